// How much faster are two threads than one, and a batch of sequences than one after the other? Method and reading:
// README.md.

#include <sinkcache/thread_pool.hpp>
#include "suite.hpp"

namespace {

using namespace measure;

// The work on one thread and on two, beside as many flops of plain arithmetic, and a plain read of the same bytes, that
// are handed out in the same way.
void two_threads(suite::row& row, const rounds& rounds) {
  row.number("fma_speedup", rounds.ratio(2, 3).median);
  row.number("read_speedup", rounds.ratio(4, 5).median);
  row.number("speedup", rounds.ratio(0, 1).median);
  row.ratio("of_fma_speedup", rounds.of([](const std::vector<double>& s) { return (s[0] / s[1]) / (s[2] / s[3]); }));
  row.limits(3, 5, 1);
}

struct thread_pools {
  sinkcache::thread_pool one{1}, two{2};

  // The limits as contenders.
  template <class F>
  std::vector<rounds::contender> with_limits(rounds::contender one_thread, rounds::contender two_threads, double flops,
                                             const layers<F>& caches) {
    const auto add = [flops](sinkcache::thread_pool& pool) {
      return [&pool, flops](std::size_t) {
        constexpr index_t parts = 16;
        auto part = [=](index_t, index_t) { measure::multiply_add(flops / parts); };
        pool.run(parts, sinkcache::work_ref(part));
      };
    };
    const auto read = [&caches](sinkcache::thread_pool& pool) {
      return [&pool, &caches](std::size_t) {
        constexpr std::size_t parts = 16;
        auto part = [&](index_t i, index_t) {
          for (std::size_t layer = 0; layer < caches.size(); ++layer)
            caches.read(layer, static_cast<std::size_t>(i), parts);
        };
        pool.run(parts, sinkcache::work_ref(part));
      };
    };
    return {std::move(one_thread), std::move(two_threads), add(one), add(two), read(one), read(two)};
  }
};

// One thread takes the sequences one after the other, two take them as one batch.
template <class F>
void decode(benchmark::State& state, const effort& effort, const shape& of, index_t visible, std::size_t sequences) {
  const auto config = config_of(of, visible);
  layers<F> caches(config, visible + visible / 3, sequences * sinkcache::kv_cache<F>::required_bytes(config));
  const matrix q = queries(of, static_cast<index_t>(sequences));
  matrix out(q.rows(), q.cols());
  const sinkcache::attention attention(params_of(of));
  thread_pools pools;
  sinkcache::workspace one(pools.one), two(pools.two);
  std::vector<sinkcache::decode_item> batch;
  for (std::size_t i = 0; i < sequences; ++i) {
    const auto row = static_cast<index_t>(i);
    batch.push_back({.q = {q.row(row).data(), static_cast<std::size_t>(q.cols())},
                     .keys = &caches.cache(i),
                     .out = {out.row(row).data(), static_cast<std::size_t>(out.cols())}});
  }
  const double flops =
      4. * static_cast<double>(of.num_qo_heads * of.head_dim * visible) * static_cast<double>(sequences);
  const rounds rounds(pools.with_limits(
                          [&](std::size_t) {
                            for (const sinkcache::decode_item& item : batch) attention.decode({&item, 1}, one);
                          },
                          [&](std::size_t) { attention.decode(batch, two); }, flops, caches),
                      effort, wall_seconds);
  suite::row row(state, rounds, 1);
  two_threads(row, rounds);
  row.number("error", error_of(caches.cache(0), attention.params(), q.data(), out.data()));
}

template <class F>
void prefill(benchmark::State& state, const effort& effort, const shape& of) {
  constexpr index_t visible = 1024, tokens = 512;
  layers<F> caches(config_of(of, visible), visible, 2 * sinkcache::kv_cache<F>::required_bytes(config_of(of, visible)));
  const matrix q = queries(of, tokens);
  const matrix k = normal(tokens, of.num_kv_heads * of.head_dim, 5), v = normal(tokens, k.cols(), 6);
  matrix out(tokens, q.cols());
  const sinkcache::attention attention(params_of(of));
  thread_pools pools;
  sinkcache::workspace one(pools.one), two(pools.two);
  const auto run = [&](sinkcache::any_kv_cache& cache, sinkcache::workspace& workspace) {
    cache.truncate(visible - tokens);
    attention.prefill(q, k, v, cache, out, workspace);
  };
  const double flops =
      4. * static_cast<double>(of.num_qo_heads * of.head_dim * (tokens * visible - tokens * (tokens - 1) / 2));
  const rounds rounds(pools.with_limits([&](std::size_t) { run(caches.cache(0), one); },
                                        [&](std::size_t) { run(caches.cache(1), two); }, flops, caches),
                      effort, wall_seconds);
  suite::row row(state, rounds, 1);
  two_threads(row, rounds);
  row.number("error",
             error_of(caches.cache(1), attention.params(), q.row(tokens - 1).data(), out.row(tokens - 1).data()));
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  suite::for_each_format<sinkcache::f32, sinkcache::f16>([&](auto format, const std::string& name) {
    using F = decltype(format);
    for (const shape& of : {shapes[0], shapes[1], shapes[2]}) {
      const auto run_decode = [=](index_t visible, std::size_t sequences) {
        return [=](auto& state, const effort& effort) { decode<F>(state, effort, of, visible, sequences); };
      };
      const std::string row = "threads/" + name + "/" + of.name + "/";
      program.add(row + "decode/1024", run_decode(1024, 1));
      program.add_slow(row + "decode/32768", run_decode(32768, 1));
      program.add(row + "batch_of_8/1024", run_decode(1024, 8));
      program.add_slow(row + "prefill/1024", [=](auto& state, const effort& effort) { prefill<F>(state, effort, of); });
    }
  });
  return program.main();
}
