#pragma once

// Scratch memory and the hook for the host's threads. The library starts no thread of its own.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <new>
#include <utility>

#include "segment.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

// One call's work, to be called with every item once, in any order, on any thread: work(item, worker). Calls that
// overlap in time need different workers, 0 <= worker < concurrency().
class work_ref {
 public:
  template <class F>
  requires std::invocable<F&, index_t, index_t> &&
      (!std::same_as<std::remove_cvref_t<F>, work_ref>)explicit work_ref(F& f)
      : object_(&f),
        call_([](void* object, index_t item, index_t worker) noexcept { (*static_cast<F*>(object))(item, worker); }) {}

  void operator()(index_t item, index_t worker) const noexcept { call_(object_, item, worker); }

 private:
  void* object_;
  void (*call_)(void*, index_t, index_t) noexcept;
};

// Runs work items: run(n, work) calls work(item, worker) for every item < n and returns when all are done.
template <class E>
concept executor = requires(E& e, index_t n, const work_ref& work) {
  { e.concurrency() } -> std::convertible_to<index_t>;
  e.run(n, work);
};

// The executor that needs no threads, and the shortest example of one.
struct sequential {
  index_t concurrency() const { return 1; }
  void run(index_t n, const work_ref& work) const {
    for (index_t item = 0; item < n; ++item) work(item, 0);
  }
};

// Memory that calls of `attention` work in, and the executor they run on. One for each call that is in flight: share it
// among layers and sequences, not among concurrent calls. It grows when a call needs more and never shrinks; decode of
// up to 128 heads of 256 fits what the constructor takes.
class workspace {
 public:
  workspace() : workspace(sequential_) {}

  // Runs on `e`, which must outlive the workspace.
  template <executor E>
  explicit workspace(E& e)
      : executor_(&e),
        concurrency_(static_cast<index_t>(e.concurrency())),
        run_([](void* object, index_t n, const work_ref& work) { static_cast<E*>(object)->run(n, work); }) {
    detail::check(concurrency_ >= 1, "executor.concurrency()", concurrency_, "at least 1");
    reserve(detail::checked_product("bytes of scratch", concurrency_, initial_scratch) + initial_shared);
  }

  workspace(workspace&& other) noexcept
      : executor_(other.executor_),
        concurrency_(other.concurrency_),
        run_(other.run_),
        memory_(std::exchange(other.memory_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)) {}
  workspace& operator=(workspace&& other) noexcept {
    std::swap(executor_, other.executor_);
    std::swap(concurrency_, other.concurrency_);
    std::swap(run_, other.run_);
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~workspace() { ::operator delete(memory_, alignment); }

  // Takes memory now for calls that need up to `bytes`, see attention::workspace_bytes. What it held is lost.
  void reserve(index_t bytes) {
    if (bytes <= bytes_) return;
    auto* const memory = static_cast<std::byte*>(::operator new(static_cast<std::size_t>(bytes), alignment));
    ::operator delete(memory_, alignment);
    memory_ = memory;
    bytes_ = bytes;
  }

  index_t concurrency() const { return concurrency_; }
  index_t nbytes() const { return bytes_; }

 private:
  friend class attention;

  static constexpr std::align_val_t alignment{64};
  static constexpr index_t initial_scratch = index_t{768} << 10, initial_shared = index_t{4} << 20;
  inline static constinit sequential sequential_{};

  template <class F>
  void run(index_t n, F&& work) const {
    run_(executor_, n, work_ref(work));
  }

  void* executor_;
  index_t concurrency_;
  void (*run_)(void*, index_t, const work_ref&);
  std::byte* memory_ = nullptr;
  index_t bytes_ = 0;
};

}  // namespace sinkcache::inline SINKCACHE_TAG
