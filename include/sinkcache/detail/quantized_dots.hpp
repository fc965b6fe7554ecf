#pragma once

// Dot products of query rows with keys of few bits. A vector of sums has a quarter for each of four rows (of fewer
// rows, quarters of a row): 16 codes of a key are broadcast to all of them by the load.

#include <cmath>
#include <limits>

#include "macros_off.hpp"
#include "quantized_tile.hpp"
#include "reader.hpp"

#if defined(SINKCACHE_INTEGER_KERNELS)

namespace sinkcache::inline SINKCACHE_TAG::detail {

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
    constexpr double largest = 127 * 256 + 127, largest_sum = 8.4e6;
    double most = 0, magnitudes = 0;
    bool finite = true;
    for (index_t d = 0; d < dim; ++d) {
      const double magnitude = std::abs(static_cast<double>(q[d]));
      finite = finite && magnitude <= static_cast<double>(std::numeric_limits<float>::max());
      most = std::max(most, magnitude);
      magnitudes += magnitude;
    }
    const double per_unit = finite && most > 0 ? std::min(largest / most, largest_sum / magnitudes) : 0;
    factor[row] = !finite ? std::numeric_limits<float>::quiet_NaN() : most > 0 ? static_cast<float>(1 / per_unit) : 0;
    std::int32_t total = 0;
    for (index_t d = 0; d < steps(dim) * step; ++d) {
      const double x = d < dim && per_unit > 0 ? static_cast<double>(q[d]) * per_unit : 0;
      const auto whole = static_cast<std::int32_t>(x < 0 ? x - 0.5 : x + 0.5);
      const std::int32_t high = (whole + 128) >> 8;
      std::int8_t* const at = digits + d / step * 128 + row * step + d % step;
      at[0] = static_cast<std::int8_t>(high);
      at[64] = static_cast<std::int8_t>(whole - 256 * high);
      total += whole;
    }
    sum[row] = total;
  }
};

inline const float* integer_pack(const float* rows, index_t count, index_t dim, float* to) noexcept {
  if (dim < shortest_integer_row) return packed_rows<f32>(rows, count, dim, to);
  in_groups(count, [&]<int Rows>(index_t r, index_t) {
    const query_digits<Rows> group(to + r * dim, dim);
    for (int i = 0; i < Rows; ++i) group.put(i, rows + (r + i) * dim, dim);
    if (Rows < group.rows) {
      const float none[max_head_dim + 16] = {};
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

// The products of four keys: in each quarter of the result the four keys' sums of that quarter.
template <int Rows>
[[gnu::always_inline]] inline __m512i four_keys(const std::int8_t* digits, index_t steps,
                                                const std::uint8_t* const* codes) noexcept {
  __m512i high[4] = {}, low[4] = {};
#pragma GCC unroll 4
  for (index_t i = 0; i < steps; ++i) {
    const __m512i q_high = _mm512_loadu_si512(digits + i * 128), q_low = _mm512_loadu_si512(digits + i * 128 + 64);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i key = spread_to_rows<Rows>(codes[j] + i * query_digits<Rows>::step);
      high[j] = dot_bytes(high[j], key, q_high);
      low[j] = dot_bytes(low[j], key, q_low);
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

// The codes of a block of keys, a byte each, where a step of any row may read them: where they lie, or in `memory`.
inline constexpr index_t keys_of_block = 16;

template <int Bits, int Rows>
[[gnu::always_inline]] inline void codes_of_block(tile_rows k, index_t first, index_t n, index_t dim,
                                                  std::uint8_t* memory, const std::uint8_t** codes,
                                                  float* scales) noexcept {
  const index_t padded = round_up(dim, 64);
  for (index_t j = 0; j < keys_of_block; ++j) {
    const std::byte* const row = k.row(std::min(first + j, n - 1));
    scales[j] = bf16_at(row);
    codes[j] = reinterpret_cast<const std::uint8_t*>(row) + scale_bytes;
    if (Bits == 8 && dim % query_digits<Rows>::step == 0) continue;
    codes[j] = memory + j * padded;
    if (first + j < n)
      for (index_t d = 0; d < padded; d += 64)
        _mm512_storeu_si512(memory + j * padded + d, codes_at<Bits>(row, d, dim));
    else
      codes[j] = codes[0];
  }
}

// logits[j][r] for one group.
template <int Bits, int Rows>
[[gnu::noinline]] void integer_dot_products(const query_digits<Rows>& q, index_t dim, tile_rows k, index_t n,
                                            tile_rows next, float* logits) noexcept {
  constexpr int rows = query_digits<Rows>::rows, keys = 16 / rows;  // of a vector of logits
  const index_t steps = q.steps(dim);
  alignas(64) std::uint8_t memory[keys_of_block * round_up(max_head_dim, 64)];
  const std::uint8_t* codes[keys_of_block];
  alignas(64) float scales[keys_of_block];
  // What lane i of a vector of logits is of: [keys, Rows].
  const auto key_of = [](int i) { return std::min(i / Rows, keys - 1); };
  const auto row_of = [](int i) { return i % Rows; };
  const __m512i row_numbers = numbers_of(row_of), key_numbers = numbers_of(key_of);
  float factors[16] = {};
  std::int32_t sums[16] = {};
  std::copy_n(q.factor, rows, factors);
  std::copy_n(q.sum, rows, sums);
  const vfloat factor = permuted(row_numbers, load(factors));
  const __m512i sum = permuted(row_numbers, _mm512_loadu_si512(sums));
  const vfloat half_sum = as_floats(sum) * 0.5f;
  const __m512i offset = _mm512_maskz_slli_epi32(0xffff, sum, Bits - 1);
  const __m512i order = numbers_of([&](int i) { return key_of(i) / 4 * 4 * rows + row_of(i) * 4 + key_of(i) % 4; });
  const std::byte* line = next.data;
  const index_t lines_bytes = next.stride <= 2 * next.bytes ? next.stride : next.bytes;
  for (index_t first = 0; first < n; first += keys_of_block) {
    codes_of_block<Bits, Rows>(k, first, n, dim, memory, codes, scales);
    const index_t left = std::min(keys_of_block, n - first);
    for (index_t j = 0; j < left; j += keys) {
      for (index_t at = 0; at < keys * lines_bytes; at += 64) prefetch_line(line, at);
      line = moved(line, keys * lines_bytes);
      __m512i products = four_keys<Rows>(q.digits, steps, codes + j);
      if constexpr (rows == 2) products = halves_added(products, four_keys<Rows>(q.digits, steps, codes + j + 4));
      if constexpr (rows == 1) {
        const __m512i after = four_keys<Rows>(q.digits, steps, codes + 4);
        products = halves_added(products, after);
        const __m512i third = four_keys<Rows>(q.digits, steps, codes + 8);
        products = halves_added(products, halves_added(third, four_keys<Rows>(q.digits, steps, codes + 12)));
      }
      if constexpr (rows > 1) products = permuted(order, products);
      const __m512i centred = _mm512_maskz_sub_epi32(0xffff, products, offset);
      const __m512i numbers = added(key_numbers, _mm512_set1_epi32(static_cast<int>(j)));
      const vfloat values = (as_floats(centred) + half_sum) * (factor * permuted(numbers, load(scales)));
      float* const to = logits + (first + j) * Rows;
      if constexpr (Rows == 3)
        _mm512_mask_storeu_ps(to, 0xfff, values);
      else
        store(to, values);
    }
  }
}

template <int Bits>
void integer_dots(const float* packed, index_t count, index_t dim, tile_rows k, index_t n, tile_rows next,
                  float* logits) noexcept {
  if (n <= 0) return;
  if (dim < shortest_integer_row) {
    alignas(64) float keys[tile_scratch::keys * shortest_integer_row];
    for (index_t j = 0; j < n; ++j) quantized_row<Bits>::decode(k.row(j), 0, dim, keys + j * dim);
    const index_t bytes = dim * index_t{sizeof(float)};
    return group_dots<f32>(packed, count, dim, {reinterpret_cast<const std::byte*>(keys), bytes, bytes}, n, next,
                           logits);
  }
  in_groups(count, [&]<int Rows>(index_t r, index_t group) {
    const query_digits<Rows> q(const_cast<float*>(packed) + r * dim, dim);
    integer_dot_products<Bits, Rows>(q, dim, k, n, next, logits_of(logits, group));
  });
}

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#endif

#include "macros_on.hpp"
