#pragma once

// Memory that one worker's share of a call works in: query rows as they meet keys, tiles, and states that grow.

#include <algorithm>
#include <cstddef>
#include <utility>

#include "../softmax.hpp"
#include "../source.hpp"
#include "macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// States that grow tile by tile, of vectors of columns. What rounding leaves of each addition is summed beside it, so
// that long sums do not drift however many tiles there are (fast two-sum, Dekker 1971).
struct running_states : states {
  float *d_rest, *o_rest;

  running_states from_row(index_t i) const { return {states::from_row(i), d_rest + i, o_rest + i * o_stride}; }

  void clear(index_t rows, float bound) const noexcept {
    states::clear(rows, bound);
    std::fill_n(d_rest, rows, 0.f);
    std::fill_n(o_rest, rows * o_stride, 0.f);
  }
  // Adds to the vector of columns number `at` of all rows' on.
  [[gnu::always_inline]] void add(index_t at, vfloat more) const noexcept {
    const vfloat old = load(o + at), sum = old + more;
    store(o_rest + at, load(o_rest + at) + (more - (sum - old)));
    store(o + at, sum);
  }
  // Adds the rests up; what is left is a state. An infinite sum has a rest that is NaN.
  void settle(index_t rows) const noexcept {
    for (index_t i = 0; i < rows; ++i) d[i] += d_rest[i];
    for (index_t i = 0; i < rows * o_stride; i += lanes) {
      const vfloat sum = load(o + i), rest = load(o_rest + i);
      store(o + i, rest == rest ? sum + rest : sum);  // NOLINT(misc-redundant-expression): NaN is not
    }
  }
};

// What is added to a row's logits before the sink, in base 2.
struct logit_terms {
  position_t query;   // the row's own position
  float alibi_slope;  // times (key - query), negative distances
  float sink_bias;    // on pinned tokens
};

// What one query row sees of a part: the rows with positions (or, where each row has its own, with numbers) [lo, hi),
// none if empty. `gap` tokens were evicted between them and the query.
struct extent {
  // Of tokens without positions.
  static constexpr position_t placeless = -max_position;

  position_t lo, hi, gap;
};

// Query rows, rotated for their gap, scaled by sm_scale * log2(e), zero after head_dim and after the last row: few as
// they are, [rows, round_up(head_dim, 16)], many in panels of `panel` rows, [rows / panel, round_up(head_dim, 16),
// panel]. Order within a row: scale, soft cap, ALiBi, sink bias.
struct query_rows {
  static constexpr index_t panel = 2 * lanes;

  const float* q;
  index_t rows, head_dim, v_head_dim;
  bool in_panels;
  const logit_terms* terms;    // one a row, or null
  position_t num_sink_tokens;  // positions below take sink_bias
  float soft_cap;              // in base 2; 0 for none
};

// Tiles of floats of K [keys, round_up(dim, 16)] and V (rows 16 floats further apart, so that a column of them spreads
// over the sets of the L1), logits [keys, rows], and a few rows of Q: rotated, and as keys are multiplied by them.
struct tile_scratch {
  static constexpr index_t keys = 128, max_rows = 32;  // at most, of a tile and for a few rows
  static constexpr index_t k_floats(index_t dim) { return keys * dim; }
  static constexpr index_t v_floats(index_t dim) { return keys * (dim + 16); }
  static constexpr index_t logits_floats = std::max(2 * max_rows, query_rows::panel) * (keys + 16);
  static constexpr index_t q_floats(index_t dim) { return max_rows * dim; }

  float *k, *v, *logits, *q, *rotated;
};

// Where a group's logits lie among those of a tile.
inline constexpr index_t group_floats = 4 * (tile_scratch::keys + 16);
inline float* logits_of(float* logits, index_t group) { return logits + group * group_floats; }

// How many of so many query rows a work item takes: whole panels.
inline constexpr index_t max_item_rows = 384;
inline index_t rows_of_an_item(index_t rows) {
  return std::min(max_item_rows, round_up(rows, std::max<index_t>(16, query_rows::panel)));
}

// One worker's memory, for up to `rows` query rows, a head_dim and v_head_dim up to these, and plans of so many parts.
struct worker_scratch {
  struct shape {
    index_t rows, head_dim, v_head_dim, parts;

    index_t k_dim() const { return round_up(head_dim, 16); }
    index_t v_dim() const { return round_up(v_head_dim, 16); }
    index_t part_bytes() const { return round_up(parts * index_t{sizeof(kv_part)}, 64); }

    // Enough for both.
    shape with(const shape& other) const {
      return {std::max(rows, other.rows), std::max(head_dim, other.head_dim), std::max(v_head_dim, other.v_head_dim),
              std::max(parts, other.parts)};
    }
  };

  worker_scratch(const shape& of, std::byte* memory) {
    parts = reinterpret_cast<kv_part*>(memory);
    auto* at = reinterpret_cast<float*>(memory + of.part_bytes());
    const auto take = [&](index_t floats) { return std::exchange(at, at + floats); };
    const index_t rows = of.rows, v_dim = of.v_dim();
    q = take(rows * of.k_dim());
    state = {{take(rows), take(rows), take(rows * v_dim), v_dim}, take(rows), take(rows * v_dim)};
    tile = {take(tile_scratch::k_floats(of.k_dim())), take(tile_scratch::v_floats(v_dim)),
            take(tile_scratch::logits_floats), take(tile_scratch::q_floats(of.k_dim())),
            take(tile_scratch::q_floats(of.k_dim()))};
  }

  static index_t bytes(const shape& of) {
    return of.part_bytes() +
           round_up(index_t{sizeof(float)} * (of.rows * (of.k_dim() + 2 * of.v_dim() + 3) +
                                              tile_scratch::k_floats(of.k_dim()) + tile_scratch::v_floats(of.v_dim()) +
                                              tile_scratch::logits_floats + 2 * tile_scratch::q_floats(of.k_dim())),
                    64);
  }

  kv_part* parts;
  float* q;
  running_states state;
  tile_scratch tile;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
