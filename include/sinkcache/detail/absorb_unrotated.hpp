#pragma once

// A few query rows over a part whose keys are stored as they were before rope: a tile's keys are rotated as they are
// loaded, the queries once for 64 of them.

#include <algorithm>

#include "absorb.hpp"
#include "macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// Merges what `rows` see of such a part into their states, as absorb does. rotate(row, count, base, to) writes query
// rows as they meet the keys at the places from `base` to base + 63.
template <class Rotate>
void absorb_unrotated(const kv_part& part, const key_rotations& rotations, const query_rows& rows,
                      const extent* extents, const running_states& to, const tile_scratch& scratch,
                      const kept_logits& kept, const Rotate& rotate) noexcept {
  const seen_by_rows all(rows.rows, extents);
  const index_t dim = round_up(rows.head_dim, 16);
  const position_t first = first_of(part);
  const row_loader keys(part.k, rows.head_dim, scratch.k), values(part.v, rows.v_head_dim, scratch.v);
  const bool on_the_way = rotations.in_vectors();
  const bool as_they_are =
      on_the_way && keys.as_they_are() && part.k.reader->rotated_dots != nullptr && rotations.transform == nullptr;
  rope::angles back;
  index_t q_from = 0, q_rows = 0;  // which rows are rotated: most often the same for every tile
  for (position_t tile = all.lo, end; tile < all.hi; tile = end) {
    end = std::min(all.hi, tile - tile % tile_scratch::keys + tile_scratch::keys);
    const auto n = static_cast<index_t>(end - tile), number = static_cast<index_t>(tile - first);
    const tile_runs lie(part, number, n);
    const loaded_rows k =
        as_they_are ? keys.load(lie)
                    : loaded_rows{&reader_of<f32>,
                                  on_the_way ? unrotated_rows(part, rows.head_dim, number, n, rotations, scratch.k)
                                             : rotated_rows(part, rows.head_dim, number, n, rotations, tile, scratch.k),
                                  false};
    const loaded_rows v = rows.v_head_dim > 0 ? values.load(lie) : k;
    const tile_rows next = k.rows.from_row(n);
    for (index_t r = 0, same = 1; r < rows.rows; r += same, same = 1) {
      const position_span seen = seen_of(extents[r], tile, end);
      const index_t most = std::min(tile_scratch::max_rows, rows.rows - r);
      while (same < most && seen_of(extents[r + same], tile, end) == seen) ++same;
      if (seen.size() == 0) continue;
      for (position_t at = seen.first, upto; at < seen.last; at = upto) {
        const position_t base = key_rotations::base_of(at);
        upto = std::min(seen.last, base + rope::num_ranks);
        const auto some = static_cast<index_t>(upto - at), in_tile = static_cast<index_t>(at - tile);
        const auto done = static_cast<index_t>(at - seen.first);
        const tile_rows of_k = k.rows.from_row(in_tile), of_v = v.rows.from_row(in_tile);
        if (on_the_way) {
          if (q_from != r || q_rows != same) rotate(r, same, position_t{0}, scratch.rotated);
          q_from = r, q_rows = same;
          rotations.of.angles_at(base, false, back);
          pack_rotated_back(rotations, back, scratch.rotated, same, dim, scratch.q);
          k.reader->rotated_dots(scratch.q, same, dim, rotations, at, of_k, some, of_v, done, scratch.logits);
        } else {
          rotate(r, same, base, scratch.rotated);
          const float* const q = k.reader->pack(scratch.rotated, same, dim, scratch.q);
          in_groups(same, [&]<int Rows>(index_t of, index_t group) {
            k.reader->dots(q + of * dim, Rows, dim, of_k, some, of_v, logits_of(scratch.logits, group) + done * Rows);
          });
        }
      }
      finish_tile(rows, r, same, extents, v.from_row(static_cast<index_t>(seen.first - tile)), seen, next, to,
                  scratch.logits, kept, static_cast<index_t>(seen.first - first));
    }
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
