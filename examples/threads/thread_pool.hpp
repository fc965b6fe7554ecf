#pragma once

// Two executors: the library's pool of threads, and an adapter for the pool that an engine has already. And how the
// threads of an engine that are in a call together share it.

#include <sinkcache/attention.hpp>
#include <sinkcache/thread_pool.hpp>

#include <atomic>

namespace threads {

using sinkcache::index_t, sinkcache::work_ref;

using sinkcache::thread_pool;

// The pool of an engine: has `num_threads()`, and `run(f)` calls f(thread_index, num_threads) on each of its threads
// and returns when all are done.
template <class Pool>
class engine_executor {
 public:
  explicit engine_executor(Pool& pool) : pool_(pool) {}

  index_t concurrency() const { return static_cast<index_t>(pool_.num_threads()); }
  void run(index_t n, const work_ref& work) {
    std::atomic<index_t> next_item{0};
    pool_.run([&](index_t thread_index, index_t) {
      for (index_t item = next_item++; item < n; item = next_item++) work(item, thread_index);
    });
  }

 private:
  Pool& pool_;
};

// For an operator that the engine calls on all of its threads at once (as ggml does, with ith and nth): calls f with
// the thread's part of the KV heads, none if there are fewer heads than threads. Each thread has a workspace of its
// own.
template <class F>
void with_part(index_t thread_index, index_t num_threads, index_t num_kv_heads, const F& f) {
  const index_t first = num_kv_heads * thread_index / num_threads,
                last = num_kv_heads * (thread_index + 1) / num_threads;
  f(sinkcache::call_part{.first_kv_head = first, .num_kv_heads = last - first});
}

}  // namespace threads
