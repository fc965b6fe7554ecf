#pragma once

// What plain_cache and tiered_cache share: how they are made and copied, what was erased, how far they go back.

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

// Of a `Cache` that derives from it, and of its storage. Compiled once for all formats of a policy.
template <class Cache, class Policy, class Rows>
class policy_cache : public any_kv_cache {
  static_assert(eviction_policy<Policy>, "sinkcache: the third argument of kv_cache must model eviction_policy");

 public:
  // What kv_cache's try_create makes, of formats that are known when the program runs.
  static std::optional<Cache> try_make(const tier_formats& formats, const cache_config& config, Policy policy,
                                       status& found, std::pmr::memory_resource* resource) noexcept {
    found = Cache::validate_with(formats, config, policy);
    require_resource(found, resource);
    return found ? make(formats, config, std::move(policy), found, resource) : std::nullopt;
  }
  std::unique_ptr<any_kv_cache> try_clone_any(status& found) const noexcept override {
    return on_heap(try_copy(found), found);
  }

  void advance(index_t n) noexcept override {
    seen_ += n;
    high_ = std::max(high_, seen_);
  }
  void clear() noexcept override { seen_ = high_ = 0, erased_.clear(); }

  void require_erase(status& found, position_t first, position_t last) const noexcept override {
    require_memory(found);
    require_range(found, first, last, seen_);
  }
  status try_erase(position_t first, position_t last) noexcept override {
    status found;
    require_erase(found, first, last);
    if (found) erased_.add(found, {first, last}, self().policy(), min_truncate());
    return found;
  }

  status try_truncate(position_t seen) noexcept override {
    status found;
    require_truncate(found, seen);
    if (!found) return found;
    seen_ = seen;
    erased_.truncate(seen);
    if (nbytes() > 0 && self().never_overwrites(seen)) high_ = seen;  // what came after no longer matters
    return found;
  }
  void require_truncate(status& found, position_t seen) const noexcept override {
    found.require(seen >= 0 && seen <= seen_, "seen", seen, "from 0 to what was seen,", seen_);
    if (found && nbytes() > 0 && !self().can_go_back(seen)) refuse_overwritten(found, seen);
  }

  // The policy may be moved from where there is no memory.
  index_t capacity() const noexcept override { return nbytes() > 0 ? max_visible(self().policy()) : 0; }
  index_t num_visible(position_t query) const noexcept override {
    return nbytes() > 0 ? erased_.num_left(self().policy().visible(seen_by(query))) : 0;
  }
  std::size_t nbytes() const noexcept override { return rows_.nbytes(); }
  cache_kind kind() const noexcept override { return {formats_->k.reader->name, formats_->v.reader->name}; }

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
      config.num_sink_tokens = self().policy().num_sink_tokens;
      config.window = self().policy().window;
      config.rollback = self().policy().rollback;
    }
    return config;
  }

 protected:
  static constexpr bool is_window = std::same_as<Policy, sink_window>;

  policy_cache(const kv_geometry& geometry, const tier_formats& formats, Rows&& rows) noexcept
      : any_kv_cache(geometry), rows_(std::move(rows)), formats_(&formats) {}

  static void require_policy(status& found, const Policy& policy) noexcept {
    if constexpr (is_window) require_window(found, policy);
    if (found) found.require(policy.capacity() >= 1, "the policy's capacity()", policy.capacity(), "at least 1");
  }
  status got_memory() const noexcept {
    status found;
    if (nbytes() == 0) refuse_memory(found, Cache::bytes_of(found, *formats_, self().config(), self().policy()));
    return found;
  }

  Cache copy() const {
    status found;
    require_memory(found);
    found.or_fail();
    Cache made(checked(found, rows_.resource()), *formats_, self().config(), Policy(self().policy()), rows_.resource());
    made.got_memory().or_fail();
    made.copy_tokens(self(), found);
    found.or_fail();
    return made;
  }
  std::optional<Cache> try_copy(status& found) const noexcept {
    found = status();
    require_memory(found);
    if (!found) return std::nullopt;
    std::optional<Cache> made = make(*formats_, self().config(), Policy(self().policy()), found, rows_.resource());
    if (made) made->copy_tokens(self(), found);
    if (!found) made.reset();
    return made;
  }
  void copy_tokens(const policy_cache& from, status& found) noexcept {
    erased_.assign(found, from.erased_);
    std::memcpy(rows_.data(), from.rows_.data(), rows_.nbytes());
    seen_ = from.seen_;
    high_ = from.high_;
  }

  Rows rows_;
  position_t high_ = 0;  // how far the stream got before it was last taken back: what was overwritten
  erased_spans erased_;

 private:
  const Cache& self() const noexcept { return static_cast<const Cache&>(*this); }

  static std::optional<Cache> make(const tier_formats& formats, const cache_config& config, Policy&& policy,
                                   status& found, std::pmr::memory_resource* resource) noexcept {
    return made_cache(found, Cache::bytes_of(found, formats, config, policy),
                      [&] { return Cache(checked(found, resource), formats, config, std::move(policy), resource); });
  }

  const tier_formats* formats_;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
