// The formats of keys and values come first, then the policy.
// expect: kv_format

#include <sinkcache/kv_cache.hpp>

sinkcache::kv_cache<sinkcache::f32, sinkcache::sink_window> cache({});
