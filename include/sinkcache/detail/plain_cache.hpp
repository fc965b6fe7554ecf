#pragma once

// A cache that stores all tokens alike, compiled once for all formats of a policy: kv_cache.hpp has what its callers
// see.

#include <algorithm>
#include <memory_resource>
#include <utility>

#include "macros_off.hpp"
#include "policy_cache.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

template <class Policy>
class plain_cache : public policy_cache<plain_cache<Policy>, Policy, storage> {
  using base = policy_cache<plain_cache<Policy>, Policy, storage>;
  using base::geometry_, base::seen_, base::high_, base::rows_, base::erased_, base::is_window;
  friend base;

 public:
  using base::nbytes;

  plain_cache(plain_cache&&) noexcept = default;
  plain_cache& operator=(plain_cache&&) noexcept = default;

  // As many as the ring has rows that the next token does not see; with a user-defined policy 64 at most.
  index_t room() const noexcept override {
    if constexpr (is_window) {
      const position_t oldest = std::max<position_t>(policy_.num_sink_tokens, seen_ + 1 - policy_.window);
      return static_cast<index_t>(std::max<position_t>(1, policy_.window + policy_.rollback + oldest - seen_));
    } else {
      return nbytes() > 0 ? room_after(policy_, seen_, 64) : 1;  // the policy may be moved from, too
    }
  }

  // The only place where rows are written.
  void write(index_t first_kv_head, index_t num_kv_heads, const_matrix_view k, const_matrix_view v, index_t first_row,
             index_t n) noexcept override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    key_rotation rotation(geometry_);
    for (index_t i = 0; i < n; ++i) {
      rotation.go_to(seen_ + i);
      const index_t slot = place_of(policy_, seen_ + i).slot;
      for (index_t head = first_kv_head; head < first_kv_head + num_kv_heads; ++head) {
        alignas(64) float rotated[max_head_dim];
        rows_.encode(head, slot, rotation(k.row(first_row + i) + head * dim, rotated),
                     v.row(first_row + i) + head * v_dim);
      }
    }
  }

  position_t min_truncate() const noexcept override { return detail::min_truncate(policy_, seen_, high_); }
  const Policy& policy() const { return policy_; }

  // Pinned tokens, then the ring before and after the row where it wraps; a user-defined policy may have as many runs
  // as slots. What was erased cuts one in two.
  index_t max_parts() const noexcept override {
    if (nbytes() == 0) return 0;
    return (is_window ? 3 : policy_.capacity()) + erased_.size();
  }

  plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept override {
    plan_end end{geometry_.num_kv_heads - kv_head, static_cast<index_t>(last - first + 1)};
    if (nbytes() == 0) return end;
    if constexpr (is_window) {
      const position_t pinned = policy_.num_sink_tokens, from = first + 1 - policy_.window;
      if (from <= pinned) {  // the first query sees all there is: one run, and a plan for those that do
        end.queries = static_cast<index_t>(std::min<position_t>(end.queries, pinned - from + 1));
        push_runs(kv_head, {0, first + end.queries}, kv_part::always, parts);
      } else {
        push_runs(kv_head, {0, pinned}, kv_part::always, parts);
        push_runs(kv_head, {from, last + 1}, policy_.window, parts);
      }
    } else {
      end.queries = planned_queries(policy_, first, last);
      for (const position_span& span : policy_.visible(first + end.queries))
        push_runs(kv_head, span, kv_part::always, parts);
    }
    return end;
  }

 protected:
  // Without memory where the resource had none, and exceptions are off.
  plain_cache(checked, const tier_formats& formats, const cache_config& config, Policy&& policy,
              std::pmr::memory_resource* resource)
      : base(geometry_of(config), formats, {formats.k, formats.v, storage_shape(config, policy), resource}),
        policy_(std::move(policy)) {}

  static status validate_with(const tier_formats& formats, const cache_config& config, const Policy& policy) noexcept {
    status found;
    base::require_policy(found, policy);
    require_geometry(found, geometry_of(config));
    if (found) bytes_of(found, formats, config, policy);
    return found;
  }
  static std::size_t bytes_of(status& found, const tier_formats& formats, const cache_config& config,
                              const Policy& policy) noexcept {
    return storage::required_bytes(found, formats.k, formats.v, storage_shape(config, policy));
  }

 private:
  // All there ever was is still there.
  bool never_overwrites(position_t seen) const { return policy_.visible(seen).num_tokens() == seen; }
  bool can_go_back(position_t seen) const { return detail::can_go_back(policy_, seen, seen_, high_); }

  static storage::shape storage_shape(const cache_config& config, const Policy& policy) noexcept {
    return {config.num_kv_heads, policy.capacity(), config.head_dim, geometry_of(config).v_head_dim};
  }

  // A part for each run of neighbouring slots.
  void push_runs(index_t kv_head, position_span span, position_t seen_until, part_list& parts) const noexcept {
    kv_part part;
    part.k = rows_.k_rows(kv_head);
    part.v = rows_.v_rows(kv_head);
    part.seen_until = seen_until;
    erased_.for_each_kept(span, [&](const position_span& kept) {
      detail::push_runs(part, kept, num_pinned(policy_), parts, [&](position_t p) { return place_of(policy_, p); });
    });
  }

  Policy policy_;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
