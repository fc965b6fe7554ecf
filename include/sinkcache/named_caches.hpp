#pragma once

// Caches made at run time from the names of a policy and of formats: for command lines, other languages and
// configurations.
//
// make_cache compiles what reads each format, half a minute for all of them: call it in one source file of yours, or
// name the formats that you need, make_cache<format_list<bf16, q8>>.

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "detail/macros_off.hpp"
#include "kv_cache.hpp"
#include "layer_caches.hpp"
#include "named_policies.hpp"
#include "quantized.hpp"
#include "scored_kv_cache.hpp"
#include "with_formats.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// What a cache is to be.
struct named_cache {
  // "sinks": the first config.num_sink_tokens, and the config.window newest. "window": the newest alone. Or a name of
  // named_policies, with its parameters and those of `eviction`: "snapkv:kernel=5,budget=512,recent=32,interval=64,
  // adaptive=0.2". With a budget config.window has to be 0; without one as many rows are kept as by "sinks",
  // num_sink_tokens + window, which makes budget = num_sink_tokens + window - interval.
  std::string policy = "sinks";
  std::string k_format = "bf16";  // f32, f16, bf16, q8, q6, q4, q2, or the `name` of a format of yours
  std::string v_format = {};      // k_format
  cache_config config = {};
  index_t num_qo_heads = 0;  // of the attention, for policies that look at queries or weights
};

// Formats that names are looked up in.
template <detail::named_format... F>
struct format_list : detail::format_choice<F...> {};
using all_formats = format_list<f32, f16, bf16, q8, q6, q4, q2>;

namespace detail {

inline constexpr index_t no_budget = std::numeric_limits<index_t>::min();

// How many rows a scored policy keeps where its text does not say it.
inline void require_budget(status& found, const cache_config& config, eviction& rules,
                           const token_scorer& scorer) noexcept {
  if (rules.budget != no_budget) {
    found.require(config.window == 0, "window", config.window, "0: the policy's budget says how many rows are kept");
    return;
  }
  found.require(config.window >= 1, "window", config.window, "at least 1, or the policy's budget given");
  found.require(config.num_sink_tokens >= 0, "num_sink_tokens", config.num_sink_tokens, "at least 0");
  found.require(rules.interval >= 1, "interval", rules.interval, "at least 1");
  const index_t rows = checked_sum(found, "num_sink_tokens + window", config.num_sink_tokens, config.window);
  const index_t recent = std::max(rules.recent, scorer.needs().window);
  const index_t stays = checked_sum(found, "num_sink_tokens + recent", config.num_sink_tokens, recent);
  const index_t taken = checked_sum(found, "num_sink_tokens + recent + interval", stays, rules.interval);
  found.require(rows > taken, "num_sink_tokens + window", rows,
                "above num_sink_tokens, recent (or the scorer's window) and interval together,", taken);
  if (found) rules.budget = rows - rules.interval;
}

// What a policy's text asks for, with what goes with it in the configuration and the rules. Null: a window.
inline std::shared_ptr<const token_scorer> named_scorer(std::string_view text, cache_config& config, eviction& rules,
                                                        status& found) {
  const std::string_view name = text.substr(0, text.find(':'));
  if (name == "sinks" || name == "window") {
    if (text != name)
      found.refuse("the policy was '{}', had to be '{}': num_sink_tokens and window say the rest", text.substr(0, 32),
                   name);
    found.require(name == "sinks" || config.num_sink_tokens == 0, "num_sink_tokens", config.num_sink_tokens,
                  "0: the policy window pins none");
    return nullptr;
  }
  const auto is_named = [&](const named_policy& known) { return known.name == name; };
  if (std::none_of(named_policies.begin(), named_policies.end(), is_named)) {
    std::string known = "sinks window";
    for (const named_policy& each : named_policies) known.append(" ").append(each.name);
    found.refuse("the policy was '{}', had to be one of: {}", name.substr(0, 32), std::string_view(known));
    return nullptr;
  }
  rules.budget = no_budget;
  std::shared_ptr<const token_scorer> scorer = make_policy(text, rules, found);
  if (found) require_budget(found, config, rules, *scorer);
  config.window = 0;
  return scorer;
}

template <class Formats>
std::unique_ptr<any_kv_cache> make_named(const named_cache& of, status& found, std::pmr::memory_resource* resource) {
  const std::string_view k_format = of.k_format, v_format = of.v_format.empty() ? k_format : of.v_format;
  found = Formats::validate(k_format, v_format);
  if (!found) return nullptr;
  cache_config config = of.config;
  eviction rules{.num_qo_heads = of.num_qo_heads};
  const std::shared_ptr<const token_scorer> scorer = named_scorer(of.policy, config, rules, found);
  if (!found) return nullptr;
  const tier_formats& formats = Formats::call(
      k_format, v_format, []<class K, class V>(K, V) -> const tier_formats& { return tier_formats_of<K, V>; });
  if (scorer != nullptr) return on_heap(scored_cache::try_make(formats, config, rules, scorer, found, resource), found);
  if (in_tiers(formats.spares, formats.k_transform, formats.v_transform))
    return on_heap(tiered_cache<sink_window>::try_make(formats, config, window_of(config), found, resource), found);
  return on_heap(plain_cache<sink_window>::try_make(formats, config, window_of(config), found, resource), found);
}

}  // namespace detail

// The cache; or null, and in `found` why: a name that is not known, a rule that is broken, or no memory.
template <class Formats = all_formats>
std::unique_ptr<any_kv_cache> try_make_cache(const named_cache& of, status& found,
                                             std::pmr::memory_resource* resource = default_resource()) noexcept {
#if defined(__cpp_exceptions)
  try {
    return detail::make_named<Formats>(of, found, resource);
  } catch (...) {  // a scorer, or a name, had no memory
    found = status();
    detail::refuse_exhausted(found);
    return nullptr;
  }
#else
  return detail::make_named<Formats>(of, found, resource);
#endif
}

template <class Formats = all_formats>
std::unique_ptr<any_kv_cache> make_cache(const named_cache& of,
                                         std::pmr::memory_resource* resource = default_resource()) {
  status found;
  std::unique_ptr<any_kv_cache> cache = try_make_cache<Formats>(of, found, resource);
  found.or_fail();
  return cache;
}

// One for each layer of a model; or nothing, and in `found` which layer's cannot be made, and why.
template <class Formats = all_formats>
std::optional<layer_caches> try_make_layer_caches(std::span<const named_cache> layers, status& found,
                                                  std::pmr::memory_resource* resource = default_resource()) noexcept {
  found = status();
  auto caches = detail::created(found, "caches of layers", [&] {
    std::vector<std::unique_ptr<any_kv_cache>> of_layers(layers.size());
    return of_layers;
  });
  for (std::size_t i = 0; i < layers.size() && found; ++i) {
    status of_layer;
    (*caches)[i] = try_make_cache<Formats>(layers[i], of_layer, resource);
    if (of_layer) continue;
    constexpr const char* words = "layer {}: {}";
    const std::string_view why = of_layer.message().substr(std::string_view("sinkcache: ").size());
    of_layer.lacks_memory() ? found.refuse_memory(words, i, why) : found.refuse(words, i, why);
  }
  return found ? layer_caches::try_create(std::move(*caches), found) : std::nullopt;
}
template <class Formats = all_formats>
layer_caches make_layer_caches(std::span<const named_cache> layers,
                               std::pmr::memory_resource* resource = default_resource()) {
  status found;
  std::optional<layer_caches> made = try_make_layer_caches<Formats>(layers, found, resource);
  found.or_fail();
  return std::move(*made);
}

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
