// The C interface as a shared library, and beside it the same work through the C++ classes themselves, for the tests to
// compare: few formats, because what reads each is compiled.

#define SINKCACHE_C_FORMATS sinkcache::f32, sinkcache::q8
#include <sinkcache/sinkcache.cpp>

namespace {

constexpr index_t kv_heads = 2, qo_heads = 6, dim = 16, v_dim = 8;

rope plain_yarn() { return rope::yarn(dim, 10000, {.factor = 4, .original_max_position_embeddings = 64}); }
rope whole_yarn() {
  return rope::yarn(8, 100,
                    {.factor = 4,
                     .original_max_position_embeddings = 64,
                     .beta_fast = 5,
                     .beta_slow = 2,
                     .truncate = false,
                     .mscale = 2,
                     .mscale_all_dim = 0.5},
                    rope_pairing::interleaved);
}
rope scaled_yarn() {
  return rope::yarn(dim, 10000, {.factor = 4, .original_max_position_embeddings = 64, .attention_factor = 1.25});
}

cache_config config_of(positions at, const rope& rotation) {
  return {.num_kv_heads = kv_heads,
          .head_dim = dim,
          .v_head_dim = v_dim,
          .num_sink_tokens = 3,
          .window = 20,
          .positions = at,
          .rope = rotation,
          .rollback = 5,
          .recent = 7};
}

// Prefill of `prompt` tokens, and the others one by one.
template <class Cache>
void stream(Cache cache, index_t prompt, index_t tokens, const float* q, const float* k, const float* v, float* out,
            float* lse) {
  std::vector<float> sinks{0.5f, -1, 0, 2, 1, -0.25f};
  const sinkcache::attention layer({.num_qo_heads = qo_heads,
                                    .softmax = softmax_variant::sink_logits(sinks),
                                    .logits_soft_cap = 30,
                                    .sink_bias = std::vector<float>(6, 0.125f)});
  workspace memory;
  const auto rows = [](auto* data, index_t first, index_t n, index_t cols) {
    return basic_matrix_view<std::remove_pointer_t<decltype(data)>>(data + first * cols, n, cols);
  };
  for (index_t i = 0, n = prompt; i < tokens; i += n, n = 1) {
    const auto queries = rows(q, i, n, qo_heads * dim);
    const auto keys = rows(k, i, n, kv_heads * dim);
    const auto values = rows(v, i, n, kv_heads * v_dim);
    const auto outputs = rows(out, i, n, qo_heads * v_dim);
    const std::span<float> lses(lse + i * qo_heads, static_cast<std::size_t>(n * qo_heads));
    if (i == 0) {
      layer.prefill(queries, keys, values, cache, outputs, memory, {.lse = lses});
    } else {
      cache.append(keys, values);
      layer.decode(queries, cache, outputs, memory, {.lse = lses});
    }
  }
}

}  // namespace

// What a stream gives through the C++ classes: case 0 is a window of f32, 1 one of q8 keys and f32 values, 2 is H2O.
extern "C" int reference_stream(int number, int64_t prompt, int64_t tokens, const float* q, const float* k,
                                const float* v, float* out, float* lse) {
  if (number == 0)
    stream(kv_cache<f32>(config_of(positions::in_cache, plain_yarn())), prompt, tokens, q, k, v, out, lse);
  if (number == 1)
    stream(kv_cache<q8, f32>(config_of(positions::absolute, whole_yarn())), prompt, tokens, q, k, v, out, lse);
  if (number == 2) {
    cache_config config = config_of(positions::in_cache, scaled_yarn());
    config.window = 0;
    const eviction rules{.budget = 19, .recent = 5, .interval = 4, .num_qo_heads = qo_heads};
    stream(scored_kv_cache<f32>(config, rules, policies::h2o()), prompt, tokens, q, k, v, out, lse);
  }
  return number >= 0 && number <= 2;
}
