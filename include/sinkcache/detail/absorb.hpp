#pragma once

// The hot loop: what query rows see of one segment, merged into their states. Keys are walked in tiles, logits lie as
// [keys, rows of the group], so that the softmax needs no sums across a vector. A few rows (decode) go through a tile
// in groups of up to four: a key is loaded once for a group, where it lies and whatever its format. Many rows (prefill)
// go in panels, a row a lane, over a tile that was decoded once. A row's arithmetic does not depend on others.

#include <algorithm>
#include <type_traits>

#include "macros_off.hpp"
#include "tile_dots.hpp"
#include "tile_softmax.hpp"
#include "tile_values.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// `count` query rows from `row` on, q as from packed_rows, take in n keys and values, of positions from `first` on; all
// of them see all. `next` are the keys that follow.
template <class K, class V>
void absorb_tile(const query_rows& rows, index_t row, index_t count, const float* q, const extent* extents, tile_rows k,
                 tile_rows v, index_t offset, position_t first, index_t n, tile_rows next, const running_states& to,
                 float* logits) noexcept {
  const index_t dim = round_up(rows.head_dim, 16), v_dim = round_up(rows.v_head_dim, 16);
  const auto logits_of = [&](index_t group) { return logits + group * 4 * (tile_scratch::keys + 16); };
  float scale[tile_scratch::max_rows];
  in_groups(count, [&]<int Rows>(index_t r, index_t group) {
    if (k.decoded)
      dot_products<f32, Rows>(q + r * dim, dim, k, n, v, logits_of(group));
    else
      dot_products<K, Rows>(q + r * dim, dim, k, n, v, logits_of(group));
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
  index_t from[panel], upto[panel], lo = n, hi = 0;  // keys of the tile that a row sees, that any does
  index_t all_from = 0, all_upto = n;                // that all do
  for (int r = 0; r < panel; ++r) {
    const position_span seen = row + r < rows.rows ? seen_of(extents[row + r], first, first + n) : position_span{};
    from[r] = seen.size() > 0 ? static_cast<index_t>(seen.first - first) : 0;
    upto[r] = from[r] + seen.size();
    all_from = std::max(all_from, from[r]), all_upto = std::min(all_upto, upto[r]);
    if (seen.size() > 0) lo = std::min(lo, from[r]), hi = std::max(hi, upto[r]);
  }
  if (lo >= hi) return;
  if (all_from >= all_upto) all_from = all_upto = hi;
  k = k.from_row(lo), v = v.from_row(lo), n = hi - lo;
  panel_dot_products(rows.q + row * dim, dim, k, n, logits);
  if (rows.soft_cap > 0 || rows.terms != nullptr) adjust_logits<panel>(rows, row, extents, first + lo, n, logits);
  alignas(64) float sees_from[panel], sees_upto[panel];
  for (int r = 0; r < panel; ++r)
    sees_from[r] = static_cast<float>(from[r]), sees_upto[r] = static_cast<float>(upto[r]);
  const auto hide_unseen = [&](index_t j, index_t end) {
    for (; j < end; ++j)
      for (int part = 0; part < panel; part += lanes) {
        float* const at = logits + (j - lo) * panel + part;
        const vfloat key = broadcast(static_cast<float>(j));
        const auto is_seen = (key >= load(sees_from + part)) & (key < load(sees_upto + part));
        store(at, is_seen ? load(at) : broadcast(no_logit));
      }
  };
  hide_unseen(lo, all_from);
  hide_unseen(all_upto, hi);
  float scale[panel];
  weigh<panel>(logits, offset + lo, n, to.from_row(row), scale);
  rescale_values(scale, panel, to.from_row(row));
  // A weight of 0 keeps a value out, unless that is infinite or NaN: then each row goes alone over what it sees.
  if (!all_finite(v, all_from - lo, v_dim) || !all_finite(v.from_row(all_upto - lo), hi - all_upto, v_dim)) {
    for (int r = 0; r < panel; ++r) {
      const index_t skipped = from[r] - lo;
      if (from[r] == upto[r]) continue;
      in_strips<1>(v_dim, [&]<int Vectors>(index_t column) {
        add_values<f32, 1, Vectors, panel>(logits + skipped * panel + r, v.from_row(skipped), offset + from[r],
                                           upto[r] - from[r], column, to.from_row(row + r));
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
  const index_t dim = round_up(rows.head_dim, 16), v_dim = round_up(rows.v_head_dim, 16);
  const float* q = nullptr;
  index_t q_from = 0, q_rows = 0;  // which rows it is of: most often the same for every tile
  // Tiles end where positions are a multiple, whatever is seen of them.
  for (position_t tile = lo, end; tile < hi; tile = end) {
    end = std::min(hi, tile - tile % tile_scratch::keys + tile_scratch::keys);
    const index_t offset = static_cast<index_t>(tile % tile_scratch::keys);
    const index_t first_row = from.row + static_cast<index_t>(tile - from.first), n = static_cast<index_t>(end - tile);
    if (rows.in_panels) {
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
      if (seen.size() == 0) continue;
      if (q_from != r || q_rows != same) {
        const float* const run = rows.q + r * dim;
        q = k.decoded ? packed_rows<f32>(run, same, dim, scratch.q) : packed_rows<loaded_k>(run, same, dim, scratch.q);
        q_from = r, q_rows = same;
      }
      const index_t skipped = static_cast<index_t>(seen.first - tile);
      absorb_tile<loaded_k, loaded_v>(rows, r, same, q, extents, k.from_row(skipped), v.from_row(skipped),
                                      offset + skipped, seen.first, seen.size(), next, to, scratch.logits);
    }
  }
}

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "macros_on.hpp"
