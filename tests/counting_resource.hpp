#pragma once

// A memory resource that knows what it gave: how often, how much, where, and that it all came back.

#include <cstddef>
#include <cstring>
#include <map>
#include <memory_resource>
#include <new>
#include <stdexcept>

class counting_resource final : public std::pmr::memory_resource {
 public:
  std::size_t allocations = 0, bytes = 0, last_bytes = 0, last_alignment = 0;  // so far; in use now; of the last call
  bool exhausted = false;                                                      // no more: std::bad_alloc
  void* last = nullptr;

  bool all_returned() const { return blocks_.empty() && bytes == 0; }

  ~counting_resource() override {
    for (const auto& [memory, size] : blocks_) ::operator delete (memory, std::align_val_t{size.alignment});
  }

 private:
  struct block {
    std::size_t bytes, alignment;
  };
  std::map<void*, block> blocks_;

  void* do_allocate(std::size_t size, std::size_t alignment) override {
    last_bytes = size, last_alignment = alignment;
    if (exhausted || size > std::size_t{1} << 30) throw std::bad_alloc();
    last = ::operator new (size, std::align_val_t{alignment});
    std::memset(last, 0xff, size);  // NaNs, where a float is read that nobody wrote
    blocks_[last] = {size, alignment};
    ++allocations, bytes += size;
    return last;
  }
  void do_deallocate(void* memory, std::size_t size, std::size_t alignment) override {
    const auto found = blocks_.find(memory);
    // Thrown out of a destructor: ends the program, as it should.
    if (found == blocks_.end()) throw std::logic_error("freed what was not allocated here, or twice");
    if (found->second.bytes != size || found->second.alignment != alignment)
      throw std::logic_error("freed with another size or alignment than it was allocated with");
    blocks_.erase(found);
    bytes -= size;
    ::operator delete (memory, std::align_val_t{alignment});
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};
