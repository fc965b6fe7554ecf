#pragma once

// The cache: keys and values of the tokens that its policy keeps, in constant memory, for one sequence and one layer.

#include <concepts>
#include <memory>
#include <memory_resource>
#include <optional>
#include <type_traits>
#include <utility>

#include "detail/macros_off.hpp"
#include "detail/plain_cache.hpp"
#include "detail/tiered_cache.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

namespace detail {

template <kv_format K, kv_format V, class Policy>
using cache_of =
    std::conditional_t<in_tiers(tiered_format<K> || tiered_format<V>, transform_of<K>(), transform_of<V>()),
                       tiered_cache<Policy>, plain_cache<Policy>>;

inline sink_window window_of(const cache_config& config) noexcept {
  return {config.num_sink_tokens, config.window, config.rollback};
}

}  // namespace detail

// Keys in format K and values in format V, kept and dropped by Policy. One allocation, at construction. Const calls may
// run concurrently; append, truncate and prefill may not run beside any other. Formats that spare tokens, q8, q6, q4,
// q2, store pinned tokens and the newest `recent` in another format. The calls of all caches are in any_kv_cache.hpp.
template <kv_format K, kv_format V = K, class Policy = sink_window>
class kv_cache final : public detail::cache_of<K, V, Policy> {
  static_assert(
      K::block_rows == 1 && V::block_rows == 1,
      "sinkcache: kv_cache stores tokens one by one; a format whose block_rows is above 1 has to wait for tiers");
  using base = detail::cache_of<K, V, Policy>;

 public:
  explicit kv_cache(const cache_config& config,
                    std::pmr::memory_resource* resource = default_resource()) requires std::same_as<Policy, sink_window>
      : base(detail::checked(validate(config), resource), formats(), config, detail::window_of(config), resource) {
    base::got_memory().or_fail();
  }

  // With a policy, which brings its own window, pinned tokens and rows for rollback: of the configuration, window and
  // num_sink_tokens have to be 0, and rollback is read where formats spare tokens alone: it is of the newest.
  kv_cache(const cache_config& config, Policy policy, std::pmr::memory_resource* resource = default_resource())
      : base(detail::checked(validate(config, policy), resource), formats(), config, std::move(policy), resource) {
    base::got_memory().or_fail();
  }

  // Whether a cache can be made, given the memory.
  static status validate(const cache_config& config) noexcept requires std::same_as<Policy, sink_window> {
    return base::validate_with(formats(), config, detail::window_of(config));
  }
  static status validate(const cache_config& config, const Policy& policy) noexcept {
    status found = base::validate_with(formats(), config, policy);
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
    return of(base::try_make(formats(), config, detail::window_of(config), found, resource));
  }
  static std::optional<kv_cache> try_create(const cache_config& config, Policy policy, status& found,
                                            std::pmr::memory_resource* resource = default_resource()) noexcept {
    found = validate(config, policy);
    if (!found) return std::nullopt;
    return of(base::try_make(formats(), config, std::move(policy), found, resource));
  }

  // What the constructor asks its memory resource for. Throws what validate finds.
  static std::size_t required_bytes(const cache_config& config) requires std::same_as<Policy, sink_window> {
    return required_bytes(config, detail::window_of(config));
  }
  static std::size_t required_bytes(const cache_config& config, const Policy& policy) {
    status found = base::validate_with(formats(), config, policy);
    found.or_fail();
    return base::bytes_of(found, formats(), config, policy);
  }

  // A copy that goes on by itself, in memory from the same resource.
  kv_cache clone() const { return kv_cache(base::copy()); }
  std::optional<kv_cache> try_clone(status& found) const noexcept { return of(base::try_copy(found)); }
  std::unique_ptr<any_kv_cache> try_clone_any(status& found) const noexcept override {
    return detail::on_heap(try_clone(found), found);
  }

 private:
  static constexpr const detail::tier_formats& formats() { return detail::tier_formats_of<K, V>; }

  explicit kv_cache(base&& made) noexcept : base(std::move(made)) {}
  static std::optional<kv_cache> of(std::optional<base>&& made) noexcept {
    if (!made) return std::nullopt;
    return kv_cache(std::move(*made));
  }
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
