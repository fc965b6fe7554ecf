#pragma once

// Caches made at run time from the names of a policy and of formats: for command lines, other languages and
// configurations.
//
// make_cache compiles a cache for each pair of formats, half a minute for all of them: call it in one source file of
// yours, or name the formats that you need, make_cache<format_list<bf16, q8>>.

#include <memory>
#include <new>
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

namespace sinkcache::inline SINKCACHE_TAG {

// What a cache is to be.
struct named_cache {
  // "sinks": the first config.num_sink_tokens, and the config.window newest. "window": the newest alone. Or a name of
  // named_policies, with its parameters and those of `eviction`: "snapkv:kernel=5,budget=512,recent=32,interval=64,
  // adaptive=0.2". With a budget config.window has to be 0; without one as many rows are kept as by "sinks",
  // num_sink_tokens + window, which makes budget = num_sink_tokens + window - interval.
  std::string policy = "sinks";
  std::string k_format = "bf16";  // f32, f16, bf16, q8, q6, q4, q2, or the `name` of a format of yours
  std::string v_format = "";      // k_format
  cache_config config = {};
  index_t num_qo_heads = 0;  // of the attention, for policies that look at queries or weights
};

// Formats that names are looked up in.
template <kv_format... F>
struct format_list {};
using all_formats = format_list<f32, f16, bf16, q8, q6, q4, q2>;

namespace detail {

template <kv_format... F>
[[gnu::cold]] void refuse_format(status& found, const char* what, std::string_view name, format_list<F...>) {
  std::string known;
  ((known += ' ', known += format_name<F>()), ...);
  found.refuse("{} was '{}', had to be one of:{}", what, name.substr(0, 32), std::string_view(known));
}

// make.operator()<F>() of the format that has the name.
template <class Make, kv_format... F>
std::unique_ptr<any_kv_cache> with_format(status& found, const char* what, std::string_view name, format_list<F...> of,
                                          const Make& make) {
  std::unique_ptr<any_kv_cache> made;
  const bool known = ((name == format_name<F>() && (made = make.template operator()<F>(), true)) || ...);
  if (!known) refuse_format(found, what, name, of);
  return made;
}

// How many rows a scored policy keeps where its text does not say it.
inline void require_budget(status& found, const cache_config& config, eviction& rules) noexcept {
  if (rules.budget != 0) {
    found.require(config.window == 0, "window", config.window, "0: the policy's budget says how many rows are kept");
    return;
  }
  found.require(config.window >= 1, "window", config.window, "at least 1, or the policy's budget given");
  found.require(config.num_sink_tokens >= 0, "num_sink_tokens", config.num_sink_tokens, "at least 0");
  found.require(rules.interval >= 1, "interval", rules.interval, "at least 1");
  const index_t rows = checked_sum(found, "num_sink_tokens + window", config.num_sink_tokens, config.window);
  if (found) rules.budget = rows - rules.interval;
}

template <class Formats>
class cache_maker {
 public:
  cache_maker(const named_cache& of, status& found, std::pmr::memory_resource* resource)
      : of_(of), found_(found), resource_(resource) {}

  std::unique_ptr<any_kv_cache> make() {
    cache_config config = of_.config;
    if (of_.policy == "sinks" || of_.policy == "window") {
      found_.require(of_.policy == "sinks" || config.num_sink_tokens == 0, "num_sink_tokens", config.num_sink_tokens,
                     "0: the policy window pins none");
      if (!found_) return nullptr;
      return with_formats([&]<kv_format K, kv_format V>() {
        return on_heap(kv_cache<K, V>::try_create(config, found_, resource_), found_);
      });
    }
    eviction rules;
    rules.num_qo_heads = of_.num_qo_heads;
    const std::shared_ptr<const token_scorer> scorer = policy(rules);
    if (found_) require_budget(found_, config, rules);
    if (!found_) return nullptr;
    config.window = 0;
    return with_formats([&]<kv_format K, kv_format V>() {
      return on_heap(scored_kv_cache<K, V>::try_create(config, rules, scorer, found_, resource_), found_);
    });
  }

 private:
  std::shared_ptr<const token_scorer> policy(eviction& rules) {
    const std::string_view name = std::string_view(of_.policy).substr(0, of_.policy.find(':'));
    if (name == "sinks" || name == "window") {
      found_.refuse("the policy was '{}', had to be '{}': num_sink_tokens and window say the rest",
                    std::string_view(of_.policy).substr(0, 32), name);
      return nullptr;
    }
    for (const named_policy& known : named_policies)
      if (known.name == name) return make_policy(of_.policy, rules, found_);
    std::string known = "sinks window";
    for (const named_policy& each : named_policies) known.append(" ").append(each.name);
    found_.refuse("the policy was '{}', had to be one of: {}", name.substr(0, 32), std::string_view(known));
    return nullptr;
  }

  template <class Make>
  std::unique_ptr<any_kv_cache> with_formats(const Make& make) {
    const std::string_view v_format = of_.v_format.empty() ? of_.k_format : of_.v_format;
    return with_format(found_, "k_format", of_.k_format, Formats(), [&]<kv_format K>() {
      return with_format(found_, "v_format", v_format, Formats(),
                         [&]<kv_format V>() { return make.template operator()<K, V>(); });
    });
  }

  const named_cache& of_;
  status& found_;
  std::pmr::memory_resource* resource_;
};

}  // namespace detail

// The cache; or null, and in `found` why: a name that is not known, a rule that is broken, or no memory.
template <class Formats = all_formats>
std::unique_ptr<any_kv_cache> try_make_cache(const named_cache& of, status& found,
                                             std::pmr::memory_resource* resource = default_resource()) noexcept {
  found = status();
  detail::cache_maker<Formats> maker(of, found, resource);
#if defined(__cpp_exceptions)
  try {
    return maker.make();
  } catch (...) {
    detail::refuse_exhausted(found);
    return nullptr;
  }
#else
  return maker.make();
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

// One for each layer of a model.
template <class Formats = all_formats>
layer_caches make_layer_caches(std::span<const named_cache> layers,
                               std::pmr::memory_resource* resource = default_resource()) {
  std::vector<std::unique_ptr<any_kv_cache>> caches;
  caches.reserve(layers.size());
  for (const named_cache& layer : layers) {
    status found;
    caches.push_back(try_make_cache<Formats>(layer, found, resource));
    if (found) continue;
    status of_layer;
    of_layer.refuse("layer {}: {}", caches.size() - 1, found.message().substr(std::string_view("sinkcache: ").size()));
    of_layer.or_fail();
  }
  return layer_caches(std::move(caches));
}

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
