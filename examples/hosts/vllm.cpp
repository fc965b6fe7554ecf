// vLLM: pages [page][slot][head][dim] of a pool, and a block table of int32 for each sequence; several sequences in one
// call. FlashInfer's HND pages differ in their strides alone, {.head = page_tokens * head_dim, .token = head_dim}.

#include "hosts.hpp"

bool hosts::vllm() {
  using namespace sinkcache;
  constexpr index_t num_pages = 12, page_tokens = 16, row = num_kv_heads * head_dim, page = page_tokens * row;
  std::vector<std::uint16_t> k(num_pages * page), v = k;
  const std::vector<std::int32_t> tables[] = {{7, 2, 0, 9}, {3, 11}};
  const index_t lengths[] = {59, 32};

  const kv_strides strides{.head = head_dim, .token = row};
  std::vector<kv_view<f16>> views;
  matrix q(2, num_heads * head_dim), out = q;
  std::vector<decode_item> batch;
  views.reserve(2);
  for (std::size_t s = 0; s < 2; ++s) {
    for (index_t t = 0; t < lengths[s]; ++t)
      for (index_t h = 0; h < num_kv_heads; ++h)
        for (index_t d = 0; d < head_dim; ++d) {
          const index_t slot = tables[s][static_cast<std::size_t>(t / page_tokens)] * page_tokens + t % page_tokens;
          k[static_cast<std::size_t>(slot * row + h * head_dim + d)] = half(key(t, h, d));
          v[static_cast<std::size_t>(slot * row + h * head_dim + d)] = half(value(t, h, d));
        }
    const auto i = static_cast<index_t>(s);
    q.row(i) = query(lengths[s] - 1);
    views.emplace_back(config(), kv_layout{strides, strides},
                       kv_pages{k.data(), v.data(), page, page, num_pages, page_tokens, tables[s]}, lengths[s]);
    batch.push_back({.q = {q.row(i).data(), static_cast<std::size_t>(q.cols())},
                     .keys = &views.back(),
                     .out = {out.row(i).data(), static_cast<std::size_t>(out.cols())}});
  }
  workspace workspace;
  attention({.num_qo_heads = num_heads}).decode(batch, workspace);
  bool good = true;
  for (index_t s : {0, 1}) good &= report("vllm", q.row(s), out.row(s), lengths[s], [](index_t) { return true; });
  return good;
}
