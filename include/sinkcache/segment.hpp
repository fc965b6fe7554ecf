#pragma once

// All that the kernel ever sees of a cache: segments of stored tokens, and what each query row sees of them.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "detail/macros_off.hpp"
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

struct segment;

// Merges what `rows` see of one segment into their states. noexcept, and no more memory than the scratch.
using absorb_fn = void (*)(const segment&, const query_rows& rows, const extent* extents, const detail::running_states&,
                           const tile_scratch&) noexcept;

// Consecutive tokens in consecutive rows of one KV head, in one pair of formats.
struct segment {
  const std::byte *k, *v;    // block 0 of the store that holds them
  index_t k_block, v_block;  // bytes from block to block
  index_t k_step, v_step;    // bytes from element to element in an engine's rows; 0: blocks as the format wrote them
  index_t row;               // row of position `first`
  position_t first, last;
  absorb_fn absorb;
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

#include "detail/macros_on.hpp"
