#pragma once

// Threads that a host has already: its pool as an executor, or its threads, all in one call, each with a share of it.

#include <atomic>
#include <numeric>

#include "attention.hpp"
#include "detail/macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// The pool of an engine as an executor. A pool has num_threads(), and its run(f) calls f(thread, num_threads) on each
// of its threads and returns when all are done. The pool outlives this; one call at a time.
template <class Pool>
class pool_executor {
 public:
  explicit pool_executor(Pool& pool) : pool_(pool) {}

  index_t concurrency() const { return static_cast<index_t>(pool_.num_threads()); }
  void run(index_t n, const work_ref& work) {
    std::atomic<index_t> next{0};
    pool_.run([&](auto thread, auto) {
      for (index_t item = next++; item < n; item = next++) work(item, static_cast<index_t>(thread));
    });
  }

 private:
  Pool& pool_;
};

namespace detail {

inline void require_thread(status& found, index_t thread, index_t num_threads) noexcept {
  found.require(num_threads >= 1, "num_threads", num_threads, "at least 1");
  found.require(thread >= 0 && thread < num_threads, "thread", thread, "at least 0 and below num_threads,",
                num_threads);
}

}  // namespace detail

// The share of thread number `thread` of `num_threads`, which all make the same call (ggml's ith of nth): by KV heads
// as far as they divide evenly, then by tokens (of a batch: by sequences). Empty where there is too little for all
// threads, or where `found` says why.
inline call_part try_part_of_thread(index_t thread, index_t num_threads, index_t num_kv_heads, index_t tokens,
                                    status& found) noexcept {
  found = status();
  detail::require_thread(found, thread, num_threads);
  found.require(num_kv_heads >= 1, "num_kv_heads", num_kv_heads, "at least 1");
  found.require(tokens >= 0, "tokens", tokens, "at least 0");
  if (!found) return {.num_kv_heads = 0, .num_rows = 0};
  const index_t by_heads = tokens == 1 ? std::min(num_threads, num_kv_heads) : std::gcd(num_threads, num_kv_heads);
  const index_t by_rows = std::min(tokens, num_threads / by_heads);
  if (thread >= by_heads * by_rows) return {.num_kv_heads = 0, .num_rows = 0};
  // The i-th of so many stretches of about the same length; `more` of them are one longer.
  const auto begin = [](index_t all, index_t stretches, index_t i) {
    return all / stretches * i + std::min(i, all % stretches);
  };
  const index_t head = begin(num_kv_heads, by_heads, thread % by_heads),
                row = begin(tokens, by_rows, thread / by_heads);
  return {head, begin(num_kv_heads, by_heads, thread % by_heads + 1) - head, row,
          begin(tokens, by_rows, thread / by_heads + 1) - row};
}
inline call_part part_of_thread(index_t thread, index_t num_threads, index_t num_kv_heads, index_t tokens) {
  status found;
  const call_part part = try_part_of_thread(thread, num_threads, num_kv_heads, tokens, found);
  found.or_fail();
  return part;
}

// A prefill that threads make together, each with the same arguments but for its number and its workspace; the bits are
// those of attention::prefill. `barrier()` returns when all threads have called it (std::barrier's arrive_and_wait,
// `#pragma omp barrier` in a lambda). All get what was wrong with the arguments; a thread whose workspace cannot grow
// says so after the others have done their part, and its part of `out` is not written then.
template <class Barrier>
status try_prefill_part(const attention& attention, const_matrix_view q, const_matrix_view k, const_matrix_view v,
                        any_kv_cache& cache, matrix_view out, workspace& workspace, index_t thread, index_t num_threads,
                        Barrier&& barrier) {
  status found = detail::check_prefill(attention.params(), q, k, v, cache, cache, out, {});
  detail::require_thread(found, thread, num_threads);
  if (cache.learner() != nullptr)
    found.refuse("the cache learns from queries, had to be one that does not: prefill it with an executor instead");
  if (!found) return found;
  const index_t kv_heads = cache.geometry().num_kv_heads;
  barrier();  // all have looked at the cache
  for (index_t row = 0, n; row < q.rows(); row += n) {
    if (thread == 0) cache.prepare();
    barrier();
    n = std::min(q.rows() - row, cache.room());
    const call_part heads = part_of_thread(thread, num_threads, kv_heads, 1);
    cache.write(heads.first_kv_head, heads.num_kv_heads, k, v, row, n);
    barrier();
    if (thread == 0) cache.advance(n);
    barrier();
    const const_matrix_view rows(q.row(row), n, q.cols(), q.stride());
    const matrix_view to(out.row(row), n, out.cols(), out.stride());
    const status attended =
        attention.try_attend(rows, cache, to, workspace, {}, part_of_thread(thread, num_threads, kv_heads, n));
    if (found) found = attended;
    barrier();  // none reads any longer what the next block writes over
  }
  return found;
}

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
