#pragma once

// Rows of keys and values in one allocation, and where that memory comes from by default.

#include <cstddef>
#include <memory_resource>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "format.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

namespace detail {

// operator new, but for large caches on whole huge pages: attention walks them in strides that small pages make
// 10 to 30 % slower.
class huge_page_resource final : public std::pmr::memory_resource {
  static constexpr std::size_t huge_page = std::size_t{2} << 20;

  static std::size_t alignment_for(std::size_t bytes, std::size_t alignment) {
    return bytes >= huge_page ? std::max(alignment, huge_page) : alignment;
  }
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    void* const memory = ::operator new (bytes, std::align_val_t{alignment_for(bytes, alignment)});
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes >= huge_page) ::madvise(memory, bytes, MADV_HUGEPAGE);  // advice: failure costs speed alone
#endif
    return memory;
  }
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
    ::operator delete (memory, std::align_val_t{alignment_for(bytes, alignment)});
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

}  // namespace detail

// Where caches take their memory from unless told otherwise: new, on 2 MiB pages for caches of that size and more.
inline std::pmr::memory_resource* default_resource() noexcept {
  static auto* const resource = new detail::huge_page_resource;  // never destroyed: global caches may outlive it
  return resource;
}

namespace detail {

// [num_kv_heads, rows] blocks of keys, then as many of values; a head's rows lie together (HND).
template <kv_format K, kv_format V>
class storage {
  static_assert(K::block_rows == 1 && V::block_rows == 1,
                "sinkcache: this format keeps several tokens in a block; kv_cache stores one token a row, so "
                "block_rows must be 1");

 public:
  storage(index_t num_kv_heads, index_t rows, index_t head_dim, index_t v_head_dim, std::pmr::memory_resource* resource)
      : nbytes_(required_bytes(num_kv_heads, rows, head_dim, v_head_dim)),
        rows_(rows),
        k_block_(block_bytes<K>(head_dim)),
        v_block_(block_bytes<V>(v_head_dim)),
        v_offset_(num_kv_heads * rows * k_block_),
        resource_(resource),
        memory_(static_cast<std::byte*>(resource->allocate(nbytes_, alignment))) {}

  storage(storage&& other) noexcept
      : nbytes_(other.nbytes_),
        rows_(other.rows_),
        k_block_(other.k_block_),
        v_block_(other.v_block_),
        v_offset_(other.v_offset_),
        resource_(other.resource_),
        memory_(std::exchange(other.memory_, nullptr)) {}
  storage& operator=(storage&& other) noexcept {
    std::swap(nbytes_, other.nbytes_);
    std::swap(rows_, other.rows_);
    std::swap(k_block_, other.k_block_);
    std::swap(v_block_, other.v_block_);
    std::swap(v_offset_, other.v_offset_);
    std::swap(resource_, other.resource_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~storage() {
    if (memory_ != nullptr) resource_->deallocate(memory_, nbytes_, alignment);
  }

  static std::size_t required_bytes(index_t num_kv_heads, index_t rows, index_t head_dim, index_t v_head_dim) {
    const index_t row_bytes = checked_sum("bytes of a token", block_bytes<K>(head_dim), block_bytes<V>(v_head_dim));
    const index_t all_rows = checked_product("num_kv_heads * tokens", num_kv_heads, rows);
    return static_cast<std::size_t>(checked_product("bytes of the cache", all_rows, row_bytes));
  }

  std::byte* k(index_t kv_head, index_t row) const { return memory_ + (kv_head * rows_ + row) * k_block_; }
  std::byte* v(index_t kv_head, index_t row) const { return memory_ + v_offset_ + (kv_head * rows_ + row) * v_block_; }
  index_t k_block() const { return k_block_; }
  index_t v_block() const { return v_block_; }
  std::size_t nbytes() const { return nbytes_; }
  std::byte* data() const { return memory_; }
  std::pmr::memory_resource* resource() const { return resource_; }

 private:
  static constexpr std::size_t alignment = 64;

  template <kv_format F>
  static index_t block_bytes(index_t dim) {
    const index_t bytes = F::block_bytes(dim);
    check(bytes > 0 && bytes % 64 == 0, "a format's block_bytes(dim)", bytes, "a positive multiple of 64");
    return bytes;
  }

  std::size_t nbytes_;
  index_t rows_, k_block_, v_block_, v_offset_;
  std::pmr::memory_resource* resource_;
  std::byte* memory_;
};

}  // namespace detail
}  // namespace sinkcache::inline SINKCACHE_TAG
