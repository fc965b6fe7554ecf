// StreamingLLM's own comparison: what does a token cost with pinned tokens and a window, and what with a window that is
// computed anew for every token? Method and reading: README.md.

#include "suite.hpp"

namespace {

using namespace measure;

constexpr shape llama_2_7b{"Llama-2-7B", 32, 32, 128};

template <class F>
void streaming(benchmark::State& state, const effort& effort, index_t visible) {
  const shape of = llama_2_7b;
  layers<F> sinks(config_of(of, visible), visible + visible / 3), window(config_of(of, visible), 1);
  auto &streamed = sinks.cache(0), &recomputed = window.cache(0);
  const matrix q = queries(of, visible);
  const matrix k = normal(visible, of.num_kv_heads * of.head_dim, 1), v = normal(visible, k.cols(), 2);
  matrix out(1, q.cols()), all_out(visible, q.cols());
  const sinkcache::attention attention(params_of(of));
  sinkcache::workspace workspace;
  const double flops = 4. * static_cast<double>(of.num_qo_heads * of.head_dim * visible);
  const rounds rounds({
                          [&](std::size_t) { multiply_add(flops); },
                          [&](std::size_t round) { sinks.read(round); },
                          [&](std::size_t) {
                            recomputed.clear();
                            attention.prefill(q, k, v, recomputed, all_out, workspace);
                          },
                          [&](std::size_t round) {
                            const index_t row = static_cast<index_t>(round) % visible;
                            streamed.append(k.row(row), v.row(row));
                            attention.decode(q.row(0), streamed, out, workspace);
                          },
                      },
                      effort);
  suite::row row(state, rounds, 3);
  row.number("recomputed_us", 1e6 * rounds.seconds(2).median);
  row.ratio("speedup", rounds.ratio(2, 3));
  row.limits(0, 1, 3);
  row.number("recomputed_fma%", 100 * rounds.ratio(0, 2).median * static_cast<double>(visible + 1) / 2);
  row.number("error", error_of(streamed, attention.params(), q.data(), out.data()));
  row.number("recomputed_error",
             error_of(recomputed, attention.params(), q.row(visible - 1).data(), all_out.row(visible - 1).data()));
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  const auto run = [](index_t visible) {
    return [=](auto& state, const effort& effort) { streaming<sinkcache::f16>(state, effort, visible); };
  };
  program.add("streaming/256", run(256));
  for (index_t visible : {512, 1024, 2048, 4096})
    program.add_slow("streaming/" + std::to_string(visible), run(visible));
  return program.main();
}
