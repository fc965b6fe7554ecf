#pragma once

// How many random cases a test draws, and what it draws them with: the same numbers everywhere, for a seed.

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace effort {

// SINKCACHE_TEST_EFFORT: 0 draws a tenth of the usual number of cases, 1 (unless set) as many, more in proportion.
inline int cases(int usual) {
  const char* const value = std::getenv("SINKCACHE_TEST_EFFORT");
  const int factor = value == nullptr ? 1 : std::atoi(value);
  return factor <= 0 ? std::max(1, usual / 10) : usual * factor;
}

// splitmix64 (Steele, Lea, Flood 2014).
class dice {
 public:
  explicit dice(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::int64_t from_to(std::int64_t low, std::int64_t high) {  // both included
    return low + static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool one_in(int n) { return from_to(1, n) == 1; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
  float signed_unit() { return static_cast<float>(2 * uniform() - 1); }

 private:
  std::uint64_t state_;
};

}  // namespace effort
