// What the other files get wrong, done right: this one compiles.

#include <sinkcache/sinkcache.hpp>

void control(sinkcache::workspace& workspace, const sinkcache::matrix& q, const sinkcache::matrix& k,
             sinkcache::matrix& out) {
  sinkcache::kv_cache<sinkcache::f32, sinkcache::bf16, sinkcache::sink_window> cache(
      {.num_kv_heads = 1, .head_dim = 8, .window = 4, .rope = sinkcache::rope::none()});
  cache.append(k, k);
  sinkcache::attention({.num_qo_heads = 1}).decode(q, cache, out, workspace);
}
