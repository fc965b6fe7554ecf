// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "caches.hpp"

#include <algorithm>
#include <memory>
#include <sinkcache/eviction.hpp>
#include <stdexcept>
#include <vector>

#include "kv_formats.hpp"
#include "scored_policies.hpp"

namespace compare {
namespace {

sinkcache::cache_config window_config(const engine::layer_info& layer, index_t num_sink_tokens, index_t window,
                                      index_t rollback, index_t kv_recent) {
  sinkcache::cache_config config = layer.cache;
  config.num_sink_tokens = num_sink_tokens;
  config.window = window;
  config.rollback = rollback;
  config.recent = kv_recent;
  return config;
}

const kv_formats& formats_of(const policy& p) { return p.formats ? *p.formats : all_kv_formats().front(); }

// Whatever the policy: of a layer that the model has windowed.
engine::cache_factory window_of(const policy& p, index_t num_sink_tokens, index_t window, index_t rollback) {
  return [make = formats_of(p).make, kv_recent = p.kv_recent, num_sink_tokens, window,
          rollback](const engine::layer_info& layer) {
    return make(window_config(layer, num_sink_tokens, window, rollback, kv_recent));
  };
}

// Of a policy that is a window.
index_t pinned_by(const policy& p) { return p.is == policy::kind::sinks ? p.num_sink_tokens : 0; }

// A policy's cache of at most so many rows in a layer; of the same sum over all layers where budgets fall.
struct scored_layer {
  sinkcache::cache_config config;
  sinkcache::eviction rules;
  std::shared_ptr<const sinkcache::token_scorer> scorer;
};

// A layer's rows by head: of what short heads leave, the others get the same, the first of them a row more.
void share_rows(const scored_policy& p, const engine::layer_info& layer, sinkcache::eviction& rules) {
  const index_t heads = layer.cache.num_kv_heads;
  std::vector<bool> is_short(static_cast<std::size_t>(heads));
  for (const auto& [of_layer, head] : p.duo) {
    if (head >= heads || of_layer.value_or(0) >= layer.num_layers)
      throw std::invalid_argument(
          fmt::format("a short head was {} of layer {}, had to be below {}, of a layer below {}", head,
                      of_layer.value_or(layer.layer), heads, layer.num_layers));
    if (of_layer.value_or(layer.layer) == layer.layer) is_short[static_cast<std::size_t>(head)] = true;
  }
  const auto shorts = static_cast<index_t>(std::count(is_short.begin(), is_short.end(), true));
  if (shorts == 0) return;
  const index_t newest = p.newest.value_or(p.recent), longs = std::max<index_t>(1, heads - shorts);
  index_t rest = heads * rules.budget - shorts * (p.sinks + newest);
  rules.head_budgets = sinkcache::duo_budgets(is_short, rest / longs, p.sinks, newest);
  rest %= longs;
  for (std::size_t h = 0; h < is_short.size() && rest > 0; ++h)
    if (!is_short[h]) ++rules.head_budgets[h], --rest;
  rules.short_heads = is_short;
  rules.budget = 0;
}

scored_layer scored_layer_of(const policy& of, const engine::layer_info& layer, index_t cache, index_t rollback) {
  const scored_policy& p = *of.scored;
  scored_layer made{layer.cache, {}, p.scorer(layer.layer)};
  made.config.num_sink_tokens = p.sinks;
  made.config.rollback = formats_of(of).few_bits ? rollback : 0;  // others prefill as fast without
  made.config.recent = of.kv_recent;
  const auto num_pins = static_cast<index_t>(p.pins.size());
  made.rules = {.budget = p.budget(cache),
                .recent = p.recent,
                .interval = p.interval,
                .num_qo_heads = layer.num_qo_heads,
                .adaptive = p.ada};
  made.rules.spared_pins = std::max(made.rules.spared_pins, num_pins);
  if (p.pyramid)
    made.rules.budget = sinkcache::pyramid_budgets(layer.num_layers, p.budget(cache), p.kept(),
                                                   *p.pyramid)[static_cast<std::size_t>(layer.layer)];
  share_rows(p, layer, made.rules);
  return made;
}

engine::cache_factory scored(const policy& p, index_t cache, index_t rollback) {
  return [=](const engine::layer_info& layer) {
    if (layer.cache.window > 0) return window_of(p, p.scored->sinks, layer.cache.window, rollback)(layer);
    scored_layer made = scored_layer_of(p, layer, cache, rollback);
    std::unique_ptr<sinkcache::any_kv_cache> cache_of_layer =
        formats_of(p).make_scored(made.config, made.rules, std::move(made.scorer));
    for (const index_t position : p.scored->pins) {
      bool pinned = false;
      const sinkcache::status found = cache_of_layer->try_pin(position, pinned);
      if (!found) throw std::invalid_argument(std::string(found.message()));
    }
    return cache_of_layer;
  };
}

// The smallest cache that the library makes: how many rows a lag or short heads need, it knows.
index_t least_taken(const policy& p, const engine::model& model) {
  const auto why_not = [&](index_t cache) -> std::string {
    try {
      cache_bytes(p, model, cache);
      return "";
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
  };
  index_t refused = least_cache(p) - 1, taken = most_tokens;
  if (const std::string why = why_not(taken); !why.empty())
    throw usage_error(fmt::format("--policies: {}: {}", p.name, why));
  while (taken - refused > 1) {
    const index_t middle = refused + (taken - refused) / 2;
    (why_not(middle).empty() ? taken : refused) = middle;
  }
  return taken;
}

}  // namespace

engine::cache_factory sink_window(index_t num_sink_tokens, index_t window, index_t rollback) {
  return window_of({policy::kind::sinks, num_sink_tokens, ""}, num_sink_tokens, window, rollback);
}

engine::cache_factory caches_of(const policy& p, index_t cache, index_t rollback) {
  if (p.is == policy::kind::scored) return scored(p, cache, rollback);
  const index_t pinned = pinned_by(p);
  return window_of(p, pinned, cache - pinned, rollback);
}

std::size_t cache_bytes(const policy& p, const engine::model& model, index_t cache) {
  std::size_t bytes = 0;
  for (index_t i = 0; i < model.config().num_hidden_layers; ++i) {
    const engine::layer_info layer = model.info(i);
    if (p.is == policy::kind::scored) {
      const scored_layer made = scored_layer_of(p, layer, cache, 0);
      bytes += formats_of(p).scored_bytes(made.config, made.rules, *made.scorer);
    } else {
      const index_t pinned = pinned_by(p);
      bytes += formats_of(p).bytes(window_config(layer, pinned, cache - pinned, 0, p.kv_recent));
    }
  }
  return bytes;
}

index_t cache_of(const policy& p, const engine::model& model, std::size_t bytes) {
  const index_t least = least_taken(p, model);
  index_t fits = least - 1, too_many = most_tokens + 1;
  while (too_many - fits > 1) {
    const index_t middle = fits + (too_many - fits) / 2;
    (cache_bytes(p, model, middle) <= bytes ? fits : too_many) = middle;
  }
  if (fits < least)
    throw usage_error(fmt::format("--bytes is {}, {} had to have at least {}: {} tokens", bytes, p.name,
                                  cache_bytes(p, model, least), least));
  return fits;
}

}  // namespace compare
