// The formats of keys and values come first, then the policy.
// expect: the third argument of kv_cache must model eviction_policy

#include <sinkcache/kv_cache.hpp>

sinkcache::kv_cache<sinkcache::f32, sinkcache::f32, sinkcache::f16> cache({}, {});
