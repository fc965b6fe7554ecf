#pragma once

// What f32, f16 and bf16 store, in plain arithmetic in double: nothing is asked of the library but the names.

#include <sinkcache/format.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace plain {

using sinkcache::bf16, sinkcache::f16, sinkcache::f32, sinkcache::index_t;

// IEEE binary formats of 16 bits in arithmetic: `digits` bits of significand, the leading one included.
template <class F>
struct ieee16;
template <>
struct ieee16<f16> {
  static constexpr int digits = 11, lowest_exponent = -14, exponent_bits = 5;
};
template <>
struct ieee16<bf16> {
  static constexpr int digits = 8, lowest_exponent = -126, exponent_bits = 8;
};

template <class F>
double value_of(std::uint16_t pattern) {
  constexpr int fraction_bits = ieee16<F>::digits - 1, exponent_mask = (1 << ieee16<F>::exponent_bits) - 1;
  const int exponent = pattern >> fraction_bits & exponent_mask, fraction = pattern & ((1 << fraction_bits) - 1);
  const double sign = pattern & 0x8000 ? -1 : 1;
  if (exponent == exponent_mask)
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(fraction, ieee16<F>::lowest_exponent - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), ieee16<F>::lowest_exponent + exponent - 1 - fraction_bits);
}

// The nearest value of the format, ties to even: std::nearbyint on the multiples of the last place.
template <class F>
double rounded(float x) {
  if (std::isnan(x) || std::isinf(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(static_cast<double>(x)), ieee16<F>::lowest_exponent);
  const int last_place = exponent - (ieee16<F>::digits - 1);
  const double nearest = std::ldexp(std::nearbyint(std::ldexp(static_cast<double>(x), -last_place)), last_place);
  const double limit = std::ldexp(1.0, -ieee16<F>::lowest_exponent + 2);  // one step above the largest
  return std::abs(nearest) >= limit ? std::copysign(std::numeric_limits<double>::infinity(), x) : nearest;
}
template <>
inline double rounded<f32>(float x) {
  return static_cast<double>(x);
}

// The pattern of a value of the format; not of NaN.
template <class F>
std::uint16_t pattern_of(double value) {
  constexpr int fraction_bits = ieee16<F>::digits - 1;
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (value == 0) return static_cast<std::uint16_t>(sign);
  if (std::isinf(value))
    return static_cast<std::uint16_t>(sign | ((1 << ieee16<F>::exponent_bits) - 1) << fraction_bits);
  const int exponent = std::max(std::ilogb(value), ieee16<F>::lowest_exponent);
  const auto significand = static_cast<int>(std::ldexp(std::abs(value), fraction_bits - exponent));
  // The leading one of a normal number is the 1 that its exponent field counts from.
  const int magnitude = ((exponent - ieee16<F>::lowest_exponent) << fraction_bits) + significand;
  return static_cast<std::uint16_t>(sign | magnitude);
}

template <class F>
inline constexpr index_t element_bytes = std::is_same_v<F, f32> ? 4 : 2;

// Rows fill whole cache lines of 64 bytes.
template <class F>
index_t row_bytes(index_t dim) {
  return (dim * element_bytes<F> + 63) / 64 * 64;
}

// Stores a number that is not NaN as element i of a row, and reads one.
template <class F>
void put(float x, std::byte* row, index_t i) {
  if constexpr (std::is_same_v<F, f32>) {
    std::memcpy(row + 4 * i, &x, 4);
  } else {
    const std::uint16_t pattern = pattern_of<F>(rounded<F>(x));
    std::memcpy(row + 2 * i, &pattern, 2);
  }
}
template <class F>
double element(const std::byte* row, index_t i) {
  if constexpr (std::is_same_v<F, f32>) {
    float x;
    std::memcpy(&x, row + 4 * i, 4);
    return static_cast<double>(x);
  } else {
    std::uint16_t pattern;
    std::memcpy(&pattern, row + 2 * i, 2);
    return value_of<F>(pattern);
  }
}

}  // namespace plain
