// How close does one decode step come to the machine's limits? Method and reading: README.md.

#include "suite.hpp"

namespace {

using namespace measure;

// One token over one layer after the other; `calls` in a row where one is too short to be timed.
template <class F>
void decode(benchmark::State& state, const effort& effort, const shape& of, index_t visible, std::size_t bytes,
            int calls = 1) {
  const auto config = config_of(of, visible);
  layers<F> layers(config, visible + visible / 3, bytes);
  const matrix q = queries(of, 1);
  matrix out(1, q.cols());
  const sinkcache::attention attention(params_of(of));
  sinkcache::workspace workspace;
  const auto visible_bytes = [&](std::size_t round) {
    for (int i = 0; i < calls; ++i) layers.read(round);
  };
  const double flops = 4. * static_cast<double>(of.num_qo_heads * of.head_dim * visible * calls);
  const rounds rounds({
                          [&](std::size_t) { multiply_add(flops); },
                          visible_bytes,
                          [&](std::size_t round) {
                            const auto& cache =
                                layers.cache(round + layers.size() / 2);  // not what was read a moment ago
                            for (int i = 0; i < calls; ++i) attention.decode(q, cache, out, workspace);
                          },
                      },
                      effort);
  suite::row row(state, rounds, 2);
  row.number("call_ns", 1e9 * rounds.seconds(2).median / calls);
  row.limits(0, 1, 2);
  row.number("layer_bytes", static_cast<double>(layers.layer_bytes()));
  row.number("error", error_of(layers.cache(0), attention.params(), q.data(), out.data()));
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  const std::size_t cold_bytes = cold().bytes;
  suite::for_each_format<sinkcache::f32, sinkcache::f16, sinkcache::bf16>([&](auto format, const std::string& name) {
    using F = decltype(format);
    for (const shape& of : shapes) {
      const index_t visible = short_visible(of);
      const std::string row = "decode/" + name + "/" + of.name + "/";
      program.add(row + std::to_string(visible) + "/hot",
                  [=](auto& state, const effort& effort) { decode<F>(state, effort, of, visible, 0); });
      program.add_slow(row + std::to_string(visible) + "/cold",
                       [=](auto& state, const effort& effort) { decode<F>(state, effort, of, visible, cold_bytes); });
      if (visible == 1024)
        program.add_slow(row + "32768/cold",
                         [=](auto& state, const effort& effort) { decode<F>(state, effort, of, 32768, cold_bytes); });
    }
    program.add("decode/" + name + "/one_head_x_64/1/hot", [](auto& state, const effort& effort) {
      decode<F>(state, effort, {"one", 1, 1, 64}, 1, 0, 1000);
    });
  });
  return program.main();
}
