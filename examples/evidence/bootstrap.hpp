#pragma once

#include <cstddef>
#include <functional>
#include <span>

namespace evidence {

struct interval {
  double estimate, low, high;
};

// The percentile bootstrap's 95% interval of a statistic of `items` items, which is given the indices of those drawn.
// The same items give the same interval: the draws are seeded.
interval bootstrap(std::size_t items, const std::function<double(std::span<const std::size_t>)>& statistic);

}  // namespace evidence
