// Hugging Face transformers: keys and values are tensors [batch, heads, tokens, dim] with strides of their own (here a
// transposed view of [tokens, heads, dim]), queries the view(...).transpose(1, 2) of [tokens, heads * dim]: a chunk.

#include "hosts.hpp"

bool hosts::huggingface() {
  using namespace sinkcache;
  constexpr index_t tokens = 70, chunk = 20;
  std::vector<float> k, v;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t h = 0; h < num_kv_heads; ++h)
      for (index_t d = 0; d < head_dim; ++d) k.push_back(key(t, h, d)), v.push_back(value(t, h, d));

  // tensor.stride(1), tensor.stride(2), tensor.stride(3), whatever they are
  const kv_strides strides{.head = head_dim, .token = num_kv_heads * head_dim, .dim = 1};
  const kv_view<f32> view(config(), {strides, strides}, kv_piece{0, tokens, k.data(), v.data()}, tokens);
  matrix q(chunk, num_heads * head_dim), out = q;
  for (index_t row = 0; row < chunk; ++row) q.row(row) = query(tokens - chunk + row);
  workspace workspace;
  attention({.num_qo_heads = num_heads}).attend(q, view, out, workspace);  // causal; out is [tokens, heads, dim]
  bool good = true;
  for (index_t row : {index_t{0}, chunk - 1})
    good &= report("huggingface", q.row(row), out.row(row), tokens - chunk + row + 1, [](index_t) { return true; });
  return good;
}
