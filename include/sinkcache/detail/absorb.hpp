#pragma once

// The hot loop: what query rows see of one segment, merged into their states. Keys are walked in tiles, logits lie as
// [keys, rows of the group], so that the softmax needs no sums across a vector. A few rows (decode) go through a tile
// in groups of up to four: a key is loaded once for a group, where it lies and whatever its format. Many rows (prefill)
// go in panels, a row a lane, over a tile that was decoded once. A row's arithmetic does not depend on others.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <type_traits>

#include "tile.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// Soft cap, ALiBi and sink bias of Rows rows' logits for the keys [first, first + n).
template <int Rows, int Width = width_of<Rows>>
void adjust_logits(const query_rows& rows, index_t row, const extent* extents, position_t first, index_t n,
                   float* logits) noexcept {
  using lanes_of = row_lanes<Width>;
  const index_t all = round_up(n * Width, lanes);
  if (rows.soft_cap > 0) {
    const float inverse = std::min(1 / rows.soft_cap, std::numeric_limits<float>::max());  // 0 times it has to be 0
    for (index_t i = 0; i < all; i += lanes) store(logits + i, rows.soft_cap * tanh(load(logits + i) * inverse));
  }
  if (rows.terms == nullptr) return;
  float slope[std::max(Width, 4)] = {}, bias[Width] = {}, nearest[std::max(Width, 4)] = {};
  for (int r = 0; r < Rows && row + r < rows.rows; ++r) {
    const logit_terms& terms = rows.terms[row + r];
    slope[r] = terms.alibi_slope;
    bias[r] = terms.sink_bias;
    nearest[r] = static_cast<float>(first - (terms.query - extents[row + r].gap));
  }
  vfloat slopes[lanes_of::vectors], from[lanes_of::vectors], key = lanes_of::key_numbers();
  lanes_of::spread(slope, slopes);
  lanes_of::spread(nearest, from);
  for (index_t i = 0; i < all; i += lanes_of::vectors * lanes, key += static_cast<float>(lanes_of::keys))
    for (int part = 0; part < lanes_of::vectors; ++part) {
      float* const at = logits + i + part * lanes;
      store(at, load(at) + slopes[part] * (from[part] + key));
    }
  const index_t pinned = static_cast<index_t>(std::clamp<position_t>(rows.num_sink_tokens - first, 0, n));
  for (index_t j = 0; j < pinned; ++j)
    for (int r = 0; r < Width; ++r) logits[j * Width + r] += bias[r];
}

// Turns the logits of Rows rows for n keys, from number `offset` of a tile on, into weights relative to their new
// maxima, and brings d along; scale: what o has to be multiplied with.
template <int Rows, int Width = width_of<Rows>>
void weigh(float* logits, index_t offset, index_t n, const running_states& to, float* scale) noexcept {
  using lanes_of = row_lanes<Width>;
  constexpr int vectors = lanes_of::vectors;
  // A few rows: `lanes` keys at a time.
  const index_t used = n * Width, all = vectors == 1 ? round_up(used, Width * lanes) : used;
  for (index_t i = used; i < all; ++i) logits[i] = no_logit;
  vfloat largest[vectors], old_max[vectors], subtract[vectors], factor[vectors], sum[vectors] = {};
  for (int part = 0; part < vectors; ++part) largest[part] = load(logits + part * lanes);
  for (index_t i = vectors * lanes; i < all; i += vectors * lanes)
    for (int part = 0; part < vectors; ++part) largest[part] = max(largest[part], load(logits + i + part * lanes));
  lanes_of::spread(to.m, old_max);
  for (int part = 0; part < vectors; ++part) {
    // A whole number, so that no later change of it rounds what was summed.
    const vfloat tile_max = ceil(join_lanes<Width>(largest[part], [](vfloat a, vfloat b) { return max(a, b); }));
    const vfloat new_max = max(tile_max, old_max[part]);
    subtract[part] = new_max == broadcast(no_logit) ? vfloat{} : new_max;  // logits of -inf alone: weights 0, not NaN
    // Where nothing was summed yet there is nothing to scale.
    const vfloat from = old_max[part] == broadcast(no_logit) ? new_max : old_max[part];
    factor[part] = exp2_nonpositive(from == new_max ? vfloat{} : from - new_max);
    largest[part] = new_max;
  }
  const auto to_weight = [&](index_t i, int part) {
    const vfloat w = exp2_nonpositive(load(logits + i) - subtract[part]);
    store(logits + i, w);
    return w;
  };
  if constexpr (vectors == 1) {
    // Keys `lanes` apart are summed first, then halves: the same whatever the width.
    vfloat sums[Width];
    for (int part = 0; part < Width; ++part) sums[part] = to_weight(part * lanes, 0);
    for (index_t i = Width * lanes; i < all; i += Width * lanes)
#pragma GCC unroll 4
      for (int part = 0; part < Width; ++part) sums[part] += to_weight(i + part * lanes, 0);
    for (int half = Width / 2; half > 0; half /= 2)
      for (int part = 0; part < half; ++part) sums[part] += sums[part + half];
    sum[0] = sums[0];
  } else {
    // Sixteen keys first, by their numbers in the tile.
    for (index_t i = 0; i < all;) {
      const index_t some = std::min(all, i + (16 - (offset + i / Width) % 16) * Width);
      vfloat some_sum[vectors] = {};
      for (; i < some; i += Width)
        for (int part = 0; part < vectors; ++part) some_sum[part] += to_weight(i + part * lanes, part);
      for (int part = 0; part < vectors; ++part) sum[part] += some_sum[part];
    }
  }
  vfloat old_d[vectors], old_rest[vectors];
  lanes_of::spread(to.d, old_d);
  lanes_of::spread(to.d_rest, old_rest);
  for (int part = 0; part < vectors; ++part) {
    const vfloat tile_d = join_lanes<Width>(sum[part], [](vfloat a, vfloat b) { return a + b; });
    const vfloat old = old_d[part] * factor[part], new_d = old + tile_d;
    const vfloat rest = old_rest[part] * factor[part] + (tile_d - (new_d - old));
    constexpr std::size_t bytes = std::min(Rows, lanes) * sizeof(float);
    std::memcpy(to.m + part * lanes, &largest[part], bytes);
    std::memcpy(to.d + part * lanes, &new_d, bytes);
    std::memcpy(to.d_rest + part * lanes, &rest, bytes);
    std::memcpy(scale + part * lanes, &factor[part], bytes);
  }
}

// `count` query rows from `row` on take in n keys and values, of positions from `first` on; all of them see all. `next`
// are the keys that follow.
template <class K, class V>
void absorb_tile(const query_rows& rows, index_t row, index_t count, const extent* extents, tile_rows k, tile_rows v,
                 index_t offset, position_t first, index_t n, tile_rows next, const running_states& to,
                 float* logits) noexcept {
  const index_t dim = round_up(rows.head_dim, 16), v_dim = round_up(rows.v_head_dim, 16);
  const auto logits_of = [&](index_t group) { return logits + group * 4 * (tile_scratch::keys + 16); };
  float scale[tile_scratch::max_rows];
  in_groups(count, [&]<int Rows>(index_t r, index_t group) {
    const float* const q = rows.q + (row + r) * dim;
    if (k.decoded)
      dot_products<f32, Rows>(q, dim, k, n, v, logits_of(group));
    else
      dot_products<K, Rows>(q, dim, k, n, v, logits_of(group));
  });
  in_groups(count, [&]<int Rows>(index_t r, index_t group) {
    if (rows.soft_cap > 0 || rows.terms != nullptr)
      adjust_logits<Rows>(rows, row + r, extents, first, n, logits_of(group));
    weigh<Rows>(logits_of(group), offset, n, to.from_row(row + r), scale + r);
  });
  rescale_values(scale, count, to.from_row(row));
  in_groups(count, [&]<int Rows>(index_t r, index_t group) {
    const running_states sums = to.from_row(row + r);
    const float* const weights = logits_of(group);
    in_strips<Rows>(v_dim, [&]<int Vectors>(index_t column) {
      if (v.decoded)
        add_values<f32, Rows, Vectors>(weights, v, offset, n, column, sums, next);
      else
        add_values<V, Rows, Vectors>(weights, v, offset, n, column, sums, next);
    });
  });
}

// The positions that a row sees between `first` and `last`.
inline position_span seen_of(const extent& extent, position_t first, position_t last) {
  const position_span span{std::max(extent.lo, first), std::min(extent.hi, last)};
  return span.first < span.last ? span : position_span{};
}

// The panel of rows from `row` on takes in what each row sees of a decoded tile of n keys, of positions from `first`
// on.
inline void absorb_panel(const query_rows& rows, index_t row, const extent* extents, tile_rows k, tile_rows v,
                         index_t offset, position_t first, index_t n, const running_states& to,
                         float* logits) noexcept {
  constexpr int panel = query_rows::panel;
  const index_t dim = round_up(rows.head_dim, 16), v_dim = round_up(rows.v_head_dim, 16);
  position_span seen[panel];
  index_t lo = n, hi = 0;  // what any row sees, as keys of the tile
  for (int r = 0; r < panel; ++r) {
    seen[r] = row + r < rows.rows ? seen_of(extents[row + r], first, first + n) : position_span{};
    if (seen[r].size() == 0) continue;
    lo = std::min(lo, static_cast<index_t>(seen[r].first - first));
    hi = std::max(hi, static_cast<index_t>(seen[r].last - first));
  }
  if (lo >= hi) return;
  const position_span all{first + lo, first + hi};
  k = k.from_row(lo), v = v.from_row(lo), n = hi - lo;
  panel_dot_products(rows.q + row * dim, dim, k, n, logits);
  if (rows.soft_cap > 0 || rows.terms != nullptr) adjust_logits<panel, panel>(rows, row, extents, all.first, n, logits);
  alignas(64) float from[panel], upto[panel];  // keys that a row sees
  bool alike = true;
  for (int r = 0; r < panel; ++r) {
    alike = alike && seen[r] == all;
    from[r] = static_cast<float>(seen[r].first - all.first);
    upto[r] = from[r] + static_cast<float>(seen[r].size());
  }
  for (index_t j = 0; j < (alike ? 0 : n); ++j)
    for (int part = 0; part < panel; part += lanes) {
      const vfloat key = broadcast(static_cast<float>(j)), logit = load(logits + j * panel + part);
      const auto is_seen = (key >= load(from + part)) & (key < load(upto + part));
      store(logits + j * panel + part, is_seen ? logit : broadcast(no_logit));
    }
  float scale[panel];
  weigh<panel, panel>(logits, offset + lo, n, to.from_row(row), scale);
  rescale_values(scale, panel, to.from_row(row));
  // A weight of 0 keeps a value out, unless that is infinite or NaN: then each row goes alone over what it sees.
  if (!alike && !all_finite(v, n, v_dim)) {
    for (int r = 0; r < panel; ++r) {
      if (seen[r].size() == 0) continue;
      const index_t skipped = static_cast<index_t>(seen[r].first - all.first);
      in_strips<1>(v_dim, [&]<int Vectors>(index_t column) {
        add_values<f32, 1, Vectors, panel>(logits + skipped * panel + r, v.from_row(skipped), offset + lo + skipped,
                                           seen[r].size(), column, to.from_row(row + r));
      });
    }
    return;
  }
  in_strips<4, lanes == 16 ? 4 : 2>(v_dim, [&]<int Vectors>(index_t column) {
    for (int r = 0; r < panel; r += 4)
      add_values<f32, 4, Vectors, panel>(logits + r, v, offset + lo, n, column, to.from_row(row + r));
  });
}

// See absorb_fn.
template <kv_format K, kv_format V>
void absorb(const segment& from, const query_rows& rows, const extent* extents, const running_states& to,
            const tile_scratch& scratch) noexcept {
  position_t lo = from.last, hi = from.first;
  for (index_t r = 0; r < rows.rows; ++r) {
    const position_span seen = seen_of(extents[r], from.first, from.last);
    if (seen.size() == 0) continue;
    lo = std::min(lo, seen.first);
    hi = std::max(hi, seen.last);
  }
  using loaded_k = std::conditional_t<elementwise_format<K>, K, f32>;
  using loaded_v = std::conditional_t<elementwise_format<V>, V, f32>;
  const stored_rows keys{from.k, from.k_block, from.k_step}, values{from.v, from.v_block, from.v_step};
  // Tiles end where positions are a multiple, whatever is seen of them.
  for (position_t tile = lo, end; tile < hi; tile = end) {
    end = std::min(hi, tile - tile % tile_scratch::keys + tile_scratch::keys);
    const index_t offset = static_cast<index_t>(tile % tile_scratch::keys);
    const index_t first_row = from.row + static_cast<index_t>(tile - from.first), n = static_cast<index_t>(end - tile);
    if (rows.in_panels) {
      const index_t dim = round_up(rows.head_dim, 16), v_dim = round_up(rows.v_head_dim, 16);
      const tile_rows k = decoded_rows<K>(keys, first_row, n, rows.head_dim, dim, scratch.k);
      const tile_rows v = decoded_rows<V>(values, first_row, n, rows.v_head_dim, v_dim + 16, scratch.v);
      for (index_t r = 0; r < rows.rows; r += query_rows::panel)
        absorb_panel(rows, r, extents, k, v, offset, tile, n, to, scratch.logits);
      continue;
    }
    const tile_rows k = rows_of<K>(keys, first_row, n, rows.head_dim, scratch.k);
    const tile_rows v = rows_of<V>(values, first_row, n, rows.v_head_dim, scratch.v);
    tile_rows next = k.from_row(n);
    if (end == hi && !k.decoded) next.data = from.next_keys != nullptr ? from.next_keys : k.data;
    // Rows that see the same keys of the tile go together; where they differ, no row touches what it does not see.
    for (index_t r = 0, same = 1; r < rows.rows; r += same, same = 1) {
      const position_span seen = seen_of(extents[r], tile, end);
      while (same < tile_scratch::max_rows && r + same < rows.rows && seen_of(extents[r + same], tile, end) == seen)
        ++same;
      const index_t skipped = static_cast<index_t>(seen.first - tile);
      if (seen.size() > 0)
        absorb_tile<loaded_k, loaded_v>(rows, r, same, extents, k.from_row(skipped), v.from_row(skipped),
                                        offset + skipped, seen.first, seen.size(), next, to, scratch.logits);
    }
  }
}

}  // namespace sinkcache::inline SINKCACHE_TAG::detail
