#pragma once

// kv_cache for formats that spare some tokens: pinned tokens and the newest `recent` are stored in another format,
// those between go to the formats of few bits once, when they leave the newest, from the row as it is stored. Where a
// token is read from is a pure function of how many were seen; a ring of each tier keeps `rollback` rows longer, so
// that the queries of a chunk, and those after a rollback, find what decode would.

#include <algorithm>
#include <concepts>
#include <cstring>
#include <memory_resource>
#include <optional>
#include <utility>

#include "any_kv_cache.hpp"
#include "detail/macros_off.hpp"
#include "tiered_storage.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

template <kv_format K, kv_format V = K, class Policy = sink_window>
class kv_cache;

// See kv_cache.hpp: the same calls. Of formats that spare tokens, or that transform rows.
template <kv_format K, kv_format V, class Policy>
requires(tiered_format<K> || tiered_format<V> || detail::transform_of<K>() != nullptr ||
         detail::transform_of<V>() != nullptr) class kv_cache<K, V, Policy> final : public any_kv_cache {
  static_assert(eviction_policy<Policy>, "sinkcache: the third argument of kv_cache must model eviction_policy");
  static_assert(K::block_rows == 1 && V::block_rows == 1,
                "sinkcache: kv_cache stores tokens one by one, so block_rows must be 1");

 public:
  explicit kv_cache(const cache_config& config,
                    std::pmr::memory_resource* resource = default_resource()) requires std::same_as<Policy, sink_window>
      : kv_cache(checked(validate(config), resource), config, window_policy(config), resource) {
    got_memory().or_fail();
  }
  // With a policy: of the configuration window and num_sink_tokens have to be 0; rollback is of the newest tokens.
  kv_cache(const cache_config& config, Policy policy, std::pmr::memory_resource* resource = default_resource())
      : kv_cache(checked(validate(config, policy), resource), config, std::move(policy), resource) {
    got_memory().or_fail();
  }
  kv_cache(kv_cache&& from) noexcept
      : any_kv_cache(static_cast<any_kv_cache&&>(from)),
        high_(std::exchange(from.high_, 0)),
        encoded_(std::exchange(from.encoded_, 0)),
        config_recent_(from.config_recent_),
        shape_(std::move(from.shape_)),
        rows_(std::move(from.rows_)) {}
  kv_cache& operator=(kv_cache&& from) noexcept {
    any_kv_cache::operator=(static_cast<any_kv_cache&&>(from));
    high_ = std::exchange(from.high_, 0);
    encoded_ = std::exchange(from.encoded_, 0);
    config_recent_ = from.config_recent_;
    shape_ = std::move(from.shape_);
    rows_ = std::move(from.rows_);
    return *this;
  }

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

  static std::size_t required_bytes(const cache_config& config) requires std::same_as<Policy, sink_window> {
    return required(config, window_policy(config));
  }
  static std::size_t required_bytes(const cache_config& config, const Policy& policy) {
    return required(config, policy);
  }

  index_t room() const noexcept override { return shape_.room(seen_); }

  void write(index_t first_kv_head, index_t num_kv_heads, const_matrix_view k, const_matrix_view v, index_t first_row,
             index_t n) noexcept override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    detail::key_rotation rotation(geometry_);
    for (index_t i = 0; i < n; ++i) {
      const position_t position = seen_ + i;
      rotation.go_to(position);
      for (index_t head = first_kv_head; head < first_kv_head + num_kv_heads; ++head) {
        move_to_few(head, position - shape_.recent);  // before its row is written over
        alignas(64) float rotated[max_head_dim], k_row[max_head_dim], v_row[max_head_dim];
        const float* const key = detail::transformed_row(
            geometry_.k_transform, rotation(k.row(first_row + i) + head * dim, rotated), dim, k_row);
        const float* const value =
            detail::transformed_row(geometry_.v_transform, v.row(first_row + i) + head * v_dim, v_dim, v_row);
        if (position < shape_.pinned() || shape_.recent > 0) {
          const index_t row = spared_row(position);
          full_k::encode(key, dim, rows_.spared_k(head, row));
          full_v::encode(value, v_dim, rows_.spared_v(head, row));
        } else {
          encode_few(head, position, key, value);
        }
      }
    }
  }

  void advance(index_t n) noexcept override {
    seen_ += n;
    high_ = std::max(high_, seen_);
    encoded_ = std::max(encoded_, seen_ - shape_.recent);
  }

  void clear() noexcept override { seen_ = high_ = encoded_ = 0; }

  status try_truncate(position_t seen) noexcept override {
    status found;
    require_truncate(found, seen);
    if (!found) return found;
    seen_ = seen;
    encoded_ = std::min(encoded_, seen);
    if (seen <= shape_.pinned()) high_ = seen;  // nothing else is left that could have been written over
    return found;
  }
  void require_truncate(status& found, position_t seen) const noexcept override {
    found.require(seen >= 0 && seen <= seen_, "seen", seen, "from 0 to what was seen,", seen_);
    if (found && !shape_.can_go_back(seen, seen_, high_)) refuse_overwritten(found, seen);
  }
  position_t min_truncate() const noexcept override { return shape_.min_truncate(seen_, high_); }

  kv_cache clone() const {
    status found;
    require_memory(found);
    found.or_fail();
    kv_cache copy(checked(found, rows_.resource()), config(), Policy(shape_.policy), rows_.resource());
    copy.got_memory().or_fail();
    copy.copy_tokens(*this);
    return copy;
  }
  std::optional<kv_cache> try_clone(status& found) const noexcept {
    found = status();
    require_memory(found);
    if (!found) return std::nullopt;
    std::optional<kv_cache> copy = make(config(), Policy(shape_.policy), found, rows_.resource());
    if (copy) copy->copy_tokens(*this);
    return copy;
  }
  std::unique_ptr<any_kv_cache> try_clone_any(status& found) const noexcept override {
    return detail::on_heap(try_clone(found), found);
  }

  index_t capacity() const noexcept override { return nbytes() > 0 ? detail::max_visible(shape_.policy) : 0; }
  std::size_t nbytes() const noexcept override { return rows_.nbytes(); }
  cache_kind kind() const noexcept override { return {detail::format_name<K>(), detail::format_name<V>()}; }
  const Policy& policy() const { return shape_.policy; }

  cache_config config() const {
    const kv_geometry& of = geometry_;
    cache_config config{.num_kv_heads = of.num_kv_heads,
                        .head_dim = of.head_dim,
                        .v_head_dim = of.v_head_dim,
                        .positions = of.positions,
                        .inputs = of.inputs,
                        .rope = of.rope,
                        .first_position = of.first_position,
                        .rollback = shape_.rollback,
                        .recent = config_recent_};
    if constexpr (is_window) {
      config.num_sink_tokens = shape_.policy.num_sink_tokens;
      config.window = shape_.policy.window;
    }
    return config;
  }

  index_t num_visible(position_t query) const noexcept override {
    return nbytes() > 0 && query >= 0 ? shape_.policy.visible(query + 1).num_tokens() : 0;
  }

  // Pinned tokens, then both rings where they wrap; of a user-defined policy for each span, and a run for each slot.
  index_t max_parts() const noexcept override {
    if (nbytes() == 0) return 0;
    return is_window ? 5 : 3 * span_list::max_spans + shape_.few();
  }

  plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept override {
    plan_end end{geometry_.num_kv_heads - kv_head, static_cast<index_t>(last - first + 1)};
    if (nbytes() == 0) return end;
    if constexpr (is_window) {
      push_span(kv_head, {0, std::min<position_t>(shape_.pinned(), last + 1)}, first, last, kv_part::always, parts);
      push_span(kv_head, {shape_.first_visible(first + 1), last + 1}, first, last, shape_.policy.window, parts);
    } else {
      end.queries = detail::planned_queries(shape_.policy, first, last);
      for (const position_span& span : shape_.policy.visible(first + end.queries))
        push_span(kv_head, span, first, first + end.queries - 1, kv_part::always, parts);
    }
    return end;
  }

 private:
  using shape = detail::tier_shape<Policy>;
  using rows = detail::tiered_storage<K, V>;
  using full_k = typename rows::full_k;
  using full_v = typename rows::full_v;

  // What passed all checks.
  struct checked {
    checked(status found, const std::pmr::memory_resource* resource) {
      detail::require_resource(found, resource);
      found.or_fail();
    }
  };

  static constexpr bool is_window = std::same_as<Policy, sink_window>;

  // Without memory where the resource had none, and exceptions are off.
  kv_cache(checked, const cache_config& config, Policy&& policy, std::pmr::memory_resource* resource)
      : any_kv_cache(detail::geometry_of<K, V>(config)),
        config_recent_(config.recent),
        shape_(shape_of(config, std::move(policy))),
        rows_(storage_shape(config, shape_), resource) {}

  static std::optional<kv_cache> make(const cache_config& config, Policy&& policy, status& found,
                                      std::pmr::memory_resource* resource) noexcept {
    std::optional<kv_cache> cache;
    detail::require_resource(found, resource);
    if (!found) return cache;
    const std::size_t bytes = bytes_of(found, config, shape_of(config, policy));
#if defined(__cpp_exceptions)
    try {
      cache = kv_cache(checked(found, resource), config, std::move(policy), resource);
    } catch (...) {
    }
#else
    cache = kv_cache(checked(found, resource), config, std::move(policy), resource);
#endif
    if (!cache || cache->nbytes() == 0) {
      detail::refuse_memory(found, bytes);
      cache.reset();
    }
    return cache;
  }

  static sink_window window_policy(const cache_config& config) noexcept {
    return {config.num_sink_tokens, config.window, config.rollback};
  }
  static status validate_with(const cache_config& config, const Policy& policy) noexcept {
    status found;
    if constexpr (is_window) detail::require_window(found, policy);
    if (found) found.require(policy.capacity() >= 1, "the policy's capacity()", policy.capacity(), "at least 1");
    found.require(config.rollback >= 0, "rollback", config.rollback, "at least 0");
    found.require(config.recent >= 0, "recent", config.recent, "at least 0");
    detail::require_geometry(found, detail::geometry_of(config));
    if (!is_window) detail::checked_sum(found, "recent + rollback", config.recent, config.rollback);
    if (found) bytes_of(found, config, shape_of(config, policy));
    return found;
  }
  static std::size_t required(const cache_config& config, const Policy& policy) {
    status found = validate_with(config, policy);
    found.or_fail();
    return bytes_of(found, config, shape_of(config, policy));
  }

  // Where neither format spares any, a window is whole, and of a user-defined policy what it pins.
  static shape shape_of(const cache_config& config, Policy policy) noexcept {
    constexpr bool spares = tiered_format<K> || tiered_format<V>;
    return {std::move(policy), spares ? config.recent : is_window ? index_t{max_position} : 0, config.rollback};
  }
  static typename rows::shape storage_shape(const cache_config& config, const shape& of) noexcept {
    return {config.num_kv_heads, config.head_dim, detail::geometry_of(config).v_head_dim, of.full_rows(), of.few()};
  }
  static std::size_t bytes_of(status& found, const cache_config& config, const shape& of) noexcept {
    return rows::required_bytes(found, storage_shape(config, of));
  }

  status got_memory() const noexcept {
    status found;
    if (nbytes() == 0) detail::refuse_memory(found, bytes_of(found, config(), shape_));
    return found;
  }

  void copy_tokens(const kv_cache& from) noexcept {
    std::memcpy(rows_.data(), from.rows_.data(), rows_.nbytes());
    seen_ = from.seen_;
    high_ = from.high_;
    encoded_ = from.encoded_;
  }

  index_t spared_row(position_t position) const noexcept {
    if (position < shape_.pinned()) return static_cast<index_t>(position);
    return shape_.pinned() + static_cast<index_t>((position - shape_.pinned()) % shape_.spared());
  }

  void encode_few(index_t head, position_t position, const float* key, const float* value) const noexcept {
    const index_t row = shape_.place(position).slot;
    K::encode(key, geometry_.head_dim, rows_.k(head, row));
    V::encode(value, geometry_.v_head_dim, rows_.v(head, row));
  }

  // What leaves the newest tokens, unless it is there already: of tokens that were taken back, those after them were.
  void move_to_few(index_t head, position_t position) const noexcept {
    if (shape_.recent == 0 || shape_.few() == 0 || position < shape_.pinned() || position < encoded_) return;
    const index_t row = spared_row(position);
    alignas(64) float key[max_head_dim], value[max_head_dim];
    full_k::decode(rows_.spared_k(head, row), 0, geometry_.head_dim, key);
    full_v::decode(rows_.spared_v(head, row), 0, geometry_.v_head_dim, value);
    encode_few(head, position, key, value);
  }

  // A span as the queries [first, last] may see it: what is pinned, what is encoded, then what is among the newest.
  void push_span(index_t kv_head, const position_span& span, position_t first, position_t last, position_t seen_until,
                 part_list& parts) const noexcept {
    const auto whole_row = [&](position_t p) {
      const index_t row = spared_row(p);
      return placed{row, (p < shape_.pinned() ? shape_.pinned() : shape_.full_rows()) - 1 - row};
    };
    const position_t pinned = shape_.pinned(), newest = std::max(pinned, first + 1 - shape_.recent);
    kv_part whole, few;
    whole.k = rows_.spared_k_rows(kv_head);
    whole.v = rows_.spared_v_rows(kv_head);
    few.k = rows_.k_rows(kv_head);
    few.v = rows_.v_rows(kv_head);
    few.seen_from = shape_.recent;
    few.seen_until = seen_until;
    detail::push_runs(whole, {span.first, std::min(span.last, pinned)}, pinned, parts, whole_row);
    if (shape_.few() > 0)
      detail::push_runs(few, {std::max(span.first, pinned), std::min(span.last, last + 1 - shape_.recent)}, 0, parts,
                        [&](position_t p) { return shape_.place(p); });
    whole.seen_until = shape_.recent;
    if (shape_.recent > 0) detail::push_runs(whole, {std::max(span.first, newest), span.last}, 0, parts, whole_row);
  }

  position_t high_ = 0;     // how far the stream got before it was last taken back: what was overwritten
  position_t encoded_ = 0;  // those before this, and not pinned, are in the formats of few bits
  index_t config_recent_;
  shape shape_;
  rows rows_;
};

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
