// A column-major matrix would have to be copied.
// expect: refused: not row-major

#include <sinkcache/kv_cache.hpp>

void append(sinkcache::kv_cache<sinkcache::f32>& cache, const Eigen::MatrixXf& k) { cache.append(k, k); }
