#pragma once

// A cache whose formats spare some tokens: pinned tokens and the newest `recent` are stored in another format, those
// between go to the formats of few bits once, when they leave the newest, from the row as it is stored. Where a token
// is read from is a pure function of how many were seen; whole rows of the newest lie `rollback` tokens longer, so that
// the queries of a chunk, and those after a rollback, find what decode would.

#include <algorithm>
#include <memory_resource>
#include <utility>

#include "macros_off.hpp"
#include "policy_cache.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

template <class Policy>
class tiered_cache : public policy_cache<tiered_cache<Policy>, Policy, tiered_storage> {
  using base = policy_cache<tiered_cache<Policy>, Policy, tiered_storage>;
  using base::geometry_, base::seen_, base::high_, base::rows_, base::erased_, base::is_window;
  friend base;

 public:
  using base::nbytes;

  tiered_cache(tiered_cache&&) noexcept = default;
  tiered_cache& operator=(tiered_cache&&) noexcept = default;

  // Where it was moved from, the policy may be, too.
  index_t room() const noexcept override { return nbytes() > 0 ? shape_.room(seen_) : 1; }

  void write(index_t first_kv_head, index_t num_kv_heads, const_matrix_view k, const_matrix_view v, index_t first_row,
             index_t n) noexcept override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    key_rotation rotation(geometry_);
    for (index_t i = 0; i < n; ++i) {
      const position_t position = seen_ + i;
      rotation.go_to(position);
      for (index_t head = first_kv_head; head < first_kv_head + num_kv_heads; ++head) {
        move_to_few(head, position - shape_.recent);  // before its row is written over
        alignas(64) float rotated[max_head_dim], k_row[max_head_dim], v_row[max_head_dim];
        const float* const key =
            transformed_row(geometry_.k_transform, rotation(k.row(first_row + i) + head * dim, rotated), dim, k_row);
        const float* const value =
            transformed_row(geometry_.v_transform, v.row(first_row + i) + head * v_dim, v_dim, v_row);
        if (position < shape_.pinned() || shape_.recent > 0) {
          rows_.encode_whole(head, spared_row(position), key, value);
        } else {
          rows_.encode(head, shape_.place(position).slot, key, value);
        }
      }
    }
  }

  void advance(index_t n) noexcept override {
    base::advance(n);
    encoded_ = std::max(encoded_, seen_ - shape_.recent);
  }
  void clear() noexcept override { base::clear(), encoded_ = 0; }
  status try_truncate(position_t seen) noexcept override {
    status found = base::try_truncate(seen);
    if (found) encoded_ = std::min(encoded_, seen);
    return found;
  }
  position_t min_truncate() const noexcept override { return shape_.min_truncate(seen_, high_); }

  const Policy& policy() const { return shape_.policy; }

  cache_config config() const {
    cache_config config = base::config();
    config.rollback = shape_.rollback;
    config.recent = config_recent_;
    return config;
  }

  // Pinned tokens, then both rings where they wrap; of a user-defined policy for each span, and a run for each slot.
  // What was erased cuts one in two, of few bits and whole.
  index_t max_parts() const noexcept override {
    if (nbytes() == 0) return 0;
    return (is_window ? 5 : 3 * span_list::max_spans + shape_.few()) + 2 * erased_.size();
  }

  plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept override {
    plan_end end{geometry_.num_kv_heads - kv_head, static_cast<index_t>(last - first + 1)};
    if (nbytes() == 0) return end;
    if constexpr (is_window) {
      push_span(kv_head, {0, std::min<position_t>(shape_.pinned(), last + 1)}, first, last, kv_part::always, parts);
      push_span(kv_head, {shape_.first_visible(first + 1), last + 1}, first, last, shape_.policy.window, parts);
    } else {
      end.queries = planned_queries(shape_.policy, first, last);
      for (const position_span& span : shape_.policy.visible(first + end.queries))
        push_span(kv_head, span, first, first + end.queries - 1, kv_part::always, parts);
    }
    return end;
  }

 protected:
  // Without memory where the resource had none, and exceptions are off.
  tiered_cache(checked, const tier_formats& formats, const cache_config& config, Policy&& policy,
               std::pmr::memory_resource* resource)
      : base(geometry_of(config, formats.k_transform, formats.v_transform), formats,
             {formats, storage_shape(config, shape_of(formats, config, Policy(policy))), resource}),
        config_recent_(config.recent),
        shape_(shape_of(formats, config, std::move(policy))) {}

  static status validate_with(const tier_formats& formats, const cache_config& config, const Policy& policy) noexcept {
    status found;
    base::require_policy(found, policy);
    found.require(config.rollback >= 0, "rollback", config.rollback, "at least 0");
    found.require(config.recent >= 0, "recent", config.recent, "at least 0");
    require_geometry(found, geometry_of(config));
    if (!is_window) checked_sum(found, "recent + rollback", config.recent, config.rollback);
    if (found) bytes_of(found, formats, config, policy);
    return found;
  }
  static std::size_t bytes_of(status& found, const tier_formats& formats, const cache_config& config,
                              const Policy& policy) noexcept {
    return tiered_storage::required_bytes(found, formats,
                                          storage_shape(config, shape_of(formats, config, Policy(policy))));
  }

 private:
  using shape = tier_shape<Policy>;

  void copy_tokens(const tiered_cache& from, status& found) noexcept {
    base::copy_tokens(from, found);
    encoded_ = from.encoded_;
  }

  // Nothing else is left that could have been written over.
  bool never_overwrites(position_t seen) const { return seen <= shape_.pinned(); }
  bool can_go_back(position_t seen) const { return shape_.can_go_back(seen, seen_, high_); }

  // Where neither format spares any, a window is whole, and of a user-defined policy what it pins.
  static shape shape_of(const tier_formats& formats, const cache_config& config, Policy policy) noexcept {
    return {std::move(policy), formats.spares ? config.recent : is_window ? index_t{max_position} : 0, config.rollback};
  }
  static tiered_storage::shape storage_shape(const cache_config& config, const shape& of) noexcept {
    return {config.num_kv_heads, config.head_dim, geometry_of(config).v_head_dim, of.full_rows(), of.few()};
  }

  index_t spared_row(position_t position) const noexcept {
    if (position < shape_.pinned()) return static_cast<index_t>(position);
    return shape_.pinned() + static_cast<index_t>((position - shape_.pinned()) % shape_.spared());
  }

  // What leaves the newest tokens, unless it is there already: of tokens that were taken back, those after them were.
  void move_to_few(index_t head, position_t position) const noexcept {
    if (shape_.recent == 0 || shape_.few() == 0 || position < shape_.pinned() || position < encoded_) return;
    rows_.encode_stored(head, spared_row(position), shape_.place(position).slot);
  }

  // A span as the queries [first, last] may see it: what is pinned, what is encoded, then what is among the newest.
  void push_span(index_t kv_head, const position_span& of, position_t first, position_t last, position_t seen_until,
                 part_list& parts) const noexcept {
    const auto whole_row = [&](position_t p) {
      const index_t row = spared_row(p);
      return placed{row, (p < shape_.pinned() ? shape_.pinned() : shape_.full_rows()) - 1 - row};
    };
    const position_t pinned = shape_.pinned(), newest = std::max(pinned, first + 1 - shape_.recent);
    kv_part whole, few;
    whole.k = rows_.whole_rows_k(kv_head);
    whole.v = rows_.whole_rows_v(kv_head);
    few.k = rows_.k_rows(kv_head);
    few.v = rows_.v_rows(kv_head);
    few.seen_from = shape_.recent;
    few.seen_until = seen_until;
    erased_.for_each_kept(of, [&](const position_span& span) {
      whole.seen_until = kv_part::always;
      push_runs(whole, {span.first, std::min(span.last, pinned)}, pinned, parts, whole_row);
      if (shape_.few() > 0)
        push_runs(few, {std::max(span.first, pinned), std::min(span.last, last + 1 - shape_.recent)}, 0, parts,
                  [&](position_t p) { return shape_.place(p); });
      whole.seen_until = shape_.recent;
      if (shape_.recent > 0) push_runs(whole, {std::max(span.first, newest), span.last}, 0, parts, whole_row);
    });
  }

  position_t encoded_ = 0;  // those before this, and not pinned, are in the formats of few bits
  index_t config_recent_;
  shape shape_;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
