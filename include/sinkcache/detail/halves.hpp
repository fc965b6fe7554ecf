#pragma once

// Floats of 16 bits: f16 is IEEE's half precision, bf16 the upper half of a float. The same whatever the process does
// with subnormal floats (DAZ, FTZ).

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "macros_off.hpp"
#include "simd.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

typedef std::uint16_t vhalf __attribute__((vector_size(lanes * sizeof(std::uint16_t))));

// `lanes` 16-bit floats from anywhere, widened.
[[gnu::always_inline]] inline vuint load_halves(const std::byte* from) noexcept {
  // Intrinsics: g++ 12 converts the two halves of the vector one after the other, of four halves too. With a mask of
  // all lanes where it would warn of what the plain intrinsic leaves undefined, here and below.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return std::bit_cast<vuint>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return std::bit_cast<vuint>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__aarch64__)
  return std::bit_cast<vuint>(vmovl_u16(vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const std::uint8_t*>(from)))));
#elif defined(__SSE2__) && !defined(__AVX__)
  return std::bit_cast<vuint>(
      _mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), _mm_setzero_si128()));
#else
  vhalf halves;
  std::memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, vuint);
#endif
}
[[gnu::always_inline]] inline vfloat load_bf16(const std::byte* from) noexcept {
  return std::bit_cast<vfloat>(load_halves(from) << 16);
}
// Of 2 * lanes of them from there on, those of even and of odd number: fewer instructions than two times neighbours.
[[gnu::always_inline]] inline vfloat load_even_bf16(const std::byte* from) noexcept {
  vuint pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  return std::bit_cast<vfloat>(pairs << 16);
}
[[gnu::always_inline]] inline vfloat load_odd_bf16(const std::byte* from) noexcept {
  vuint pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  return std::bit_cast<vfloat>(pairs & 0xffff0000u);
}
[[gnu::always_inline]] inline vfloat load_f16(const std::byte* from) noexcept {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  return std::bit_cast<vfloat>(vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(reinterpret_cast<const std::uint8_t*>(from)))));
#else
  const vuint halves = load_halves(from);
  // With 224 added to its exponent, what was infinite or NaN is so as a float, and everything is 2^112 times too large.
  // Scaled back, a subnormal m 2^-24 looks like 2^-15 + m 2^-25: twice that, less 2^-14, is right, and the smaller of
  // the two; above 2^-14 the other is. No float here is subnormal, which the process may have the processor read as 0.
  const vfloat scaled = std::bit_cast<vfloat>(((halves & 0x7fffu) << 13) + (224u << 23)) * 0x1p-112f;
  const vfloat magnitude = min(scaled + scaled - 0x1p-14f, scaled);
  return std::bit_cast<vfloat>(std::bit_cast<vuint>(magnitude) | (halves & 0x8000u) << 16);
#endif
}
#if defined(__AVX512DQ__)
[[gnu::always_inline]] inline voct load_eight_f16(const std::byte* from) noexcept {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

[[gnu::always_inline]] inline void store_halves(std::byte* to, vuint v) noexcept {
  const vhalf halves = __builtin_convertvector(v, vhalf);
  std::memcpy(to, &halves, sizeof halves);
}
// Rounded to nearest even; a NaN becomes quiet.
[[gnu::always_inline]] inline void store_bf16(std::byte* to, vfloat v) noexcept {
  const vuint u = std::bit_cast<vuint>(v), rounded = u + (0x7fffu + ((u >> 16) & 1u));
  const auto is_nan = std::bit_cast<vint>(u & 0x7fffffffu) > 0x7f800000;
  store_halves(to, (is_nan ? u | 0x400000u : rounded) >> 16);
}
// Rounded to nearest even, magnitudes of 65520 and more to infinity; a NaN becomes quiet.
[[gnu::always_inline]] inline void store_f16(std::byte* to, vfloat v) noexcept {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u8(reinterpret_cast<std::uint8_t*>(to), vreinterpret_u8_f16(vcvt_f16_f32(std::bit_cast<float32x4_t>(v))));
#else
  constexpr std::int32_t smallest_normal = (127 - 14) << 23, too_large = (127 + 16) << 23, infinity = 255 << 23;
  const vuint bits = std::bit_cast<vuint>(v), u = bits & 0x7fffffffu;
  const vint magnitude = std::bit_cast<vint>(u);
  const vuint normal = (u + (0xfffu + ((u >> 13) & 1u)) - ((127u - 15) << 23)) >> 13;
  // The last bit of a float just above 0.5 is 2^-24, what a half's subnormals count.
  const vuint subnormal = std::bit_cast<vuint>(std::bit_cast<vfloat>(u) + 0.5f) - std::bit_cast<std::uint32_t>(0.5f);
  const vuint finite = magnitude < smallest_normal ? subnormal : normal;
  const vuint half = magnitude >= too_large ? broadcast_bits(0x7c00u) : finite;
  const vuint nan = ((u >> 13) & 0x3ffu) | 0x7e00u;
  store_halves(to, (magnitude > infinity ? nan : half) | ((bits >> 16) & 0x8000u));
#endif
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
