// float is a number, f32 the format.
// expect: kv_format

#include <sinkcache/kv_cache.hpp>

sinkcache::kv_cache<float> cache({});
