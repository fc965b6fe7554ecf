// What does one more token cost a full cache, and does the size of the cache matter? Method and reading: README.md.

#include <cstring>

#include "suite.hpp"

namespace {

using namespace measure;

constexpr index_t tokens = 64;  // appended one by one, so that they take long enough to be timed

template <class F>
void append(benchmark::State& state, const effort& effort, const shape& of, index_t window) {
  const auto config = config_of(of, num_sink_tokens + window);
  layers<F> measured(config, window + window / 3), small(config_of(of, num_sink_tokens + 256), 512);
  auto& cache = measured.cache(0);
  const matrix k = normal(tokens, of.num_kv_heads * of.head_dim, 5), v = normal(tokens, k.cols(), 6);
  const auto append_to = [&](sinkcache::any_kv_cache& to) {
    for (index_t i = 0; i < tokens; ++i) to.append(k.row(i), v.row(i));
  };
  // The least there is to do: the new token's bytes, put where the oldest one's were.
  const auto token_bytes = static_cast<std::size_t>(2 * of.num_kv_heads * F::block_bytes(of.head_dim));
  std::vector<std::byte> encoded(tokens * token_bytes), ring(static_cast<std::size_t>(window) * token_bytes);
  std::size_t row_of_ring = 0;
  const rounds rounds({
                          [&](std::size_t) {
                            for (std::size_t i = 0; i < tokens; ++i) {
                              std::memcpy(ring.data() + row_of_ring * token_bytes, encoded.data() + i * token_bytes,
                                          token_bytes);
                              row_of_ring = (row_of_ring + 1) % static_cast<std::size_t>(window);
                            }
                            keep(ring);
                          },
                          [&](std::size_t) { append_to(small.cache(0)); },
                          [&](std::size_t) { append_to(cache); },
                      },
                      effort);
  suite::row row(state, rounds, 2);
  row.number("token_ns", 1e9 * rounds.seconds(2).median / tokens);
  row.percent("copy%", 0, 2);
  row.ratio("over_256", rounds.ratio(2, 1));
  const matrix q = queries(of, 1);
  matrix out(1, q.cols());
  sinkcache::workspace workspace;
  const sinkcache::attention attention(params_of(of));
  attention.decode(q, cache, out, workspace);
  row.number("error", error_of(cache, attention.params(), q.data(), out.data()));
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  suite::for_each_format<sinkcache::f32, sinkcache::f16>([&](auto format, const std::string& name) {
    using F = decltype(format);
    for (const shape& of : {shapes[0], shapes[1], shapes[2]}) {
      const auto run = [=](index_t window) {
        return [=](auto& state, const effort& effort) { append<F>(state, effort, of, window); };
      };
      const std::string row = "append/" + name + "/" + of.name + "/";
      program.add(row + "1024", run(1024));
      program.add_slow(row + "65536", run(65536));
    }
  });
  return program.main();
}
