#pragma once

// Dot products of query rows with keys of few bits. A vector of sums has a quarter for each of four rows (of fewer
// rows, quarters of a row): 16 codes of a key are broadcast to all of them by the load.

#include <cmath>
#include <limits>

#include "macros_off.hpp"
#include "quantized_tile.hpp"
#include "reader.hpp"

#if defined(SINKCACHE_VNNI)

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// A group of query rows: [steps, 2, 64] bytes of digits, of each row as many as fit 64 bytes with the others; then a
// factor and a sum for each row. Shorter rows than these do not fit what floats take, and are multiplied as floats.
inline constexpr index_t shortest_integer_row = 48;

template <int Rows>
struct query_digits {
  static constexpr int rows = Rows == 3 ? 4 : Rows;  // that a vector has quarters for
  static constexpr index_t step = 64 / rows;         // elements of a row in a vector
  static constexpr index_t steps(index_t dim) { return (dim + step - 1) / step; }

  std::int8_t* digits;
  float* factor;
  std::int32_t* sum;

  query_digits(float* memory, index_t dim) noexcept
      : digits(reinterpret_cast<std::int8_t*>(memory)),
        factor(reinterpret_cast<float*>(digits + steps(dim) * 128)),
        sum(reinterpret_cast<std::int32_t*>(factor + rows)) {}

  // The row's numbers are factor * (256 high + low), rounded; their sum with codes of 8 bits fits 32.
  void put(int row, const float* q, index_t dim) const noexcept {
    const query_unit unit(q, dim);
    factor[row] = unit.factor();
    __m512i total{};
    for (index_t d = 0; d < steps(dim) * step; d += lanes) {
      const vfloat x = d < dim ? load(q + d) * unit.up * unit.per_unit : vfloat{};
      const __m512i whole = _mm512_maskz_cvtps_epi32(unit.finite ? 0xffff : 0, x);
      const __m512i high = _mm512_maskz_srai_epi32(0xffff, added(whole, _mm512_set1_epi32(128)), 8);
      const __m512i low = _mm512_maskz_sub_epi32(0xffff, whole, _mm512_maskz_slli_epi32(0xffff, high, 8));
      std::int8_t* const at = digits + d / step * 128 + row * step + d % step;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_maskz_cvtepi32_epi8(0xffff, high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 64), _mm512_maskz_cvtepi32_epi8(0xffff, low));
      total = added(total, whole);
    }
    std::int32_t of_lanes[16], all = 0;
    _mm512_storeu_si512(of_lanes, total);
    for (std::int32_t of : of_lanes) all += of;
    sum[row] = all;
  }
};

inline const float* integer_pack(const float* rows, index_t count, index_t dim, float* to) noexcept {
  if (dim < shortest_integer_row) return packed_rows<f32>(rows, count, dim, to);
  in_groups(count, [&]<int Rows>(index_t r, index_t) {
    const query_digits<Rows> group(to + r * dim, dim);
    for (int i = 0; i < Rows; ++i) group.put(i, rows + (r + i) * dim, dim);
    if constexpr (Rows < group.rows) {
      alignas(64) static constexpr float none[round_up(max_head_dim, 16)] = {};
      group.put(Rows, none, dim);
    }
  });
  return to;
}

// Codes of a key that a vector of sums meets at a time, in all quarters of their row.
template <int Rows>
[[gnu::always_inline]] inline __m512i spread_to_rows(const std::uint8_t* codes) noexcept {
  if constexpr (query_digits<Rows>::rows == 4)
    return _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  else if constexpr (query_digits<Rows>::rows == 2)
    return _mm512_maskz_broadcast_i64x4(0xff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  else
    return _mm512_loadu_si512(codes);
}

// The products of four keys, `stride` bytes apart: in each quarter of the result the four keys' sums of that quarter.
// Prefetches their share of other rows first.
template <int Rows>
[[gnu::always_inline]] inline __m512i four_keys(const std::int8_t* digits, index_t steps, const std::uint8_t* codes,
                                                index_t stride, row_prefetcher& prefetch) noexcept {
  prefetch.next();
  __m512i high[4], low[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) high[j] = low[j] = __m512i{};
#pragma GCC unroll 1
  for (index_t i = 0; i < steps; ++i, digits += 128, codes += query_digits<Rows>::step) {
    const __m512i q_high = _mm512_loadu_si512(digits), q_low = _mm512_loadu_si512(digits + 64);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i key = spread_to_rows<Rows>(codes + j * stride);
      dot_bytes(high[j], key, q_high);
      dot_bytes(low[j], key, q_low);
    }
  }
  __m512i sums[4], pairs[2];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) sums[j] = both_digits(high[j], low[j]);
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j)
    pairs[j] = added(_mm512_maskz_unpacklo_epi32(0xffff, sums[2 * j], sums[2 * j + 1]),
                     _mm512_maskz_unpackhi_epi32(0xffff, sums[2 * j], sums[2 * j + 1]));
  return added(_mm512_maskz_unpacklo_epi64(0xff, pairs[0], pairs[1]),
               _mm512_maskz_unpackhi_epi64(0xff, pairs[0], pairs[1]));
}
// Neighbouring quarters of both added up.
[[gnu::always_inline]] inline __m512i halves_added(__m512i a, __m512i b) noexcept {
  return added(_mm512_maskz_shuffle_i32x4(0xffff, a, b, 0x88), _mm512_maskz_shuffle_i32x4(0xffff, a, b, 0xdd));
}

// Sixteen keys, a byte a code, where steps of any group may read them: where they lie, or in `memory`; after the last
// key zeros.
struct key_block {
  static constexpr index_t keys = 16;

  const std::uint8_t* codes;
  index_t stride;
  float scales[keys];
  std::uint8_t memory[keys * round_up(max_head_dim, 64)];

  template <int Bits>
  void load(tile_rows k, index_t n, index_t dim) noexcept {
    load_scales(k, std::min(keys, n), scales);
    if (Bits == 8 && n >= keys && dim % 64 == 0) {
      codes = reinterpret_cast<const std::uint8_t*>(k.data) + scale_bytes;
      stride = k.stride;
      return;
    }
    codes = memory;
    stride = round_up(dim, 64);
    for (index_t j = 0; j < std::min(keys, n); ++j)
      for (index_t d = 0; d < dim; d += 64)
        _mm512_storeu_si512(memory + j * stride + d, codes_at<Bits>(k.row(j), d, dim));
  }
};

// What the lanes of a vector of logits [keys, Rows] are of, and where the products of quarters [rows, 4 keys] have
// them.
template <int Rows>
struct logit_lanes {
  static constexpr int rows = query_digits<Rows>::rows, keys = 16 / rows;

  alignas(64) std::int32_t row[16], key[16], product[16];

  constexpr logit_lanes() : row(), key(), product() {
    for (int i = 0; i < 16; ++i) {
      row[i] = i % Rows;
      key[i] = std::min(i / Rows, keys - 1);
      product[i] = key[i] / 4 * 4 * rows + row[i] * 4 + key[i] % 4;
    }
  }
};

// logits[j][r] for one group and n keys of a block; some more than n are written.
template <int Bits, int Rows>
[[gnu::noinline]] void block_dot_products(const query_digits<Rows>& q, index_t dim, const key_block& block, index_t n,
                                          row_prefetcher& prefetch, float* logits) noexcept {
  static constexpr logit_lanes<Rows> of{};
  constexpr int rows = of.rows, keys = of.keys;
  const index_t steps = q.steps(dim), stride = block.stride;
  row_prefetcher ahead = prefetch;  // in registers
  const auto four = [&](const std::uint8_t* codes) __attribute__((always_inline)) {
    return four_keys<Rows>(q.digits, steps, codes, stride, ahead);
  };
  constexpr __mmask16 some = (1 << rows) - 1;
  const __m512i of_row = _mm512_load_si512(of.row), sum = permuted(of_row, _mm512_maskz_loadu_epi32(some, q.sum));
  const vfloat factor = permuted(of_row, vfloat(_mm512_maskz_loadu_ps(some, q.factor)));
  const vfloat half_sum = as_floats(sum) * 0.5f;
  const __m512i offset = _mm512_maskz_slli_epi32(0xffff, sum, Bits - 1);
  const vfloat scales = load(block.scales);
  __m512i of_key = _mm512_load_si512(of.key);
  const std::uint8_t* codes = block.codes;
  for (index_t j = 0; j < n; j += keys, codes += keys * stride, logits += keys * Rows) {
    __m512i products = four(codes);
    if constexpr (rows == 2) products = halves_added(products, four(codes + 4 * stride));
    if constexpr (rows == 1) {
      products = halves_added(products, four(codes + 4 * stride));
      const __m512i third = four(codes + 8 * stride);
      products = halves_added(products, halves_added(third, four(codes + 12 * stride)));
    }
    if constexpr (rows > 1) products = permuted(_mm512_load_si512(of.product), products);
    const __m512i centred = _mm512_maskz_sub_epi32(0xffff, products, offset);
    const vfloat values = (as_floats(centred) + half_sum) * (factor * permuted(of_key, scales));
    of_key = added(of_key, _mm512_set1_epi32(keys));
    if constexpr (Rows == 3)
      _mm512_mask_storeu_ps(logits, 0xfff, values);
    else
      store(logits, values);
  }
  prefetch = ahead;
}

// The same for rows that are multiplied as floats.
template <int Bits>
void short_dots(const float* packed, index_t count, index_t dim, tile_rows k, index_t n, tile_rows next,
                float* logits) noexcept {
  alignas(64) float keys[tile_scratch::keys * shortest_integer_row];
  for (index_t j = 0; j < n; ++j) quantized_row<Bits>::decode(k.row(j), 0, dim, keys + j * dim);
  const index_t bytes = dim * index_t{sizeof(float)};
  group_dots<f32>(packed, count, dim, {reinterpret_cast<const std::byte*>(keys), bytes, bytes}, n, next, logits);
}

template <int Bits>
void integer_dots(const float* packed, index_t count, index_t dim, tile_rows k, index_t n, tile_rows next,
                  float* logits) noexcept {
  if (n <= 0) return;
  if (dim < shortest_integer_row) return short_dots<Bits>(packed, count, dim, k, n, next, logits);
  key_block block;
  row_prefetcher prefetch(next, n), none;
  for (index_t first = 0; first < n; first += key_block::keys) {
    block.load<Bits>(k.from_row(first), n - first, dim);
    in_groups(count, [&]<int Rows>(index_t r, index_t group) {
      const query_digits<Rows> q(const_cast<float*>(packed) + r * dim, dim);
      if (r == 0) prefetch.in_steps(4, 1);
      block_dot_products<Bits, Rows>(q, dim, block, std::min(key_block::keys, n - first), r == 0 ? prefetch : none,
                                     logits_of(logits, group) + first * Rows);
    });
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#endif

#include "macros_on.hpp"
