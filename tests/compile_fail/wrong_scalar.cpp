// Doubles would have to be cast into a copy.
// expect: refused: not float

#include <sinkcache/kv_cache.hpp>

using doubles = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

void append(sinkcache::any_kv_cache& cache, const doubles& k) { cache.append(k, k); }
