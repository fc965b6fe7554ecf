// What does eviction by score cost beside a window of as many rows: a decode step with all events between, and prefill?
// Method and reading: README.md.

#include <sinkcache/named_policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>

#include "suite.hpp"

namespace {

using namespace measure;

constexpr index_t interval = 64, recent = 32, chunk = 512;

void eviction(benchmark::State& state, const effort& effort, const shape& of, sinkcache::positions positions,
              std::string_view policy) {
  using F = sinkcache::f16;
  const index_t visible = short_visible(of);
  sinkcache::cache_config config = config_of(of, visible);
  config.positions = positions;
  sinkcache::kv_cache<F> window(config);
  config.window = 0, config.rollback = 0;
  sinkcache::status found;
  sinkcache::scored_kv_cache<F> scored(
      config, {.budget = visible - interval, .recent = recent, .interval = interval, .num_qo_heads = of.num_qo_heads},
      sinkcache::make_policy(policy, {}, found));
  const index_t tokens = visible + chunk;
  const matrix q = queries(of, tokens);
  const matrix k = normal(tokens, of.num_kv_heads * of.head_dim, 1), v = normal(tokens, k.cols(), 2);
  matrix out(tokens, q.cols());
  const sinkcache::attention attention(params_of(of));
  sinkcache::workspace workspace;
  for (sinkcache::any_kv_cache* cache :
       {static_cast<sinkcache::any_kv_cache*>(&window), static_cast<sinkcache::any_kv_cache*>(&scored)})
    attention.prefill(q, k, v, *cache, out, workspace);  // full, and events have been

  const auto steps = [&](sinkcache::any_kv_cache& cache) {
    for (index_t i = 0; i < interval; ++i) {
      cache.append(k.middleRows(i, 1), v.middleRows(i, 1));
      attention.decode(q.middleRows(i, 1), cache, out.middleRows(i, 1), workspace);
    }
  };
  const auto prefill = [&](sinkcache::any_kv_cache& cache) {
    attention.prefill(q.topRows(chunk), k.topRows(chunk), v.topRows(chunk), cache, out.topRows(chunk), workspace);
  };
  const rounds rounds({[&](std::size_t) { steps(window); }, [&](std::size_t) { steps(scored); },
                       [&](std::size_t) { prefill(window); }, [&](std::size_t) { prefill(scored); }},
                      effort);
  suite::row row(state, rounds, 1);
  row.number("step_us", 1e6 * rounds.seconds(1).median / static_cast<double>(interval));
  row.ratio("step_over_window", rounds.ratio(1, 0));
  row.ratio("prefill_over_window", rounds.ratio(3, 2));
  row.number("bytes_over_rows", static_cast<double>(scored.nbytes()) /
                                    static_cast<double>(visible * of.num_kv_heads * 2 * F::block_bytes(of.head_dim)));
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  for (const auto& [positions, name] :
       {std::pair(sinkcache::positions::absolute, "absolute"), std::pair(sinkcache::positions::in_cache, "in_cache")})
    for (const shape& of : {shapes[0], shapes[2]})
      for (const sinkcache::named_policy& policy : sinkcache::named_policies) {
        const auto run = [of, positions = positions, policy](auto& state, const effort& effort) {
          eviction(state, effort, of, positions, policy.name);
        };
        const std::string row = std::string("eviction/") + name + "/" + of.name + "/" + std::string(policy.name);
        if (of.name[0] == 'C')
          program.add(row, run);
        else
          program.add_slow(row, run);
      }
  return program.main();
}
