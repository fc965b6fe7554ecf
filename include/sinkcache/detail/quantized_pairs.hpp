#pragma once

// Dot products and weighted sums of rows of few bits by products of 16-bit integers, of which each sum takes two at a
// time: of neighbouring elements of a key, or of an element of two values. The codes of a tile are laid out for that
// first.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "macros_off.hpp"
#include "quantized_tile.hpp"

#if defined(SINKCACHE_INTEGER_KERNELS) && !defined(SINKCACHE_VNNI)

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

typedef std::int32_t vint_quad __attribute__((vector_size(16)));
typedef std::int32_t vint_oct __attribute__((vector_size(32)));

// Keys a byte a code. What dot_products takes for an element is a pair of codes.
struct code_pairs {
#if defined(__AVX2__)
  using key_vector = vint_oct;
#else
  using key_vector = vint_quad;
#endif
  static constexpr index_t element_bytes = 2;

  [[gnu::always_inline]] static key_vector load(const std::byte* from) noexcept {
#if defined(__aarch64__)
    return std::bit_cast<key_vector>(vmovl_u8(vld1_u8(reinterpret_cast<const std::uint8_t*>(from))));
#else
    const auto* const bytes = reinterpret_cast<const __m128i*>(from);
#if defined(__AVX2__)
    return key_vector(_mm256_cvtepu8_epi16(_mm_loadu_si128(bytes)));
#else
    return key_vector(_mm_unpacklo_epi8(_mm_loadl_epi64(bytes), __m128i{}));
#endif
#endif
  }
};

// To the nearest whole number.
[[gnu::always_inline]] inline vint_quad rounded(vquad x) noexcept {
#if defined(__aarch64__)
  return std::bit_cast<vint_quad>(vcvtnq_s32_f32(std::bit_cast<float32x4_t>(x)));
#else
  return vint_quad(_mm_cvtps_epi32(x));
#endif
}
// The numbers of both, those beyond 16 bits as the last that fit.
typedef std::int16_t eight_words __attribute__((vector_size(16)));
[[gnu::always_inline]] inline eight_words narrowed(vint_quad a, vint_quad b) noexcept {
#if defined(__aarch64__)
  const int16x4_t low = vqmovn_s32(std::bit_cast<int32x4_t>(a)), high = vqmovn_s32(std::bit_cast<int32x4_t>(b));
  return std::bit_cast<eight_words>(vcombine_s16(low, high));
#else
  return eight_words(_mm_packs_epi32(__m128i(a), __m128i(b)));
#endif
}

// A group of query rows: pairs of 16 bits as dot_products reads them, then a factor and a sum for each row.
template <int Rows>
struct query_pairs {
  float *pairs, *factor;
  std::int32_t* sum;

  query_pairs(float* memory, index_t dim) noexcept
      : pairs(memory), factor(memory + Rows * dim / 2), sum(reinterpret_cast<std::int32_t*>(factor + Rows)) {}

  void put(int row, const float* q, index_t dim) const noexcept {
    const query_unit unit(q, dim);
    constexpr index_t step = 2 * width_of<code_pairs::key_vector>;  // elements of a vector
    vint_quad total{};
    for (index_t d = 0; d < dim; d += 8) {
      vint_quad four[2];
      for (int i = 0; i < 2; ++i) {
        four[i] = unit.finite ? rounded(load<vquad>(q + d + 4 * i) * unit.up * unit.per_unit) : vint_quad{};
        total += four[i];
      }
      const eight_words eight = narrowed(four[0], four[1]);
      std::memcpy(pairs + ((d / step * Rows + row) * step + d % step) / 2, &eight, sizeof eight);
    }
    factor[row] = unit.factor();
    sum[row] = total[0] + total[1] + total[2] + total[3];
  }
};

// NOLINTNEXTLINE(readability-non-const-parameter): a template writes through it
inline const float* integer_pack(const float* rows, index_t count, index_t dim, float* to) noexcept {
  in_groups(count, [&]<int Rows>(index_t r, index_t) {
    const query_pairs<Rows> group(to + r * dim, dim);
    for (int i = 0; i < Rows; ++i) group.put(i, rows + (r + i) * dim, dim);
  });
  return to;
}

// The key, of four with Rows logits each, that a lane of vector number Quad is of.
template <int Rows, int Quad>
constexpr int key_of_lane(int lane) noexcept {
  return (4 * Quad + lane) / Rows;
}

// Of sums of products with codes [n, Rows], the logits; up to three keys more are written.
template <int Bits, int Rows>
void logits_from_sums(const query_pairs<Rows>& q, const float* scales, index_t n, float* logits) noexcept {
  vint_quad offset[Rows];
  vquad half_sum[Rows], factor[Rows];
  for (int i = 0; i < 4 * Rows; ++i) {
    offset[i / 4][i % 4] = q.sum[i % Rows] * (1 << (Bits - 1));
    half_sum[i / 4][i % 4] = 0.5f * static_cast<float>(q.sum[i % Rows]);
    factor[i / 4][i % 4] = q.factor[i % Rows];
  }
  for (index_t j = 0; j < n; j += 4) {
    const vquad of_keys = load<vquad>(scales + j);
    const auto put = [&]<int Quad>() __attribute__((always_inline)) {
      float* const at = logits + j * Rows + 4 * Quad;
      const auto centred = load<vint_quad>(at) - offset[Quad];
      const vquad scale = factor[Quad] * shuffled<4, key_of_lane<Rows, Quad>>(of_keys, of_keys);
      store(at, (__builtin_convertvector(centred, vquad) + half_sum[Quad]) * scale);
    };
    put.template operator()<0>();
    if constexpr (Rows > 1) put.template operator()<1>();
    if constexpr (Rows > 2) put.template operator()<2>();
    if constexpr (Rows > 3) put.template operator()<3>();
  }
}

// Codes [first, first + columns) of n rows, a byte each: where they lie, or in `to`.
template <int Bits>
tile_rows byte_rows(tile_rows rows, index_t n, index_t first, index_t columns, index_t dim, std::byte* to) noexcept {
  if constexpr (Bits == 8) return {rows.data + scale_bytes + first, rows.stride, rows.bytes};
  for (index_t j = 0; j < n; ++j) codes_of<Bits>(rows.row(j), first, columns, dim, to + j * columns);
  return {to, columns, columns};
}

template <int Bits>
void integer_dots(const float* packed, index_t count, index_t dim, tile_rows k, index_t n, tile_rows next,
                  float* logits) noexcept {
  constexpr index_t some = Bits == 8 ? tile_scratch::keys : 32;  // keys whose codes stay in the L1
  alignas(64) std::byte memory[Bits == 8 ? 1 : some * round_up(max_head_dim, 16)];
  alignas(16) float scales[some];
  for (index_t first = 0, m; first < n; first += m) {
    m = std::min(some, n - first);
    const tile_rows rows = k.from_row(first);
    load_scales(rows, m, scales);
    std::fill(scales + m, scales + std::min(some, m + 3), 0.f);
    const tile_rows codes = byte_rows<Bits>(rows, m, 0, dim, dim, memory);
    in_groups(count, [&]<int Rows>(index_t r, index_t group) {
      const query_pairs<Rows> q(const_cast<float*>(packed) + r * dim, dim);
      float* const of_group = logits_of(logits, group) + first * Rows;
      dot_products<code_pairs, Rows>(q.pairs, dim / 2, codes, m, next.from_row(first), of_group);
      logits_from_sums<Bits>(q, scales, m, of_group);
    });
  }
}

// The weights of a group of rows over a tile, times scales: pairs of two keys' [keys / 2, 4], and what sums mean.
struct weight_pairs {
  alignas(16) float pairs[tile_scratch::keys / 2][4];
  vquad factor;
  vint_quad sum;

  // Which rows are left out, a bit each: where a weight or a scale is not a number, or all are next to nothing.
  template <int Rows>
  int put(const float* weights, const float* scales, index_t n) noexcept {
    vquad products[tile_scratch::keys], largest[2] = {}, zeros[2] = {};  // what lies after a key's weights, too
    const auto take = [&](index_t j, index_t i) __attribute__((always_inline)) {
      products[j] = load<vquad>(weights + j * Rows) * scales[j];
      largest[i] = products[j] > largest[i] ? products[j] : largest[i];
      zeros[i] += products[j] * 0.f;
    };
    for (index_t j = 0; j + 1 < n; j += 2) take(j, 0), take(j + 1, 1);
    if (n % 2 == 1) take(n - 1, 0), products[n] = vquad{};
    largest[0] = largest[1] > largest[0] ? largest[1] : largest[0];
    zeros[0] += zeros[1];
    constexpr float top = 32767;
    vquad per_unit{};
    vint_quad kept{};
    factor = vquad{};
    int left_out = 0;
    for (int r = 0; r < Rows; ++r) {
      const float most = largest[0][r];
      const bool out = zeros[0][r] != 0 || (most > 0 && most < 0x1p-90f);
      left_out |= int{out} << r;
      if (out || most <= 0) continue;
      kept[r] = -1, per_unit[r] = top / most, factor[r] = most / top;
    }
    sum = vint_quad{};
    for (index_t j = 0; j < n; j += 2) {
      const vint_quad a = rounded(products[j] * per_unit) & kept, b = rounded(products[j + 1] * per_unit) & kept;
      sum += a + b;
      const eight_words words = narrowed(a, b);
      store(pairs[j / 2], __builtin_shufflevector(words, words, 0, 4, 1, 5, 2, 6, 3, 7));
    }
    return left_out;
  }
};

// A pair of weights for every column.
[[gnu::always_inline]] inline vint broadcast_pair(const float* pair) noexcept {
  const auto pairs = std::bit_cast<std::int32_t>(*pair) - vint{};
#if defined(__aarch64__)
  constexpr uint8x16_t halves = {0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3};
  return std::bit_cast<vint>(vqtbl1q_u8(std::bit_cast<uint8x16_t>(pairs), halves));
#else
  return pairs;
#endif
}

// Codes of two values in 16 bits each, as add_product takes pairs; after the last value of a tile itself.
struct value_pairs {
  tile_rows codes;
  index_t n;
  const std::byte *first = nullptr, *second = nullptr;

  [[gnu::always_inline]] void go_to(index_t j) noexcept {
    first = codes.row(j);
    second = j + 1 < n ? first + codes.stride : first;
  }
  // Of the vectors of columns from `column` on number i; they come `together`.
  static constexpr int together = lanes == 16 ? 1 : 2;
  [[gnu::always_inline]] vint load(index_t column, int i) const noexcept {
    column += i / together * together * lanes;
#if defined(__aarch64__)
    const uint32x2_t x = vreinterpret_u32_u8(vld1_u8(reinterpret_cast<const std::uint8_t*>(first + column)));
    const uint32x2_t y = vreinterpret_u32_u8(vld1_u8(reinterpret_cast<const std::uint8_t*>(second + column)));
    return std::bit_cast<vint>(vmovl_u8(vreinterpret_u8_u32(i % 2 == 0 ? vzip1_u32(x, y) : vzip2_u32(x, y))));
#else
    const auto* const a = reinterpret_cast<const __m128i*>(first + column);
    const auto* const b = reinterpret_cast<const __m128i*>(second + column);
#if defined(__AVX512BW__)
    const __m128i x = _mm_loadu_si128(a), y = _mm_loadu_si128(b);
    const __m256i bytes = _mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y));
    return vint(_mm512_maskz_cvtepu8_epi16(~__mmask32{0}, bytes));
#elif defined(__AVX2__)
    const __m128i x = _mm_loadu_si128(a), y = _mm_loadu_si128(b);
    return vint(_mm256_cvtepu8_epi16(i % 2 == 0 ? _mm_unpacklo_epi8(x, y) : _mm_unpackhi_epi8(x, y)));
#else
    const __m128i bytes = _mm_unpacklo_epi8(_mm_loadl_epi64(a), _mm_loadl_epi64(b)), zeros{};
    return vint(i % 2 == 0 ? _mm_unpacklo_epi8(bytes, zeros) : _mm_unpackhi_epi8(bytes, zeros));
#endif
#endif
  }
};

// A strip of columns of a tile times the weights of a group, for a group's sums. Prefetches other rows meanwhile.
template <int Bits, int Rows, int Vectors>
[[gnu::noinline]] void add_pairs(const weight_pairs& weights, value_pairs values, index_t column,
                                 const running_states& to, row_prefetcher& prefetch) noexcept {
  vint sums[Vectors][Rows];
  clear(sums);
  row_prefetcher ahead = prefetch;  // in registers
  const float* pair = weights.pairs[0];
  for (index_t j = 0; j < values.n; j += 2, pair += 4) {
    ahead.next();
    values.go_to(j);
    add_products(
        sums, [&](int i) __attribute__((always_inline)) { return values.load(column, i); },
        [&](int r) __attribute__((always_inline)) { return broadcast_pair(pair + r); }, no_prefetch{});
  }
  prefetch = ahead;
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Vectors; ++i) {
    const int r = i % Rows;
    const vint centred = sums[i / Rows][r] - weights.sum[r] * (1 << (Bits - 1));
    const float half_sum = 0.5f * static_cast<float>(weights.sum[r]);
    to.add(r * to.o_stride + column + i / Rows * lanes,
           (__builtin_convertvector(centred, vfloat) + half_sum) * weights.factor[r]);
  }
}

template <int Bits>
void integer_add(const float* weights, index_t count, tile_rows v, index_t offset, index_t n, index_t dim,
                 const running_states& to, tile_rows next) noexcept {
  if (n <= 0) return;
  constexpr index_t piece = Bits == 8 ? max_head_dim : 64;  // columns whose codes stay in the L1
  alignas(16) float scales[tile_scratch::keys];
  load_scales(v, n, scales);
  alignas(64) std::byte memory[Bits == 8 ? 1 : tile_scratch::keys * piece];
  weight_pairs groups[most_groups];
  put_groups<Bits>(groups, weights, count, scales, v, offset, n, dim, to);
  row_prefetcher prefetch(next, n), none;
  for (index_t first = 0; first < dim; first += piece) {
    const index_t columns = std::min(piece, dim - first);
    const value_pairs values{byte_rows<Bits>(v, n, first, columns, dim, memory), n};
    in_groups(count, [&]<int Rows>(index_t r, index_t group) {
      running_states sums = to.from_row(r);
      sums.o += first, sums.o_rest += first;
      constexpr int vectors = Rows > 2 && cpu.registers < 32 ? 2 : 4;
      if (r == 0) prefetch.in_steps(2, (dim + vectors * lanes - 1) / (vectors * lanes));
      constexpr int together = value_pairs::together;
      in_strips<Rows, vectors / together>(columns / together, [&]<int Strips>(index_t column) {
        add_pairs<Bits, Rows, Strips * together>(groups[group], values, column * together, sums,
                                                 r == 0 ? prefetch : none);
      });
    });
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#endif

#include "macros_on.hpp"
