#pragma once

// The cache: keys and values of the tokens that its policy keeps, in constant memory, for one sequence and one layer.

#include <memory_resource>
#include <optional>
#include <utility>

#include "detail/absorb.hpp"
#include "format.hpp"
#include "matrix.hpp"
#include "policy.hpp"
#include "rope.hpp"
#include "segment.hpp"
#include "storage.hpp"

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

// What attention needs of a cache, whatever its formats and policy.
class any_kv_cache : public segment_source {
 public:
  virtual ~any_kv_cache() = default;

  const cache_config& config() const { return config_; }
  index_t size() const { return visible(seen_).num_tokens(); }  // visible tokens now
  position_t seen() const { return seen_; }                     // tokens appended, less those taken back

 protected:
  explicit any_kv_cache(const cache_config& config) : config_(checked(config)) {}
  any_kv_cache(any_kv_cache&&) = default;
  any_kv_cache& operator=(any_kv_cache&&) = default;

  void check_room_for(index_t tokens) const {
    detail::check(tokens <= max_position - seen_, "tokens seen and appended", tokens + seen_, "at most", max_position);
  }

  static cache_config checked(cache_config config) {
    using detail::check;
    check(config.num_kv_heads >= 1, "num_kv_heads", config.num_kv_heads, "at least 1");
    check(config.head_dim >= 1 && config.head_dim <= max_head_dim, "head_dim", config.head_dim, "from 1 to",
          max_head_dim);
    if (config.v_head_dim == 0) config.v_head_dim = config.head_dim;
    check(config.v_head_dim >= 1 && config.v_head_dim <= max_head_dim, "v_head_dim", config.v_head_dim, "from 1 to",
          max_head_dim);
    check(config.first_position >= 0 && config.first_position <= max_position, "first_position", config.first_position,
          "from 0 to", max_position);
    check(config.rollback >= 0, "rollback", config.rollback, "at least 0");
    check(config.prefill_block >= 1, "prefill_block", config.prefill_block, "at least 1");
    check(config.rope.has_value() || (config.positions == positions::absolute && config.inputs == inputs::rotated),
          "rope", "absent", "given (rope::none() counts) unless positions are absolute and inputs rotated");
    if (config.rope)
      check(config.rope->width() <= config.head_dim, "rope's width", config.rope->width(), "at most head_dim,",
            config.head_dim);
    return config;
  }

  cache_config config_;
  position_t seen_ = 0;

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

// Keys in format K and values in format V, kept and dropped by Policy. One allocation, at construction. Const calls may
// run concurrently; append, truncate and prefill may not run beside any other.
template <kv_format K, kv_format V = K, class Policy = sink_window>
class kv_cache final : public any_kv_cache {
  static_assert(eviction_policy<Policy>, "sinkcache: the third argument of kv_cache must model eviction_policy");
  static_assert(
      K::block_rows == 1 && V::block_rows == 1,
      "sinkcache: kv_cache stores tokens one by one; a format whose block_rows is above 1 has to wait for tiers");

 public:
  explicit kv_cache(const cache_config& config,
                    std::pmr::memory_resource* resource = default_resource()) requires std::same_as<Policy, sink_window>
      : kv_cache(config, window_policy(config), resource, config.rollback) {}

  // A policy of one's own; it brings its own window, pinned tokens and room for rollback.
  kv_cache(const cache_config& config, Policy policy, std::pmr::memory_resource* resource = default_resource())
      : kv_cache(config, std::move(policy), resource, 0) {}

  kv_cache(kv_cache&&) noexcept = default;
  kv_cache& operator=(kv_cache&&) noexcept = default;

  // What the constructor asks its memory resource for.
  static std::size_t required_bytes(const cache_config& config) requires std::same_as<Policy, sink_window> {
    return required_bytes(config, window_policy(config));
  }
  static std::size_t required_bytes(const cache_config& config, const Policy& policy) {
    const cache_config c = checked_with(config, policy);
    return rows::required_bytes(c.num_kv_heads, policy.capacity(), c.head_dim, c.v_head_dim);
  }

  // Appends tokens: k [tokens, num_kv_heads * head_dim], v [tokens, num_kv_heads * v_head_dim].
  void append(const_matrix_view k, const_matrix_view v) {
    check_tokens(k, v);
    check_room_for(k.rows());
    for (index_t i = 0; i < k.rows(); ++i) {
      rope::angles angles;
      angles_of(seen_, angles);
      const index_t slot = policy_.place(seen_).slot;
      for (index_t head = 0; head < config_.num_kv_heads; ++head)
        encode(head, k.row(i), v.row(i), angles, rows_.k(head, slot), rows_.v(head, slot));
      ++seen_;
    }
    high_ = std::max(high_, seen_);
  }

  // Takes back tokens until `seen` are left, as long as none that becomes visible again was overwritten.
  void truncate(position_t seen) {
    detail::check(seen >= 0 && seen <= seen_, "seen", seen, "from 0 to what was seen,", seen_);
    const position_t smallest = detail::min_truncate(policy_, seen_, high_, seen);
    if (seen < smallest && !detail::can_go_back(policy_, seen, seen_, high_))
      detail::fail(fmt::format("seen was {}, had to be at least {}: older tokens are overwritten", seen, smallest));
    seen_ = seen;
    if (size() == seen) high_ = seen;  // all there ever was is still here, so what came after no longer matters
  }

  // The smallest argument down to which truncate takes any. (It takes the pinned tokens alone, too.)
  position_t min_truncate() const { return detail::min_truncate(policy_, seen_, high_); }

  // Forgets all tokens.
  void clear() noexcept { seen_ = high_ = 0; }

  // A copy that goes on by itself, in memory from the same resource.
  kv_cache clone() const {
    kv_cache copy(config_, policy_, rows_.resource(), config_.rollback);
    std::memcpy(copy.rows_.data(), rows_.data(), rows_.nbytes());
    copy.seen_ = seen_;
    copy.high_ = high_;
    return copy;
  }

  // Most tokens visible at once; of a policy of one's own, its capacity().
  index_t capacity() const {
    if constexpr (std::same_as<Policy, sink_window>) return policy_.num_sink_tokens + policy_.window;
    return policy_.capacity();
  }
  std::size_t nbytes() const { return rows_.nbytes(); }  // memory held
  const Policy& policy() const { return policy_; }

  span_list visible(position_t seen) const noexcept override { return policy_.visible(seen); }

  segment segment_at(index_t kv_head, position_t first, position_t last) const noexcept override {
    const placed at = policy_.place(first);
    return {rows_.k(kv_head, 0),
            rows_.v(kv_head, 0),
            rows_.k_block(),
            rows_.v_block(),
            at.slot,
            first,
            std::min<position_t>(last, first + at.following + 1),
            &detail::absorb<K, V>};
  }

 private:
  using rows = detail::storage<K, V>;

  kv_cache(const cache_config& config, Policy policy, std::pmr::memory_resource* resource, index_t rollback)
      : any_kv_cache(checked_with(config, policy)),
        policy_(std::move(policy)),
        rows_(config_.num_kv_heads, policy_.capacity(), config_.head_dim, config_.v_head_dim, resource) {
    detail::check(config.rollback == rollback, "rollback", config.rollback,
                  "0: a policy of one's own brings its own rows for it");
  }

  static sink_window window_policy(const cache_config& config) {
    return {config.num_sink_tokens, config.window, config.rollback};
  }

  static void check_window(const sink_window& policy) {
    detail::check(policy.num_sink_tokens >= 0, "num_sink_tokens", policy.num_sink_tokens, "at least 0");
    detail::check(policy.window >= 1, "window", policy.window, "at least 1");
    detail::check(policy.rollback >= 0, "rollback", policy.rollback, "at least 0");
    detail::checked_sum("num_sink_tokens + window + rollback", policy.num_sink_tokens,
                        detail::checked_sum("window + rollback", policy.window, policy.rollback));
  }

  static cache_config checked_with(const cache_config& config, const Policy& policy) {
    if constexpr (std::same_as<Policy, sink_window>) check_window(policy);
    detail::check(policy.capacity() >= 1, "the policy's capacity()", policy.capacity(), "at least 1");
    return checked(config);
  }

  void check_tokens(const_matrix_view k, const_matrix_view v) const {
    detail::check_shape("k.rows()", "k.cols()", k, k.rows(), config_.num_kv_heads * config_.head_dim);
    detail::check_shape("v.rows()", "v.cols()", v, k.rows(), config_.num_kv_heads * config_.v_head_dim);
  }

  bool turns_keys() const { return config_.inputs == inputs::raw && config_.rope->width() > 0; }

  void angles_of(position_t position, rope::angles& angles) const noexcept {
    if (turns_keys()) config_.rope->angles_at(config_.first_position + position, true, angles);
  }

  // One token of one head: the only place where rows are written.
  void encode(index_t kv_head, const float* k, const float* v, const rope::angles& angles, std::byte* k_to,
              std::byte* v_to) const noexcept {
    k += kv_head * config_.head_dim;
    alignas(64) float turned[max_head_dim];
    if (turns_keys()) {
      config_.rope->turn(angles, k, config_.head_dim, turned);
      k = turned;
    }
    K::encode(k, config_.head_dim, k_to);
    V::encode(v + kv_head * config_.v_head_dim, config_.v_head_dim, v_to);
  }

  index_t staged_token_bytes() const noexcept override {
    return config_.num_kv_heads * (rows_.k_block() + rows_.v_block());
  }

  // A staged block is [num_kv_heads][keys of all its tokens, then values].
  std::byte* staged(index_t kv_head, index_t tokens, std::byte* block) const {
    return block + kv_head * tokens * (rows_.k_block() + rows_.v_block());
  }

  void stage(index_t kv_head, const_matrix_view k, const_matrix_view v, index_t first_row, index_t tokens,
             std::byte* block) const noexcept override {
    std::byte* const k_to = staged(kv_head, tokens, block);
    std::byte* const v_to = k_to + tokens * rows_.k_block();
    for (index_t i = 0; i < tokens; ++i) {
      rope::angles angles;
      angles_of(seen_ + i, angles);
      encode(kv_head, k.row(first_row + i), v.row(first_row + i), angles, k_to + i * rows_.k_block(),
             v_to + i * rows_.v_block());
    }
  }

  segment staged_segment(index_t kv_head, position_t first, position_t last, index_t tokens,
                         const std::byte* block) const noexcept override {
    const std::byte* const k = staged(kv_head, tokens, const_cast<std::byte*>(block));
    return {k,
            k + tokens * rows_.k_block(),
            rows_.k_block(),
            rows_.v_block(),
            static_cast<index_t>(first - seen_),
            first,
            last,
            &detail::absorb<K, V>};
  }

  void commit(index_t tokens, const std::byte* block) noexcept override {
    for (index_t i = 0; i < tokens;) {
      const placed at = policy_.place(seen_ + i);
      const index_t run = std::min(at.following + 1, tokens - i);
      for (index_t head = 0; head < config_.num_kv_heads; ++head) {
        const std::byte* const k = staged(head, tokens, const_cast<std::byte*>(block));
        const std::byte* const v = k + tokens * rows_.k_block();
        std::memcpy(rows_.k(head, at.slot), k + i * rows_.k_block(), static_cast<std::size_t>(run * rows_.k_block()));
        std::memcpy(rows_.v(head, at.slot), v + i * rows_.v_block(), static_cast<std::size_t>(run * rows_.v_block()));
      }
      i += run;
    }
    seen_ += tokens;
    high_ = std::max(high_, seen_);
  }

  Policy policy_;
  rows rows_;
  position_t high_ = 0;  // how far the stream got before it was last taken back: what was overwritten
};

}  // namespace sinkcache::inline SINKCACHE_TAG
