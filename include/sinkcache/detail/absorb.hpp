#pragma once

// The hot loop: what a few query rows see of one segment, merged into their states. Keys are walked in tiles; all rows
// that see the same keys of a tile go through it together. A row's arithmetic does not depend on the rows beside it.

#include <algorithm>
#include <cmath>
#include <concepts>

#include "../format.hpp"
#include "../segment.hpp"
#include "simd.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// Rows of floats [n, round_up(dim, 16)] of a tile, `stride` floats apart.
struct tile_rows {
  const float* data;
  index_t stride;

  const float* row(index_t i) const { return data + i * stride; }
};

// The rows [first, first + n) of a store: f32 where they lie, other formats decoded into `scratch`.
template <kv_format F>
tile_rows rows_of(const std::byte* store, index_t block, index_t first, index_t n, index_t dim,
                  float* scratch) noexcept {
  if constexpr (std::same_as<F, f32>) {
    return {reinterpret_cast<const float*>(store + first * block), block / index_t{sizeof(float)}};
  } else {
    const index_t stride = round_up(dim, 16);
    for (index_t i = 0; i < n; ++i) {
      const index_t row = first + i;
      float* const to = scratch + i * stride;
      F::decode(store + row / F::block_rows * block, row % F::block_rows, dim, to);
      std::fill(to + dim, to + stride, 0.f);
    }
    return {scratch, stride};
  }
}

// logits[r][j] = q[r] . k[j], for Rows rows, `lanes` dot products at a time: as many accumulators as hide the latency
// of an FMA. Behind the n-th key the last one repeats. Meanwhile `ahead`, what is read next, comes into the L1.
template <int Rows>
void dot_products(const float* q, index_t dim, tile_rows k, index_t n, tile_rows ahead, float* logits) noexcept {
  constexpr int keys = lanes / Rows;
  for (index_t j = 0; j < n; j += keys) {
    const float* key[keys];
    for (int i = 0; i < keys; ++i) key[i] = k.row(std::min(j + i, n - 1));
    for (int i = 0; i < keys; ++i)
      for (index_t d = 0; d < dim; d += 16) __builtin_prefetch(ahead.row(std::min(j + i, n - 1)) + d);
    vfloat sums[lanes] = {};
    for (index_t d = 0; d < dim; d += 16)
#pragma GCC unroll 4
      for (index_t part = d; part < d + 16; part += lanes) {
        vfloat query[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) query[r] = load(q + r * dim + part);
#pragma GCC unroll 16
        for (int i = 0; i < keys; ++i) {
          const vfloat kd = load(key[i] + part);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) sums[r * keys + i] += query[r] * kd;
        }
      }
    const vfloat dots = sums_of_lanes(sums);
    for (int r = 0; r < Rows; ++r)
      std::memcpy(logits + r * tile_scratch::stride + j, reinterpret_cast<const char*>(&dots) + r * keys * 4,
                  keys * sizeof(float));
  }
}

// o[r] = o[r] * scale[r] + sum over j of weights[r][j] * v[j]. Long sums drift: 16 keys are summed by themselves, then
// the tile, which is added once. Strips of columns are a pattern that hardware does not prefetch, so each line of V
// brings in the same line of `ahead`.
template <int Rows, int Vectors>
void add_values(const float* weights, const float* scale, tile_rows v, index_t n, tile_rows ahead, index_t column,
                float* o, index_t o_stride) noexcept {
  vfloat tile[Rows][Vectors] = {};
  for (index_t first = 0; first < n; first += 16) {
    vfloat sums[Rows][Vectors] = {};
    const index_t last = std::min<index_t>(n, first + 16);
#pragma GCC unroll 4
    for (index_t j = first; j < last; ++j) {
      const float* const value = v.row(j) + column;
      for (int line = 0; line < Vectors * lanes; line += 16) __builtin_prefetch(ahead.row(j) + column + line);
#pragma GCC unroll 8
      for (int c = 0; c < Vectors; ++c) {
        const vfloat vc = load(value + c * lanes);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sums[r][c] += vc * weights[r * tile_scratch::stride + j];
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Vectors; ++c) tile[r][c] += sums[r][c];
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Vectors; ++c) {
      float* const to = o + r * o_stride + column + c * lanes;
      store(to, load(to) * scale[r] + tile[r][c]);
    }
}

template <int Rows, int Vectors>
void add_columns(const float* weights, const float* scale, tile_rows v, index_t n, tile_rows ahead, index_t column,
                 index_t dim, float* o, index_t o_stride) noexcept {
  for (; column + Vectors * lanes <= dim; column += Vectors * lanes)
    add_values<Rows, Vectors>(weights, scale, v, n, ahead, column, o, o_stride);
  if constexpr (Vectors > 1) add_columns<Rows, Vectors / 2>(weights, scale, v, n, ahead, column, dim, o, o_stride);
}

// tanh(x), within 2e-7 of it.
inline vfloat tanh(vfloat x) noexcept {
  const vfloat magnitude = x < vfloat{} ? -x : x, x2 = x * x;
  vfloat p = broadcast(-5.70498872745e-3f);  // Cephes tanhf, |x| < 0.625
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  const vfloat near = x + x * x2 * p;
  const vfloat t = exp2_nonpositive(magnitude * (-2 * std::numbers::log2e_v<float>));
  const vfloat far = (1.f - t) / (1.f + t);
  return magnitude < broadcast(0.625f) ? near : (x < vfloat{} ? -far : far);
}

// Soft cap, ALiBi and sink bias of one row's logits for the keys [first, first + n).
inline void adjust_logits(const query_rows& rows, index_t row, position_t gap, position_t first, index_t n,
                          float* logits) noexcept {
  if (rows.soft_cap > 0)
    for (index_t j = 0; j < n; j += lanes) store(logits + j, rows.soft_cap * tanh(load(logits + j) / rows.soft_cap));
  if (rows.terms == nullptr) return;
  const logit_terms& terms = rows.terms[row];
  if (terms.alibi_slope != 0) {
    const auto nearest = static_cast<float>(first - (terms.query - gap));
    for (index_t j = 0; j < n; ++j) logits[j] += terms.alibi_slope * (nearest + static_cast<float>(j));
  }
  const index_t pinned = static_cast<index_t>(std::clamp<position_t>(rows.num_sink_tokens - first, 0, n));
  for (index_t j = 0; j < pinned; ++j) logits[j] += terms.sink_bias;
}

// Turns the logits of one row into weights relative to its new maximum, and brings d along; returns the scale of o.
inline float weigh(float* logits, index_t n, float* m, float* d) noexcept {
  const index_t padded = round_up(n, lanes);
  std::fill(logits + n, logits + padded, no_logit);
  vfloat largest = load(logits);
  for (index_t j = lanes; j < padded; j += lanes) largest = max(largest, load(logits + j));
  // A whole number, so that no later change of it rounds what was summed.
  const float tile_max = std::ceil(max_of_lanes(largest)), new_max = tile_max > *m ? tile_max : *m;
  const float subtract = new_max == no_logit ? 0.f : new_max;  // logits of -inf alone: weights 0, not NaN
  vfloat sum{};
  for (index_t j = 0; j < padded; j += lanes) {
    const vfloat w = exp2_nonpositive(load(logits + j) - subtract);
    store(logits + j, w);
    sum += w;
  }
  const float scale = rescale(*m, new_max);
  *m = new_max;
  *d = *d * scale + sum_of_lanes(sum);
  return scale;
}

// `Rows` query rows from `row` on take in n keys and values, of positions from `first` on.
template <int Rows>
void absorb_rows(const query_rows& rows, index_t row, const extent* extents, tile_rows k, tile_rows v, tile_rows next_k,
                 position_t first, index_t n, const states& to, float* logits) noexcept {
  const index_t dim = round_up(rows.head_dim, 16);
  float scale[Rows];
  dot_products<Rows>(rows.q + row * dim, dim, k, n, v, logits);
  for (int r = 0; r < Rows; ++r) {
    float* const row_logits = logits + r * tile_scratch::stride;
    adjust_logits(rows, row + r, extents[row + r].gap, first, n, row_logits);
    scale[r] = weigh(row_logits, n, to.m + row + r, to.d + row + r);
  }
  add_columns<Rows, 8 / Rows>(logits, scale, v, n, next_k, 0, round_up(rows.v_head_dim, 16), to.o + row * to.o_stride,
                              to.o_stride);
}

// See absorb_fn.
template <kv_format K, kv_format V>
void absorb(const segment& from, const query_rows& rows, const extent* extents, const states& to,
            const tile_scratch& scratch) noexcept {
  position_t lo = from.last, hi = from.first;
  for (index_t r = 0; r < rows.rows; ++r) {
    if (extents[r].lo >= extents[r].hi) continue;
    lo = std::min(lo, std::max(extents[r].lo, from.first));
    hi = std::max(hi, std::min(extents[r].hi, from.last));
  }
  const index_t tile_keys = tile_scratch::keys(rows.head_dim, rows.v_head_dim);
  for (position_t tile = lo; tile < hi; tile += tile_keys) {
    const position_t end = std::min<position_t>(hi, tile + tile_keys);
    const index_t first_row = from.row + static_cast<index_t>(tile - from.first), n = static_cast<index_t>(end - tile);
    const tile_rows k = rows_of<K>(from.k, from.k_block, first_row, n, rows.head_dim, scratch.k);
    const tile_rows v = rows_of<V>(from.v, from.v_block, first_row, n, rows.v_head_dim, scratch.v);
    tile_rows next_k = k;
    if (std::same_as<K, f32> && end + n <= hi) next_k.data = k.row(n);
    // Rows that see the same keys of the tile go together; where they differ, no row touches what it does not see.
    for (index_t r = 0; r < rows.rows;) {
      const auto sees = [&](index_t row) {
        return position_span{std::max(extents[row].lo, tile), std::min(extents[row].hi, end)};
      };
      const position_span seen = sees(r);
      index_t same = r + 1;
      while (same < rows.rows && same < r + 4 && sees(same) == seen) ++same;
      if (seen.first >= seen.last) {
        ++r;
        continue;
      }
      const index_t offset = static_cast<index_t>(seen.first - tile), keys = seen.size();
      const auto together = [&]<int Rows>() {
        absorb_rows<Rows>(rows, r, extents, {k.row(offset), k.stride}, {v.row(offset), v.stride}, next_k, seen.first,
                          keys, to, scratch.logits);
        r += Rows;
      };
      if (same - r >= 4)
        together.template operator()<4>();
      else if (same - r >= 2)
        together.template operator()<2>();
      else
        together.template operator()<1>();
    }
  }
}

}  // namespace sinkcache::inline SINKCACHE_TAG::detail
