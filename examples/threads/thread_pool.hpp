#pragma once

// Two executors: a small pool of threads of one's own, and an adapter for the pool that an engine has already. And how
// the threads of an engine that are in a call together share it.

#include <sinkcache/attention.hpp>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace threads {

using sinkcache::index_t, sinkcache::work_ref;

// Threads that wait for work; the one that calls `run` is a worker too. One run at a time: a pool for each thread of
// the host that makes calls. Whoever waits asks a few times before it sleeps: between the products of a decode step the
// next work comes sooner than a sleeper wakes.
class thread_pool {
 public:
  explicit thread_pool(index_t workers) {
    for (index_t worker = 1; worker < workers; ++worker) threads_.emplace_back([this, worker] { serve(worker); });
  }
  ~thread_pool() {
    start(nullptr, 0);
    for (std::thread& thread : threads_) thread.join();
  }
  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  index_t concurrency() const { return static_cast<index_t>(threads_.size()) + 1; }

  void run(index_t n, const work_ref& work) {
    start(&work, n);
    take_items(0);
    ask_until([this] { return busy_ == 0; });
    std::unique_lock lock(mutex_);
    all_done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void start(const work_ref* work, index_t n) {
    {
      const std::lock_guard lock(mutex_);
      work_ = work;
      num_items_ = n;
      next_item_ = 0;
      busy_ = threads_.size();
      ++run_number_;
    }
    started_.notify_all();
  }

  void serve(index_t worker) {
    for (unsigned last_run = 0;;) {
      ask_until([&] { return run_number_ != last_run; });
      {
        std::unique_lock lock(mutex_);
        started_.wait(lock, [&] { return run_number_ != last_run; });
        last_run = run_number_;
        if (work_ == nullptr) return;
      }
      take_items(worker);
      const std::lock_guard lock(mutex_);
      if (--busy_ == 0) all_done_.notify_one();
    }
  }

  template <class Done>
  static void ask_until(const Done& done) {
    for (int times = 0; times < 200 && !done(); ++times) std::this_thread::yield();
  }

  void take_items(index_t worker) {
    for (index_t item = next_item_++; item < num_items_; item = next_item_++) (*work_)(item, worker);
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable started_, all_done_;
  const work_ref* work_ = nullptr;  // null: the end
  index_t num_items_ = 0;
  std::atomic<std::size_t> busy_{0};
  std::atomic<unsigned> run_number_{0};  // both are changed under the mutex only
  std::atomic<index_t> next_item_{0};
};

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
