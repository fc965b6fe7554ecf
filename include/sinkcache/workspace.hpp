#pragma once

// Scratch memory and the hook for the host's threads. The library starts none of its own: thread_pool.hpp is for
// programs that have no others.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <memory>
#include <new>
#include <optional>

#include "detail/macros_off.hpp"
#include "status.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

namespace detail {
class schedule;
}

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

// Memory that calls of `attention` work in, and the executor they run on. Each call in flight needs its own: share it
// among layers and sequences, not among concurrent calls. It grows when a call needs more and never shrinks; decode of
// up to 128 heads of 256 fits what the constructor takes. A moved-from workspace holds no memory, and takes some at its
// next call.
class workspace {
 public:
  workspace() : workspace(sequential_) {}

  // Runs on `e`, which must outlive the workspace.
  template <executor E>
  explicit workspace(E& e) : workspace(bound(), e) {
    status found;
    const index_t bytes = initial_bytes(found);
    found.or_fail();
    reserve(bytes);
  }
  template <executor E>
  explicit workspace(const E&&) = delete;

  // The same, or nothing and the reason in `found`.
  static std::optional<workspace> try_create(status& found) noexcept { return try_create(sequential_, found); }
  template <executor E>
  static std::optional<workspace> try_create(E& e, status& found) noexcept {
    found = status();
    std::optional<workspace> result = workspace(bound(), e);
    const index_t bytes = result->initial_bytes(found);
    if (found) found = result->try_reserve(bytes);
    if (!found) result.reset();
    return result;
  }

  // Takes memory now for calls that need up to `bytes`, see attention::workspace_bytes. What it held is lost.
  void reserve(index_t bytes) {
    if (bytes > nbytes()) hold(::operator new(static_cast<std::size_t>(bytes), alignment), bytes);
  }
  status try_reserve(index_t bytes) noexcept {
    status found;
    if (bytes <= nbytes()) return found;
    void* const memory = ::operator new(static_cast<std::size_t>(bytes), alignment, std::nothrow);
    if (memory == nullptr)
      found.refuse_memory("bytes of the workspace was {}, had to be at most what the system has", bytes);
    if (found) hold(memory, bytes);
    return found;
  }

  index_t concurrency() const { return concurrency_; }
  index_t nbytes() const { return memory_ ? memory_.get_deleter().bytes : 0; }

 private:
  friend class attention;
  friend class detail::schedule;

  static constexpr std::align_val_t alignment{64};
  static constexpr index_t initial_scratch = index_t{768} << 10, initial_shared = index_t{4} << 20;
  inline static constinit sequential sequential_{};

  struct give_back {
    index_t bytes;

    void operator()(std::byte* memory) const { ::operator delete(memory, alignment); }
  };

  struct bound {};

  // Without memory so far. The executor comes back as what it was, const or not.
  template <executor E>
  workspace(bound, E& e)
      : executor_(const_cast<void*>(static_cast<const void*>(&e))),
        concurrency_(static_cast<index_t>(e.concurrency())),
        run_([](void* object, index_t n, const work_ref& work) { static_cast<E*>(object)->run(n, work); }) {}

  index_t initial_bytes(status& found) const noexcept {
    found.require(concurrency_ >= 1, "executor.concurrency()", concurrency_, "at least 1");
    const index_t scratch = detail::checked_product(found, "bytes of scratch", concurrency_, initial_scratch);
    return detail::checked_sum(found, "bytes of scratch", scratch, initial_shared);
  }

  void hold(void* memory, index_t bytes) noexcept { memory_ = {static_cast<std::byte*>(memory), {bytes}}; }

  template <class F>
  void run(index_t n, F&& work) const {
    run_(executor_, n, work_ref(work));
  }

  void* executor_;
  index_t concurrency_;
  void (*run_)(void*, index_t, const work_ref&);
  std::unique_ptr<std::byte, give_back> memory_;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
