// One decode step and one prompt, on the caller's thread, on a pool of threads, and on an engine's own pool: the same
// bits. `threads [NUMBER]`, 4 unless given.

#include <sinkcache/thread_pool.hpp>

#include <sinkcache/host_threads.hpp>
#include <sinkcache/sinkcache.hpp>

#include <cstdio>
#include <cstdlib>

namespace {

using namespace sinkcache;

// Stands for the pool of an engine.
struct engine_pool {
  index_t size;

  index_t num_threads() const { return size; }
  template <class F>
  void run(const F& f) const {
    std::vector<std::thread> team;
    for (index_t i = 0; i < size; ++i) team.emplace_back([&f, i, this] { f(i, size); });
    for (std::thread& thread : team) thread.join();
  }
};

const cache_config config{
    .num_kv_heads = 4, .head_dim = 64, .num_sink_tokens = 4, .window = 2044, .rope = rope::plain(64, 10000.0)};
constexpr index_t tokens = 3000, num_qo_heads = 16;

struct layer {
  matrix q = matrix::Random(tokens, num_qo_heads * 64), k = matrix::Random(tokens, 4 * 64),
         v = matrix::Random(tokens, 4 * 64);
  sinkcache::attention attention{{.num_qo_heads = num_qo_heads}};

  // The outputs of a prompt, and of the newest token once more.
  matrix run(workspace& workspace, kv_cache<bf16>& cache) const {
    matrix out(tokens + 1, num_qo_heads * 64);
    attention.prefill(q, k, v, cache, out.topRows(tokens), workspace);
    attention.decode(q.bottomRows(1), cache, out.bottomRows(1), workspace);
    return out;
  }
};

bool report(const char* how, bool same) {
  std::printf("%-60s %s\n", how, same ? "the same bits" : "DIFFERENT");
  return same;
}

}  // namespace

int main(int argc, char** argv) {
  const index_t number = argc > 1 ? std::atoi(argv[1]) : 4;
  if (number < 1) return 2;
  const layer layer;

  kv_cache<bf16> cache(config), others(config);
  workspace alone;
  const matrix expected = layer.run(alone, cache);

  sinkcache::thread_pool pool(number);
  workspace on_pool(pool);
  bool good = report("a pool of threads", layer.run(on_pool, others) == expected);

  engine_pool engine{number};
  pool_executor executor(engine);
  workspace on_engine(executor);
  others.clear();
  good &= report("an engine's pool, as the executor", layer.run(on_engine, others) == expected);

  // The engine's threads call together, each for its KV heads and with its workspace.
  std::vector<workspace> workspaces(static_cast<std::size_t>(number));
  matrix out(1, num_qo_heads * 64);
  engine.run([&](index_t ith, index_t nth) {
    layer.attention.attend(layer.q.bottomRows(1), cache, out, workspaces[static_cast<std::size_t>(ith)], {},
                           part_of_thread(ith, nth, config.num_kv_heads, 1));
  });
  good &= report("threads that share a call by KV heads", out == expected.bottomRows(1));
  return good ? 0 : 1;
}
