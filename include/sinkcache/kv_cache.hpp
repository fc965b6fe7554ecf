#pragma once

// The cache: keys and values of the tokens that its policy keeps, in constant memory, for one sequence and one layer.

#include <algorithm>
#include <concepts>
#include <cstring>
#include <memory_resource>
#include <optional>
#include <utility>

#include "any_kv_cache.hpp"
#include "detail/absorb.hpp"
#include "detail/macros_off.hpp"
#include "format.hpp"
#include "storage.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

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
      : kv_cache(checked(validate(config), resource), config, window_policy(config), resource) {
    got_memory().or_fail();
  }

  // A policy of one's own; it brings its own window, pinned tokens and room for rollback.
  kv_cache(const cache_config& config, Policy policy, std::pmr::memory_resource* resource = default_resource())
      : kv_cache(checked(validate(config, policy), resource), config, std::move(policy), resource) {
    got_memory().or_fail();
  }

  kv_cache(kv_cache&&) noexcept = default;
  kv_cache& operator=(kv_cache&&) noexcept = default;

  // Whether a cache can be made, given the memory.
  static status validate(const cache_config& config) noexcept requires std::same_as<Policy, sink_window> {
    return validate_with(config, window_policy(config));
  }
  static status validate(const cache_config& config, const Policy& policy) noexcept {
    status found = validate_with(config, policy);
    found.require(config.rollback == 0, "rollback", config.rollback,
                  "0: a policy of one's own brings its own rows for it");
    return found;
  }

  // What the constructors make; or nothing, and in `found` why: a rule, or no memory. noexcept, as every try_ function
  // is: a policy, format or executor of one's own that throws in one ends the program.
  static std::optional<kv_cache> try_create(
      const cache_config& config, status& found,
      std::pmr::memory_resource* resource = default_resource()) noexcept requires std::same_as<Policy, sink_window> {
    found = validate(config);
    return make(config, window_policy(config), found, resource);
  }
  static std::optional<kv_cache> try_create(const cache_config& config, Policy policy, status& found,
                                            std::pmr::memory_resource* resource = default_resource()) noexcept {
    found = validate(config, policy);
    return make(config, std::move(policy), found, resource);
  }

  // What the constructor asks its memory resource for.
  static std::size_t required_bytes(const cache_config& config) requires std::same_as<Policy, sink_window> {
    status found = validate(config);
    found.or_fail();
    return bytes_of(found, config, window_policy(config));
  }
  static std::size_t required_bytes(const cache_config& config, const Policy& policy) {
    status found = validate_with(config, policy);
    found.or_fail();
    return bytes_of(found, config, policy);
  }

  status try_append(const_matrix_view k, const_matrix_view v) noexcept override {
    status found;
    require_tokens(found, k.rows(), k, v);
    if (!found) return found;
    for (index_t i = 0; i < k.rows(); ++i) {
      rope::angles angles;
      angles_of(seen_, angles);
      const index_t slot = policy_.place(seen_).slot;
      for (index_t head = 0; head < config_.num_kv_heads; ++head)
        encode(head, k.row(i), v.row(i), angles, rows_.k(head, slot), rows_.v(head, slot));
      ++seen_;
    }
    high_ = std::max(high_, seen_);
    return found;
  }

  status try_truncate(position_t seen) noexcept override {
    status found;
    found.require(seen >= 0 && seen <= seen_, "seen", seen, "from 0 to what was seen,", seen_);
    if (!found) return found;
    const position_t smallest = detail::min_truncate(policy_, seen_, high_, seen);
    if (seen < smallest && !detail::can_go_back(policy_, seen, seen_, high_)) {
      found.refuse("seen was {}, had to be at least {}: older tokens are overwritten", seen, smallest);
      return found;
    }
    seen_ = seen;
    if (size() == seen) high_ = seen;  // all there ever was is still here, so what came after no longer matters
    return found;
  }

  position_t min_truncate() const noexcept override { return detail::min_truncate(policy_, seen_, high_); }

  // A copy that goes on by itself, in memory from the same resource.
  kv_cache clone() const {
    status found;
    require_memory(found);
    found.or_fail();
    kv_cache copy(checked(found, rows_.resource()), config_, Policy(policy_), rows_.resource());
    copy.got_memory().or_fail();
    copy.copy_tokens(*this);
    return copy;
  }
  std::optional<kv_cache> try_clone(status& found) const noexcept {
    found = status();
    require_memory(found);
    if (!found) return std::nullopt;
    std::optional<kv_cache> copy = make(config_, Policy(policy_), found, rows_.resource());
    if (copy) copy->copy_tokens(*this);
    return copy;
  }

  index_t capacity() const noexcept override {
    if (nbytes() == 0) return 0;
    if constexpr (std::same_as<Policy, sink_window>) return policy_.num_sink_tokens + policy_.window;
    return policy_.capacity();
  }
  std::size_t nbytes() const noexcept override { return rows_.nbytes(); }
  cache_kind kind() const noexcept override {
    return {detail::format_name<K>(), detail::format_name<V>(), std::same_as<Policy, sink_window>};
  }
  const Policy& policy() const { return policy_; }

  span_list visible(position_t seen) const noexcept override {
    return nbytes() > 0 ? policy_.visible(seen) : span_list();  // the policy may be moved from, too
  }

  segment segment_at(index_t kv_head, position_t first, position_t last) const noexcept override {
    const placed at = policy_.place(first);
    return {rows_.k(kv_head, 0),
            rows_.v(kv_head, 0),
            rows_.k_block(),
            rows_.v_block(),
            0,
            0,
            at.slot,
            first,
            std::min<position_t>(last, first + at.following + 1),
            &detail::absorb<K, V>};
  }

 private:
  using rows = detail::storage<K, V>;

  // What passed all checks.
  struct checked {
    checked(status found, const std::pmr::memory_resource* resource) {
      require_resource(found, resource);
      found.or_fail();
    }
  };

  static void require_resource(status& found, const std::pmr::memory_resource* resource) noexcept {
    found.require(resource != nullptr, "resource", "null", "a memory resource");
  }

  // Without memory where the resource had none, and exceptions are off.
  kv_cache(checked, const cache_config& config, Policy&& policy, std::pmr::memory_resource* resource)
      : any_kv_cache(config),
        policy_(std::move(policy)),
        rows_(config_.num_kv_heads, policy_.capacity(), config_.head_dim, config_.v_head_dim, resource) {}

  static std::optional<kv_cache> make(const cache_config& config, Policy&& policy, status& found,
                                      std::pmr::memory_resource* resource) noexcept {
    std::optional<kv_cache> cache;
    require_resource(found, resource);
    if (!found) return cache;
    const std::size_t bytes = bytes_of(found, config, policy);
#if defined(__cpp_exceptions)
    try {
      cache = kv_cache(checked(found, resource), config, std::move(policy), resource);
    } catch (...) {
    }
#else
    cache = kv_cache(checked(found, resource), config, std::move(policy), resource);
#endif
    if (!cache || cache->nbytes() == 0) {
      refuse_memory(found, bytes);
      cache.reset();
    }
    return cache;
  }

  status got_memory() const noexcept {
    status found;
    if (nbytes() == 0) refuse_memory(found, bytes_of(found, config_, policy_));
    return found;
  }
  static void refuse_memory(status& found, std::size_t bytes) noexcept {
    found.refuse("bytes of the cache was {}, had to be at most what the memory resource has", bytes);
  }

  static std::size_t bytes_of(status& found, const cache_config& config, const Policy& policy) noexcept {
    return rows::required_bytes(found, config.num_kv_heads, policy.capacity(), config.head_dim,
                                detail::with_v_head_dim(config).v_head_dim);
  }

  void copy_tokens(const kv_cache& from) noexcept {
    std::memcpy(rows_.data(), from.rows_.data(), rows_.nbytes());
    seen_ = from.seen_;
    high_ = from.high_;
  }

  static sink_window window_policy(const cache_config& config) noexcept {
    return {config.num_sink_tokens, config.window, config.rollback};
  }

  static status validate_with(const cache_config& config, const Policy& policy) noexcept {
    status found;
    if constexpr (std::same_as<Policy, sink_window>) detail::require_window(found, policy);
    if (found) found.require(policy.capacity() >= 1, "the policy's capacity()", policy.capacity(), "at least 1");
    detail::require_config(found, config);
    if (found) bytes_of(found, config, policy);
    return found;
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
            0,
            0,
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
};

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
