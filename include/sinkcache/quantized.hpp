#pragma once

// Rows of few bits: q8, q6, q4, q2, and the Hadamard transform that goes with them.
//
// A row is a block: its scale d as a bf16, then a code for each element. The row y that is encoded went through a
// Hadamard transform, which spreads outliers over it; so it needs no groups, no zero point and no table. A code counts
// steps of d, the value is the middle of its step:
//   d = 2 max|y| / 2^b (q2: the root of the mean of y^2), rounded up to a bf16 (q2: at most 2.26e38, so that 1.5 d is a
//       float)
//   code = clamp(floor(y / d) + 2^(b-1), 0, 2^b - 1),  value = (code - 2^(b-1) + 1/2) d
//
//        bits an element, with the scale, at     error of an element (quantized_test.cpp)
//        head_dim 64     128        576
//   q8   8.25            8.125      8.028        max|y| 2^-8 (1 + 2^-7)
//   q6   6.25            6.125      6.028        max|y| 2^-6 (1 + 2^-7)
//   q4   4.25            4.125      4.028        max|y| 2^-4 (1 + 2^-7)
//   q2   2.25            2.125      2.028        the larger of d / 2 and max|y| - 1.5 d
// (and 2^-134 more where d is below the normal floats, of which a bf16 has every 2^-133)
//
// Codes lie in the order of elements, from the low bits of a byte to the high ones; those of q6 in two planes, the low
// four bits of all, then the high two. They are padded to 16 elements: a row of 33 takes as many bytes as one of 48.
//
// A cache of few bits holds every row whose transform fits floats: any with a norm, the root of the sum of squares, of
// at most 3.38e38. That is a single element of that size, or a constant row of 3.38e38 / sqrt(head_dim), 4.2e37 at 64.
// The transform of a larger row may have elements that no float is as large as: of a constant row of 3e38 one
// is 2.4e39. Such rows, and those that hold a NaN or an infinity, have a scale of NaN and codes of 0: outputs that see
// them are infinite or NaN, and num_not_finite counts them (extremes_test.cpp).

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>

#include "detail/hadamard.hpp"
#include "detail/macros_off.hpp"
#include "detail/quantized_dots.hpp"
#include "detail/quantized_pairs.hpp"
#include "detail/quantized_values.hpp"
#include "detail/reader.hpp"
#include "format.hpp"
#include "source.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Orthogonal, and its own inverse.
inline constexpr row_transform hadamard{&detail::hadamard_row, &detail::hadamard_row};

namespace detail {

// A positive double as a bf16, rounded up: in integers, so that how the process treats subnormal floats does not
// matter.
inline std::uint16_t bf16_from_above(double x) noexcept {
  if (x < 0x1p-126) return static_cast<std::uint16_t>(std::ceil(x * 0x1p133));
  constexpr int dropped = 52 - 7;
  const std::uint64_t up = (std::bit_cast<std::uint64_t>(x) + (std::uint64_t{1} << dropped) - 1) >> dropped;
  return static_cast<std::uint16_t>(up - (std::uint64_t{1023 - 127} << 7));
}
inline constexpr std::uint16_t nan_scale = 0x7fc0, largest_q2_scale = 0x7f2a;  // 1.5 times that is a float

// Packs the low Bits of codes one after another; n is a multiple of 16.
template <int Bits>
void pack_codes(const std::uint8_t* codes, index_t n, std::byte* to) noexcept {
  constexpr int in_byte = 8 / Bits;
  for (index_t i = 0; i < n / in_byte; ++i) {
    unsigned byte = 0;
    for (int j = 0; j < in_byte; ++j)
      byte |= static_cast<unsigned>(codes[i * in_byte + j] & ((1 << Bits) - 1)) << Bits * j;
    to[i] = static_cast<std::byte>(byte);
  }
}

// Of squares, summed eight ways: the same on every processor.
inline double mean_square(const float* y, index_t dim) noexcept {
  constexpr index_t ways = 8;
  double squares[ways] = {}, sum = 0;
  for (index_t i = 0; i < dim; i += ways)
    for (index_t way = 0; way < std::min(ways, dim - i); ++way)
      squares[way] += static_cast<double>(y[i + way]) * static_cast<double>(y[i + way]);
  for (double square : squares) sum += square;
  return sum / static_cast<double>(dim);
}

// The scale of a row of b bits, rounded up to a bf16.
inline std::uint16_t quantized_scale(int bits, const float* y, index_t dim) noexcept {
  const float most = largest_magnitude(y, dim);
  if (!(most <= std::numeric_limits<float>::max())) return nan_scale;
  if (most == 0) return 0;
  if (bits == 2) return std::min(bf16_from_above(std::sqrt(mean_square(y, dim))), largest_q2_scale);
  return bf16_from_above(static_cast<double>(most) * (2. / (1 << bits)));
}

// The codes of `lanes` elements. A quotient may have been rounded up to a whole number, never down from one; the
// product whole * d is exact, and shows it.
[[gnu::always_inline]] inline void quantize(vfloat y, float d, int half, std::uint8_t* codes) noexcept {
  typedef std::uint8_t vbyte __attribute__((vector_size(lanes)));
  const vfloat steps = y / broadcast(d), one = broadcast(1);
  vfloat whole = __builtin_convertvector(__builtin_convertvector(steps, vint), vfloat);
  whole = whole > steps ? whole - one : whole;
  whole = whole * d > y ? whole - one : whole;
  whole = min(max(whole, broadcast(static_cast<float>(-half))), broadcast(static_cast<float>(half - 1)));
  const vbyte bytes = __builtin_convertvector(__builtin_convertvector(whole, vint) + half, vbyte);
  std::memcpy(codes, &bytes, sizeof bytes);
}

// The one place where rows are quantised.
[[gnu::noinline]] inline void encode_quantized(int bits, const float* y, index_t dim, std::byte* to) noexcept {
  const index_t padded = round_up(dim, 16);
  const std::uint16_t pattern = quantized_scale(bits, y, dim);
  std::memcpy(to, &pattern, sizeof pattern);
  to += scale_bytes;
  if (pattern == 0 || pattern == nan_scale) {
    std::memset(to, 0, static_cast<std::size_t>(code_bytes(bits, padded)));
    return;
  }
  const float d = std::bit_cast<float>(std::uint32_t{pattern} << 16);
  const int half = 1 << (bits - 1);
  constexpr index_t piece = 64;
  for (index_t from = 0; from < dim; from += piece) {
    const index_t n = std::min(piece, padded - from), given = std::min(piece, dim - from);
    std::uint8_t codes[piece] = {}, high[piece];
    index_t i = 0;
    for (; i + lanes <= given; i += lanes) quantize(load(y + from + i), d, half, codes + i);
    if (i < given) {
      float last[lanes] = {};
      std::copy_n(y + from + i, given - i, last);
      quantize(load(last), d, half, codes + i);
      std::fill(codes + given, codes + piece, std::uint8_t{0});
    }
    if (bits == 8) std::memcpy(to + from, codes, static_cast<std::size_t>(n));
    if (bits == 4 || bits == 6) pack_codes<4>(codes, n, to + code_bytes(4, from));
    if (bits == 2) pack_codes<2>(codes, n, to + code_bytes(2, from));
    if (bits != 6) continue;
    for (index_t j = 0; j < n; ++j) high[j] = static_cast<std::uint8_t>(codes[j] >> 4);
    pack_codes<2>(high, n, to + code_bytes(4, padded) + code_bytes(2, from));
  }
}

// A row of so many bits an element.
template <int Bits>
struct quantized_row {
  static constexpr int bits = Bits;
  static constexpr index_t block_rows = 1;
  static constexpr index_t block_bytes(index_t dim) { return scale_bytes + code_bytes(Bits, round_up(dim, 16)); }

  // Stored rows have gone through `transform`; spared tokens are stored in the format `spared`.
  static constexpr const row_transform* transform = &hadamard;
  using spared = bf16;

  // Of an element, as a part of the row's largest magnitude; q2 has none.
  static constexpr double error = Bits == 2 ? 1 : (1 + 0x1p-7) / (1 << Bits);

  static void encode(const float* row, index_t dim, std::byte* to) noexcept { encode_quantized(Bits, row, dim, to); }
  static void decode(const std::byte* row, index_t, index_t dim, float* out) noexcept {
    const float d = bf16_at(row);
    const index_t padded = round_up(dim, 16);
    constexpr index_t piece = 64;
    for (index_t at = 0; at < dim; at += piece) {
      alignas(64) std::byte memory[piece];
      const std::byte* const codes = codes_of<Bits>(row, at, std::min(piece, padded - at), padded, memory);
      constexpr float zero = (1 << (Bits - 1)) - 0.5f;
      const index_t n = std::min(piece, dim - at);
      index_t from = 0;
#if defined(__AVX2__)
      for (; from + lanes <= n; from += lanes) store(out + at + from, (bytes_as_floats(codes + from) - zero) * d);
#endif
      for_each_index(
          n - from, [&](index_t i) __attribute__((always_inline)) {
            out[at + from + i] = (static_cast<float>(std::to_integer<int>(codes[from + i])) - zero) * d;
          });
    }
  }
};

}  // namespace detail

struct q8 : detail::quantized_row<8> {
  static constexpr std::string_view name = "q8";
};
struct q6 : detail::quantized_row<6> {
  static constexpr std::string_view name = "q6";
};
struct q4 : detail::quantized_row<4> {
  static constexpr std::string_view name = "q4";
};
struct q2 : detail::quantized_row<2> {
  static constexpr std::string_view name = "q2";
};

// Files and tests rely on these.
static_assert(q8::block_bytes(64) == 66 && q6::block_bytes(64) == 50 && q4::block_bytes(64) == 34 &&
              q2::block_bytes(64) == 18);
static_assert(q8::block_bytes(128) == 130 && q6::block_bytes(128) == 98 && q4::block_bytes(128) == 66 &&
              q2::block_bytes(128) == 34);
static_assert(q8::block_bytes(1) == 18 && q6::block_bytes(33) == 38 && q4::block_bytes(80) == 42 &&
              q2::block_bytes(576) == 146);

namespace detail {

// Formats with these rows, whatever their name and what they spare.
template <class F>
concept quantized_format = kv_format<F> && requires {
  requires F::block_bytes == &quantized_row<F::bits>::block_bytes;
  requires F::decode == &quantized_row<F::bits>::decode;
};

}  // namespace detail

#if defined(SINKCACHE_INTEGER_KERNELS)
template <detail::quantized_format F>
inline constexpr kv_reader reader_of<F> = {F::block_rows,
                                           0,
                                           &F::block_bytes,
                                           &detail::load_rows<F>,
                                           &detail::integer_pack,
                                           &detail::integer_dots<F::bits>,
                                           &detail::integer_add<F::bits>,
                                           detail::format_name<F>()};
#endif

// Rows of a format that loses little, transformed as those of few bits are: for tokens in front of such a cache.
template <kv_format F>
struct transformed : F {
  static constexpr const row_transform* transform = &hadamard;
};

// The rows are the same, so the kernels are too: none is compiled again.
template <kv_format F>
inline constexpr kv_reader reader_of<transformed<F>> = reader_of<F>;

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
