// What `run` counts: a cache is filled, then `measured` makes so many steps.

#include <sys/resource.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "../measure.hpp"

namespace {

using namespace measure;

struct program {
  sinkcache::kv_cache<sinkcache::f16> cache;
  sinkcache::attention attention;
  sinkcache::workspace workspace = {};
  matrix q, k, v, out;
};

sinkcache::attention_params variant(const std::string& name, index_t heads) {
  shape of = shapes[1];
  of.num_qo_heads = heads, of.sink_logits = true;
  if (name == "sink_logits") return params_of(of);
  if (name == "softmax1") return {.num_qo_heads = heads, .softmax = sinkcache::softmax_variant::softmax1()};
  if (name == "soft_cap") return {.num_qo_heads = heads, .logits_soft_cap = 50};
  return {.num_qo_heads = heads};
}

}  // namespace

extern "C" [[gnu::noinline]] void measured(program& of, bool append, bool decode, int steps) {
  for (int i = 0; i < steps; ++i) {
    if (append) of.cache.append(of.k, of.v);
    if (decode) of.attention.decode(of.q, of.cache, of.out, of.workspace);
  }
}

// steps SHAPE WINDOW append|decode|both VARIANT in_cache|absolute STEPS
int main(int argc, char** argv) {
  if (argc != 7) return 2;
  const std::string what = argv[3];
  const shape of = shapes[argv[1][0] - 'A'];
  auto config = config_of(of, num_sink_tokens + std::atoi(argv[2]));
  if (std::string(argv[5]) == "absolute") config.positions = sinkcache::positions::absolute;
  program program{.cache = sinkcache::kv_cache<sinkcache::f16>(config),
                  .attention = sinkcache::attention(variant(argv[4], of.num_qo_heads)),
                  .q = queries(of, 1),
                  .k = normal(1, of.num_kv_heads * of.head_dim, 1),
                  .v = normal(1, of.num_kv_heads * of.head_dim, 2),
                  .out = queries(of, 1)};
  for (index_t i = 0; i < program.cache.capacity() + 7; ++i) program.cache.append(program.k, program.v);
  program.attention.decode(program.q, program.cache, program.out, program.workspace);
  rusage before{}, after{};
  std::fprintf(stderr, "filled\n");
  getrusage(RUSAGE_SELF, &before);
  std::fprintf(stderr, "begin\n");  // `run` counts the system calls between the two
  measured(program, what != "decode", what != "append", std::atoi(argv[6]));
  std::fprintf(stderr, "end\n");
  getrusage(RUSAGE_SELF, &after);
  std::printf("%ld\n", after.ru_minflt - before.ru_minflt + after.ru_majflt - before.ru_majflt);
}
