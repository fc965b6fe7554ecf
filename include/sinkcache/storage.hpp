#pragma once

// Rows of keys and values in one allocation, and where that memory comes from by default.

#include <cstddef>
#include <memory>
#include <memory_resource>
#include <new>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "detail/macros_off.hpp"
#include "detail/reader.hpp"
#include "format.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

namespace detail {

// operator new, but for large caches on whole huge pages: attention walks them in strides that small pages make
// 10 to 30 % slower.
class huge_page_resource final : public std::pmr::memory_resource {
  static constexpr std::size_t huge_page = std::size_t{2} << 20;

  static std::size_t alignment_for(std::size_t bytes, std::size_t alignment) {
    return bytes >= huge_page ? std::max(alignment, huge_page) : alignment;
  }
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    void* const memory = ::operator new (bytes, std::align_val_t{alignment_for(bytes, alignment)}, std::nothrow);
    if (memory == nullptr) {
#if defined(__cpp_exceptions)
      throw std::bad_alloc();
#else
      return nullptr;
#endif
    }
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

// Memory of a cache, and where it came from.
inline constexpr std::size_t cache_alignment = 64;
struct give_back {
  std::pmr::memory_resource* resource = nullptr;
  std::size_t bytes = 0;

  void operator()(std::byte* memory) const { resource->deallocate(memory, bytes, cache_alignment); }
};
using cache_memory = std::unique_ptr<std::byte, give_back>;

// Null where the resource had none, and exceptions are off.
inline cache_memory take_memory(std::size_t bytes, std::pmr::memory_resource* resource) {
  // Volatile: a resource that may not throw returns null, which libstdc++ tells the compiler never happens.
  void* volatile memory = resource->allocate(bytes, cache_alignment);
  return {static_cast<std::byte*>(memory), {resource, bytes}};
}

inline void require_resource(status& found, const std::pmr::memory_resource* resource) noexcept {
  found.require(resource != nullptr, "resource", "null", "a memory resource");
}
// What passed all checks; throws otherwise.
struct checked {
  checked(status found, const std::pmr::memory_resource* resource) {
    require_resource(found, resource);
    found.or_fail();
  }
};
inline void refuse_memory(status& found, std::size_t bytes) noexcept {
  found.refuse_memory("bytes of the cache was {}, had to be at most what the memory resource has", bytes);
}

// The cache that `make` makes; or nothing, and in `found` that there was no memory for so many bytes.
template <class Make>
auto made_cache(status& found, std::size_t bytes, const Make& make) noexcept -> std::optional<decltype(make())> {
  std::optional<decltype(make())> cache;
#if defined(__cpp_exceptions)
  try {
    cache = make();
  } catch (...) {
  }
#else
  cache = make();
#endif
  if (!cache || cache->nbytes() == 0) {
    refuse_memory(found, bytes);
    cache.reset();
  }
  return cache;
}

// What is read element by element is read sixteen at a time, in lines of its own.
inline index_t checked_block_bytes(status& found, const kv_reader& of, index_t dim) noexcept {
  const index_t bytes = of.block_bytes(dim);
  if (of.element_bytes > 0)
    found.require(bytes > 0 && bytes % 64 == 0, "a format's block_bytes(dim)", bytes, "a positive multiple of 64");
  else
    found.require(bytes > 0, "a format's block_bytes(dim)", bytes, "at least 1");
  return bytes;
}

// [num_kv_heads, rows] blocks of keys, then as many of values; a head's rows lie together (HND). Of formats that store
// one token a row.
class storage {
 public:
  struct shape {
    index_t num_kv_heads, rows, head_dim, v_head_dim;
  };

  // Holds no memory where the resource had none, and exceptions are off.
  storage(const row_format& k, const row_format& v, const shape& of, std::pmr::memory_resource* resource)
      : k_(k),
        v_(v),
        of_(of),
        k_block_(k.reader->block_bytes(of.head_dim)),
        v_block_(v.reader->block_bytes(of.v_head_dim)) {
    const std::size_t bytes = required_bytes(k, v, of);
    v_offset_ = round_up(of.num_kv_heads * of.rows * k_block_, 64);
    memory_ = take_memory(bytes, resource);
  }

  static std::size_t required_bytes(const row_format& k, const row_format& v, const shape& of) {
    status found;
    const std::size_t bytes = required_bytes(found, k, v, of);
    found.or_fail();
    return bytes;
  }
  static std::size_t required_bytes(status& found, const row_format& k, const row_format& v, const shape& of) noexcept {
    const index_t k_bytes = checked_block_bytes(found, *k.reader, of.head_dim),
                  v_bytes = checked_block_bytes(found, *v.reader, of.v_head_dim);
    const index_t row_bytes = checked_sum(found, "bytes of a token", k_bytes, v_bytes);
    const index_t all_rows = checked_product(found, "num_kv_heads * tokens", of.num_kv_heads, of.rows);
    const index_t bytes = checked_product(found, "bytes of the cache", all_rows, row_bytes);
    const index_t aligned = found ? round_up(all_rows * k_bytes, 64) - all_rows * k_bytes : 0;  // values begin a line
    return static_cast<std::size_t>(checked_sum(found, "bytes of the cache", bytes, aligned));
  }

  void encode(index_t kv_head, index_t row, const float* key, const float* value) const noexcept {
    k_.encode(key, of_.head_dim, k(kv_head, row));
    v_.encode(value, of_.v_head_dim, v(kv_head, row));
  }

  std::byte* k(index_t kv_head, index_t row) const { return data() + (kv_head * of_.rows + row) * k_block_; }
  std::byte* v(index_t kv_head, index_t row) const {
    return data() + v_offset_ + (kv_head * of_.rows + row) * v_block_;
  }
  // As parts name them.
  kv_rows k_rows(index_t kv_head) const {
    return {.reader = k_.reader, .base = k(kv_head, 0), .block = k_block_, .head = of_.rows * k_block_};
  }
  kv_rows v_rows(index_t kv_head) const {
    return {.reader = v_.reader, .base = v(kv_head, 0), .block = v_block_, .head = of_.rows * v_block_};
  }
  std::size_t nbytes() const { return memory_ ? memory_.get_deleter().bytes : 0; }
  std::byte* data() const { return memory_.get(); }
  std::pmr::memory_resource* resource() const { return memory_.get_deleter().resource; }

 private:
  row_format k_, v_;
  shape of_;
  index_t k_block_, v_block_, v_offset_ = 0;
  cache_memory memory_;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
