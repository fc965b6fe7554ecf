#pragma once

// What every cache is, whatever its formats and policy: its configuration, and the calls that an engine makes on it.

#include <cstddef>
#include <optional>
#include <string_view>
#include <utility>

#include "detail/macros_off.hpp"
#include "matrix.hpp"
#include "policy.hpp"
#include "rope.hpp"
#include "segment.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

enum class positions {
  in_cache,  // tokens count as neighbours of those that are still visible before and after them (StreamingLLM)
  absolute   // tokens keep their true positions (gpt-oss and other models trained with a window)
};

enum class inputs {
  raw,     // keys and queries come without rotary positions; the library turns them
  rotated  // the engine has turned them, at their true positions
};

struct cache_config {
  index_t num_kv_heads = 0;     // at least 1
  index_t head_dim = 0;         // of keys and queries, 1 to 512
  index_t v_head_dim = 0;       // of values and outputs, 1 to 512; 0: head_dim
  index_t num_sink_tokens = 0;  // the first tokens, pinned for ever
  index_t window = 0;           // the newest tokens, the current one included; at least 1
  sinkcache::positions positions = sinkcache::positions::in_cache;
  sinkcache::inputs inputs = sinkcache::inputs::raw;
  std::optional<sinkcache::rope> rope = std::nullopt;  // must be given (rope::none() counts) unless positions are
                                                       // absolute and inputs rotated
  position_t first_position = 0;                       // where the stream starts: enters phases only
  index_t rollback = 0;         // evicted tokens kept a while, so that so many appended ones can be taken back
  index_t prefill_block = 512;  // prefill stages at most so many tokens at a time
};

namespace detail {

inline void require_window(status& found, const sink_window& policy) noexcept {
  found.require(policy.num_sink_tokens >= 0, "num_sink_tokens", policy.num_sink_tokens, "at least 0");
  found.require(policy.window >= 1, "window", policy.window, "at least 1");
  found.require(policy.rollback >= 0, "rollback", policy.rollback, "at least 0");
  const index_t ring = checked_sum(found, "window + rollback", policy.window, policy.rollback);
  checked_sum(found, "num_sink_tokens + window + rollback", policy.num_sink_tokens, ring);
}

inline void require_config(status& found, const cache_config& config) noexcept {
  found.require(config.num_kv_heads >= 1, "num_kv_heads", config.num_kv_heads, "at least 1");
  found.require(config.head_dim >= 1 && config.head_dim <= max_head_dim, "head_dim", config.head_dim, "from 1 to",
                max_head_dim);
  found.require(config.v_head_dim >= 0 && config.v_head_dim <= max_head_dim, "v_head_dim", config.v_head_dim,
                "from 1 to", max_head_dim);
  found.require(config.first_position >= 0 && config.first_position <= max_position, "first_position",
                config.first_position, "from 0 to", max_position);
  found.require(config.rollback >= 0, "rollback", config.rollback, "at least 0");
  found.require(config.prefill_block >= 1, "prefill_block", config.prefill_block, "at least 1");
  found.require(
      config.rope.has_value() || (config.positions == positions::absolute && config.inputs == inputs::rotated), "rope",
      "absent", "given (rope::none() counts) unless positions are absolute and inputs rotated");
  if (config.rope)
    found.require(config.rope->width() <= config.head_dim, "rope's width", config.rope->width(), "at most head_dim,",
                  config.head_dim);
}

inline cache_config with_v_head_dim(cache_config config) noexcept {
  if (config.v_head_dim == 0) config.v_head_dim = config.head_dim;
  return config;
}

}  // namespace detail

// Whether a cache with the default policy can have this configuration. kv_cache<...>::validate knows its formats and
// policy too.
inline status validate(const cache_config& config) noexcept {
  status found;
  detail::require_window(found, {config.num_sink_tokens, config.window, config.rollback});
  detail::require_config(found, config);
  return found;
}

// Stored tokens of one sequence and layer, as attention reads them: those of a cache, or of the engine's own memory.
class kv_source : public segment_source {
 public:
  const cache_config& config() const { return config_; }
  index_t size() const { return visible(seen_).num_tokens(); }  // visible tokens now
  position_t seen() const { return seen_; }                     // tokens stored so far, less those taken back

  virtual index_t capacity()
      const noexcept = 0;  // most tokens visible at once; of a policy of one's own, its capacity()

  // The smallest count of tokens from which on all that was visible after so many is still stored.
  virtual position_t min_truncate() const noexcept = 0;

 protected:
  explicit kv_source(const cache_config& config) noexcept : config_(detail::with_v_head_dim(config)) {}
  kv_source(kv_source&& from) noexcept
      : segment_source(from), config_(from.config_), seen_(std::exchange(from.seen_, 0)) {}
  kv_source& operator=(kv_source&& from) noexcept {
    config_ = from.config_;
    seen_ = std::exchange(from.seen_, 0);
    return *this;
  }
  ~kv_source() = default;

  cache_config config_;
  position_t seen_ = 0;
};

// Of what a cache is made, for messages: the formats' names, and whether its policy is a sink_window.
struct cache_kind {
  std::string_view k_format, v_format;
  bool sink_window;
};

// A cache of whatever formats and policy. A call that is refused changes nothing. One that was moved from holds no
// tokens and no memory, takes none, and can be assigned to.
class any_kv_cache : public kv_source {
 public:
  virtual ~any_kv_cache() = default;

  virtual std::size_t nbytes() const noexcept = 0;  // memory held
  virtual cache_kind kind() const noexcept = 0;

  // Appends tokens: k [tokens, num_kv_heads * head_dim], v [tokens, num_kv_heads * v_head_dim].
  void append(const_matrix_view k, const_matrix_view v) { try_append(k, v).or_fail(); }
  virtual status try_append(const_matrix_view k, const_matrix_view v) noexcept = 0;

  // Takes back tokens until `seen` are left, as long as none that becomes visible again was overwritten.
  void truncate(position_t seen) { try_truncate(seen).or_fail(); }
  virtual status try_truncate(position_t seen) noexcept = 0;

  // The smallest argument down to which truncate takes any. (It takes the pinned tokens alone, too.)
  position_t min_truncate() const noexcept override = 0;

  // Forgets all tokens.
  void clear() noexcept { seen_ = high_ = 0; }

  // Adds to `found` that this cache was moved from, if so.
  void require_memory(status& found) const noexcept {
    found.require(nbytes() > 0, "the cache", "moved from", "one that holds memory");
  }

  // Adds to `found` why k and v cannot be appended as so many tokens.
  void require_tokens(status& found, index_t tokens, const_matrix_view k, const_matrix_view v) const noexcept {
    require_memory(found);
    detail::require_shape(found, "k", k, tokens, config_.num_kv_heads * config_.head_dim);
    detail::require_shape(found, "v", v, tokens, config_.num_kv_heads * config_.v_head_dim);
    found.require(tokens >= 0, "k.rows()", tokens, "at least 0");
    found.require(tokens <= max_position - seen_, "tokens seen and appended",
                  static_cast<std::uint64_t>(tokens) + static_cast<std::uint64_t>(seen_), "at most", max_position);
  }

 protected:
  explicit any_kv_cache(const cache_config& config) noexcept : kv_source(config) {}
  any_kv_cache(any_kv_cache&& from) noexcept : kv_source(std::move(from)), high_(std::exchange(from.high_, 0)) {}
  any_kv_cache& operator=(any_kv_cache&& from) noexcept {
    high_ = std::exchange(from.high_, 0);
    kv_source::operator=(std::move(from));
    return *this;
  }

  position_t high_ = 0;  // how far the stream got before it was last taken back: what was overwritten

 private:
  friend class attention;

  // Prefill encodes a block of tokens first, attends to cache and block, and then moves the block in.
  virtual index_t staged_token_bytes() const noexcept = 0;
  virtual void stage(index_t kv_head, const_matrix_view k, const_matrix_view v, index_t first_row, index_t tokens,
                     std::byte* block) const noexcept = 0;
  virtual segment staged_segment(index_t kv_head, position_t first, position_t last, index_t tokens,
                                 const std::byte* block) const noexcept = 0;
  virtual void commit(index_t tokens, const std::byte* block) noexcept = 0;
};

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
