#pragma once

// The hot loop: what query rows see of one part, merged into their states. Keys are walked in tiles, logits lie as
// [keys, rows of the group], so that the softmax needs no sums across a vector. A few rows (decode) go through a tile
// in groups of up to four: a key is loaded once for a group, where it lies and whatever its format. Many rows (prefill)
// go in panels, a row a lane, over a tile that was decoded once. A row's arithmetic does not depend on others.

#include <algorithm>
#include <cstring>

#include "macros_off.hpp"
#include "panel_sums.hpp"
#include "part_rules.hpp"
#include "reader.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// Rows as one of the readers can work on them; in_place: where the cache has them.
struct loaded_rows {
  const kv_reader* reader;
  tile_rows rows;
  bool in_place;

  loaded_rows from_row(index_t i) const { return {reader, rows.from_row(i), in_place}; }
};

// How rows of a part are read, tile by tile: as they are, if their reader can work on that, where they lie or gathered;
// else decoded.
class row_loader {
 public:
  row_loader(const kv_rows& from, index_t dim, float* scratch) noexcept
      : from_(from),
        dim_(dim),
        scratch_(scratch),
        bytes_(from.step == 0 ? from.reader->block_bytes(dim) : dim * from.reader->element_bytes),
        as_they_are_(from.reader->dots != nullptr &&
                     (from.step == 0 || (from.step == from.reader->element_bytes && dim % 16 == 0)) &&
                     bytes_ <= round_up(dim, 16) * index_t{sizeof(float)}) {}

  bool as_they_are() const { return as_they_are_; }
  loaded_rows load(const tile_runs& tile) const noexcept {
    if (!as_they_are_) return {&reader_of<f32>, decoded_rows(from_, tile, dim_, round_up(dim_, 16), scratch_), false};
    const auto at = [&](const row_run& run) { return from_.base + run.page * from_.page + run.row * from_.block; };
    const std::span<const row_run> runs = tile.runs();
    if (runs.size() == 1) return {from_.reader, {at(runs[0]), from_.block, bytes_}, true};
    auto* to = reinterpret_cast<std::byte*>(scratch_);
    for (const row_run& run : runs)
      for (index_t i = 0; i < run.n; ++i, to += bytes_)
        std::memcpy(to, at(run) + i * from_.block, static_cast<std::size_t>(bytes_));
    return {from_.reader, {reinterpret_cast<const std::byte*>(scratch_), bytes_, bytes_}, false};
  }

 private:
  const kv_rows& from_;
  index_t dim_;
  float* scratch_;
  index_t bytes_;  // of a row by itself: an engine's may lie far apart
  bool as_they_are_;
};

// A few rows of one group-by-group tile: logits that are there become weights and take in values.
inline void absorb_values(const query_rows& rows, index_t row, index_t count, const loaded_rows& v, index_t offset,
                          index_t n, tile_rows next, const running_states& to, float* logits) noexcept {
  float scale[tile_scratch::max_rows];
  in_groups(count, [&]<int Rows>(index_t r, index_t group) {
    weigh<Rows>(logits_of(logits, group), offset, n, to.from_row(row + r), scale + r);
  });
  if (rows.v_head_dim == 0) return;
  rescale_values(scale, count, to.from_row(row));
  v.reader->add(logits, count, v.rows, offset, n, round_up(rows.v_head_dim, 16), to.from_row(row), next);
}

// `count` query rows from `row` on whose logits are there, for the keys `seen`, take in n values. `next` are the keys
// that follow.
inline void finish_tile(const query_rows& rows, index_t row, index_t count, const extent* extents, const loaded_rows& v,
                        position_span seen, tile_rows next, const running_states& to, float* logits,
                        const kept_logits& kept, index_t number) noexcept {
  const index_t n = seen.size();
  if (rows.soft_cap > 0 || rows.terms != nullptr || kept.to != nullptr)
    in_groups(count, [&]<int Rows>(index_t r, index_t group) {
      float* const of_group = logits_of(logits, group);
      if (rows.soft_cap > 0 || rows.terms != nullptr)
        adjust_logits<Rows>(rows, row + r, extents, seen.first, n, of_group);
      if (kept.to != nullptr) kept.keep<Rows>(of_group, row + r, number, n);
    });
  absorb_values(rows, row, count, v, static_cast<index_t>(seen.first % tile_scratch::keys), n, next, to, logits);
}

// The extents of several rows together.
struct seen_by_rows {
  position_t lo = max_position, hi = -1;
  bool alike = true;  // all see the same, as in decode

  seen_by_rows(index_t rows, const extent* extents) noexcept {
    for (index_t r = 0; r < rows; ++r) {
      alike = alike && extents[r].lo == extents[0].lo && extents[r].hi == extents[0].hi;
      if (extents[r].lo >= extents[r].hi) continue;
      lo = std::min(lo, extents[r].lo);
      hi = std::max(hi, extents[r].hi);
    }
  }
};

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
  if (v_dim == 0) return;
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
  in_strips<4, cpu.panel_vectors>(v_dim, [&]<int Vectors>(index_t column) {
    for (int r = 0; r < panel; r += 4)
      add_values<f32, 4, Vectors, panel>(logits + r, v, offset + lo, n, column, to.from_row(row + r));
  });
}

// Merges what `rows` see of a part into their states; next_keys: where the keys lie that are read after these, if that
// is known. With `turns`, for panels, keys are stored as they were before rope.
inline void absorb(const kv_part& part, const query_rows& rows, const extent* extents, const running_states& to,
                   const tile_scratch& scratch, const std::byte* next_keys, const kept_logits& kept,
                   const key_rotations* rotations = nullptr) noexcept {
  const seen_by_rows all(rows.rows, extents);
  const index_t dim = round_up(rows.head_dim, 16), v_dim = round_up(rows.v_head_dim, 16);
  const position_t first = first_of(part);
  const row_loader keys(part.k, rows.head_dim, scratch.k), values(part.v, rows.v_head_dim, scratch.v);
  const float* q = nullptr;
  index_t q_from = 0, q_rows = 0;  // which rows it is of: most often the same for every tile
  // Tiles end where positions are a multiple, whatever is seen of them.
  for (position_t tile = all.lo, end; tile < all.hi; tile = end) {
    end = std::min(all.hi, tile - tile % tile_scratch::keys + tile_scratch::keys);
    const index_t offset = static_cast<index_t>(tile % tile_scratch::keys), n = static_cast<index_t>(end - tile);
    const tile_runs lie(part, static_cast<index_t>(tile - first), n);
    const auto tile_keys = [&] {
      return rotations != nullptr
                 ? placed_rows(part, rows.head_dim, static_cast<index_t>(tile - first), n, *rotations, tile, scratch.k)
                 : decoded_rows(part.k, lie, rows.head_dim, dim, scratch.k);
    };
    if (rows.in_panels && kept.sums != nullptr) {
      sum_tile(rows, extents, tile_keys(), tile, n, *kept.sums, scratch,
               kept.sums->to + kept.first + static_cast<index_t>(tile - first));
      continue;
    }
    if (rows.in_panels) {
      const tile_rows k = tile_keys();
      const tile_rows v = v_dim > 0 ? decoded_rows(part.v, lie, rows.v_head_dim, v_dim + 16, scratch.v) : k;
      for (index_t r = 0; r < rows.rows; r += query_rows::panel)
        absorb_panel(rows, r, extents, k, v, offset, tile, n, to, scratch.logits);
      continue;
    }
    const loaded_rows k = keys.load(lie), v = v_dim > 0 ? values.load(lie) : k;
    tile_rows next = k.rows.from_row(n);
    if (end == all.hi && k.in_place) next.data = next_keys != nullptr ? next_keys : k.rows.data;
    // Rows that see the same keys of the tile go together; where they differ, no row touches what it does not see.
    for (index_t r = 0, same = 1; r < rows.rows; r += same, same = 1) {
      const position_span seen = seen_of(extents[r], tile, end);
      const index_t most = std::min(tile_scratch::max_rows, rows.rows - r);
      if (all.alike) same = most;
      while (same < most && seen_of(extents[r + same], tile, end) == seen) ++same;
      if (seen.size() == 0) continue;
      if (q_from != r || q_rows != same) {
        q = k.reader->pack(rows.q + r * dim, same, dim, scratch.q);
        q_from = r, q_rows = same;
      }
      const index_t skipped = static_cast<index_t>(seen.first - tile);
      const loaded_rows of_k = k.from_row(skipped), of_v = v.from_row(skipped);
      k.reader->dots(q, same, dim, of_k.rows, seen.size(), of_v.rows, scratch.logits);
      finish_tile(rows, r, same, extents, of_v, seen, next, to, scratch.logits, kept,
                  static_cast<index_t>(seen.first - first));
    }
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
