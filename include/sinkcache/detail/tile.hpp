#pragma once

// What the loops over one tile of keys and values share: sums in registers and what is added to them, how a row's
// vectors are loaded, how other rows are prefetched meanwhile, groups of query rows.

#include <concepts>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "macros_off.hpp"
#include "tile_rows.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// Zeros. `= {}` is a slow string instruction, and g++ keeps in memory what it does not unroll early.
template <class V, int M, int N>
[[gnu::always_inline]] inline void clear(V (&sums)[M][N]) noexcept {
#pragma GCC unroll 32
  for (int i = 0; i < M * N; ++i) sums[i / N][i % N] = V{};
}
template <int M, int N>
[[gnu::always_inline]] inline void add(vfloat (&to)[M][N], const vfloat (&sums)[M][N]) noexcept {
#pragma GCC unroll 32
  for (int i = 0; i < M * N; ++i) to[i / N][i % N] += sums[i / N][i % N];
}
template <class V, int M, int N>
[[gnu::always_inline]] inline void copy(V (&to)[M][N], const V (&sums)[M][N]) noexcept {
#pragma GCC unroll 32
  for (int i = 0; i < M * N; ++i) to[i / N][i % N] = sums[i / N][i % N];
}

#if defined(__SSE2__) || defined(__aarch64__)
// Of vectors of 16-bit integers, two for each sum of 32 bits: those in its place, on aarch64 one of each
// half.
template <class V>
requires in_integers<V>
[[gnu::always_inline]] inline V add_product(V sum, V a, V b) noexcept {
#if defined(__aarch64__)
  const auto x = std::bit_cast<int16x8_t>(a), y = std::bit_cast<int16x8_t>(b);
  const int32x4_t with_low = vmlal_s16(std::bit_cast<int32x4_t>(sum), vget_low_s16(x), vget_low_s16(y));
  return std::bit_cast<V>(vmlal_high_s16(with_low, x, y));
#else
#if defined(__AVX512BW__)
  if constexpr (width_of<V> == 16) return sum + V(_mm512_maskz_madd_epi16(0xffff, __m512i(a), __m512i(b)));
#endif
#if defined(__AVXVNNI__)
  if constexpr (width_of<V> == 8) return V(_mm256_dpwssd_avx_epi32(__m256i(sum), __m256i(a), __m256i(b)));
#elif defined(__AVX2__)
  if constexpr (width_of<V> == 8) return sum + V(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#endif
  if constexpr (width_of<V> == 4) return sum + V(_mm_madd_epi16(__m128i(a), __m128i(b)));
#endif
}
#endif

// Adds the product of vector(m) and factor(n) to sums[m][n]. Only the fewer of both fit the registers all at once: the
// others are loaded one by one, with prefetch(i) before the i-th.
template <class V, int M, int N, class Vector, class Factor, class Prefetch>
[[gnu::always_inline]] inline void add_products(V (&sums)[M][N], const Vector& vector, const Factor& factor,
                                                const Prefetch& prefetch) noexcept {
  V vectors[M];
  std::invoke_result_t<Factor, int> factors[N];
  if constexpr (M < N) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) vectors[m] = vector(m);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      prefetch(n);
      factors[n] = factor(n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[m][n] = add_product(sums[m][n], vectors[m], factors[n]);
    }
  } else {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) factors[n] = factor(n);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      prefetch(m);
      vectors[m] = vector(m);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = add_product(sums[m][n], vectors[m], factors[n]);
    }
  }
}

// An address that may lie outside of what from points into.
[[gnu::always_inline]] inline const std::byte* moved(const std::byte* from, index_t bytes) noexcept {
  const std::uintptr_t to = reinterpret_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(bytes);
  return reinterpret_cast<const std::byte*>(to);  // NOLINT(performance-no-int-to-ptr)
}
[[gnu::always_inline]] inline void prefetch_line(const std::byte* from, index_t offset) noexcept {
  if constexpr (cpu.prefetches_to_l1)
    __builtin_prefetch(moved(from, offset), 0, 3);
  else
    __builtin_prefetch(moved(from, offset), 0, 2);
}
struct no_prefetch {
  [[gnu::always_inline]] void operator()(int) const noexcept {}
};

// Formats of our own load whole vectors; whether one has its elements of even and of odd number apart, where that takes
// fewer instructions, and whether keys are multiplied in vectors of eight though others have sixteen.
template <class F>
concept in_vectors = elementwise_format<F> && requires(const std::byte* from) {
  { F::load(from) } -> std::same_as<vfloat>;
};
template <class F>
concept in_pairs = in_vectors<F> && cpu.in_pairs&& requires(const std::byte* from) {
  { F::load_even(from) } -> std::same_as<vfloat>;
  { F::load_odd(from) } -> std::same_as<vfloat>;
};
template <class F>
concept in_eights = in_vectors<F> && cpu.halves&& requires(const std::byte* from) {
  { F::load_eight(from) } -> std::same_as<voct>;
};

// Vector i of the `count` that begin there: of a format in pairs every two hold even and odd elements, a last one alone
// neighbours.
template <class F, class V = vfloat>
[[gnu::always_inline]] inline V load_vector(const std::byte* from, int i, int count) noexcept {
  constexpr index_t bytes = width_of<V> * F::element_bytes;
  const std::byte* const at = from + i * bytes;
  if constexpr (in_integers<V>) {
    return F::load(at);
  } else if constexpr (!std::same_as<V, vfloat>) {
    return F::load_eight(at);
  } else if constexpr (!in_vectors<F>) {
    float elements[lanes];
#pragma GCC unroll 16
    for (int e = 0; e < lanes; ++e) elements[e] = F::element(at + e * F::element_bytes);
    return load(elements);
  } else {
    if constexpr (in_pairs<F>) {
      if (i % 2 == 1) return F::load_odd(at - bytes);
      if (i + 1 < count) return F::load_even(at);
    }
    return F::load(at);
  }
}

// Calls f<Rows>(row, group) for groups of up to four of `count` rows; or for two of four rows each, where `Most` is 8.
template <int Most = 4, class F>
void in_groups(index_t count, const F& f) {
  index_t group = 0;
  for (index_t row = 0; row < count; ++group) {
    const index_t left = count - row;
    if (Most == 8 && left % 8 == 0)
      f.template operator()<Most>(row, group), row += 8, ++group;
    else if (left % 4 == 0)
      f.template operator()<4>(row, group), row += 4;
    else if (left >= 3)
      f.template operator()<3>(row, group), row += 3;
    else if (left == 2)
      f.template operator()<2>(row, group), row += 2;
    else
      f.template operator()<1>(row, group), row += 1;
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
