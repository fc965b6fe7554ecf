// How close does prefill come to the machine's arithmetic? Method and reading: README.md.

#include "suite.hpp"

namespace {

using namespace measure;

constexpr index_t tokens = 512;

// The newest 512 of `visible` tokens; or, in a stream, 512 more behind a window that is full.
template <class F>
void prefill(benchmark::State& state, const effort& effort, const shape& of, index_t visible, bool stream) {
  layers<F> layers(config_of(of, visible), visible);
  auto& cache = layers.cache(0);
  const matrix q = queries(of, tokens);
  const matrix k = normal(tokens, of.num_kv_heads * of.head_dim, 5), v = normal(tokens, k.cols(), 6);
  matrix out(tokens, q.cols());
  const sinkcache::attention attention(params_of(of));
  sinkcache::workspace workspace;
  const index_t pairs = tokens * visible - (stream ? 0 : tokens * (tokens - 1) / 2);
  const double flops = 4. * static_cast<double>(of.num_qo_heads * of.head_dim * pairs);
  constexpr double part = 8;  // of the arithmetic is enough to know how fast the machine is
  const rounds rounds({
                          [&](std::size_t) { multiply_add(flops / part); },
                          [&](std::size_t round) { layers.read(round); },
                          [&](std::size_t) {
                            if (!stream) cache.truncate(visible - tokens);
                            attention.prefill(q, k, v, cache, out, workspace);
                          },
                      },
                      effort);
  suite::row row(state, rounds, 2);
  row.limits(0, 1, 2, part);
  row.number("error", error_of(cache, attention.params(), q.row(tokens - 1).data(), out.row(tokens - 1).data()));
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  suite::for_each_format<sinkcache::f32, sinkcache::f16, sinkcache::bf16>([&](auto format, const std::string& name) {
    using F = decltype(format);
    for (const shape& of : shapes) {
      const std::string row = "prefill/" + name + "/" + of.name + "/";
      const index_t visible = short_visible(of);
      const bool stream = visible < 1024;
      program.add(row + std::to_string(visible) + (stream ? "/stream" : "/last"),
                  [=](auto& state, const effort& effort) { prefill<F>(state, effort, of, visible, stream); });
      if (!stream)
        for (index_t longer : {4096, 32768})
          program.add_slow(row + std::to_string(longer) + "/last",
                           [=](auto& state, const effort& effort) { prefill<F>(state, effort, of, longer, false); });
    }
  });
  return program.main();
}
