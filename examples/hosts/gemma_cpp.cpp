// gemma.cpp: one row of floats a token, for every layer and head K and after it V; a ring of rows.

#include "hosts.hpp"

bool hosts::gemma_cpp() {
  using namespace sinkcache;
  constexpr index_t layers = 2, layer = 1, seq_len = 48, tokens = 130;
  constexpr index_t row = layers * num_kv_heads * 2 * head_dim, in_row = layer * num_kv_heads * 2 * head_dim;
  std::vector<float> cache(seq_len * row);

  const kv_strides strides{.head = 2 * head_dim, .token = row};
  kv_view<f32> view(config(), {strides, strides});
  const attention attention({.num_qo_heads = num_heads});
  workspace workspace;
  matrix q, out(1, num_heads * head_dim);
  for (index_t pos = 0; pos < tokens; ++pos) {
    float* const to = cache.data() + pos % seq_len * row + in_row;
    for (index_t h = 0; h < num_kv_heads; ++h)
      for (index_t d = 0; d < head_dim; ++d) {
        to[h * 2 * head_dim + d] = key(pos, h, d);
        to[h * 2 * head_dim + head_dim + d] = value(pos, h, d);
      }
    const auto pieces = ring_pieces({.k = cache.data() + in_row,
                                     .v = cache.data() + in_row + head_dim,
                                     .k_row = row * index_t{sizeof(float)},
                                     .v_row = row * index_t{sizeof(float)},
                                     .rows = seq_len},
                                    pos + 1);
    view.assign(pieces, pos + 1);
    q = query(pos);
    attention.decode(q, view, out, workspace);
  }
  return report("gemma.cpp", q, out, tokens, [](index_t t) { return t >= tokens - seq_len; });
}
