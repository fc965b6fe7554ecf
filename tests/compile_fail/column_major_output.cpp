// Columns of a row-major matrix are not rows, to be written either.
// expect: refused: not row-major

#include <sinkcache/attention.hpp>

void decode(const sinkcache::attention& attention, const sinkcache::any_kv_cache& cache, const sinkcache::matrix& q,
            sinkcache::matrix& out, sinkcache::workspace& workspace) {
  attention.decode(q, cache, out.transpose(), workspace);
}
