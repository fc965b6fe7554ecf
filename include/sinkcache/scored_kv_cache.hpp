#pragma once

// A cache that evicts by score: each KV head keeps the tokens that its scorer thinks most of, in constant memory.

#include <concepts>
#include <memory>
#include <memory_resource>
#include <optional>
#include <utility>

#include "detail/macros_off.hpp"
#include "detail/scored_cache.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Keys in format K and values in format V, with the calls that kv_cache has. Of the configuration it reads the
// geometry, num_sink_tokens and rollback, and recent where a format spares tokens; window has to be 0. One allocation,
// at construction.
//
// An event is due where seen() is a multiple of the interval, and happens before the next token is stored. Scorers that
// look at queries or weights learn from every call that is handed the cache not const (attention::decode, attend,
// prefill), or whose reader of weights is learner(). No query may be left out, and no token appended past the place of
// an event before its query was seen. Threads that share one call may divide its KV heads, not its rows. Const calls
// may run concurrently; others may not run beside any. The calls of all such caches are in detail/scored_cache.hpp.
template <kv_format K, kv_format V = K>
class scored_kv_cache final : public detail::scored_cache {
  static_assert(K::block_rows == 1 && V::block_rows == 1, "sinkcache: scored_kv_cache stores tokens one by one");
  using base = detail::scored_cache;

 public:
  template <std::derived_from<token_scorer> S>
  scored_kv_cache(const cache_config& config, const eviction& rules, S scorer,
                  std::pmr::memory_resource* resource = default_resource())
      : scored_kv_cache(config, rules, std::make_shared<const S>(std::move(scorer)), resource) {}
  scored_kv_cache(const cache_config& config, const eviction& rules, const std::shared_ptr<const token_scorer>& scorer,
                  std::pmr::memory_resource* resource = default_resource())
      : base(formats(), config, rules, scorer, resource) {}

  // Whether a cache can be made, given the memory.
  static status validate(const cache_config& config, const eviction& rules, const token_scorer* scorer) noexcept {
    return base::validate_with(formats(), config, rules, scorer);
  }
  static std::size_t required_bytes(const cache_config& config, const eviction& rules, const token_scorer& scorer) {
    status found;
    const index_t bytes = base::bytes_of(found, formats(), config, rules, &scorer);
    found.or_fail();
    return static_cast<std::size_t>(bytes);
  }
  // What the constructor makes; or nothing, and in `found` why.
  static std::optional<scored_kv_cache> try_create(const cache_config& config, const eviction& rules,
                                                   const std::shared_ptr<const token_scorer>& scorer, status& found,
                                                   std::pmr::memory_resource* resource = default_resource()) noexcept {
    return of(base::try_make(formats(), config, rules, scorer, found, resource));
  }

  // A copy that goes on by itself, in memory from the same resource. Its events are told to nobody.
  scored_kv_cache clone() const { return scored_kv_cache(base::copy()); }
  std::optional<scored_kv_cache> try_clone(status& found) const noexcept { return of(base::try_copy(found)); }
  std::unique_ptr<any_kv_cache> try_clone_any(status& found) const noexcept override {
    return detail::on_heap(try_clone(found), found);
  }

 private:
  static constexpr const detail::tier_formats& formats() { return detail::tier_formats_of<K, V>; }

  explicit scored_kv_cache(base&& made) noexcept : base(std::move(made)) {}
  static std::optional<scored_kv_cache> of(std::optional<base>&& made) noexcept {
    if (!made) return std::nullopt;
    return scored_kv_cache(std::move(*made));
  }
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
