#pragma once

// OpenMP's threads as an executor: workspace memory(threads), where `threads` is an openmp_executor.

#if !defined(_OPENMP)
#error "sinkcache: openmp.hpp needs OpenMP; compile with -fopenmp, or leave it out"
#endif

#include <omp.h>

#include <optional>

#include "detail/macros_off.hpp"
#include "workspace.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// As many threads as are given, or as OpenMP would take where it is made (OMP_NUM_THREADS). Its calls may be made from
// inside a parallel region, which then runs them on one thread unless nesting is on.
class openmp_executor {
 public:
  explicit openmp_executor(index_t num_threads = omp_get_max_threads()) : num_threads_(num_threads) {
    validate(num_threads).or_fail();
  }
  // The same, or nothing and in `found` why.
  static std::optional<openmp_executor> try_create(index_t num_threads, status& found) noexcept {
    found = validate(num_threads);
    return found ? std::optional(openmp_executor(num_threads)) : std::nullopt;
  }
  static status validate(index_t num_threads) noexcept {
    status found;
    found.require(num_threads >= 1 && num_threads <= 1 << 16, "num_threads", num_threads, "from 1 to", 1 << 16);
    return found;
  }

  index_t concurrency() const { return num_threads_; }
  void run(index_t n, const work_ref& work) const {
    const int threads = static_cast<int>(std::min(n, num_threads_));
    if (threads <= 1) return sequential{}.run(n, work);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (index_t item = 0; item < n; ++item) work(item, omp_get_thread_num());
  }

 private:
  index_t num_threads_;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
