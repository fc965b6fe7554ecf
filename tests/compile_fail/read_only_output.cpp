// Outputs are written.
// expect: refused: read-only

#include <sinkcache/attention.hpp>

void decode(const sinkcache::attention& attention, const sinkcache::any_kv_cache& cache, const sinkcache::matrix& q,
            const sinkcache::matrix& out, sinkcache::workspace& workspace) {
  attention.decode(q, cache, out, workspace);
}
