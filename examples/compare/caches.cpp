#include "caches.hpp"

#include <memory>

namespace compare {

engine::cache_factory sink_window(index_t num_sink_tokens, index_t window) {
  return [=](sinkcache::cache_config layer) {
    layer.num_sink_tokens = num_sink_tokens;
    layer.window = window;
    return std::make_unique<sinkcache::kv_cache<sinkcache::f32>>(layer);
  };
}

engine::cache_factory caches_of(const policy& p, index_t cache) {
  const index_t pinned = p.is == policy::kind::sinks ? p.num_sink_tokens : 0;
  return sink_window(pinned, cache - pinned);
}

}  // namespace compare
