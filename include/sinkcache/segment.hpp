#pragma once

// All that the kernel ever sees of a cache: segments of stored tokens, and what each query row sees of them.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "policy.hpp"
#include "softmax.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

// What is added to a row's logits before the sink, in base 2.
struct logit_terms {
  position_t query;   // the row's own position
  float alibi_slope;  // times (key - query), negative distances
  float sink_bias;    // on pinned tokens
};

// Query rows, turned for their gap, scaled by sm_scale * log2(e), zero behind head_dim and behind the last row: few as
// they are, [rows, round_up(head_dim, 16)], many in panels of `panel` rows, [rows / panel, round_up(head_dim, 16),
// panel]. Order within a row: scale, soft cap, ALiBi, sink bias.
struct query_rows {
  static constexpr index_t panel = 2 * detail::lanes;

  const float* q;
  index_t rows, head_dim, v_head_dim;
  bool in_panels;
  const logit_terms* terms;    // one a row, or null
  position_t num_sink_tokens;  // positions below take sink_bias
  float soft_cap;              // in base 2; 0 for none
};

// Scratch of one worker: tiles of floats of K [keys, round_up(dim, 16)] and V (rows 16 floats further apart, so that a
// column of them spreads over the sets of the L1), logits [keys, rows], and a few rows of Q as keys are multiplied by
// them.
struct tile_scratch {
  static constexpr index_t keys = 128, max_rows = 32;  // at most, of a tile and for a few rows
  static constexpr index_t k_floats(index_t dim) { return keys * dim; }
  static constexpr index_t v_floats(index_t dim) { return keys * (dim + 16); }
  static constexpr index_t logits_floats = std::max(2 * max_rows, query_rows::panel) * (keys + 16);
  static constexpr index_t q_floats(index_t dim) { return max_rows * dim; }

  float *k, *v, *logits, *q;
};

// What one query row sees of a segment: positions [lo, hi), none if empty. `gap` tokens were evicted between them and
// the query.
struct extent {
  position_t lo, hi, gap;
};

// Rows of a tile as the kernel reads them: `stride` bytes apart, each of `bytes` for round_up(dim, 16) elements.
struct tile_rows {
  const std::byte* data;
  index_t stride, bytes;

  const std::byte* row(index_t i) const { return data + i * stride; }
  tile_rows from_row(index_t i) const { return {row(i), stride, bytes}; }
};

struct stored_rows;

// How rows of one format are read; reader_of<F> is the one of a format F. `load` gives floats [n, stride] of the rows
// [first, first + n), zero from `dim` to round_up(dim, 16). The others work on rows where they lie, and are null where
// a format is only loaded: `pack` lays `count` query rows [count, dim] out for `dots`, which gives the logits [n, rows
// of a group] of each group of them, and `add` adds values times weights that lie so to the rows' sums. Both prefetch
// other rows meanwhile. `dim` is a multiple of 16, count at most tile_scratch::max_rows.
struct kv_reader {
  index_t block_rows, element_bytes;
  void (*load)(const stored_rows& from, index_t first, index_t n, index_t dim, index_t stride, float* to) noexcept;
  const float* (*pack)(const float* rows, index_t count, index_t dim, float* to) noexcept;
  void (*dots)(const float* packed, index_t count, index_t dim, tile_rows k, index_t n, tile_rows next,
               float* logits) noexcept;
  void (*add)(const float* weights, index_t count, tile_rows v, index_t offset, index_t n, index_t dim,
              const detail::running_states& to, tile_rows next) noexcept;
};

// Where the keys, or the values, of one KV head lie.
struct stored_rows {
  const kv_reader* reader;
  const std::byte* store;  // block 0
  index_t block;           // bytes from block to block
  index_t step = 0;        // bytes from element to element in an engine's rows; 0: blocks as the format wrote them

  // What a row takes of a cache near the processor: an engine's rows may lie far apart.
  index_t row_bytes(index_t dim) const { return step == 0 ? block : dim * std::min(step, index_t{sizeof(float)}); }
};

// Consecutive tokens in consecutive rows of one KV head.
struct segment {
  stored_rows k, v;
  index_t row;  // row of position `first`
  position_t first, last;
  const std::byte* next_keys = nullptr;  // where the keys lie that are read after these, if that is known
};

// Where segments come from.
class segment_source {
 public:
  // The positions visible to token number seen - 1, oldest first.
  virtual span_list visible(position_t seen) const noexcept = 0;

  // The longest segment of a KV head that starts at `first` and ends by `last`. Where nothing is stored it may be asked
  // for, too: a segment of what no row sees is not read.
  virtual segment segment_at(index_t kv_head, position_t first, position_t last) const noexcept = 0;

 protected:
  segment_source() = default;
  segment_source(const segment_source&) = default;
  segment_source& operator=(const segment_source&) = default;
  ~segment_source() = default;
};

}  // namespace sinkcache::inline SINKCACHE_TAG
