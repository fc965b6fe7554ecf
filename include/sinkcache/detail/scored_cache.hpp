#pragma once

// A cache that evicts by score, compiled once for all formats: scored_kv_cache.hpp has what its callers see.

#include <algorithm>
#include <cstring>
#include <memory>
#include <memory_resource>
#include <optional>
#include <utility>

#include "../attention.hpp"
#include "../eviction.hpp"
#include "../scorer.hpp"
#include "../tiered_storage.hpp"
#include "eviction_event.hpp"
#include "learner.hpp"
#include "macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

class scored_cache : public any_kv_cache {
 public:
  scored_cache(scored_cache&& from) noexcept
      : any_kv_cache(static_cast<any_kv_cache&&>(from)),
        formats_(from.formats_),
        parts_(std::move(from.parts_)),
        memory_(std::move(from.memory_)),
        watcher_(std::exchange(from.watcher_, nullptr)) {
    if (parts_) parts_->learner.cache = this;
  }
  scored_cache& operator=(scored_cache&& from) noexcept {
    any_kv_cache::operator=(static_cast<any_kv_cache&&>(from));
    formats_ = from.formats_;
    parts_ = std::move(from.parts_);
    memory_ = std::move(from.memory_);
    watcher_ = std::exchange(from.watcher_, nullptr);
    if (parts_) parts_->learner.cache = this;
    return *this;
  }

  // What scored_kv_cache's try_create makes, of formats that are known when the program runs.
  static std::optional<scored_cache> try_make(const tier_formats& formats, const cache_config& config,
                                              const eviction& rules, const std::shared_ptr<const token_scorer>& scorer,
                                              status& found, std::pmr::memory_resource* resource) noexcept {
    found = validate_with(formats, config, rules, scorer.get());
    require_resource(found, resource);
    const auto of = created(found, "the rules", [&] { return config_of(formats, config, rules, scorer); });
    return of ? make(formats, *of, found, resource) : std::nullopt;
  }
  std::unique_ptr<any_kv_cache> try_clone_any(status& found) const noexcept override {
    return on_heap(try_copy(found), found);
  }

  index_t room() const noexcept override {
    if (nbytes() == 0) return 1;
    const index_t interval = state().of.rules.interval, left = interval - static_cast<index_t>(seen_ % interval);
    return state().of.has_tiers() ? std::min(left, state().tiers.room()) : left;
  }
  index_t capacity() const noexcept override { return nbytes() > 0 ? state().most_rows() : 0; }
  std::size_t nbytes() const noexcept override { return memory_ ? memory_.get_deleter().bytes : 0; }
  cache_kind kind() const noexcept override { return {formats_->k.reader->name, formats_->v.reader->name}; }

  const eviction& rules() const { return held_state().of.rules; }
  const token_scorer& scorer() const { return *held_state().of.scorer; }

  index_t num_sink_tokens() const { return nbytes() > 0 ? state().of.num_sink_tokens : 0; }
  index_t rollback() const { return nbytes() > 0 ? state().of.rollback : 0; }

  // Positions of the rows that a KV head holds, oldest first; and how many of them an event leaves.
  std::span<const position_t> kept(index_t kv_head) const {
    return held(kv_head) != nullptr ? state().rows.at(kv_head) : std::span<const position_t>();
  }
  index_t budget(index_t kv_head) const { return of_held(kv_head, &held_rows::budget); }

  // With accounts: the sum of the masses of all events, and the largest bound (eviction_event).
  double evicted_mass(index_t kv_head) const { return of_held(kv_head, &held_rows::mass); }
  double largest_bound(index_t kv_head) const { return of_held(kv_head, &held_rows::bound); }

  // Keeps the token at a position for ever, one that comes later too. False where a head has evicted it, or will, as an
  // event decided that truncate took back to. Refused where it would leave no row free.
  bool pin(position_t position) {
    bool pinned = false;
    try_pin(position, pinned).or_fail();
    return pinned;
  }
  status try_pin(position_t position, bool& pinned) noexcept override {
    status found;
    pinned = false;
    require_memory(found);
    found.require(position >= 0 && position < max_position, "position", position, "from 0 and below", max_position);
    if (found && (position >= seen_ || state().keeps(position, seen_))) state().pin(found, position, pinned);
    return found;
  }

  // `reader` is told of each event from now on; null: nobody is.
  void watch(eviction_reader* reader) noexcept { watcher_ = reader; }

  void prepare() noexcept override {
    if (nbytes() == 0 || state().prepared_at == seen_ || !state().is_due(seen_)) return;
    scored_state& s = state();
    s.prepared_at = seen_;
    if (!s.is_over_budget(0)) return;
    if (s.is_decided(seen_)) {
      s.rows.redo({s.leaves, static_cast<std::size_t>(s.most_rows())});
      if (s.of.rules.adaptive) s.rows.lay_out(s.of.rules.interval);
    } else {
      if (s.log.learns() && s.log.learned() < seen_)
        broken_source("a cache that evicts by what queries give tokens has not seen all queries");
      eviction_run(s, seen_, watcher_).run();
    }
    s.evicted_at = seen_;
  }

  void write(index_t first_kv_head, index_t num_kv_heads, const_matrix_view k, const_matrix_view v, index_t first_row,
             index_t n) noexcept override {
    const scored_state& s = state();
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    key_rotation rotation(geometry_, !s.stores_unrotated());
    for (index_t i = 0; i < n; ++i) {
      rotation.go_to(seen_ + i);
      for (index_t head = first_kv_head; head < first_kv_head + num_kv_heads; ++head) {
        const float* const key = k.row(first_row + i) + head * dim;
        const float given = s.needs.given ? s.of.scorer->given({key, static_cast<std::size_t>(dim)}) : 0;
        alignas(64) float rotated[max_head_dim], k_row[max_head_dim], v_row[max_head_dim];
        s.write(head, i, seen_, transformed_row(geometry_.k_transform, rotation(key, rotated), dim, k_row),
                transformed_row(geometry_.v_transform, v.row(first_row + i) + head * v_dim, v_dim, v_row), given);
      }
    }
  }

  void advance(index_t n) noexcept override {
    if (nbytes() == 0) return;
    seen_ += n;
    for (index_t h = 0; h < geometry_.num_kv_heads; ++h) state().rows.head(h).n += n;
    state().advance(seen_);
  }

  // Refused: scores were given while those tokens were seen, and say nothing of a cache without them.
  void require_erase(status& found, position_t, position_t) const noexcept override {
    found.refuse(
        "this cache evicts by scores that were given while it held these tokens, had to be a kv_cache to drop a range: "
        "clear it and prefill the tokens that stay");
  }

  void clear() noexcept override {
    seen_ = 0;
    if (nbytes() > 0) state().clear();
  }

  // Takes back up to `rollback` tokens, with the events between and all that was learned since.
  status try_truncate(position_t seen) noexcept override {
    status found;
    require_truncate(found, seen);
    if (!found || seen == seen_) return found;
    state().take_back(seen, seen_);
    seen_ = seen;
    return found;
  }
  position_t min_truncate() const noexcept override { return nbytes() > 0 ? state().floor : 0; }

  index_t num_visible(position_t query) const noexcept override {
    if (nbytes() == 0 || query < 0) return 0;
    const index_t n = state().fullest();
    return std::max<index_t>(0, n - static_cast<index_t>(std::clamp<position_t>(seen_ - 1 - query, 0, n)));
  }
  position_t oldest_query() const noexcept override {
    return nbytes() == 0 || parts_->learner.looks_back() ? 0 : state().oldest_query();
  }

  // What was kept by score, and the newest tokens; with tiers several runs of rows.
  index_t max_parts() const noexcept override { return nbytes() > 0 ? state().max_parts() : 0; }
  plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept override {
    if (nbytes() > 0) state().push_parts(kv_head, first, last, parts);
    return {1, static_cast<index_t>(last - first + 1)};
  }

  weight_reader* learner() noexcept override {
    return nbytes() > 0 && state().log.learns() ? &parts_->learner : nullptr;
  }
  void require_learned(status& found, index_t tokens) const noexcept override {
    if (nbytes() > 0) state().require_learned(found, seen_, tokens);
  }

 protected:
  scored_cache(const tier_formats& formats, const cache_config& config, const eviction& rules,
               const std::shared_ptr<const token_scorer>& scorer, std::pmr::memory_resource* resource)
      : scored_cache(checked(validate_with(formats, config, rules, scorer.get()), resource), formats,
                     config_of(formats, config, rules, scorer), resource) {
    got_memory().or_fail();
  }
  static status validate_with(const tier_formats& formats, const cache_config& config, const eviction& rules,
                              const token_scorer* scorer) noexcept {
    status found;
    bytes_of(found, formats, config, rules, scorer);
    return found;
  }
  static index_t bytes_of(status& found, const tier_formats& formats, const cache_config& config, const eviction& rules,
                          const token_scorer* scorer) noexcept {
    found.require(scorer != nullptr, "scorer", "null", "a scorer");
    const auto bytes = created(found, "the rules", [&] {
      const scored_config of =
          config_of(formats, config, rules, std::shared_ptr<const token_scorer>(std::shared_ptr<void>(), scorer));
      require_rules(found, of, config);
      return found ? scored_state(of).bytes(found) : 0;
    });
    return bytes.value_or(0);
  }
  scored_cache copy() const {
    status found;
    require_memory(found);
    found.or_fail();
    scored_cache made(checked(found, resource()), *formats_, state().of, resource());
    made.got_memory().or_fail();
    made.copy_tokens(*this);
    return made;
  }
  std::optional<scored_cache> try_copy(status& found) const noexcept {
    found = status();
    require_memory(found);
    if (!found) return std::nullopt;
    std::optional<scored_cache> made = make(*formats_, state().of, found, resource());
    if (made) made->copy_tokens(*this);
    return made;
  }

 private:
  // On the heap, because the learner keeps a reference to it.
  struct own_parts {
    own_parts(scored_config config, const any_kv_cache* cache) : state(std::move(config)), learner(state, cache) {}

    scored_state state;
    scored_learner learner;
  };

  // Without memory where the resource had none, and exceptions are off.
  scored_cache(checked, const tier_formats& formats, scored_config config, std::pmr::memory_resource* resource)
      : any_kv_cache(config.geometry),
        formats_(&formats),
        parts_(std::make_unique<own_parts>(std::move(config), this)) {
    status fits;
    memory_ = take_memory(static_cast<std::size_t>(state().bytes(fits)), resource);
    if (!memory_) return;
    state().place(memory_.get());
    state().clear();
  }
  // Of what was found right; or nothing, where there is no memory.
  static std::optional<scored_cache> make(const tier_formats& formats, const scored_config& of, status& found,
                                          std::pmr::memory_resource* resource) noexcept {
    status fits;
    const auto bytes = created(found, "the rules", [&] { return scored_state(of).bytes(fits); });
    if (!bytes) return std::nullopt;
    return made_cache(found, static_cast<std::size_t>(*bytes),
                      [&] { return scored_cache(checked(found, resource), formats, of, resource); });
  }

  static scored_config config_of(const tier_formats& formats, const cache_config& config, const eviction& rules,
                                 const std::shared_ptr<const token_scorer>& scorer) {
    return {.geometry = geometry_of(config, formats.k_transform, formats.v_transform),
            .rules = rules,
            .scorer = scorer,
            .k = formats.k,
            .v = formats.v,
            .num_sink_tokens = config.num_sink_tokens,
            .rollback = config.rollback,
            .whole_k = formats.whole_k,
            .whole_v = formats.whole_v,
            .recent = formats.spares ? config.recent : -1};
  }
  status got_memory() const noexcept {
    status found, fits;
    if (!memory_) refuse_memory(found, static_cast<std::size_t>(state().bytes(fits)));
    return found;
  }
  std::pmr::memory_resource* resource() const { return memory_.get_deleter().resource; }

  void copy_tokens(const scored_cache& from) noexcept {
    seen_ = from.seen_;
    state() = from.state();
    state().place(memory_.get());
    std::memcpy(memory_.get(), from.memory_.get(), nbytes());
  }

  const held_rows* held(index_t kv_head) const {
    const index_t heads = geometry_.num_kv_heads;
    detail::check(kv_head >= 0 && kv_head < heads, "kv_head", kv_head, "from 0 to below", heads);
    return nbytes() > 0 ? &state().rows.head(kv_head) : nullptr;
  }
  template <class T>
  T of_held(index_t kv_head, T held_rows::*member) const {
    const held_rows* const rows = held(kv_head);
    return rows != nullptr ? rows->*member : T(0);
  }
  const scored_state& held_state() const {
    detail::check(nbytes() > 0, "the cache", "moved from", "one that holds memory");
    return state();
  }
  scored_state& state() { return parts_->state; }
  const scored_state& state() const { return parts_->state; }

  const tier_formats* formats_;
  std::unique_ptr<own_parts> parts_;
  cache_memory memory_;
  eviction_reader* watcher_ = nullptr;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
