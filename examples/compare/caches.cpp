// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "caches.hpp"

#include <memory>
#include <sinkcache/eviction.hpp>
#include <sinkcache/scored_kv_cache.hpp>

#include "scored_policies.hpp"

namespace compare {
namespace {

using window_cache = sinkcache::kv_cache<sinkcache::f32>;
using scored_cache = sinkcache::scored_kv_cache<sinkcache::f32>;

sinkcache::cache_config window_config(const engine::layer_info& layer, index_t num_sink_tokens, index_t window,
                                      index_t rollback) {
  sinkcache::cache_config config = layer.cache;
  config.num_sink_tokens = num_sink_tokens;
  config.window = window;
  config.rollback = rollback;
  return config;
}

// Of a policy that is a window.
index_t pinned_by(const policy& p) { return p.is == policy::kind::sinks ? p.num_sink_tokens : 0; }

// A policy's cache of at most so many rows in a layer; of the same sum over all layers where budgets fall.
struct scored_layer {
  sinkcache::cache_config config;
  sinkcache::eviction rules;
  std::shared_ptr<const sinkcache::token_scorer> scorer;
};

scored_layer scored_layer_of(const scored_policy& p, const engine::layer_info& layer, index_t cache) {
  scored_layer made{layer.cache, {}, p.scorer(layer.layer)};
  made.config.num_sink_tokens = p.sinks;
  made.config.rollback = 0;
  made.rules = {.budget = p.budget(cache),
                .recent = p.recent,
                .interval = p.interval,
                .num_qo_heads = layer.num_qo_heads,
                .adaptive = p.ada};
  if (p.pyramid)
    made.rules.budget = sinkcache::pyramid_budgets(layer.num_layers, p.budget(cache), p.kept(),
                                                   *p.pyramid)[static_cast<std::size_t>(layer.layer)];
  return made;
}

engine::cache_factory scored(std::shared_ptr<const scored_policy> p, index_t cache, index_t rollback) {
  return [=](const engine::layer_info& layer) -> std::unique_ptr<sinkcache::any_kv_cache> {
    if (layer.cache.window > 0) return sink_window(p->sinks, layer.cache.window, rollback)(layer);
    scored_layer made = scored_layer_of(*p, layer, cache);
    return std::make_unique<scored_cache>(made.config, made.rules, std::move(made.scorer));
  };
}

}  // namespace

engine::cache_factory sink_window(index_t num_sink_tokens, index_t window, index_t rollback) {
  return [=](const engine::layer_info& layer) {
    return std::make_unique<window_cache>(window_config(layer, num_sink_tokens, window, rollback));
  };
}

engine::cache_factory caches_of(const policy& p, index_t cache, index_t rollback) {
  if (p.is == policy::kind::scored) return scored(p.scored, cache, rollback);
  const index_t pinned = pinned_by(p);
  return sink_window(pinned, cache - pinned, rollback);
}

std::size_t cache_bytes(const policy& p, const engine::model& model, index_t cache) {
  std::size_t bytes = 0;
  for (index_t i = 0; i < model.config().num_hidden_layers; ++i) {
    const engine::layer_info layer = model.info(i);
    if (p.is == policy::kind::scored) {
      const scored_layer made = scored_layer_of(*p.scored, layer, cache);
      bytes += scored_cache::required_bytes(made.config, made.rules, *made.scorer);
    } else {
      const index_t pinned = pinned_by(p);
      bytes += window_cache::required_bytes(window_config(layer, pinned, cache - pinned, 0));
    }
  }
  return bytes;
}

index_t cache_of(const policy& p, const engine::model& model, std::size_t bytes) {
  index_t fits = least_cache(p) - 1, too_many = most_tokens + 1;
  while (too_many - fits > 1) {
    const index_t middle = fits + (too_many - fits) / 2;
    (cache_bytes(p, model, middle) <= bytes ? fits : too_many) = middle;
  }
  if (fits < least_cache(p))
    throw usage_error(fmt::format("--bytes is {}, {} had to have at least {}: {} tokens", bytes, p.name,
                                  cache_bytes(p, model, least_cache(p)), least_cache(p)));
  return fits;
}

}  // namespace compare
