#pragma once

// The few vector operations that the kernel is written in. They are spelled in the vector extensions that g++ and clang
// share, as wide as the instruction set allows; only conversions of 16-bit floats (halves.hpp) need intrinsics.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../status.hpp"
#include "macros_off.hpp"

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// What the kernel is arranged for: all that it knows of a processor but single instructions.
struct processor {
  int lanes;        // floats of a vector
  int registers;    // for vectors
  bool halves;      // takes a vector in two halves
  bool in_pairs;    // elements of even and of odd number are loaded with fewer instructions than neighbours
  bool joins_late;  // sums of keys are joined among the products of the next: when all are done, those are out of reach

  // Sums in registers hide the latency of an FMA, 8 to 16 of them, and leave some for what is multiplied: keys that
  // some query rows are multiplied by at a time, vectors of columns of values, both of a panel of rows.
  // Keys that take two instructions to load take a register more.
  constexpr int keys_of(int rows, bool loaded_at_once) const {
    if (rows == 1) return 8;
    return rows < 4 || (registers == 32 && !joins_late && loaded_at_once) ? 4 : 3;
  }
  constexpr int vectors_of(int rows) const { return rows == 1 ? 8 : registers == 32 ? 16 / rows : rows == 4 ? 3 : 4; }
  // Rows that values are added to at a time: of eight a processor that takes whole vectors reads them half as often.
  int value_rows = lanes == 16 && !halves ? 8 : 4;
  // Lines are prefetched into the L2: on the way to the L1 fewer may be under way, and those too many are dropped. A
  // Zen 5 gains by the L1.
  bool prefetches_to_l1 = SINKCACHE_ZEN5;
  int panel_keys = registers == 32 ? 6 : 4, panel_vectors = registers == 32 ? 4 : 2;
};

#if defined(__AVX512DQ__)
inline constexpr processor cpu{16, 32, SINKCACHE_AVX512_IN_HALVES, true, true};
#elif defined(__AVX__)
inline constexpr processor cpu{8, 16, false, false, false};
#elif defined(__aarch64__)
inline constexpr processor cpu{4, 32, false, true, false};
#else
inline constexpr processor cpu{4, 16, false, true, false};
#endif
inline constexpr int lanes = cpu.lanes;

typedef float vfloat __attribute__((vector_size(lanes * sizeof(float))));
typedef std::int32_t vint __attribute__((vector_size(lanes * sizeof(float))));
typedef std::uint32_t vuint __attribute__((vector_size(lanes * sizeof(float))));
typedef float vquad __attribute__((vector_size(4 * sizeof(float))));
typedef float voct __attribute__((vector_size(8 * sizeof(float))));

template <class V>
inline constexpr int width_of = sizeof(V) / sizeof(float);
template <class V>
inline constexpr bool in_integers = false;
template <class V>
requires requires(V v) { v[0] % 2; }
inline constexpr bool in_integers<V> = true;

template <class V = vfloat>
[[gnu::always_inline]] inline V load(const float* from) noexcept {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
// As load, but into a register that several products share: compilers like to load it again for each.
template <class V = vfloat>
[[gnu::always_inline]] inline V load_once(const float* from) noexcept {
  V v = load<V>(from);
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}
[[gnu::always_inline]] inline vfloat broadcast(float x) noexcept { return x - vfloat{}; }
[[gnu::always_inline]] inline vuint broadcast_bits(std::uint32_t x) noexcept { return x - vuint{}; }
// sum + a * b, fused where the instruction set can: by name on x86, where the same sums are also written in assembly
// below and must agree with those, and g++ -O1 and -ffp-contract=off fuse nothing by themselves.
template <class V>
[[gnu::always_inline]] inline V add_product(V sum, V a, V b) noexcept {
#if defined(__AVX512DQ__)
  if constexpr (width_of<V> == 16) return _mm512_fmadd_ps(a, b, sum);
#endif
#if defined(__FMA__)
  if constexpr (width_of<V> == 8) return _mm256_fmadd_ps(a, b, sum);
#endif
  return sum + a * b;
}

// A number that vectors are multiplied by where it lies. What takes 512 bits in two halves does that for nothing, and
// its conversions of f16 are less in the way of the products; elsewhere it is broadcast to a register.
using multiplier = std::conditional_t<cpu.halves, const float*, vfloat>;
#if defined(__AVX512DQ__)
[[gnu::always_inline]] inline vfloat add_product(vfloat sum, vfloat a, const float* b) noexcept {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
  return sum;
}
#endif
template <class M>
[[gnu::always_inline]] inline M multiply_by(const float* from) noexcept {
  if constexpr (std::is_same_v<M, vfloat>)
    return broadcast(*from);
  else
    return from;
}
template <class V>
[[gnu::always_inline]] inline void store(float* to, V v) noexcept {
  std::memcpy(to, &v, sizeof v);
}

// Lane by lane; b where either is NaN, as x86's instructions have it, which g++ 12 does not recognise here.
[[gnu::always_inline]] inline vfloat max(vfloat a, vfloat b) noexcept {
#if defined(__AVX512DQ__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
[[gnu::always_inline]] inline vfloat min(vfloat a, vfloat b) noexcept {
#if defined(__AVX512DQ__)
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Width of the lanes of a, then those of b: the i-th is number At(i). Written out: nvcc loses packs among a builtin's
// arguments.
template <int Width, auto At, class V>
[[gnu::always_inline]] inline auto shuffled(V a, V b) noexcept {
  if constexpr (Width == 4)
    return __builtin_shufflevector(a, b, At(0), At(1), At(2), At(3));
  else if constexpr (Width == 8)
    return __builtin_shufflevector(a, b, At(0), At(1), At(2), At(3), At(4), At(5), At(6), At(7));
  else
    return __builtin_shufflevector(a, b, At(0), At(1), At(2), At(3), At(4), At(5), At(6), At(7), At(8), At(9), At(10),
                                   At(11), At(12), At(13), At(14), At(15));
}

// Sums across vectors, of any width: join_pair two by two, join_pairs of two of those, then sums_of_lanes, whose lane i
// is the sum of the lanes of the i-th vector. Every sum is associated alike, whatever i is.
template <class V>
[[gnu::always_inline]] inline V join_pair(V v0, V v1) noexcept {
  constexpr int n = width_of<V>;
  return shuffled<n, [](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * n; }>(v0, v1) +
         shuffled<n, [](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * n + 2; }>(v0, v1);
}
template <class V>
[[gnu::always_inline]] inline V join_pairs(V v01, V v23) noexcept {
  constexpr int n = width_of<V>;
  return shuffled<n, [](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * n; }>(v01, v23) +
         shuffled<n, [](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * n + 2; }>(v01, v23);
}
template <class V>
[[gnu::always_inline]] inline auto sums_of_lanes(V joined) noexcept {
  if constexpr (width_of<V> == 16)
    return sums_of_lanes(__builtin_shufflevector(joined, joined, 0, 1, 2, 3, 4, 5, 6, 7) +
                         __builtin_shufflevector(joined, joined, 8, 9, 10, 11, 12, 13, 14, 15));
  else if constexpr (width_of<V> == 8)
    return __builtin_shufflevector(joined, joined, 0, 1, 2, 3) + __builtin_shufflevector(joined, joined, 4, 5, 6, 7);
  else
    return joined;
}

// Of the lanes of a, then those of b: as many as a vector has, from number First on.
template <int First>
[[gnu::always_inline]] inline vfloat from_lane(vfloat a, vfloat b) noexcept {
  return shuffled<lanes, [](int i) { return (i + First) % (2 * lanes); }>(a, b);
}

// Of the lanes of a, then those of b: every second, from number First on.
template <int First>
[[gnu::always_inline]] inline vfloat every_second(vfloat a, vfloat b) noexcept {
  return shuffled<lanes, [](int i) { return 2 * i + First; }>(a, b);
}
// Of the lanes of all three: every third, from number First on.
template <int First>
[[gnu::always_inline]] inline vfloat every_third(const vfloat (&v)[3]) noexcept {
  const vfloat of_two = shuffled<lanes, [](int i) { return (3 * i + First) % (2 * lanes); }>(v[0], v[1]);
  return shuffled<lanes, [](int i) { return 3 * i + First < 2 * lanes ? i : 3 * i + First - lanes; }>(of_two, v[2]);
}
// The reverse: lanes of `even` and `odd` by turns, from number First on.
template <int First>
[[gnu::always_inline]] inline vfloat by_turns(vfloat even, vfloat odd) noexcept {
  return shuffled<lanes, [](int i) { return (First + i) / 2 + i % 2 * lanes; }>(even, odd);
}

// The lanes of a number of all vectors, in each.
[[gnu::always_inline]] inline void transpose(vfloat (&v)[lanes]) noexcept {
#pragma GCC unroll 4
  for (int done = 1; done < lanes; done *= 2) {
    vfloat from[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) from[i] = v[i];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      v[2 * i] = by_turns<0>(from[i], from[i + lanes / 2]);
      v[2 * i + 1] = by_turns<lanes>(from[i], from[i + lanes / 2]);
    }
  }
}

// The first Period lanes over and over, from number First on.
template <int Period, int First = 0, int Width = lanes, class V>
[[gnu::always_inline]] inline auto repeated(V v) noexcept {
  return shuffled<Width, [](int i) { return (First + i) % Period; }>(v, v);
}
// The first Period of the four floats there, over and over.
template <int Period>
[[gnu::always_inline]] inline vfloat repeated(const float* from) noexcept {
  vquad four;
  std::memcpy(&four, from, sizeof four);
  if constexpr (lanes > 8) {  // in two steps: g++ 12 takes one through memory
    const auto eight = repeated<Period, 0, 8>(four);
    return repeated<8>(eight);
  } else {
    return repeated<Period>(four);
  }
}

// Joins the lanes that are a multiple of Width apart, halves first; each ends up with what they joined to. Of the first
// 2 * Distance lanes alone into the first Width, if that is given.
template <int Width, int Distance = lanes / 2, class F>
[[gnu::always_inline]] inline vfloat join_lanes(vfloat v, const F& join) noexcept {
  if constexpr (Distance >= Width) v = join_lanes<Width, Distance / 2>(join(v, from_lane<Distance>(v, v)), join);
  return v;
}

// The next whole number.
[[gnu::always_inline]] inline vfloat ceil(vfloat x) noexcept {
  const vfloat cut = __builtin_convertvector(__builtin_convertvector(x, vint), vfloat);
  const vfloat up = cut < x ? cut + 1.f : cut;
  return x < broadcast(0x1p24f) && x > broadcast(-0x1p24f) ? up : x;  // what is larger is whole, or infinite, or NaN
}

// 2^x for x <= 0, within 1e-7 of it; 0 below -100, so that no product with a weight is denormal. NaN stays NaN.
[[gnu::always_inline]] inline vfloat exp2_nonpositive(vfloat x) noexcept {
#if defined(__clang__)
#pragma clang fp reassociate(off)  // under -fassociative-math, which clang does not tell of
#endif
#if defined(__AVX512DQ__)
  const vfloat whole = _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
  const vfloat f = x - whole;
#else
  const vfloat round = broadcast(0x1.8p23f + 127);  // adding it leaves the power's exponent in the low bits
  const vfloat shifted = x + round;
  const vfloat f = x - (shifted - round);
#endif
  vfloat p = broadcast(1.534581242594868e-4f);
  p = p * f + 1.3399931e-3f;  // minimax over [-1/2, 1/2], relative error 2e-9 before rounding
  p = p * f + 9.6184889571e-3f;
  p = p * f + 5.55032877697e-2f;
  p = p * f + 2.402264689063e-1f;
  p = p * f + 6.931472057373e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512DQ__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(-100.f), _CMP_NLT_UQ), p, whole);
#else
  return x < broadcast(-100.f) ? vfloat{} : p * std::bit_cast<vfloat>(std::bit_cast<vint>(shifted) << 23);
#endif
}
inline float exp2_nonpositive(float x) noexcept { return exp2_nonpositive(broadcast(x))[0]; }

// scale * tanh(x), within scale * 3e-7 of it before it is scaled, in proportion where it is small.
[[gnu::always_inline]] inline vfloat scaled_tanh(vfloat x, float scale) noexcept {
  const vfloat most = broadcast(9.f), largest = broadcast(scale);
  x = max(-most, min(most, x));
  const vfloat x2 = x * x;
  vfloat p = broadcast(scale * 1.3354545025379139e-8f);  // least squares, reweighted towards minimax; 2e-8 unrounded
  p = p * x2 + scale * 2.0608995328075252e-5f;
  p = p * x2 + scale * 3.4955828450620174e-3f;
  p = p * x2 + scale * 0.13381020724773407f;
  p = p * x2 + scale;
  vfloat q = broadcast(7.776509960422118e-7f);
  q = q * x2 + 3.285626007709652e-4f;
  q = q * x2 + 2.5876961648464203e-2f;
  q = q * x2 + 0.46714335680007935f;
  q = q * x2 + 1.f;
  return max(-largest, min(largest, x * p / q));
}

// f(i) for i from 0 to n, in any order. Sixteen at a time: only loops whose count it knows does g++ -O2 turn into
// vectors. clang needs no help.
template <class F>
[[gnu::always_inline]] inline void for_each_index(index_t n, const F& f) noexcept {
  index_t i = 0;
#if !defined(__clang__)
  constexpr index_t some = 16;
  for (; i + some <= n; i += some) {
#pragma GCC ivdep
    for (index_t j = 0; j < some; ++j) f(i + j);
  }
#endif
  for (; i < n; ++i) f(i);
}

// Whether none of n floats is infinite or NaN.
[[gnu::always_inline]] inline bool all_finite(const float* from, index_t n) noexcept {
  vfloat sum{};
  index_t i = 0;
  for (; i + lanes <= n; i += lanes) sum += load(from + i) * 0.f;
  float rest = 0;
  for (; i < n; ++i) rest += from[i] * 0.f;
#if defined(__AVX512DQ__)
  return rest == 0 && _mm512_cmp_ps_mask(sum, vfloat{}, _CMP_EQ_OQ) == 0xffff;
#elif defined(__AVX__)
  return rest == 0 && _mm256_movemask_ps(_mm256_cmp_ps(sum, vfloat{}, _CMP_EQ_OQ)) == 0xff;
#else
  return rest + join_lanes<1>(sum, [](vfloat a, vfloat b) { return a + b; })[0] == 0;
#endif
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
