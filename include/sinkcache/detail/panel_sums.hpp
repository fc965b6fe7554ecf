#pragma once

// What many query rows give each key, summed: a second pass over the keys, when the rows' softmax is known.

#include <algorithm>

#include "macros_off.hpp"
#include "tile_dots.hpp"
#include "tile_softmax.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// NaN counts nothing in a sum.
inline float known_weight(float w) { return w == w ? w : 0.f; }

// Logits, relative to m and in base 2, become normalised weights.
inline void to_weights(float* logits, index_t n, float m, float weight) noexcept {
  if (m == no_logit) return static_cast<void>(std::fill_n(logits, n, 0.f));  // nothing was seen
  index_t i = 0;
  for (; i + lanes <= n; i += lanes) store(logits + i, exp2_nonpositive(load(logits + i) - m) * weight);
  for (; i < n; ++i) logits[i] = exp2_nonpositive(logits[i] - m) * weight;
}

// Of each row of a block, in whole panels: the maximum of its logits, and the normalised weight of a logit that equals
// it; 0 where nothing is seen, and after the last row.
struct row_weights {
  const float *m, *weight;
  float* to;  // sums, a key each

  float of(index_t row, float logit) const { return known_weight(exp2_nonpositive(logit - m[row]) * weight[row]); }
};

// Where logits are kept for those who ask what a query gives each key: [rows, stride], a part's row 0 as number
// `first`.
struct kept_logits {
  float* to = nullptr;
  index_t stride = 0, first = 0;
  const row_weights* sums = nullptr;  // instead: what rows give each key is summed

  // Of n rows from `number` on.
  template <int Rows>
  void keep(const float* logits, index_t row, index_t number, index_t n) const noexcept {
    float* const at = to + row * stride + first + number;
    index_t j = 0;
    for (; j + lanes <= n; j += lanes) {
      vfloat of_keys[Rows];
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) of_keys[i] = load(logits + j * Rows + i * lanes);
      row_lanes<Rows>::for_rows(of_keys, [&](int r, vfloat of_row) { store(at + r * stride + j, of_row); });
    }
    for (; j < n; ++j)
      for (int r = 0; r < Rows; ++r) at[r * stride + j] = logits[j * Rows + r];
  }
};

// What a row sees between `first` and `last`.
inline position_span seen_of(const extent& extent, position_t first, position_t last) {
  const position_span span{std::max(extent.lo, first), std::min(extent.hi, last)};
  return span.first < span.last ? span : position_span{};
}

// Adds what the panel of rows from `row` on gives each of n keys to sums [n, lanes]. A row's weight of what it does not
// see is 0, whatever is there, and so is NaN.
inline void sum_panel(const query_rows& rows, index_t row, const extent* extents, tile_rows k, position_t first,
                      index_t n, const row_weights& weights, float* logits, float* sums) noexcept {
  constexpr int panel = query_rows::panel;
  const index_t dim = round_up(rows.head_dim, 16);
  alignas(64) float from[panel] = {}, upto[panel] = {};
  index_t lo = n, hi = 0;
  for (int r = 0; r < panel && row + r < rows.rows; ++r) {
    const position_span seen = seen_of(extents[row + r], first, first + n);
    if (seen.size() == 0) continue;
    const index_t at = static_cast<index_t>(seen.first - first), end = at + seen.size();
    from[r] = static_cast<float>(at), upto[r] = static_cast<float>(end);
    lo = std::min(lo, at), hi = std::max(hi, end);
  }
  if (lo >= hi) return;
  panel_dot_products(rows.q + row * dim, dim, k.from_row(lo), hi - lo, logits);
  if (rows.soft_cap > 0 || rows.terms != nullptr) adjust_logits<panel>(rows, row, extents, first + lo, hi - lo, logits);
  for (int part = 0; part < panel; part += lanes) {
    const vfloat m = load(weights.m + row + part), weight = load(weights.weight + row + part);
    const vfloat zero{};
    const vfloat sees_from = load(from + part), sees_upto = load(upto + part);
    for (index_t j = lo; j < hi; ++j) {
      const vfloat key = broadcast(static_cast<float>(j));
      const auto is_seen = (key >= sees_from) & (key < sees_upto);
      const vfloat w = exp2_nonpositive(load(logits + (j - lo) * panel + part) - m) * weight;
      store(sums + j * lanes, load(sums + j * lanes) + ((is_seen & (w >= zero)) ? w : zero));
    }
  }
}

// Adds what all rows give the n keys of a tile to `to`.
inline void sum_tile(const query_rows& rows, const extent* extents, tile_rows k, position_t first, index_t n,
                     const row_weights& weights, const tile_scratch& scratch, float* to) noexcept {
  float* const sums = scratch.v;  // no values are read
  std::fill_n(sums, n * lanes, 0.f);
  for (index_t r = 0; r < rows.rows; r += query_rows::panel)
    sum_panel(rows, r, extents, k, first, n, weights, scratch.logits, sums);
  for (index_t j = 0; j < n; ++j)
    to[j] += join_lanes<1>(load(sums + j * lanes), [](vfloat a, vfloat b) { return a + b; })[0];
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
