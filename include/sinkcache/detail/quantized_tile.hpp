#pragma once

// Dot products and weighted sums of rows of few bits where they lie, in integers: codes times digits of the query, or
// of the weights, each 8 bits of a number of 16 (15 for weights). Sums of integers are exact and the same in any order.
// With AVX-512 VNNI; elsewhere rows are loaded as floats.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "macros_off.hpp"
#include "tile_dots.hpp"
#include "tile_values.hpp"

#if defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define SINKCACHE_INTEGER_KERNELS 1
#endif

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

template <int Bits>
struct quantized_row;

inline constexpr index_t scale_bytes = 2;  // a bf16, before a row's codes

// Bytes of `n` codes of so many bits; n is a multiple of 16.
constexpr index_t code_bytes(int bits, index_t n) { return n * bits / 8; }

inline float bf16_at(const std::byte* from) noexcept {
  std::uint16_t half;
  std::memcpy(&half, from, sizeof half);
  return std::bit_cast<float>(std::uint32_t{half} << 16);
}

#if defined(SINKCACHE_INTEGER_KERNELS)

// As many bytes as there are, zeros after them; all without a mask, which takes longer.
template <class V>
[[gnu::always_inline]] inline V load_bytes(const std::byte* from, index_t n) noexcept {
  V bytes;
  if (n >= index_t{sizeof(V)}) {
    std::memcpy(&bytes, from, sizeof bytes);
    return bytes;
  }
  const __mmask64 some = (__mmask64{1} << n) - 1;
  if constexpr (sizeof(V) == 64) return _mm512_maskz_loadu_epi8(some, from);
  if constexpr (sizeof(V) == 32) return _mm256_maskz_loadu_epi8(static_cast<__mmask32>(some), from);
  if constexpr (sizeof(V) == 16) return _mm_maskz_loadu_epi8(static_cast<__mmask16>(some), from);
}

// Codes of four bits in pairs, of two bits in fours, a byte each.
[[gnu::always_inline]] inline __m512i spread_fours(__m256i codes) noexcept {
  const __m512i words = _mm512_maskz_cvtepu8_epi16(~__mmask32{0}, codes);
  const __m512i nibble = _mm512_set1_epi8(15);
  return _mm512_and_si512(_mm512_or_si512(words, _mm512_maskz_slli_epi16(~__mmask32{0}, words, 4)), nibble);
}
[[gnu::always_inline]] inline __m512i spread_twos(__m128i codes) noexcept {
  const __m512i x = _mm512_maskz_cvtepu8_epi32(0xffff, codes);
  const __m512i two = _mm512_or_si512(x, _mm512_maskz_slli_epi32(0xffff, x, 6));
  return _mm512_and_si512(_mm512_or_si512(two, _mm512_maskz_slli_epi32(0xffff, two, 12)), _mm512_set1_epi8(3));
}

// The codes of elements [first, first + 64) of a row of `dim`, a multiple of 16; zeros after those.
template <int Bits>
[[gnu::always_inline]] inline __m512i codes_at(const std::byte* row, index_t first, index_t dim) noexcept {
  const std::byte* const codes = row + scale_bytes;
  const index_t n = dim - first;
  if constexpr (Bits == 8) return load_bytes<__m512i>(codes + first, n);
  if constexpr (Bits == 2) return spread_twos(load_bytes<__m128i>(codes + first / 4, n / 4));
  const __m512i low = spread_fours(load_bytes<__m256i>(codes + first / 2, n / 2));
  if constexpr (Bits == 4) return low;
  const __m512i high = spread_twos(load_bytes<__m128i>(codes + dim / 2 + first / 4, n / 4));
  return _mm512_or_si512(low, _mm512_maskz_slli_epi32(0xffff, high, 4));
}

// Assembly: g++ 12 copies every sum before it is added to, and loads digits again for each key.
[[gnu::always_inline]] inline void dot_bytes(__m512i& sum, __m512i codes, __m512i digits) noexcept {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}

// One by one: g++ makes a long way of them to fill vectors.
inline void load_scales(tile_rows rows, index_t n, float* scales) noexcept {
  const std::byte* row = rows.data;
  for (index_t j = 0; j < n; ++j, row += rows.stride) {
    std::uint32_t bits = std::bit_cast<std::uint32_t>(bf16_at(row));
    asm("" : "+r"(bits));
    scales[j] = std::bit_cast<float>(bits);
  }
}

// Prefetches rows bit by bit: in a burst, what is under way would hold up what is multiplied.
class row_prefetcher {
 public:
  row_prefetcher() = default;
  row_prefetcher(tile_rows rows, index_t n)
      : data_(rows.data), stride_(rows.stride <= 2 * rows.bytes ? rows.stride : rows.bytes), bytes_(n * stride_) {}

  // From now on some rows take so many steps.
  void in_steps(index_t rows, index_t steps) noexcept { step_ = round_up((rows * stride_ + steps - 1) / steps, 64); }
  [[gnu::always_inline]] void next() noexcept {
    if (at_ >= bytes_) return;
    for (index_t i = 0; i < step_; i += 64) prefetch_line(data_, at_ + i);
    at_ += step_;
  }

 private:
  const std::byte* data_ = nullptr;
  index_t stride_ = 0, bytes_ = 0, step_ = 0, at_ = 0;
};

// Of integers that may wrap.
[[gnu::always_inline]] inline __m512i added(__m512i a, __m512i b) noexcept {
  return std::bit_cast<__m512i>(std::bit_cast<vuint>(a) + std::bit_cast<vuint>(b));
}
// Of sums of high and of low digits.
[[gnu::always_inline]] inline __m512i both_digits(__m512i high, __m512i low) noexcept {
  return added(_mm512_maskz_slli_epi32(0xffff, high, 8), low);
}
[[gnu::always_inline]] inline vfloat as_floats(__m512i x) noexcept { return _mm512_maskz_cvtepi32_ps(0xffff, x); }
[[gnu::always_inline]] inline __m512i permuted(__m512i numbers, __m512i x) noexcept {
  return _mm512_maskz_permutexvar_epi32(0xffff, numbers, x);
}
[[gnu::always_inline]] inline vfloat permuted(__m512i numbers, vfloat x) noexcept {
  return std::bit_cast<vfloat>(permuted(numbers, std::bit_cast<__m512i>(x)));
}
// At(0) to At(15).
template <class F>
__m512i numbers_of(const F& at) noexcept {
  std::int32_t numbers[16];
  for (int i = 0; i < 16; ++i) numbers[i] = at(i);
  return _mm512_loadu_si512(numbers);
}

#endif

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
