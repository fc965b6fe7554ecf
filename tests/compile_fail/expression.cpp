// An expression has no memory: it would have to be evaluated into a copy.
// expect: refused: an expression without memory

#include <sinkcache/kv_cache.hpp>

void append(sinkcache::kv_cache<sinkcache::f32>& cache, const sinkcache::matrix& k) { cache.append(k + k, k); }
