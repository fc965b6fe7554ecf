// What `aarch64` counts: so many decode steps of one KV head with four query heads over a cache of so many tokens.

#include <cmath>
#include <cstdlib>
#include <sinkcache/sinkcache.hpp>
#include <string>

namespace {

template <class Format>
bool decode(int tokens, int steps) {
  constexpr sinkcache::index_t group = 4, dim = 128;
  sinkcache::kv_cache<Format> cache({.num_kv_heads = 1,
                                     .head_dim = dim,
                                     .num_sink_tokens = 4,
                                     .window = tokens - 4,
                                     .rope = sinkcache::rope::none()});
  const sinkcache::attention attention({.num_qo_heads = group});
  sinkcache::workspace workspace;
  sinkcache::matrix q(1, group * dim), kv(1, dim), out(1, group * dim);
  for (sinkcache::index_t i = 0; i < q.cols(); ++i) q.data()[i] = std::sin(static_cast<float>(i));
  for (sinkcache::index_t i = 0; i < dim; ++i) kv.data()[i] = std::cos(static_cast<float>(i));
  for (int i = 0; i < tokens; ++i) cache.append(kv, kv);
  for (int i = 0; i < steps; ++i) attention.decode(q, cache, out, workspace);
  return std::abs(out.data()[0] - 1) < 0.1f;  // every value begins with cos(0)
}

}  // namespace

// keys f32|f16|bf16|q8|q4 TOKENS STEPS
int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string format = argv[1];
  const int tokens = std::atoi(argv[2]), steps = std::atoi(argv[3]);
  const bool right = format == "f32"   ? decode<sinkcache::f32>(tokens, steps)
                     : format == "f16" ? decode<sinkcache::f16>(tokens, steps)
                     : format == "q8"  ? decode<sinkcache::q8>(tokens, steps)
                     : format == "q4"  ? decode<sinkcache::q4>(tokens, steps)
                                       : decode<sinkcache::bf16>(tokens, steps);
  return right ? 0 : 1;
}
