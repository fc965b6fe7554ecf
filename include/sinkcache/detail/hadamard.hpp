#pragma once

// Hadamard transforms of rows, with the bits of any compiler and processor.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "macros_off.hpp"
#include "simd.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// The largest magnitude of a row, NaN where one is not finite.
inline float largest_magnitude(const float* y, index_t dim) noexcept {
  vfloat mosts{}, zeros{};
  const auto take = [&](vfloat x) {
    mosts = max(max(x, -x), mosts);
    zeros += x * 0.f;
  };
  index_t i = 0;
  for (; i + lanes <= dim; i += lanes) take(load(y + i));
  if (i < dim) {
    float last[lanes] = {};
    std::copy_n(y + i, dim - i, last);
    take(load(last));
  }
  const auto larger = [](vfloat a, vfloat b) { return max(a, b); };
  const auto sum = [](vfloat a, vfloat b) { return a + b; };
  return join_lanes<1>(mosts, larger)[0] + join_lanes<1>(zeros, sum)[0];
}

inline void scale_row(float* row, index_t n, float by) noexcept {
  index_t i = 0;
  for (; i + lanes <= n; i += lanes) store(row + i, load(row + i) * by);
  for (; i < n; ++i) row[i] *= by;
}

// As a function of its own: clang 16 loses Half in a lambda within the one below.
template <int Half>
constexpr int exchanged(int lane) noexcept {
  return lane ^ Half;
}

// Sums and differences of neighbours, of every second, and so on, up to halves of so many vectors, which stay in
// registers meanwhile.
template <int Vectors>
void hadamard_vectors(float* row, index_t n) noexcept {
  const auto within = [&]<int Half>(vfloat v) {
    // Lanes with that bit become the other less themselves, the others the sum.
    constexpr auto numbers = [] {
      struct {
        std::uint32_t sign[lanes] = {};
      } of;
      for (int i = 0; i < lanes; ++i) of.sign[i] = (i & Half) != 0 ? 0x80000000u : 0;
      return of;
    }();
    const auto signs = std::bit_cast<vuint>(numbers);
    const auto other = shuffled<lanes, exchanged<Half>>(v, v);
    return other + std::bit_cast<vfloat>(std::bit_cast<vuint>(v) ^ signs);
  };
  for (index_t i = 0; i < n; i += Vectors * lanes) {
    vfloat v[Vectors];
#pragma GCC unroll 8
    for (int k = 0; k < Vectors; ++k) {
      v[k] = within.template operator()<2>(within.template operator()<1>(load(row + i + k * lanes)));
      if constexpr (lanes > 4) v[k] = within.template operator()<4 % lanes>(v[k]);
      if constexpr (lanes > 8) v[k] = within.template operator()<8 % lanes>(v[k]);
    }
#pragma GCC unroll 3
    for (int h = 1; h < Vectors; h *= 2)
#pragma GCC unroll 8
      for (int k = 0; k < Vectors; ++k) {
        if ((k & h) != 0) continue;
        const vfloat a = v[k], b = v[k + h];
        v[k] = a + b;
        v[k + h] = a - b;
      }
#pragma GCC unroll 8
    for (int k = 0; k < Vectors; ++k) store(row + i + k * lanes, v[k]);
  }
}

// A Hadamard transform of n floats, a power of two: its own inverse. Additions alone, then one factor: no two compilers
// round it differently. Where sums might not be floats a power of two is taken out before; what is infinite after that
// is too large for any float, as of a constant row of 3e38.
inline void hadamard_block(float* row, index_t n) noexcept {
  const bool large = largest_magnitude(row, n) > 0x1p117f;  // sums of up to 512
  if (large) scale_row(row, n, 0x1p-10f);
  index_t h = 1;
  if (n >= lanes) {
    h = std::min<index_t>(n, 8 * lanes);
    if (h == 8 * lanes) hadamard_vectors<8>(row, n);
    if (h == 4 * lanes) hadamard_vectors<4>(row, n);
    if (h == 2 * lanes) hadamard_vectors<2>(row, n);
    if (h == lanes) hadamard_vectors<1>(row, n);
    for (; h < n; h *= 2)
      for (index_t i = 0; i < n; i += 2 * h)
        for (index_t j = i; j < i + h; j += lanes) {
          const vfloat a = load(row + j), b = load(row + j + h);
          store(row + j, a + b);
          store(row + j + h, a - b);
        }
  }
  for (; h < n; h *= 2)
    for (index_t i = 0; i < n; i += 2 * h)
      for (index_t j = i; j < i + h; ++j) {
        const float a = row[j], b = row[j + h];
        row[j] = a + b;
        row[j + h] = a - b;
      }
  scale_row(row, n, 1 / std::sqrt(static_cast<float>(n)));
  if (large) scale_row(row, n, 0x1p10f);
}

// Of any number of floats: blocks of the largest powers of two first, 80 = 64 + 16.
[[gnu::noinline]] inline void hadamard_row(float* row, index_t dim) noexcept {
  for (index_t n; dim > 0; row += n, dim -= n) {
    n = static_cast<index_t>(std::bit_floor(static_cast<std::size_t>(dim)));
    hadamard_block(row, n);
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
