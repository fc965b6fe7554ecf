#pragma once

// What a token is worth. A scorer is a small immutable class: it says what it wants to know, and scores the rows of one
// KV head. Memory, threads, pinned tokens and budgets are the business of the cache (scored_kv_cache.hpp).

#include <cmath>
#include <cstdint>
#include <span>
#include <string_view>

#include "detail/macros_off.hpp"
#include "source.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// What a scorer wants to be told.
struct scorer_needs {
  // What each of the newest `window` queries gives each row at the event; rows of that window never leave. Or what the
  // last query alone gave when it ran: weight(0, i); its own row may leave.
  index_t window = 0;
  bool last_query = false;
  enum class over_group {
    mean,       // of the query heads of a KV head
    max,        // of them
    max_logits  // the largest of their logits, not weights
  } group = over_group::mean;
  bool together = false;          // the mean over the queries of the window is enough: weight(0, i)
  bool sums = false;              // what all queries since a row came gave it, mean over the group
  bool query_statistics = false;  // means and second moments of queries before their rotary position
  bool carried = false;           // a number per row that it takes from event to event
  bool given = false;             // a number per row of its key as given, before rotary position and format
  bool one_set = false;           // scores are averaged over KV heads: all keep the same tokens
  bool drops = false;             // a score of -infinity leaves even where there is room
  bool compares_heads = false;    // scores of different KV heads can be compared (Ada-KV needs that)
};

// Of the queries of one query head so far, the first num_sink_tokens left out.
struct query_statistics {
  double count;
  const double *sum, *products;  // [head_dim], [head_dim, head_dim]
};

// The rows of one KV head at an event, in stream order, before any leaves.
struct scored_head {
  index_t kv_head, num_kv_heads, group, rows;
  index_t window;  // rows [rows - window, rows) are those of the newest queries
  index_t num_sink_tokens, budget;
  position_t seen;  // tokens so far
  index_t whole;    // of tiers: keys and values change once, into codes, when they are older than so many tokens
  float sm_scale;   // of the attention that was asked last; 0 where none was
  const kv_geometry& geometry;
  std::span<const position_t> at;             // positions
  std::span<const std::uint8_t> pinned;       // 1: for ever (the newest rows, which stay too, are not marked)
  std::span<const double> sums;               // what all queries gave, if it is wanted
  std::span<const float> given;               // of each row, what `given` made of its key
  std::span<float> carried;                   // NaN of rows that have none yet; what is written is carried on
  std::span<float> scratch;                   // as many floats as it asked for
  std::span<const query_statistics> queries;  // per query head of the group

  // What query number w of the window gave row i, over the group as it was wanted; or, together, all of them.
  float weight(index_t w, index_t i) const { return weights[w * stride + i]; }

  // Row i's key, at its true position whatever attention makes of it, and its value, as stored and decoded.
  void key(index_t i, float* to) const noexcept { reader.key(reader.of, kv_head, i, false, to); }
  // The key as the next query meets it.
  void shown_key(index_t i, float* to) const noexcept { reader.key(reader.of, kv_head, i, true, to); }
  void value(index_t i, float* to) const noexcept { reader.value(reader.of, kv_head, i, to); }
  // Where the next query stands among those keys.
  position_t next_query() const {
    return geometry.positions == positions::in_cache ? rows : geometry.first_position + seen;
  }

  struct row_reader {
    const void* of;
    void (*key)(const void* of, index_t kv_head, index_t row, bool shown, float* to) noexcept;
    void (*value)(const void* of, index_t kv_head, index_t row, float* to) noexcept;
  };
  row_reader reader;
  const float* weights = nullptr;
  index_t stride = 0;
};

struct scored_sizes {
  index_t rows, head_dim, v_head_dim, group;
};

// A scorer. Const calls may run concurrently.
class token_scorer {
 public:
  virtual ~token_scorer() = default;

  virtual scorer_needs needs() const noexcept = 0;

  // What each row is worth; the highest stay, of equal ones the younger. NaN is the lowest.
  virtual void score(const scored_head& head, std::span<float> scores) const noexcept = 0;

  // Floats of scratch memory that `score` wants for rows of these sizes.
  virtual index_t scratch_floats(const scored_sizes& /*of*/) const noexcept { return 0; }
  // Of one key [head_dim] as given.
  virtual float given(std::span<const float> /*key*/) const noexcept { return 0; }
  // Whether it can work with these.
  virtual void require(status& /*found*/, const kv_geometry& /*of*/, index_t /*budget*/,
                       index_t /*num_sink_tokens*/) const noexcept {}
  virtual std::string_view name() const noexcept { return "custom"; }
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
