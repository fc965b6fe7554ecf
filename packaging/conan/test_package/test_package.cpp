#include <sinkcache/sinkcache.hpp>

int main() {
  sinkcache::kv_cache<sinkcache::bf16> cache(
      {.num_kv_heads = 1, .head_dim = 8, .window = 4, .rope = sinkcache::rope::none()});
  const sinkcache::matrix row = sinkcache::matrix::Constant(1, 8, 0.5f);
  sinkcache::matrix out(1, 8);
  sinkcache::workspace workspace;
  cache.append(row, row);
  sinkcache::attention({.num_qo_heads = 1}).decode(row, cache, out, workspace);
  return out.isConstant(0.5f) ? 0 : 1;
}
