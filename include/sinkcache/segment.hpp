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

// Query rows [rows, round_up(head_dim, 16)], turned for their gap, scaled by sm_scale * log2(e), zero behind head_dim.
// Order within a row: scale, soft cap, ALiBi, sink bias.
struct query_rows {
  const float* q;
  index_t rows, head_dim, v_head_dim;
  const logit_terms* terms;    // one a row, or null
  position_t num_sink_tokens;  // positions below take sink_bias
  float soft_cap;              // in base 2; 0 for none
};

// Scratch of one worker: decoded tiles [keys, round_up(dim, 16)], logits [4, stride].
struct tile_scratch {
  static constexpr index_t max_keys = 128, stride = max_keys + 16;

  // Keys in a tile: as many as leave room in a 32 KiB L1 for both K and V in float.
  static constexpr index_t keys(index_t head_dim, index_t v_head_dim) {
    return std::clamp<index_t>(8192 / (head_dim + v_head_dim) / 16 * 16, 16, max_keys);
  }

  float *k, *v, *logits;
};

// What one query row sees of a segment: positions [lo, hi), none if empty. `gap` tokens were evicted between them and
// the query.
struct extent {
  position_t lo, hi, gap;
};

struct segment;

// Merges what `rows` see of one segment into their states. noexcept, and no more memory than the scratch.
using absorb_fn = void (*)(const segment&, const query_rows& rows, const extent* extents, const detail::states&,
                           const tile_scratch&) noexcept;

// Consecutive tokens in consecutive rows of one KV head, in one pair of formats.
struct segment {
  const std::byte *k, *v;    // block 0 of the store that holds them
  index_t k_block, v_block;  // bytes from block to block
  index_t row;               // row of position `first`
  position_t first, last;
  absorb_fn absorb;
};

// Where segments come from.
class segment_source {
 public:
  // The positions visible to token number seen - 1, oldest first.
  virtual span_list visible(position_t seen) const noexcept = 0;

  // The longest segment of a KV head that starts at `first` and ends by `last`; the tokens between must be stored.
  virtual segment segment_at(index_t kv_head, position_t first, position_t last) const noexcept = 0;

 protected:
  segment_source() = default;
  segment_source(const segment_source&) = default;
  segment_source& operator=(const segment_source&) = default;
  ~segment_source() = default;
};

}  // namespace sinkcache::inline SINKCACHE_TAG
