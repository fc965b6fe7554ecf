#include "bootstrap.hpp"

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

namespace evidence {

interval bootstrap(std::size_t items, const std::function<double(std::span<const std::size_t>)>& statistic) {
  constexpr std::size_t resamples = 2000;
  std::vector<std::size_t> drawn(items);
  std::iota(drawn.begin(), drawn.end(), std::size_t{0});
  const double estimate = statistic(drawn);

  std::mt19937_64 random(1);
  std::vector<double> values(resamples);
  for (double& value : values) {
    for (std::size_t& item : drawn) item = random() % items;
    value = statistic(drawn);
  }
  std::sort(values.begin(), values.end());
  return {estimate, values[resamples / 40], values[resamples - 1 - resamples / 40]};
}

}  // namespace evidence
