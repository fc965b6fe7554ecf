// What does a decode step over keys and values of few bits take, beside f16's, what prefill, and what storing a token?
// Method and reading: README.md.

#include "suite.hpp"

namespace {

using namespace measure;

constexpr index_t tokens = 16;  // appended one by one, so that they take long enough to be timed

template <class K, class V>
void decode(benchmark::State& state, const effort& effort, const shape& of, index_t visible, std::size_t bytes) {
  const auto config = config_of(of, visible);
  layers<sinkcache::f16> plain(config, visible + visible / 3, bytes);
  layers<K, V> few(config, visible + visible / 3, bytes), stored(config, visible);
  const matrix q = queries(of, 1), k = normal(tokens, of.num_kv_heads * of.head_dim, 5),
               v = normal(tokens, k.cols(), 6);
  matrix out(1, q.cols()), out_of_plain(1, q.cols());
  const sinkcache::attention attention(params_of(of));
  sinkcache::workspace workspace;
  const rounds rounds(
      {[&](std::size_t round) { few.read(round); },
       [&](std::size_t round) { attention.decode(q, plain.cache(round + plain.size() / 2), out_of_plain, workspace); },
       [&](std::size_t round) { attention.decode(q, few.cache(round + few.size() / 2), out, workspace); },
       [&](std::size_t) {
         for (index_t i = 0; i < tokens; ++i) stored.cache(0).append(k.row(i), v.row(i));
       }},
      effort);
  suite::row row(state, rounds, 2);
  row.ratio("of_f16", rounds.ratio(2, 1));
  row.percent("read%", 0, 2);
  row.number("append%", 100 * rounds.ratio(3, 2).median / static_cast<double>(tokens));
  row.number("layer_bytes", static_cast<double>(few.layer_bytes()));
  row.number("error", error_of(few.cache(0), attention.params(), q.data(), out.data()));
}

// 512 more tokens after a window that is full.
template <class K, class V>
void prefill(benchmark::State& state, const effort& effort, const shape& of) {
  constexpr index_t chunk = 512;
  const index_t visible = short_visible(of);
  layers<sinkcache::f32> plain(config_of(of, visible), visible);
  layers<K, V> few(config_of(of, visible), visible);
  const matrix q = queries(of, chunk), k = normal(chunk, of.num_kv_heads * of.head_dim, 5),
               v = normal(chunk, k.cols(), 6);
  matrix out(chunk, q.cols()), out_of_plain(chunk, q.cols());
  const sinkcache::attention attention(params_of(of));
  sinkcache::workspace workspace;
  const rounds rounds({[&](std::size_t) { attention.prefill(q, k, v, plain.cache(0), out_of_plain, workspace); },
                       [&](std::size_t) { attention.prefill(q, k, v, few.cache(0), out, workspace); }},
                      effort);
  suite::row row(state, rounds, 1);
  row.ratio("of_f32", rounds.ratio(1, 0));
  row.number("error", error_of(few.cache(0), attention.params(), q.row(chunk - 1).data(), out.row(chunk - 1).data()));
}

template <class K, class V>
void add(const suite::program& program, const std::string& name, std::size_t cold_bytes) {
  for (const shape& of : shapes) {
    const index_t visible = short_visible(of);
    const std::string row = "few_bits/" + name + "/" + of.name + "/";
    program.add(row + std::to_string(visible) + "/hot",
                [=](auto& state, const effort& effort) { decode<K, V>(state, effort, of, visible, 0); });
    program.add_slow(row + std::to_string(visible) + "/prefill",
                     [=](auto& state, const effort& effort) { prefill<K, V>(state, effort, of); });
    if (visible != 1024) continue;
    program.add_slow(row + "1024/cold",
                     [=](auto& state, const effort& effort) { decode<K, V>(state, effort, of, 1024, cold_bytes); });
    program.add_slow(row + "32768/cold",
                     [=](auto& state, const effort& effort) { decode<K, V>(state, effort, of, 32768, cold_bytes); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  const std::size_t cold_bytes = cold().bytes;
  add<sinkcache::q8, sinkcache::q8>(program, "q8", cold_bytes);
  add<sinkcache::q6, sinkcache::q4>(program, "q6/q4", cold_bytes);
  add<sinkcache::q4, sinkcache::q4>(program, "q4", cold_bytes);
  add<sinkcache::q2, sinkcache::q2>(program, "q2", cold_bytes);
  return program.main();
}
