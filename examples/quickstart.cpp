#include <fmt/core.h>

#include <sinkcache/fmt.hpp>
#include <sinkcache/sinkcache.hpp>

int main() {
  constexpr int num_tokens = 5000;
  // 8 KV heads of 128; the first 4 tokens stay for ever, and the newest 1020.
  sinkcache::cache_config config{.num_kv_heads = 8,
                                 .head_dim = 128,
                                 .num_sink_tokens = 4,
                                 .window = 1020,
                                 .rope = sinkcache::rope::plain(128, 500000.0)};
  sinkcache::kv_cache<sinkcache::bf16> cache(config);
  sinkcache::attention attention({.num_qo_heads = 32});
  sinkcache::workspace workspace;
  sinkcache::matrix q(1, 32 * 128), k(1, 8 * 128), v(1, 8 * 128), out(1, 32 * 128);
  for (int token = 0; token < num_tokens; ++token) {  // constant memory, constant time
    q.setRandom(), k.setRandom(), v.setRandom();      // your model's projections
    cache.append(k, v);
    attention.decode(q, cache, out, workspace);
  }

  config.window = num_tokens;  // keeps every token
  const auto full = static_cast<double>(sinkcache::kv_cache<sinkcache::bf16>::required_bytes(config));
  fmt::print("{} tokens seen, {} kept: {}\n", cache.seen(), cache.size(), cache);
  fmt::print("keeping them all would take {:.1f} times as much\n", full / static_cast<double>(cache.nbytes()));
}
