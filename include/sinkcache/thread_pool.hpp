#pragma once

// An executor for programs that have no threads of their own. Nothing else in the library starts any.

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "detail/macros_off.hpp"
#include "workspace.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Threads that wait for work; the one that calls `run` is a worker too. One run at a time: a pool for each thread of
// the host that makes calls. A waiting thread polls a few times before it sleeps: within a decode step the next work
// comes sooner than a sleeping thread wakes.
class thread_pool {
 public:
  // 1 to 1024 workers. Throws std::system_error where the system gives no more threads.
  explicit thread_pool(index_t workers) {
    validate(workers).or_fail();
    threads_.reserve(static_cast<std::size_t>(workers - 1));
#if defined(__cpp_exceptions)
    try {
      start_threads(workers);
    } catch (...) {
      stop();
      throw;
    }
#else
    start_threads(workers);
#endif
  }
  ~thread_pool() { stop(); }

  // The same; or null, and in `found` why. Without exceptions the program ends where the system gives no more threads.
  static std::unique_ptr<thread_pool> try_create(index_t workers, status& found) noexcept {
    found = validate(workers);
    if (!found) return nullptr;
#if defined(__cpp_exceptions)
    try {
      return std::make_unique<thread_pool>(workers);
    } catch (const std::exception& thrown) {
      found.refuse_memory("threads could not be started: {}", thrown.what());
      return nullptr;
    }
#else
    return std::make_unique<thread_pool>(workers);
#endif
  }
  static status validate(index_t workers) noexcept {
    status found;
    found.require(workers >= 1 && workers <= 1024, "workers", workers, "from 1 to", 1024);
    return found;
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
  void start_threads(index_t workers) {
    for (index_t worker = 1; worker < workers; ++worker) threads_.emplace_back([this, worker] { serve(worker); });
  }
  void stop() {
    start(nullptr, 0);
    for (std::thread& thread : threads_) thread.join();
  }

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

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
