// What every consumer here builds: a token that sees itself alone gets its own value.

#include <sinkcache/sinkcache.hpp>

#include <cstdio>

int main() {
  sinkcache::kv_cache<sinkcache::bf16> cache({.num_kv_heads = 2,
                                              .head_dim = 8,
                                              .num_sink_tokens = 1,
                                              .window = 3,
                                              .rope = sinkcache::rope::plain(8, 10000.0)});
  const sinkcache::attention attention({.num_qo_heads = 4});
  sinkcache::workspace workspace;
  const sinkcache::matrix q = sinkcache::matrix::Constant(1, 4 * 8, 1.f),
                          k = sinkcache::matrix::Constant(1, 2 * 8, 1.f),
                          v = sinkcache::matrix::Constant(1, 2 * 8, 0.5f);
  sinkcache::matrix out(1, 4 * 8);
  cache.append(k, v);
  attention.decode(q, cache, out, workspace);
  std::printf("sinkcache %d.%d.%d, %s\n", SINKCACHE_VERSION_MAJOR, SINKCACHE_VERSION_MINOR, SINKCACHE_VERSION_PATCH,
              sinkcache::isa());
  return out.isConstant(0.5f) ? 0 : 1;
}
