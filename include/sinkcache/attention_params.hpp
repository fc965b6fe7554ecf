#pragma once

// What an attention layer is told once, and what it asks of the arguments of a call.

#include <cmath>
#include <optional>
#include <span>
#include <vector>

#include "any_kv_cache.hpp"
#include "detail/macros_off.hpp"
#include "softmax.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Order within a row: scale, soft cap, ALiBi, sink bias, then the sink. Errors stay within 16 u (1 + A) max|v|, where u
// is 2^-24 and A the row's largest sum of |q| |k| sm_scale, |alibi_slope| times distance and |sink_bias|: float32 holds
// a logit of size A to u A, whatever it is made of. docs/architecture.md has what infinities and NaN become.
struct attention_params {
  index_t num_qo_heads = 0;  // query and output heads, a multiple of the cache's num_kv_heads; at least 1
  softmax_variant softmax = softmax_variant::standard();
  std::optional<float> sm_scale = std::nullopt;  // 1 / sqrt(head_dim)
  float logits_soft_cap = 0;                     // cap * tanh(logit / cap); 0 for none
  std::vector<float> alibi_slopes = {};  // per query head, or none: logit += slope * (key - query), Press et al. 2022
  std::vector<float> sink_bias = {};     // per query head, or none: added to the logits of pinned tokens
};

// Whether an attention can be made from these.
inline status validate(const attention_params& params) noexcept {
  status found;
  const index_t heads = params.num_qo_heads;
  const auto require_per_head = [&](const char* what, index_t size) {
    found.require(size == 0 || size == heads, what, size, "one per query head,", heads);
  };
  found.require(heads >= 1, "num_qo_heads", heads, "at least 1");
  params.softmax.require_given(found);
  require_per_head("sink_logits.size()", params.softmax.num_sink_logits());
  require_per_head("alibi_slopes.size()", static_cast<index_t>(params.alibi_slopes.size()));
  require_per_head("sink_bias.size()", static_cast<index_t>(params.sink_bias.size()));
  if (params.sm_scale) found.require(std::isfinite(*params.sm_scale), "sm_scale", *params.sm_scale, "finite");
  found.require(std::isfinite(params.logits_soft_cap) && params.logits_soft_cap >= 0, "logits_soft_cap",
                params.logits_soft_cap, "finite and at least 0");
  for (float slope : params.alibi_slopes) found.require(std::isfinite(slope), "an alibi slope", slope, "finite");
  for (float bias : params.sink_bias) found.require(std::isfinite(bias), "a sink bias", bias, "finite");
  return found;
}

// What a call can give besides its output: lse, natural, the sink included [tokens, num_qo_heads]; and the weights of
// the queries that a reader wants, which are computed one by one, as in decode. Without `out` these alone: no value is
// read, and the call's `out` may be empty.
struct extra_outputs {
  std::span<float> lse = {};
  weight_reader* weights = nullptr;
  bool out = true;
};

// One sequence of a batch: q [num_qo_heads * head_dim] of its newest token, already stored, out [num_qo_heads *
// v_head_dim], lse [num_qo_heads] or empty, and who wants the weights, or null. A cache that learns is its own reader:
// cache.learner().
struct decode_item {
  std::span<const float> q;
  const kv_source* keys = nullptr;
  std::span<float> out;
  std::span<float> lse = {};
  weight_reader* weights = nullptr;
};

// One thread's share of a call: a range of KV heads, each with its group of query heads, and of rows of q, or of a
// batch's sequences. A count of 0 is nothing; one that is not given reaches to the end. Parts that do not overlap may
// run at the same time, each with its own workspace, and give the same bits as the whole. host_threads.hpp makes them.
struct call_part {
  static constexpr index_t rest = -1;

  index_t first_kv_head = 0, num_kv_heads = rest, first_row = 0, num_rows = rest;
};

namespace detail {

inline void require_heads(status& found, const attention_params& params, const kv_geometry& of) noexcept {
  params.softmax.require_given(found);
  found.require(params.num_qo_heads % of.num_kv_heads == 0, "num_qo_heads", params.num_qo_heads,
                "a multiple of the cache's num_kv_heads,", of.num_kv_heads);
}

inline void require_queries(status& found, const attention_params& params, const_matrix_view q, index_t tokens,
                            const kv_geometry& of) noexcept {
  require_heads(found, params, of);
  const index_t cols = checked_product(found, "num_qo_heads * head_dim", params.num_qo_heads, of.head_dim);
  require_shape(found, "q", q, tokens, cols);
}

inline void require_outputs(status& found, const attention_params& params, matrix_view out, index_t tokens,
                            const kv_geometry& of) noexcept {
  const index_t cols = checked_product(found, "num_qo_heads * v_head_dim", params.num_qo_heads, of.v_head_dim);
  require_shape(found, "out", out, tokens, cols);
}

inline void require_lse(status& found, const attention_params& params, std::span<const float> lse,
                        index_t tokens) noexcept {
  const index_t floats = checked_product(found, "num_qo_heads * tokens", params.num_qo_heads, tokens);
  found.require(lse.empty() || static_cast<index_t>(lse.size()) == floats, "lse.size()", lse.size(), "0 or", floats);
}

inline void require_seen(status& found, const kv_source& keys) noexcept {
  keys.require_memory(found);
  found.require(keys.seen() <= max_position, "keys.seen()", keys.seen(), "at most", max_position);
}

inline void require_token(status& found, const kv_source& keys) noexcept {
  require_seen(found, keys);
  found.require(keys.seen() >= 1, "keys.seen()", keys.seen(), "at least 1: its newest token is the one that attends");
}

inline status check_decode(const attention_params& params, const_matrix_view q, const kv_source& keys, matrix_view out,
                           const extra_outputs& extra) noexcept {
  status found;
  require_queries(found, params, q, 1, keys.geometry());
  if (extra.out) require_outputs(found, params, out, 1, keys.geometry());
  require_lse(found, params, extra.lse, 1);
  require_token(found, keys);
  return found;
}

inline void require_item(status& found, const attention_params& params, std::span<const float> q, const kv_source* keys,
                         std::span<const float> out, std::span<const float> lse) noexcept {
  found.require(keys != nullptr, "a batch's keys", "null", "a cache or view");
  if (!found) return;
  require_token(found, *keys);
  const kv_geometry& of = keys->geometry();
  require_heads(found, params, of);
  const auto require_row = [&](const char* what, std::span<const float> row, index_t dim) {
    const index_t floats = checked_product(found, "floats of a row", params.num_qo_heads, dim);
    found.require(row.data() != nullptr, what, "null", "a row");
    found.require(static_cast<index_t>(row.size()) == floats, what, row.size(), "of size", floats);
  };
  require_row("a batch's q", q, of.head_dim);
  require_row("a batch's out", out, of.v_head_dim);
  require_lse(found, params, lse, 1);
}

inline status check_attend(const attention_params& params, const_matrix_view q, const kv_source& keys, matrix_view out,
                           const extra_outputs& extra) noexcept {
  status found;
  require_queries(found, params, q, q.rows(), keys.geometry());
  if (extra.out) require_outputs(found, params, out, q.rows(), keys.geometry());
  require_lse(found, params, extra.lse, q.rows());
  require_seen(found, keys);
  found.require(q.rows() <= keys.seen(), "q.rows()", q.rows(), "at most what was stored,", keys.seen());
  if (found && q.rows() > 1) {
    const position_t oldest = keys.oldest_query();
    if (keys.seen() - q.rows() < oldest)
      found.refuse("q.rows() was {}, had to be at most {}: what older tokens saw is overwritten", q.rows(),
                   keys.seen() - oldest);
  }
  return found;
}

inline status check_attend(const attention_params& params, const_matrix_view q, const kv_source& keys,
                           const attention_state& state) noexcept {
  status found;
  require_queries(found, params, q, 1, keys.geometry());
  require_seen(found, keys);
  found.require(state.num_heads() == params.num_qo_heads, "state.num_heads()", state.num_heads(), "exactly",
                params.num_qo_heads);
  found.require(state.v_head_dim() == keys.geometry().v_head_dim, "state.v_head_dim()", state.v_head_dim(), "exactly",
                keys.geometry().v_head_dim);
  return found;
}

inline status check_prefill(const attention_params& params, const_matrix_view q, const_matrix_view k,
                            const_matrix_view v, const any_kv_cache& cache, const kv_source& keys, matrix_view out,
                            const extra_outputs& extra) noexcept {
  status found;
  require_queries(found, params, q, q.rows(), keys.geometry());
  require_seen(found, keys);
  cache.require_tokens(found, q.rows(), k, v);
  if (extra.out) require_outputs(found, params, out, q.rows(), keys.geometry());
  require_lse(found, params, extra.lse, q.rows());
  if (&keys == &cache) return found;
  const kv_geometry &of = keys.geometry(), &grows = cache.geometry();
  found.require(of.num_kv_heads == grows.num_kv_heads, "keys' num_kv_heads", of.num_kv_heads, "that of the cache,",
                grows.num_kv_heads);
  found.require(of.head_dim == grows.head_dim, "keys' head_dim", of.head_dim, "that of the cache,", grows.head_dim);
  found.require(of.v_head_dim == grows.v_head_dim, "keys' v_head_dim", of.v_head_dim, "that of the cache,",
                grows.v_head_dim);
  found.require(keys.ends_with(cache), "keys", "another source", "one that ends with the cache");
  found.require(q.rows() <= max_position - keys.seen(), "tokens seen and appended", q.rows(), "at most",
                max_position - keys.seen());
  return found;
}

inline status check_sizes(const attention_params& params, const kv_source* keys, index_t tokens,
                          index_t concurrency) noexcept {
  status found;
  found.require(tokens >= 0 && tokens <= max_position, "tokens", tokens, "from 0 to", max_position);
  found.require(concurrency >= 1, "concurrency", concurrency, "at least 1");
  found.require(keys != nullptr, "a batch's keys", "null", "a cache or view");
  if (found) require_heads(found, params, keys->geometry());
  return found;
}

// The part with its ends filled in.
inline call_part whole_part(status& found, call_part part, index_t num_kv_heads, index_t num_rows) noexcept {
  const auto fill = [&](const char* first_name, const char* size_name, index_t first, index_t& size, index_t all) {
    found.require(first >= 0 && first <= all, first_name, first, "from 0 to", all);
    if (!found) return;
    if (size == call_part::rest) size = all - first;
    found.require(size >= 0 && size <= all - first, size_name, size, "from 0 to", all - first);
  };
  fill("first_kv_head", "num_kv_heads", part.first_kv_head, part.num_kv_heads, num_kv_heads);
  fill("first_row", "num_rows", part.first_row, part.num_rows, num_rows);
  return part;
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
