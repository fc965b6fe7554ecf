// ONNX Runtime's GroupQueryAttention: past and present share one [head][max_seq][dim]. The same order (BNSH) in
// CTranslate2, OpenVINO's SDPA, ncnn, TinyChatEngine and InfiniLM. A C callback: nothing may be thrown.

#include "hosts.hpp"

bool hosts::onnxruntime() {
  using namespace sinkcache;
  constexpr index_t max_seq = 64, total_sequence_length = 50, local_window_size = 24;
  std::vector<std::uint16_t> k(num_kv_heads * max_seq * head_dim), v = k;
  for (index_t h = 0; h < num_kv_heads; ++h)
    for (index_t t = 0; t < total_sequence_length; ++t)
      for (index_t d = 0; d < head_dim; ++d) {
        k[static_cast<std::size_t>((h * max_seq + t) * head_dim + d)] = half(key(t, h, d));
        v[static_cast<std::size_t>((h * max_seq + t) * head_dim + d)] = half(value(t, h, d));
      }

  cache_config layer = config();
  layer.window = local_window_size;
  const kv_strides strides{.head = max_seq * head_dim, .token = head_dim};
  const matrix q = query(total_sequence_length - 1);
  matrix out(1, num_heads * head_dim);
  status found;
  std::optional<workspace> workspace = workspace::try_create(found);
  const auto view = kv_view<f16>::try_create(layer, {strides, strides}, kv_piece{0, max_seq, k.data(), v.data()},
                                             total_sequence_length, found);
  const attention attention({.num_qo_heads = num_heads});
  if (workspace && view) found = attention.try_decode(q, *view, out, *workspace);
  if (!found) return false;  // found.c_str() says why
  return report("onnxruntime", q, out, total_sequence_length,
                [](index_t t) { return t >= total_sequence_length - local_window_size; });
}
