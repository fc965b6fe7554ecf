#pragma once

// What a cache is told once: how large it is, what it keeps, and what positions mean.

#include <optional>

#include "detail/macros_off.hpp"
#include "policy.hpp"
#include "source.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

struct cache_config {
  index_t num_kv_heads = 0;     // at least 1
  index_t head_dim = 0;         // of keys and queries, 1 to 576
  index_t v_head_dim = 0;       // of values and outputs, 1 to 576; 0: head_dim
  index_t num_sink_tokens = 0;  // the first tokens, pinned for ever
  index_t window = 0;           // the newest tokens, the current one included; at least 1
  sinkcache::positions positions = sinkcache::positions::in_cache;
  sinkcache::inputs inputs = sinkcache::inputs::raw;
  std::optional<sinkcache::rope> rope = std::nullopt;  // must be given (rope::none() counts) unless positions are
                                                       // absolute and inputs rotated
  position_t first_position = 0;                       // where the stream starts: enters phases only
  index_t rollback = 63;  // evicted tokens kept a while longer: so many appended ones can be taken back, and prefill
                          // takes one more at a time. 0 saves their memory, and prefills token by token
  index_t recent = 64;    // the newest tokens that formats of few bits spare, besides those pinned; 0: none
};

namespace detail {

inline void require_window(status& found, const sink_window& policy) noexcept {
  found.require(policy.num_sink_tokens >= 0, "num_sink_tokens", policy.num_sink_tokens, "at least 0");
  found.require(policy.window >= 1, "window", policy.window,
                "at least 1: of a layer without a window, as many tokens as its stream may have");
  found.require(policy.rollback >= 0, "rollback", policy.rollback, "at least 0");
  const index_t ring = checked_sum(found, "window + rollback", policy.window, policy.rollback);
  checked_sum(found, "num_sink_tokens + window + rollback", policy.num_sink_tokens, ring);
}

inline void require_geometry(status& found, const kv_geometry& of) noexcept {
  found.require(of.num_kv_heads >= 1, "num_kv_heads", of.num_kv_heads, "at least 1");
  found.require(of.head_dim >= 1 && of.head_dim <= max_head_dim, "head_dim", of.head_dim, "from 1 to", max_head_dim);
  found.require(of.v_head_dim >= 1 && of.v_head_dim <= max_head_dim, "v_head_dim", of.v_head_dim, "from 1 to",
                max_head_dim);
  found.require(of.first_position >= 0 && of.first_position <= max_position, "first_position", of.first_position,
                "from 0 to", max_position);
  found.require(of.rope.has_value() || (of.positions == positions::absolute && of.inputs == inputs::rotated), "rope",
                "absent",
                "given, say .rope = rope::plain(head_dim, theta), or rope::none(), unless positions are absolute and "
                "inputs rotated");
  if (of.rope)
    found.require(of.rope->width() <= of.head_dim, "rope's width", of.rope->width(), "at most head_dim,", of.head_dim);
}

// With what rows go through before their formats take them.
inline kv_geometry geometry_of(const cache_config& config, const row_transform* of_k = nullptr,
                               const row_transform* of_v = nullptr) noexcept {
  return {.num_kv_heads = config.num_kv_heads,
          .head_dim = config.head_dim,
          .v_head_dim = config.v_head_dim == 0 ? config.head_dim : config.v_head_dim,
          .positions = config.positions,
          .inputs = config.inputs,
          .rope = config.rope,
          .first_position = config.first_position,
          .k_transform = of_k,
          .v_transform = of_v};
}

}  // namespace detail

// Whether a cache with the default policy can have this configuration. kv_cache<...>::validate knows its formats and
// policy too.
inline status validate(const cache_config& config) noexcept {
  status found;
  detail::require_window(found, {config.num_sink_tokens, config.window, config.rollback});
  detail::require_geometry(found, detail::geometry_of(config));
  return found;
}

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
