// Nobody looks whether it worked.
// flags: -Werror
// expect: nodiscard

#include <sinkcache/kv_cache.hpp>

void append(sinkcache::any_kv_cache& cache, const sinkcache::matrix& k) { cache.try_append(k, k); }
