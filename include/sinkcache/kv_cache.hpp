#pragma once

// The cache: keys and values of the tokens that its policy keeps, in constant memory, for one sequence and one layer.

#include <algorithm>
#include <concepts>
#include <cstring>
#include <memory_resource>
#include <optional>
#include <utility>

#include "any_kv_cache.hpp"
#include "detail/erased.hpp"
#include "detail/macros_off.hpp"
#include "format.hpp"
#include "storage.hpp"
#include "tiered_kv_cache.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Keys in format K and values in format V, kept and dropped by Policy. One allocation, at construction. Const calls may
// run concurrently; append, truncate and prefill may not run beside any other.
// Formats that spare tokens, q8, q6, q4, q2, have a kv_cache of their own with the same calls: tiered_kv_cache.hpp.
template <kv_format K, kv_format V, class Policy>
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

  // With a policy, which brings its own window, pinned tokens and rows for rollback: of the configuration, window and
  // num_sink_tokens have to be 0, and rollback is not read.
  kv_cache(const cache_config& config, Policy policy, std::pmr::memory_resource* resource = default_resource())
      : kv_cache(checked(validate(config, policy), resource), config, std::move(policy), resource) {
    got_memory().or_fail();
  }

  kv_cache(kv_cache&& from) noexcept
      : any_kv_cache(static_cast<any_kv_cache&&>(from)),
        high_(std::exchange(from.high_, 0)),
        policy_(std::move(from.policy_)),
        rows_(std::move(from.rows_)),
        erased_(std::exchange(from.erased_, {})) {}
  kv_cache& operator=(kv_cache&& from) noexcept {
    any_kv_cache::operator=(static_cast<any_kv_cache&&>(from));
    high_ = std::exchange(from.high_, 0);
    policy_ = std::move(from.policy_);
    rows_ = std::move(from.rows_);
    erased_ = std::exchange(from.erased_, {});
    return *this;
  }

  // Whether a cache can be made, given the memory.
  static status validate(const cache_config& config) noexcept requires std::same_as<Policy, sink_window> {
    return validate_with(config, window_policy(config));
  }
  static status validate(const cache_config& config, const Policy& policy) noexcept {
    status found = validate_with(config, policy);
    found.require(config.num_sink_tokens == 0, "num_sink_tokens", config.num_sink_tokens,
                  "0: the policy that is given says what it pins");
    found.require(config.window == 0, "window", config.window, "0: the policy that is given says what it keeps");
    return found;
  }

  // What the constructors make; or nothing, and in `found` why: a rule, or no memory. noexcept, as every try_ function
  // is: a user-defined policy, format or executor that throws in one ends the program.
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

  // What the constructor asks its memory resource for. Throws what validate finds.
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

  // As many as the ring has rows that the next token does not see; with a user-defined policy 64 at most.
  index_t room() const noexcept override {
    if constexpr (std::same_as<Policy, sink_window>) {
      const position_t oldest = std::max<position_t>(policy_.num_sink_tokens, seen_ + 1 - policy_.window);
      return static_cast<index_t>(std::max<position_t>(1, policy_.window + policy_.rollback + oldest - seen_));
    } else {
      if (nbytes() == 0) return 1;  // the policy may be moved from, too
      constexpr index_t most = 64;
      span_list kept = policy_.visible(seen_ + 1);
      index_t n = 1;
      for (; n < most && !detail::stored_over(policy_, kept, seen_ + n); ++n)
        kept.push_back({seen_ + n, seen_ + n + 1});
      return n;
    }
  }

  // The only place where rows are written.
  void write(index_t first_kv_head, index_t num_kv_heads, const_matrix_view k, const_matrix_view v, index_t first_row,
             index_t n) noexcept override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    detail::key_rotation rotation(geometry_);
    for (index_t i = 0; i < n; ++i) {
      rotation.go_to(seen_ + i);
      const index_t slot = policy_.place(seen_ + i).slot;
      for (index_t head = first_kv_head; head < first_kv_head + num_kv_heads; ++head) {
        alignas(64) float rotated[max_head_dim];
        K::encode(rotation(k.row(first_row + i) + head * dim, rotated), dim, rows_.k(head, slot));
        V::encode(v.row(first_row + i) + head * v_dim, v_dim, rows_.v(head, slot));
      }
    }
  }

  void advance(index_t n) noexcept override {
    seen_ += n;
    high_ = std::max(high_, seen_);
  }

  void clear() noexcept override { seen_ = high_ = 0, erased_.clear(); }

  void require_erase(status& found, position_t first, position_t last) const noexcept override {
    require_range(found, first, last);
  }
  status try_erase(position_t first, position_t last) noexcept override {
    status found;
    require_range(found, first, last);
    if (found) erased_.add(found, {first, last}, policy_, min_truncate());
    return found;
  }

  status try_truncate(position_t seen) noexcept override {
    status found;
    require_truncate(found, seen);
    if (!found) return found;
    seen_ = seen;
    erased_.truncate(seen);
    if (nbytes() > 0 && policy_.visible(seen).num_tokens() == seen)
      high_ = seen;  // all there ever was is still here, so what came after no longer matters
    return found;
  }
  void require_truncate(status& found, position_t seen) const noexcept override {
    found.require(seen >= 0 && seen <= seen_, "seen", seen, "from 0 to what was seen,", seen_);
    if (!found) return;
    const position_t smallest = detail::min_truncate(policy_, seen_, high_, seen);
    if (seen < smallest && !detail::can_go_back(policy_, seen, seen_, high_))
      found.refuse("seen was {}, had to be at least {}: older tokens are overwritten", seen, smallest);
  }

  position_t min_truncate() const noexcept override { return detail::min_truncate(policy_, seen_, high_); }

  // A copy that goes on by itself, in memory from the same resource.
  kv_cache clone() const {
    status found;
    require_memory(found);
    found.or_fail();
    kv_cache copy(checked(found, rows_.resource()), config(), Policy(policy_), rows_.resource());
    copy.got_memory().or_fail();
    copy.copy_tokens(*this, found);
    found.or_fail();
    return copy;
  }
  std::optional<kv_cache> try_clone(status& found) const noexcept {
    found = status();
    require_memory(found);
    if (!found) return std::nullopt;
    std::optional<kv_cache> copy = make(config(), Policy(policy_), found, rows_.resource());
    if (copy) copy->copy_tokens(*this, found);
    if (!found) copy.reset();
    return copy;
  }
  std::unique_ptr<any_kv_cache> try_clone_any(status& found) const noexcept override {
    return detail::on_heap(try_clone(found), found);
  }

  index_t capacity() const noexcept override { return nbytes() > 0 ? detail::max_visible(policy_) : 0; }
  std::size_t nbytes() const noexcept override { return rows_.nbytes(); }
  cache_kind kind() const noexcept override { return {detail::format_name<K>(), detail::format_name<V>()}; }
  const Policy& policy() const { return policy_; }

  // What it was made from. The configuration of a user-defined policy has no window and no pinned tokens.
  cache_config config() const {
    const kv_geometry& of = geometry_;
    cache_config config{.num_kv_heads = of.num_kv_heads,
                        .head_dim = of.head_dim,
                        .v_head_dim = of.v_head_dim,
                        .positions = of.positions,
                        .inputs = of.inputs,
                        .rope = of.rope,
                        .first_position = of.first_position};
    if constexpr (std::same_as<Policy, sink_window>) {
      config.num_sink_tokens = policy_.num_sink_tokens;
      config.window = policy_.window;
      config.rollback = policy_.rollback;
    }
    return config;
  }

  index_t num_visible(position_t query) const noexcept override {
    if (nbytes() == 0 || query < 0) return 0;  // the policy may be moved from, too
    return erased_.num_left(policy_.visible(query + 1));
  }

  // Pinned tokens, then the ring before and after the row where it wraps; a user-defined policy may have as many runs
  // as slots. What was erased cuts one in two.
  index_t max_parts() const noexcept override {
    if (nbytes() == 0) return 0;
    return (std::same_as<Policy, sink_window> ? 3 : policy_.capacity()) + erased_.size();
  }

  plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept override {
    plan_end end{geometry_.num_kv_heads - kv_head, static_cast<index_t>(last - first + 1)};
    if (nbytes() == 0) return end;
    if constexpr (std::same_as<Policy, sink_window>) {
      const position_t pinned = policy_.num_sink_tokens, from = first + 1 - policy_.window;
      if (from <= pinned) {  // the first query sees all there is: one run, and a plan for those that do
        end.queries = static_cast<index_t>(std::min<position_t>(end.queries, pinned - from + 1));
        push_runs(kv_head, {0, first + end.queries}, kv_part::always, parts);
      } else {
        push_runs(kv_head, {0, pinned}, kv_part::always, parts);
        push_runs(kv_head, {from, last + 1}, policy_.window, parts);
      }
      return end;
    } else {
      end.queries = detail::planned_queries(policy_, first, last);
      for (const position_span& span : policy_.visible(first + end.queries))
        push_runs(kv_head, span, kv_part::always, parts);
      return end;
    }
  }

 private:
  using rows = detail::storage<K, V>;

  // What passed all checks.
  struct checked {
    checked(status found, const std::pmr::memory_resource* resource) {
      detail::require_resource(found, resource);
      found.or_fail();
    }
  };

  // Without memory where the resource had none, and exceptions are off.
  kv_cache(checked, const cache_config& config, Policy&& policy, std::pmr::memory_resource* resource)
      : any_kv_cache(detail::geometry_of(config)),
        policy_(std::move(policy)),
        rows_(geometry_.num_kv_heads, policy_.capacity(), geometry_.head_dim, geometry_.v_head_dim, resource) {}

  static std::optional<kv_cache> make(const cache_config& config, Policy&& policy, status& found,
                                      std::pmr::memory_resource* resource) noexcept {
    detail::require_resource(found, resource);
    if (!found) return std::nullopt;
    return detail::made_cache(found, bytes_of(found, config, policy),
                              [&] { return kv_cache(checked(found, resource), config, std::move(policy), resource); });
  }

  status got_memory() const noexcept {
    status found;
    if (nbytes() == 0) detail::refuse_memory(found, bytes_of(found, config(), policy_));
    return found;
  }

  static std::size_t bytes_of(status& found, const cache_config& config, const Policy& policy) noexcept {
    return rows::required_bytes(found, config.num_kv_heads, policy.capacity(), config.head_dim,
                                detail::geometry_of(config).v_head_dim);
  }

  void copy_tokens(const kv_cache& from, status& found) noexcept {
    erased_.assign(found, from.erased_);
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
    detail::require_geometry(found, detail::geometry_of(config));
    if (found) bytes_of(found, config, policy);
    return found;
  }

  // A part for each run of neighbouring slots.
  void push_runs(index_t kv_head, position_span span, position_t seen_until, part_list& parts) const noexcept {
    kv_part part;
    part.k = rows_.k_rows(kv_head);
    part.v = rows_.v_rows(kv_head);
    part.seen_until = seen_until;
    erased_.for_each_kept(span, [&](const position_span& kept) {
      detail::push_runs(part, kept, detail::num_pinned(policy_), parts, [&](position_t p) { return policy_.place(p); });
    });
  }

  position_t high_ = 0;  // how far the stream got before it was last taken back: what was overwritten
  Policy policy_;
  rows rows_;
  detail::erased_spans erased_;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
