#pragma once

// Dot products and weighted sums of rows of few bits in integers: codes times a query's or weights' numbers of 16 bits
// (15 for weights). Sums of integers are exact and the same in any order. With AVX-512 VNNI where the rows lie, by
// digits of 8 bits (quantized_dots.hpp, quantized_values.hpp); with any other x86 and aarch64 by pairs
// (quantized_pairs.hpp); elsewhere rows are loaded as floats.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "macros_off.hpp"
#include "reader.hpp"

#if defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define SINKCACHE_VNNI 1
#endif
// Vectors of integers are as wide as those of floats but for AVX alone.
#if defined(__aarch64__)
#define SINKCACHE_INTEGER_KERNELS 1
#elif defined(__SSE2__) && (defined(__AVX2__) || !defined(__AVX__)) && (defined(__AVX512BW__) || !defined(__AVX512DQ__))
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

typedef std::uint8_t sixteen_bytes __attribute__((vector_size(16)));

// Sixteen codes of four or two bits, a byte each.
template <int Bits>
[[gnu::always_inline]] inline sixteen_bytes unpacked(const std::byte* from) noexcept {
  const auto by_turns = [](sixteen_bytes x, sixteen_bytes y) {
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  };
  typedef std::uint64_t words __attribute__((vector_size(16)));
  std::uint64_t first = 0;  // not through a vector in memory
  std::memcpy(&first, from, 2 * Bits);
  const auto x = std::bit_cast<sixteen_bytes>(words{first, 0});
  if constexpr (Bits == 4) return by_turns(x & 15, x >> 4);
  return by_turns(by_turns(x & 3, x >> 4 & 3), by_turns(x >> 2 & 3, x >> 6));
}

#if defined(__AVX2__)
// The same of 32 codes.
template <int Bits>
[[gnu::always_inline]] inline __m256i spread(const std::byte* from) noexcept {
  if constexpr (Bits == 4) {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
  }
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m256i two = _mm256_or_si256(x, _mm256_slli_epi32(x, 6));
  return _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi32(two, 12)), _mm256_set1_epi8(3));
}
#endif

#if defined(__AVX2__)
// `lanes` codes of a byte each.
[[gnu::always_inline]] inline vfloat bytes_as_floats(const std::byte* from) noexcept {
  // Intrinsics: g++ 12 takes twice as long over conversions of its own.
#if defined(__AVX512DQ__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#else
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#endif
}
#endif

#if defined(SINKCACHE_VNNI)

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

// The codes of elements [first, first + n) of a row of `padded`, both multiples of 16, a byte each: where they lie, or
// in `to`.
template <int Bits>
const std::byte* codes_of(const std::byte* row, index_t first, index_t n, index_t padded, std::byte* to) noexcept {
  row += scale_bytes;
  if constexpr (Bits == 8) return row + first;
  constexpr int low = Bits == 2 ? 2 : 4;  // bits of the first plane
  const std::byte *codes = row + code_bytes(low, first), *high = row + code_bytes(4, padded) + code_bytes(2, first);
  index_t i = 0;
#if defined(SINKCACHE_VNNI)
  for (; i + 64 <= n; i += 64, codes += 8 * low, high += 16)
    _mm512_storeu_si512(to + i, codes_at<Bits>(row - scale_bytes, first + i, padded));
#elif defined(__AVX2__)
  for (; i + 32 <= n; i += 32, codes += 4 * low, high += 8) {
    __m256i some = spread<low>(codes);
    if constexpr (Bits == 6) some = _mm256_or_si256(some, _mm256_slli_epi32(spread<2>(high), 4));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), some);
  }
#endif
  for (; i < n; i += 16, codes += 2 * low, high += 4) {
    sixteen_bytes some = unpacked<low>(codes);
    if constexpr (Bits == 6) some |= unpacked<2>(high) << 4;
    std::memcpy(to + i, &some, sizeof some);
  }
  return to;
}

#if defined(SINKCACHE_INTEGER_KERNELS)

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

// How a query row becomes integers: its numbers are factor * integer, rounded. Their sum with codes of 8 bits fits 32
// bits.
struct query_unit {
  bool finite;
  float up, per_unit;  // what they are multiplied by: those next to nothing are scaled up first

  static constexpr float largest = 127 * 256 + 127, largest_sum = 8.4e6f;

  query_unit(const float* q, index_t dim) noexcept {
    vfloat mosts{}, sums{};
    for (index_t d = 0; d < dim; d += lanes) {
      const vfloat x = load(q + d);
      mosts = max(max(x, -x), mosts);
      sums += max(x, -x);
    }
    float most = join_lanes<1>(mosts, [](vfloat a, vfloat b) { return max(a, b); })[0];
    float magnitudes = join_lanes<1>(sums, [](vfloat a, vfloat b) { return a + b; })[0];
    finite = magnitudes * 0 == 0;
    up = most < 0x1p-60f ? 0x1p80f : 1;
    most *= up, magnitudes *= up;
    per_unit = finite && most > 0 ? std::min(largest / most, largest_sum / magnitudes) : 0;
  }

  float factor() const noexcept {
    return !finite ? std::numeric_limits<float>::quiet_NaN() : per_unit > 0 ? 1 / per_unit / up : 0;
  }
};

// Adds values in floats to one row of a group, which integers left out.
template <int Bits, int Rows>
[[gnu::noinline]] void add_as_floats(const float* weights, tile_rows v, index_t offset, index_t n, index_t dim,
                                     const running_states& to) noexcept {
  constexpr index_t some = 16;
  alignas(64) float values[some * round_up(max_head_dim, 16)], of_row[some];
  const index_t bytes = dim * index_t{sizeof(float)};
  const tile_rows rows{reinterpret_cast<const std::byte*>(values), bytes, bytes};
  for (index_t j = 0, m; j < n; j += m) {
    m = std::min(some, n - j);
    for (index_t i = 0; i < m; ++i) {
      of_row[i] = weights[(j + i) * Rows];
      quantized_row<Bits>::decode(v.row(j + i), 0, dim, values + i * dim);
    }
    group_add<f32>(of_row, 1, rows, offset + j, m, dim, to, rows);
  }
}

// The weights of all groups of rows, as integers of either kind, in `groups`; what is left out is added in floats.
inline constexpr index_t most_groups = (tile_scratch::max_rows + 3) / 4 + 1;
template <int Bits, class Integers>
void put_groups(Integers* groups, const float* weights, index_t count, const float* scales, tile_rows v, index_t offset,
                index_t n, index_t dim, const running_states& to) noexcept {
  in_groups(count, [&]<int Rows>(index_t r, index_t group) {
    const float* const of_group = logits_of(const_cast<float*>(weights), group);
    const int left_out = groups[group].template put<Rows>(of_group, scales, n);
    for (int i = 0; i < Rows; ++i)
      if ((left_out >> i & 1) != 0) add_as_floats<Bits, Rows>(of_group + i, v, offset, n, dim, to.from_row(r + i));
  });
}

#endif

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
