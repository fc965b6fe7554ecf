#pragma once

// Weighted sums of values of few bits. Weights times scales are rounded to 15 bits of the largest of a tile; four keys'
// codes of a column lie side by side, to be multiplied at once.

#include <limits>

#include "macros_off.hpp"
#include "quantized_tile.hpp"
#include "reader.hpp"

#if defined(SINKCACHE_VNNI)

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// The weights of a group of rows over a tile: [keys / 4, 2, 4 rows] of four keys' digits, and what the sums mean.
struct weight_digits {
  static constexpr index_t most = tile_scratch::keys / 4;

  alignas(64) std::int8_t digits[most][2][4][4];
  alignas(64) float factor[16];
  alignas(64) std::int32_t sum[16];

  // Which rows are left out, a bit each: where a weight or a scale is not a number, or all are next to nothing.
  template <int Rows>
  int put(const float* weights, const float* scales, index_t n) noexcept {
    const __m512i lanes_of = numbers_of([](int i) { return std::min(i / 4 * Rows + i % 4, 15); });
    const __m512i keys = numbers_of([](int i) { return i / 4; });
    constexpr __mmask16 rows = Rows == 4 ? 0xffff : Rows == 3 ? 0x7777 : Rows == 2 ? 0x3333 : 0x1111;
    alignas(64) float products[most][16];
    vfloat largest{};
    __mmask16 not_finite = 0;
    const index_t fours = (n + 3) / 4;
    const auto take = [&](index_t i, __mmask16 there) {
      const __m512 given = _mm512_maskz_loadu_ps(there, weights + 4 * i * Rows);
      const vfloat w = _mm512_maskz_permutexvar_ps(rows, lanes_of, given);
      const vfloat d = permuted(keys, vfloat(_mm512_maskz_loadu_ps(0xf, scales + 4 * i)));
      const vfloat product = w * d;
      store(products[i], product);
      largest = max(product, largest);
      not_finite |= _mm512_cmp_ps_mask(product, broadcast(std::numeric_limits<float>::max()), _CMP_NLE_UQ);
    };
    for (index_t i = 0; i < n / 4; ++i) take(i, static_cast<__mmask16>((1 << 4 * Rows) - 1));
    if (n % 4 > 0) take(n / 4, static_cast<__mmask16>((1 << n % 4 * Rows) - 1));
    largest = join_lanes<4>(largest, [](vfloat a, vfloat b) { return max(a, b); });
    const __mmask16 positive = _mm512_cmp_ps_mask(largest, vfloat{}, _CMP_GT_OQ);
    const __mmask16 tiny = _mm512_mask_cmp_ps_mask(positive, largest, broadcast(0x1p-90f), _CMP_LT_OQ);
    const int lanes_left_out = not_finite | tiny;
    const int left_out = (lanes_left_out | lanes_left_out >> 4 | lanes_left_out >> 8 | lanes_left_out >> 12) & 15;
    constexpr float top = 127 * 256 + 127;
    const vfloat unit = _mm512_maskz_mov_ps(static_cast<__mmask16>(~(left_out * 0x1111)), largest * (1 / top));
    const auto taken = static_cast<__mmask16>(positive & ~(left_out * 0x1111));
    const vfloat per_unit = _mm512_maskz_div_ps(taken, broadcast(top), largest);
    const __m128i by_rows = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    __m512i total{};
    for (index_t i = 0; i < fours; ++i) {
      const __m512i whole = _mm512_maskz_cvtps_epi32(taken, load(products[i]) * per_unit);
      total = added(total, whole);
      const __m512i high = _mm512_maskz_srai_epi32(0xffff, added(whole, _mm512_set1_epi32(128)), 8);
      const __m512i low = _mm512_maskz_sub_epi32(0xffff, whole, _mm512_maskz_slli_epi32(0xffff, high, 8));
      const auto put_digits = [&](int digit, __m512i of) {
        const __m128i bytes = _mm_shuffle_epi8(_mm512_maskz_cvtepi32_epi8(0xffff, of), by_rows);
        std::memcpy(digits[i][digit], &bytes, sizeof bytes);
      };
      put_digits(0, high);
      put_digits(1, low);
    }
    total = std::bit_cast<__m512i>(join_lanes<4>(std::bit_cast<vfloat>(total), [](vfloat a, vfloat b) {
      return std::bit_cast<vfloat>(added(std::bit_cast<__m512i>(a), std::bit_cast<__m512i>(b)));
    }));
    store(factor, unit);
    std::memcpy(sum, &total, sizeof total);
    return left_out;
  }
};

// Four keys' codes of 64 columns, four of a column side by side: vector i has, in its quarter number c, columns
// 16 c + 4 i and the three after it. From rows as they are stored, for one group, which takes `Vectors` of them at a
// time; or from where they were put for several.
template <int Bits>
struct rows_in_fours {
  tile_rows v;
  index_t n, column, dim;

  template <int Vectors>
  [[gnu::always_inline]] void load(index_t four, int part, __m512i* to) const noexcept {
    __m512i row[4];
#pragma GCC unroll 4
    for (index_t j = 0; j < 4; ++j) row[j] = codes_at<Bits>(v.row(std::min(4 * four + j, n - 1)), column, dim);
    if (part == 0) {
      const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpacklo_epi8(row[2], row[3]);
      to[0] = _mm512_unpacklo_epi16(a, b);
      to[1] = _mm512_unpackhi_epi16(a, b);
    }
    if (Vectors == 4 || part == 2) {
      const __m512i a = _mm512_unpackhi_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[2], row[3]);
      to[Vectors - 2] = _mm512_unpacklo_epi16(a, b);
      to[Vectors - 1] = _mm512_unpackhi_epi16(a, b);
    }
  }
};
struct stored_in_fours {
  const std::uint8_t* codes;

  template <int Vectors>
  [[gnu::always_inline]] void load(index_t four, int part, __m512i* to) const noexcept {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) to[i] = _mm512_loadu_si512(codes + four * 256 + (part + i) * 64);
  }
};

// The vectors whose quarters are quarters of a number of all of these.
[[gnu::always_inline]] inline void quarters_in_order(vfloat (&v)[4]) noexcept {
  const auto quarters = []<int Numbers>(vfloat a, vfloat b) {
    return _mm512_maskz_shuffle_f32x4(0xffff, a, b, Numbers);
  };
  const vfloat a = quarters.template operator()<0x44>(v[0], v[1]), b = quarters.template operator()<0xee>(v[0], v[1]);
  const vfloat c = quarters.template operator()<0x44>(v[2], v[3]), d = quarters.template operator()<0xee>(v[2], v[3]);
  v[0] = quarters.template operator()<0x88>(a, c);
  v[1] = quarters.template operator()<0xdd>(a, c);
  v[2] = quarters.template operator()<0x88>(b, d);
  v[3] = quarters.template operator()<0xdd>(b, d);
}

// Vectors of columns whose sums fit the registers.
constexpr int vectors_of_group(int rows) { return rows <= 2 ? 4 : 2; }

// 64 columns of a tile times the weights of a group, for a group's sums.
template <int Bits, int Rows, class Codes>
[[gnu::noinline]] void add_columns(const weight_digits& weights, const Codes& codes, index_t fours, index_t column,
                                   index_t dim, row_prefetcher& prefetch, const running_states& to) noexcept {
  constexpr int vectors = vectors_of_group(Rows);
  vfloat columns[Rows][4];
  row_prefetcher ahead = prefetch;  // in registers
  const auto add_part = [&]<int Part>() __attribute__((always_inline)) {
    constexpr int part = Part;
    __m512i high[vectors][Rows], low[vectors][Rows];
#pragma GCC unroll 8
    for (int i = 0; i < vectors * Rows; ++i) high[i / Rows][i % Rows] = low[i / Rows][i % Rows] = __m512i{};
    for (index_t four = 0; four < fours; ++four) {
      ahead.next();
      __m512i value[vectors];
      codes.template load<vectors>(four, part, value);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        std::int32_t digits[2];
        std::memcpy(&digits[0], weights.digits[four][0][r], 4);
        std::memcpy(&digits[1], weights.digits[four][1][r], 4);
        const __m512i w_high = _mm512_set1_epi32(digits[0]), w_low = _mm512_set1_epi32(digits[1]);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) {
          dot_bytes(high[i][r], value[i], w_high);
          dot_bytes(low[i][r], value[i], w_low);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < vectors * Rows; ++i) {
      const int r = i % Rows, of = i / Rows;
      const std::int32_t sum = weights.sum[r];
      const __m512i centred = _mm512_maskz_sub_epi32(0xffff, both_digits(high[of][r], low[of][r]),
                                                     _mm512_set1_epi32(sum * (1 << (Bits - 1))));
      columns[r][part + of] = (as_floats(centred) + 0.5f * static_cast<float>(sum)) * weights.factor[r];
    }
  };
  add_part.template operator()<0>();
  if constexpr (vectors == 2) add_part.template operator()<2>();
  prefetch = ahead;
  for (int r = 0; r < Rows; ++r) {
    quarters_in_order(columns[r]);
    for (index_t d = 0; d < std::min<index_t>(4, (dim - column) / lanes); ++d) {
      to.add(r * to.o_stride + column + d * lanes, columns[r][d]);
    }
  }
}

template <int Bits>
void integer_add(const float* weights, index_t count, tile_rows v, index_t offset, index_t n, index_t dim,
                 const running_states& to, tile_rows next) noexcept {
  if (n <= 0) return;
  weight_digits groups[most_groups];
  alignas(64) float scales[tile_scratch::keys + 4];
  load_scales(v, n, scales);
  std::fill_n(scales + n, 4, 0.f);
  put_groups<Bits>(groups, weights, count, scales, v, offset, n, dim, to);
  alignas(64) std::uint8_t codes[tile_scratch::keys * 64];
  const index_t fours = (n + 3) / 4;
  row_prefetcher prefetch(next, n), none;
  for (index_t column = 0; column < dim; column += 64) {
    const rows_in_fours<Bits> rows{v, n, column, dim};
    const bool once = count <= 2 || (count <= 4 && (Bits == 8 || Bits == 4));  // what is spread out is used so often
    for (index_t four = 0; four < fours && !once; ++four) {
      __m512i spread[4];
      rows.template load<4>(four, 0, spread);
      std::memcpy(codes + four * 256, spread, sizeof spread);
    }
    in_groups(count, [&]<int Rows>(index_t r, index_t group) {
      row_prefetcher& of_group = r == 0 ? prefetch : none;
      if (r == 0) prefetch.in_steps(4, (dim + 63) / 64 * (4 / vectors_of_group(Rows)));
      if (once)
        add_columns<Bits, Rows>(groups[group], rows, fours, column, dim, of_group, to.from_row(r));
      else
        add_columns<Bits, Rows>(groups[group], stored_in_fours{codes}, fours, column, dim, of_group, to.from_row(r));
    });
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#endif

#include "macros_on.hpp"
