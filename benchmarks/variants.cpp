// What do sink logits, softmax1 and a soft cap cost over plain softmax? Method and reading: README.md.

#include "suite.hpp"

namespace {

using namespace measure;

template <class F>
void variant(benchmark::State& state, const effort& effort, const shape& of,
             const sinkcache::attention_params& params) {
  const index_t visible = short_visible(of);
  layers<F> layers(config_of(of, visible), visible + visible / 3);
  const auto& cache = layers.cache(0);
  const matrix q = queries(of, 1);
  matrix out(1, q.cols());
  const sinkcache::attention plain({.num_qo_heads = of.num_qo_heads}), measured(params);
  sinkcache::workspace workspace;
  const double flops = 4. * static_cast<double>(of.num_qo_heads * of.head_dim * visible);
  const rounds rounds({
                          [&](std::size_t) { multiply_add(flops); },
                          [&](std::size_t round) { layers.read(round); },
                          [&](std::size_t) { plain.decode(q, cache, out, workspace); },
                          [&](std::size_t) { measured.decode(q, cache, out, workspace); },
                      },
                      effort);
  suite::row row(state, rounds, 3);
  row.ratio("over_plain", rounds.ratio(3, 2));
  row.limits(0, 1, 3);
  measured.decode(q, cache, out, workspace);
  row.number("error", error_of(cache, params, q.data(), out.data()));
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  suite::for_each_format<sinkcache::f32, sinkcache::f16>([&](auto format, const std::string& name) {
    using F = decltype(format);
    for (shape of : {shapes[0], shapes[1], shapes[2]}) {
      const auto add = [&](const char* variant_name, const sinkcache::attention_params& params) {
        program.add("variants/" + name + "/" + of.name + "/" + variant_name,
                    [=](auto& state, const effort& effort) { variant<F>(state, effort, of, params); });
      };
      of.sink_logits = true;
      add("sink_logits", params_of(of));
      add("softmax1", {.num_qo_heads = of.num_qo_heads, .softmax = sinkcache::softmax_variant::softmax1()});
      add("soft_cap", {.num_qo_heads = of.num_qo_heads, .logits_soft_cap = 50});
    }
  });
  return program.main();
}
