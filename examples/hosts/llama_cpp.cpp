// llama.cpp and ggml: cells [cell][head][dim] of f16, and without flash attention V transposed, [head][dim][cell].
// llama2.c has the same order in f32.

#include "hosts.hpp"

bool hosts::llama_cpp() {
  using namespace sinkcache;
  constexpr index_t n_ctx = 128, n_tokens = 100, n_swa = 32, row = num_kv_heads * head_dim;
  std::vector<std::uint16_t> k(n_ctx * row), v(n_ctx * row), v_trans(n_ctx * row);

  cache_config layer = config();
  layer.window = n_swa;  // LLAMA_SWA_TYPE_STANDARD counts the query's own token too; 0 for layers without
  const kv_strides cells{.head = head_dim, .token = row};  // nb[2], nb[1]
  const kv_strides transposed{.head = head_dim * n_ctx, .token = 1, .dim = n_ctx};
  kv_view<f16> flash(layer, {cells, cells}, kv_piece{0, n_ctx, k.data(), v.data()}, 0);
  kv_view<f16> plain(layer, {cells, transposed}, kv_piece{0, n_ctx, k.data(), v_trans.data()}, 0);
  const attention attention({.num_qo_heads = num_heads});
  workspace workspace;
  matrix q, out(1, num_heads * head_dim), out_plain = out;
  for (index_t t = 0; t < n_tokens; ++t) {
    for (index_t h = 0; h < num_kv_heads; ++h)
      for (index_t d = 0; d < head_dim; ++d) {
        k[static_cast<std::size_t>(t * row + h * head_dim + d)] = half(key(t, h, d));
        v[static_cast<std::size_t>(t * row + h * head_dim + d)] = half(value(t, h, d));
        v_trans[static_cast<std::size_t>((h * head_dim + d) * n_ctx + t)] = half(value(t, h, d));
      }
    flash.set_seen(t + 1);
    plain.set_seen(t + 1);
    q = query(t);
    attention.decode(q, flash, out, workspace);
    attention.decode(q, plain, out_plain, workspace);
  }
  const auto sees = [](index_t t) { return t >= n_tokens - n_swa; };
  const bool good = report("llama.cpp", q, out, n_tokens, sees);
  return report("  -fa off", q, out_plain, n_tokens, sees) && good;
}
