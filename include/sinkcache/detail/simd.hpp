#pragma once

// The few vector operations that the kernel is written in. They are spelled in the vector extensions that g++ and clang
// share, as wide as the instruction set allows; only the f16 conversion needs an intrinsic.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../config.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace sinkcache::inline SINKCACHE_TAG::detail {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
inline constexpr int lanes = 16;
#elif defined(__AVX__)
inline constexpr int lanes = 8;
#else
inline constexpr int lanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(lanes * sizeof(float))));
typedef std::int32_t vint __attribute__((vector_size(lanes * sizeof(float))));

[[gnu::always_inline]] inline vfloat load(const float* from) noexcept {
  vfloat v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
[[gnu::always_inline]] inline void store(float* to, vfloat v) noexcept { std::memcpy(to, &v, sizeof v); }
[[gnu::always_inline]] inline vfloat broadcast(float x) noexcept { return x - vfloat{}; }

// Lane by lane; b where either is NaN.
[[gnu::always_inline]] inline vfloat max(vfloat a, vfloat b) noexcept { return a > b ? a : b; }

// The sum of the lanes, and their maximum (a NaN may be passed over).
[[gnu::always_inline]] inline float sum_of_lanes(vfloat v) noexcept {
  float lane[lanes];
  store(lane, v);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
[[gnu::always_inline]] inline float max_of_lanes(vfloat v) noexcept {
  float lane[lanes];
  store(lane, v);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// Lane i of the result is the sum of the lanes of v[i]. Every sum is associated alike, whatever i is.
[[gnu::always_inline]] inline vfloat sums_of_lanes(const vfloat (&v)[lanes]) noexcept {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  vfloat quad[4];
  for (int i = 0; i < 4; ++i) {
    vfloat pair[2];
    for (int j = 0; j < 2; ++j) {
      const vfloat a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
      pair[j] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    quad[i] = __builtin_shufflevector(pair[0], pair[1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
              __builtin_shufflevector(pair[0], pair[1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  vfloat half[2];
  for (int i = 0; i < 2; ++i)
    half[i] =
        __builtin_shufflevector(quad[2 * i], quad[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        __builtin_shufflevector(quad[2 * i], quad[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                31);
  return __builtin_shufflevector(half[0], half[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(half[0], half[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif defined(__AVX__)
  vfloat quad[2];
  for (int i = 0; i < 2; ++i) {
    vfloat pair[2];
    for (int j = 0; j < 2; ++j) {
      const vfloat a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
      pair[j] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
                __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    }
    quad[i] = __builtin_shufflevector(pair[0], pair[1], 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(pair[0], pair[1], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(quad[0], quad[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(quad[0], quad[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  const vfloat ab = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5) + __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const vfloat cd = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5) + __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

// 2^x for x <= 0, within 1e-7 of it; 0 below -100, so that no product with a weight is denormal. NaN stays NaN.
[[gnu::always_inline]] inline vfloat exp2_nonpositive(vfloat x) noexcept {
  const vfloat round = broadcast(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  const vfloat shifted = x + round;
  const vfloat f = x - (shifted - round);
  vfloat p = broadcast(1.534581242594868e-4f);
  p = p * f + 1.3399931e-3f;  // minimax over [-1/2, 1/2], relative error 2e-9 before rounding
  p = p * f + 9.6184889571e-3f;
  p = p * f + 5.55032877697e-2f;
  p = p * f + 2.402264689063e-1f;
  p = p * f + 6.931472057373e-1f;
  p = p * f + 1.0f;
  const vfloat power = std::bit_cast<vfloat>((std::bit_cast<vint>(shifted) << 23) + 0x3f800000);
  return x < broadcast(-100.f) ? vfloat{} : p * power;
}
inline float exp2_nonpositive(float x) noexcept { return exp2_nonpositive(broadcast(x))[0]; }

// IEEE half precision, rounded to nearest even; a signalling NaN becomes quiet.
inline std::uint16_t to_f16(float x) noexcept {
  constexpr std::uint32_t infinity = 255u << 23, too_large = (127u + 16) << 23, subnormal = 113u << 23;
  constexpr std::uint32_t magic = ((127u - 15) + (23 - 10) + 1) << 23;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x), sign = bits & 0x80000000u;
  std::uint32_t u = bits ^ sign;
  if (u > infinity)
    u = 0x7e00u | ((u >> 13) & 0x3ffu);
  else if (u >= too_large)
    u = 0x7c00u;
  else if (u < subnormal)  // the addition rounds where the half's last bit is
    u = std::bit_cast<std::uint32_t>(std::bit_cast<float>(u) + std::bit_cast<float>(magic)) - magic;
  else
    u = (u + 0xfffu + ((u >> 13) & 1u) - ((127u - 15) << 23)) >> 13;
  return static_cast<std::uint16_t>(u | sign >> 16);
}
inline float from_f16(std::uint16_t half) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const float magnitude = std::bit_cast<float>(static_cast<std::uint32_t>(half & 0x7fffu) << 13) * 0x1p112f;
  const std::uint32_t special = magnitude >= 65536.f ? 255u << 23 : 0u;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | special | sign);
}

inline std::uint16_t to_bf16(float x) noexcept {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet_nan = (u >> 16) | 0x40u;
  return static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}
inline float from_bf16(std::uint16_t half) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16);
}

struct f16_convert {
  static void narrow(const float* from, index_t n, std::byte* to) noexcept {
    index_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; ++i) {
      const std::uint16_t half = to_f16(from[i]);
      std::memcpy(to + 2 * i, &half, 2);
    }
  }
  static void widen(const std::byte* from, index_t n, float* to) noexcept {
    index_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
#endif
    for (; i < n; ++i) {
      std::uint16_t half;
      std::memcpy(&half, from + 2 * i, 2);
      to[i] = from_f16(half);
    }
  }
};

struct bf16_convert {
  static void narrow(const float* from, index_t n, std::byte* to) noexcept {
    for (index_t i = 0; i < n; ++i) {
      const std::uint16_t half = to_bf16(from[i]);
      std::memcpy(to + 2 * i, &half, 2);
    }
  }
  static void widen(const std::byte* from, index_t n, float* to) noexcept {
    for (index_t i = 0; i < n; ++i) {
      std::uint16_t half;
      std::memcpy(&half, from + 2 * i, 2);
      to[i] = from_bf16(half);
    }
  }
};

}  // namespace sinkcache::inline SINKCACHE_TAG::detail
