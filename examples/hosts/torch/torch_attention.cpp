// Attention as an operator of PyTorch, over keys and values where the host's tensors hold them: of any strides, in f32,
// f16 or bf16. hf_attention.py gives it the signature of Hugging Face's AttentionInterface.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <sinkcache/sinkcache.hpp>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using sinkcache::index_t;
using sinkcache::status;

// PyTorch's own threads.
struct torch_threads {
  index_t concurrency() const { return at::get_num_threads(); }
  void run(index_t n, const sinkcache::work_ref& work) const {
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) work(item, at::get_thread_num());
    });
  }
};

std::string_view format_name(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return "f32";
    case at::kHalf:
      return "f16";
    case at::kBFloat16:
      return "bf16";
    default:
      return toString(t.scalar_type());
  }
}

// Of [batch, heads, tokens, dim]. The stride of a dimension of size 1 says nothing.
sinkcache::kv_strides strides(const at::Tensor& t) {
  const auto stride = [&](int64_t i) { return t.size(i) > 1 ? static_cast<index_t>(t.stride(i)) : index_t{1}; };
  return {stride(1), stride(2), stride(3)};
}

void require(const status& found) { TORCH_CHECK(found.ok(), found.c_str()); }

// q [batch, heads, q_len, dim] and k, v [batch, kv_heads, kv_len, dim or v_dim], whose newest q_len tokens are q's.
// Token i sees the first num_sink_tokens and the newest `sliding_window` (0: all) up to itself. Gives [batch, q_len,
// heads, v_dim], in q's type.
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scaling, int64_t sliding_window,
                  int64_t num_sink_tokens, double softcap, const c10::optional<at::Tensor>& sinks) {
  status found;
  found.require(q.dim() == 4, "query.dim()", q.dim(), "4");
  found.require(k.dim() == 4, "key.dim()", k.dim(), "4");
  found.require(v.dim() == 4, "value.dim()", v.dim(), "4");
  require(found);
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2), dim = q.size(3), kv_len = k.size(2);
  found.require(format_name(q) == "f32" || format_name(q) == "f16" || format_name(q) == "bf16", "query's type",
                format_name(q), "f32, f16 or bf16");
  found.require(k.size(0) == batch, "key.size(0)", k.size(0), "that of query,", batch);
  found.require(k.size(3) == dim, "key.size(3)", k.size(3), "that of query,", dim);
  for (int64_t i : {0, 1, 2})
    found.require(v.size(i) == k.size(i), "value.size(0), (1) or (2)", v.size(i), "that of key,", k.size(i));
  if (sinks) found.require(sinks->numel() == heads, "sinks.numel()", sinks->numel(), "one per query head,", heads);
  require(found);

  // Queries are few: as rows of floats, which is how most models have them anyway. Keys and values stay where they are.
  const at::Tensor rows = q.transpose(1, 2).to(at::kFloat).contiguous();
  at::Tensor out = at::empty({batch, q_len, heads, v.size(3)}, rows.options());
  if (batch == 0 || q_len == 0) return out.to(q.scalar_type());

  sinkcache::attention_params params{
      .num_qo_heads = heads, .sm_scale = static_cast<float>(scaling), .logits_soft_cap = static_cast<float>(softcap)};
  if (sinks) {
    const at::Tensor logits = sinks->to(at::kFloat).contiguous();
    params.softmax =
        sinkcache::softmax_variant::sink_logits({logits.data_ptr<float>(), static_cast<std::size_t>(heads)});
  }
  const sinkcache::attention attention(std::move(params));
  const sinkcache::cache_config config{.num_kv_heads = k.size(1),
                                       .head_dim = dim,
                                       .v_head_dim = v.size(3),
                                       .num_sink_tokens = num_sink_tokens,
                                       .window = sliding_window,
                                       .positions = sinkcache::positions::absolute,
                                       .inputs = sinkcache::inputs::rotated};
  static torch_threads threads;
  thread_local std::optional<sinkcache::workspace> workspace;
  if (!workspace || workspace->concurrency() < threads.concurrency()) workspace.emplace(threads);

  require(sinkcache::try_with_formats(
      format_name(k), format_name(v), [&]<sinkcache::viewed_format K, sinkcache::viewed_format V>(K, V) -> status {
        using view = sinkcache::kv_view<K, V>;
        std::vector<view> views;
        views.reserve(static_cast<std::size_t>(batch));
        const auto at = [](const at::Tensor& t, int64_t i) {
          return static_cast<const std::byte*>(t.data_ptr()) + i * t.stride(0) * t.element_size();
        };
        status view_found;
        for (int64_t i = 0; i < batch; ++i) {
          std::optional<view> one = view::try_create(
              config, {strides(k), strides(v)}, sinkcache::kv_piece{0, kv_len, at(k, i), at(v, i)}, kv_len, view_found);
          if (!one) return view_found;
          views.push_back(std::move(*one));
        }
        const auto q_of = [&](int64_t i) { return rows.data_ptr<float>() + i * rows.stride(0); };
        const auto out_of = [&](int64_t i) { return out.data_ptr<float>() + i * out.stride(0); };
        if (q_len == 1) {  // all sequences at once
          std::vector<sinkcache::decode_item> items;
          const auto floats = [](auto* row, int64_t n) { return std::span(row, static_cast<std::size_t>(n)); };
          for (int64_t i = 0; i < batch; ++i)
            items.push_back({.q = floats(static_cast<const float*>(q_of(i)), heads * dim),
                             .keys = &views[static_cast<std::size_t>(i)],
                             .out = floats(out_of(i), heads * v.size(3))});
          return attention.try_decode(items, *workspace);
        }
        for (int64_t i = 0; i < batch && view_found; ++i)
          view_found = attention.try_attend({q_of(i), q_len, heads * dim}, views[static_cast<std::size_t>(i)],
                                            {out_of(i), q_len, heads * v.size(3)}, *workspace);
        return view_found;
      }));
  return out.to(q.scalar_type());
}

}  // namespace

TORCH_LIBRARY(sinkcache, m) {
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, float scaling, int sliding_window=0, int num_sink_tokens=0, "
      "float softcap=0, Tensor? sinks=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(sinkcache, CPU, m) { m.impl("attend", attend); }
