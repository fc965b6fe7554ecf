#pragma once

// A cache that stores all tokens alike, compiled once for all formats of a policy: kv_cache.hpp has what its callers
// see.

#include <algorithm>
#include <concepts>
#include <cstring>
#include <memory>
#include <memory_resource>
#include <optional>
#include <utility>

#include "../any_kv_cache.hpp"
#include "../tiered_storage.hpp"
#include "erased.hpp"
#include "macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

template <class Policy>
class plain_cache : public any_kv_cache {
  static_assert(eviction_policy<Policy>, "sinkcache: the third argument of kv_cache must model eviction_policy");

 public:
  plain_cache(plain_cache&& from) noexcept
      : any_kv_cache(static_cast<any_kv_cache&&>(from)),
        formats_(from.formats_),
        high_(std::exchange(from.high_, 0)),
        policy_(std::move(from.policy_)),
        rows_(std::move(from.rows_)),
        erased_(std::exchange(from.erased_, {})) {}
  plain_cache& operator=(plain_cache&& from) noexcept {
    any_kv_cache::operator=(static_cast<any_kv_cache&&>(from));
    formats_ = from.formats_;
    high_ = std::exchange(from.high_, 0);
    policy_ = std::move(from.policy_);
    rows_ = std::move(from.rows_);
    erased_ = std::exchange(from.erased_, {});
    return *this;
  }

  // What kv_cache's try_create makes, of formats that are known when the program runs.
  static std::optional<plain_cache> try_make(const tier_formats& formats, const cache_config& config, Policy policy,
                                             status& found, std::pmr::memory_resource* resource) noexcept {
    found = validate_with(formats, config, policy);
    require_resource(found, resource);
    return found ? make(formats, config, std::move(policy), found, resource) : std::nullopt;
  }

  // As many as the ring has rows that the next token does not see; with a user-defined policy 64 at most.
  index_t room() const noexcept override {
    if constexpr (is_window) {
      const position_t oldest = std::max<position_t>(policy_.num_sink_tokens, seen_ + 1 - policy_.window);
      return static_cast<index_t>(std::max<position_t>(1, policy_.window + policy_.rollback + oldest - seen_));
    } else {
      if (nbytes() == 0) return 1;  // the policy may be moved from, too
      constexpr index_t most = 64;
      span_list kept = policy_.visible(seen_ + 1);
      index_t n = 1;
      for (; n < most && !stored_over(policy_, kept, seen_ + n); ++n) kept.push_back({seen_ + n, seen_ + n + 1});
      return n;
    }
  }

  // The only place where rows are written.
  void write(index_t first_kv_head, index_t num_kv_heads, const_matrix_view k, const_matrix_view v, index_t first_row,
             index_t n) noexcept override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    key_rotation rotation(geometry_);
    for (index_t i = 0; i < n; ++i) {
      rotation.go_to(seen_ + i);
      const index_t slot = policy_.place(seen_ + i).slot;
      for (index_t head = first_kv_head; head < first_kv_head + num_kv_heads; ++head) {
        alignas(64) float rotated[max_head_dim];
        rows_.encode(head, slot, rotation(k.row(first_row + i) + head * dim, rotated),
                     v.row(first_row + i) + head * v_dim);
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
    if (seen < smallest && !can_go_back(policy_, seen, seen_, high_))
      found.refuse("seen was {}, had to be at least {}: older tokens are overwritten", seen, smallest);
  }

  position_t min_truncate() const noexcept override { return detail::min_truncate(policy_, seen_, high_); }

  std::unique_ptr<any_kv_cache> try_clone_any(status& found) const noexcept override {
    return on_heap(try_copy(found), found);
  }

  index_t capacity() const noexcept override { return nbytes() > 0 ? max_visible(policy_) : 0; }
  std::size_t nbytes() const noexcept override { return rows_.nbytes(); }
  cache_kind kind() const noexcept override { return {formats_->k.reader->name, formats_->v.reader->name}; }
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
    if constexpr (is_window) {
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
      return end;
    } else {
      end.queries = planned_queries(policy_, first, last);
      for (const position_span& span : policy_.visible(first + end.queries))
        push_runs(kv_head, span, kv_part::always, parts);
      return end;
    }
  }

 protected:
  static constexpr bool is_window = std::same_as<Policy, sink_window>;

  plain_cache(checked, const tier_formats& formats, const cache_config& config, Policy&& policy,
              std::pmr::memory_resource* resource)
      : plain_cache(formats, config, std::move(policy), resource) {
    got_memory().or_fail();
  }

  static status validate_with(const tier_formats& formats, const cache_config& config, const Policy& policy) noexcept {
    status found;
    if constexpr (is_window) require_window(found, policy);
    if (found) found.require(policy.capacity() >= 1, "the policy's capacity()", policy.capacity(), "at least 1");
    require_geometry(found, geometry_of(config));
    if (found) bytes_of(found, formats, config, policy);
    return found;
  }
  static std::size_t bytes_of(status& found, const tier_formats& formats, const cache_config& config,
                              const Policy& policy) noexcept {
    return storage::required_bytes(found, formats.k, formats.v, storage_shape(config, policy));
  }

  plain_cache copy() const {
    status found;
    require_memory(found);
    found.or_fail();
    plain_cache made(checked(found, rows_.resource()), *formats_, config(), Policy(policy_), rows_.resource());
    made.copy_tokens(*this, found);
    found.or_fail();
    return made;
  }
  std::optional<plain_cache> try_copy(status& found) const noexcept {
    found = status();
    require_memory(found);
    if (!found) return std::nullopt;
    std::optional<plain_cache> made = make(*formats_, config(), Policy(policy_), found, rows_.resource());
    if (made) made->copy_tokens(*this, found);
    if (!found) made.reset();
    return made;
  }

 private:
  // Without memory where the resource had none, and exceptions are off.
  plain_cache(const tier_formats& formats, const cache_config& config, Policy&& policy,
              std::pmr::memory_resource* resource)
      : any_kv_cache(geometry_of(config)),
        formats_(&formats),
        policy_(std::move(policy)),
        rows_(formats.k, formats.v, storage_shape(config, policy_), resource) {}
  static std::optional<plain_cache> make(const tier_formats& formats, const cache_config& config, Policy&& policy,
                                         status& found, std::pmr::memory_resource* resource) noexcept {
    return made_cache(found, bytes_of(found, formats, config, policy),
                      [&] { return plain_cache(formats, config, std::move(policy), resource); });
  }
  status got_memory() const noexcept {
    status found;
    if (nbytes() == 0) refuse_memory(found, bytes_of(found, *formats_, config(), policy_));
    return found;
  }
  void copy_tokens(const plain_cache& from, status& found) noexcept {
    erased_.assign(found, from.erased_);
    std::memcpy(rows_.data(), from.rows_.data(), rows_.nbytes());
    seen_ = from.seen_;
    high_ = from.high_;
  }

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
      detail::push_runs(part, kept, num_pinned(policy_), parts, [&](position_t p) { return policy_.place(p); });
    });
  }

  const tier_formats* formats_;
  position_t high_ = 0;  // how far the stream got before it was last taken back: what was overwritten
  Policy policy_;
  storage rows_;
  erased_spans erased_;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
