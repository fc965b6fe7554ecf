// mlx-lm's RotatingKVCache: [head][max_size][dim], the first `keep` tokens and after them a ring. The same three
// pieces serve any buffer of sinks and a window (StreamingLLM's start_size and recent_size).

#include "hosts.hpp"

bool hosts::mlx() {
  using namespace sinkcache;
  constexpr index_t keep = 4, max_size = 36, ring = max_size - keep, tokens = 90;
  std::vector<std::uint16_t> k(num_kv_heads * max_size * head_dim), v = k;
  const auto slot = [](index_t t) { return t < keep ? t : keep + (t - keep) % ring; };

  cache_config layer = config();
  layer.num_sink_tokens = keep;  // window stays 0: all that the pieces hold
  const kv_strides strides{.head = max_size * head_dim, .token = head_dim};
  kv_view<f16> view(layer, {strides, strides});
  const attention attention({.num_qo_heads = num_heads});
  workspace workspace;
  matrix q, out(1, num_heads * head_dim);
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t h = 0; h < num_kv_heads; ++h)
      for (index_t d = 0; d < head_dim; ++d) {
        k[static_cast<std::size_t>((h * max_size + slot(t)) * head_dim + d)] = half(key(t, h, d));
        v[static_cast<std::size_t>((h * max_size + slot(t)) * head_dim + d)] = half(value(t, h, d));
      }
    const auto pieces = ring_pieces({.k = k.data(),
                                     .v = v.data(),
                                     .k_row = head_dim * index_t{sizeof k[0]},
                                     .v_row = head_dim * index_t{sizeof v[0]},
                                     .pinned = keep,
                                     .rows = ring},
                                    t + 1);
    view.assign(pieces, t + 1);
    q = query(t);
    attention.decode(q, view, out, workspace);
  }
  return report("mlx", q, out, tokens, [](index_t t) { return t < keep || t >= tokens - ring; });
}
