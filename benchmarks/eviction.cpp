// What does eviction by score cost beside a window of as many rows: a decode step with all events between, and prefill?
// Method and reading: README.md.

#include <sinkcache/named_policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>

#include "suite.hpp"

namespace {

using namespace measure;

constexpr index_t interval = 64, recent = 32, chunk = 512;

struct place {
  const char* name;
  sinkcache::positions positions;
  sinkcache::inputs inputs = sinkcache::inputs::raw;
};
constexpr place absolute{"absolute", sinkcache::positions::absolute},
    in_cache{"in_cache", sinkcache::positions::in_cache},
    rotated{"in_cache_rotated", sinkcache::positions::in_cache, sinkcache::inputs::rotated};  // keys come rotated

template <class F>
void eviction(benchmark::State& state, const effort& effort, const shape& of, const place& at,
              std::string_view policy) {
  const index_t visible = short_visible(of);
  sinkcache::cache_config config = config_of(of, visible);
  config.positions = at.positions, config.inputs = at.inputs;
  sinkcache::kv_cache<sinkcache::f16> window(config);
  config.window = 0;
  if (std::is_same_v<F, sinkcache::f16>) config.rollback = 0;  // tiers take a prompt by as many tokens
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
  row.number("bytes_over_rows",
             static_cast<double>(scored.nbytes()) / static_cast<double>(visible * of.num_kv_heads * 4 * of.head_dim));
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  const auto add = [&]<class F>(F, const char* format, const shape& of, const place& at, std::string_view policy) {
    const auto run = [of, at, policy](auto& state, const effort& effort) {
      eviction<F>(state, effort, of, at, policy);
    };
    const std::string row = std::string("eviction/") + at.name + "/" + of.name + "/" + std::string(policy) + format;
    if (of.name[0] == 'C')
      program.add(row, run);
    else
      program.add_slow(row, run);
  };
  for (const shape& of : {shapes[0], shapes[2]}) {
    for (const place& at : {absolute, in_cache})
      for (const sinkcache::named_policy& policy : sinkcache::named_policies)
        add(sinkcache::f16{}, "", of, at, policy.name);
    for (const place& at : {absolute, in_cache, rotated}) {
      add(sinkcache::q8{}, "_q8", of, at, "knorm");
      add(sinkcache::q4{}, "_q4", of, at, "knorm");
    }
    add(sinkcache::f16{}, "", of, rotated, "knorm");
  }
  return program.main();
}
