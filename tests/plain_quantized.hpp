#pragma once

// What rows of few bits store, in plain arithmetic in double, as the head of quantized.hpp says it.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "plain_format.hpp"

namespace plain {

inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// The smallest bf16 that is not below a positive number.
inline std::uint16_t bf16_not_below(double x) {
  std::uint16_t low = 0, high = 0x7f80;
  while (low < high) {
    const auto middle = static_cast<std::uint16_t>((low + high) / 2);
    if (value_of<bf16>(middle) >= x)
      high = middle;
    else
      low = static_cast<std::uint16_t>(middle + 1);
  }
  return low;
}

// A row as the head of quantized.hpp says it.
struct quantized_row {
  quantized_row(int bits, const std::vector<float>& y) : b(bits), codes((y.size() + 15) / 16 * 16, 0) {
    double largest = 0, squares = 0;
    for (float x : y) {
      if (!std::isfinite(x)) scale = 0x7fc0;
      largest = std::max(largest, std::abs(static_cast<double>(x)));
      squares += static_cast<double>(x) * static_cast<double>(x);
    }
    if (scale != 0 || largest == 0) return;
    const double step = b == 2 ? std::sqrt(squares / static_cast<double>(y.size())) : largest * std::ldexp(2., -b);
    scale = bf16_not_below(step);
    if (b == 2) scale = std::min(scale, std::uint16_t{0x7f2a});
    const int half = 1 << (b - 1);
    for (std::size_t i = 0; i < y.size(); ++i) {
      const double steps = std::floor(static_cast<double>(y[i]) / d());
      codes[i] = static_cast<int>(std::clamp(steps + half, 0., 2. * half - 1));
    }
  }
  double d() const { return scale == 0x7fc0 ? not_a_number : value_of<bf16>(scale); }
  double value(std::size_t i) const { return (codes[i] - (1 << (b - 1)) + 0.5) * d(); }

  std::vector<std::byte> bytes() const {
    std::vector<unsigned> bytes{scale & 0xffu, static_cast<unsigned>(scale) >> 8};
    const auto plane = [&](int from, int width) {
      const std::size_t start = bytes.size();
      bytes.resize(start + codes.size() * static_cast<std::size_t>(width) / 8);
      for (std::size_t i = 0; i < codes.size(); ++i)
        for (int bit = 0; bit < width; ++bit) {
          const std::size_t at = i * static_cast<std::size_t>(width) + static_cast<std::size_t>(bit);
          bytes[start + at / 8] |= (static_cast<unsigned>(codes[i]) >> (from + bit) & 1u) << at % 8;
        }
    };
    if (b == 6)
      plane(0, 4), plane(4, 2);
    else
      plane(0, b);
    std::vector<std::byte> all;
    for (unsigned byte : bytes) all.push_back(static_cast<std::byte>(byte));
    return all;
  }

  int b;
  std::uint16_t scale = 0;
  std::vector<int> codes;
};

}  // namespace plain
