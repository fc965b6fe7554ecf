#pragma once

// kv_cache for formats that spare some tokens, or transform rows (detail/tiered_cache.hpp).

#include <concepts>
#include <memory_resource>
#include <optional>
#include <utility>

#include "detail/macros_off.hpp"
#include "detail/tiered_cache.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

template <kv_format K, kv_format V = K, class Policy = sink_window>
class kv_cache;

// See kv_cache.hpp: the same calls. Of formats that spare tokens, or that transform rows.
template <kv_format K, kv_format V, class Policy>
requires(tiered_format<K> || tiered_format<V> || detail::transform_of<K>() != nullptr ||
         detail::transform_of<V>() != nullptr) class kv_cache<K, V, Policy> final
    : public detail::tiered_cache<Policy> {
  static_assert(K::block_rows == 1 && V::block_rows == 1,
                "sinkcache: kv_cache stores tokens one by one, so block_rows must be 1");
  using base = detail::tiered_cache<Policy>;

 public:
  explicit kv_cache(const cache_config& config,
                    std::pmr::memory_resource* resource = default_resource()) requires std::same_as<Policy, sink_window>
      : kv_cache(checked(validate(config), resource), config, window_policy(config), resource) {
    this->got_memory().or_fail();
  }
  // With a policy: of the configuration window and num_sink_tokens have to be 0; rollback is of the newest tokens.
  kv_cache(const cache_config& config, Policy policy, std::pmr::memory_resource* resource = default_resource())
      : kv_cache(checked(validate(config, policy), resource), config, std::move(policy), resource) {
    this->got_memory().or_fail();
  }

  static status validate(const cache_config& config) noexcept requires std::same_as<Policy, sink_window> {
    return base::validate_with(formats(), config, window_policy(config));
  }
  static status validate(const cache_config& config, const Policy& policy) noexcept {
    status found = base::validate_with(formats(), config, policy);
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

  kv_cache clone() const {
    status found;
    this->require_memory(found);
    found.or_fail();
    kv_cache copy(checked(found, this->resource()), this->config(), Policy(this->policy()), this->resource());
    copy.got_memory().or_fail();
    copy.copy_tokens(*this, found);
    found.or_fail();
    return copy;
  }
  std::optional<kv_cache> try_clone(status& found) const noexcept {
    found = status();
    this->require_memory(found);
    if (!found) return std::nullopt;
    std::optional<kv_cache> copy = make(this->config(), Policy(this->policy()), found, this->resource());
    if (copy) copy->copy_tokens(*this, found);
    if (!found) copy.reset();
    return copy;
  }
  std::unique_ptr<any_kv_cache> try_clone_any(status& found) const noexcept override {
    return detail::on_heap(try_clone(found), found);
  }

 private:
  static constexpr const detail::tier_formats& formats() { return detail::tier_formats_of<K, V>; }

  // What passed all checks.
  struct checked {
    checked(status found, const std::pmr::memory_resource* resource) {
      detail::require_resource(found, resource);
      found.or_fail();
    }
  };

  kv_cache(checked, const cache_config& config, Policy&& policy, std::pmr::memory_resource* resource)
      : base(formats(), config, std::move(policy), resource) {}

  static std::optional<kv_cache> make(const cache_config& config, Policy&& policy, status& found,
                                      std::pmr::memory_resource* resource) noexcept {
    detail::require_resource(found, resource);
    if (!found) return std::nullopt;
    return detail::made_cache(found, base::bytes_of(found, formats(), config, policy),
                              [&] { return kv_cache(checked(found, resource), config, std::move(policy), resource); });
  }

  static sink_window window_policy(const cache_config& config) noexcept {
    return {config.num_sink_tokens, config.window, config.rollback};
  }
  static std::size_t required(const cache_config& config, const Policy& policy) {
    status found = base::validate_with(formats(), config, policy);
    found.or_fail();
    return base::bytes_of(found, formats(), config, policy);
  }
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
