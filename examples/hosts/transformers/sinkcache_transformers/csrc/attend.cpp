// Attention as an operator of PyTorch, over keys and values where the host's tensors hold them: of any strides, in f32,
// f16 or bf16. attention.py gives it the signature of Hugging Face's AttentionInterface.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "host.hpp"

namespace {

// What the queries of one sequence see: the keys in columns [first, end), up to the query's own. Query 0 has column
// `query`, and the window counts that one; 0: none.
struct span_of {
  int64_t first, end, query, window;
};
constexpr int64_t span_size = 4;

// Of [batch, heads, tokens, dim]. The stride of a dimension of size 1 says nothing.
sinkcache::kv_strides strides(const at::Tensor& t) {
  const auto stride = [&](int64_t i) { return t.size(i) > 1 ? static_cast<index_t>(t.stride(i)) : index_t{1}; };
  return {stride(1), stride(2), stride(3)};
}

std::vector<span_of> spans_of(const c10::optional<at::Tensor>& spans, int64_t batch, int64_t q_len, int64_t kv_len,
                              int64_t window) {
  status found;
  if (!spans) {
    found.require(kv_len >= q_len, "key.size(2)", kv_len, "at least query.size(2),", q_len);
    require(found);
    return std::vector<span_of>(static_cast<std::size_t>(batch), {0, kv_len, kv_len - q_len, window});
  }
  found.require(spans->dim() == 4 && spans->numel() == batch * span_size && spans->scalar_type() == at::kLong,
                "spans.numel()", spans->numel(), "int64 [batch, 1, 1, 4] of the mask, with a batch of", batch);
  require(found);
  const at::Tensor numbers = spans->contiguous();
  std::vector<span_of> result;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t* const n = numbers.data_ptr<int64_t>() + i * span_size;
    found.require(n[0] >= 0 && n[0] <= n[1], "the first key of spans", n[0], "from 0 to the last one's end,", n[1]);
    found.require(n[1] <= kv_len, "the end of the keys of spans", n[1], "at most key.size(2),", kv_len);
    found.require(n[2] >= 0 && n[2] <= kv_len - q_len, "the first query's column of spans", n[2],
                  "from 0 to key.size(2) - query.size(2),", kv_len - q_len);
    result.push_back({n[0], n[1], n[2], n[3]});
  }
  require(found);
  return result;
}

// q [batch, heads, q_len, dim] and k, v [batch, kv_heads, kv_len, dim or v_dim]. Without spans, which mask_spans makes,
// the newest q_len tokens are q's, and all see `sliding_window` (0: all). The first num_sink_tokens are seen besides.
// Gives [batch, q_len, heads, v_dim], in q's type; zeros
// for padding.
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scaling, int64_t sliding_window,
                  int64_t num_sink_tokens, double softcap, const c10::optional<at::Tensor>& sinks,
                  const c10::optional<at::Tensor>& spans) {
  status found;
  found.require(q.dim() == 4, "query.dim()", q.dim(), "4");
  found.require(k.dim() == 4, "key.dim()", k.dim(), "4");
  found.require(v.dim() == 4, "value.dim()", v.dim(), "4");
  require(found);
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2), dim = q.size(3), kv_len = k.size(2);
  require_float_type(found, "query's type", q);
  found.require(k.size(0) == batch, "key.size(0)", k.size(0), "that of query,", batch);
  found.require(k.size(3) == dim, "key.size(3)", k.size(3), "that of query,", dim);
  for (int64_t i : {0, 1, 2})
    found.require(v.size(i) == k.size(i), "value.size(0), (1) or (2)", v.size(i), "that of key,", k.size(i));
  if (sinks) found.require(sinks->numel() == heads, "sinks.numel()", sinks->numel(), "one per query head,", heads);
  require(found);

  // Queries are few: as rows of floats, which is how most models have them anyway. Keys and values stay where they are.
  const at::Tensor rows = q.transpose(1, 2).to(at::kFloat).contiguous();
  at::Tensor out = at::zeros({batch, q_len, heads, v.size(3)}, rows.options());  // padding
  if (batch == 0 || q_len == 0) return out.to(q.scalar_type());

  const std::vector<span_of> seen = spans_of(spans, batch, q_len, kv_len, sliding_window);
  const sinkcache::attention_params params = attention_params(heads, scaling, softcap, sinks);
  sinkcache::workspace& workspace = torch_workspace();
  const auto at = [](const at::Tensor& t, int64_t sequence, int64_t column) {
    return static_cast<const std::byte*>(t.data_ptr()) +
           (sequence * t.stride(0) + column * t.stride(2)) * t.element_size();
  };
  std::vector<std::shared_ptr<const sinkcache::kv_source>> views;
  std::vector<sinkcache::decode_item> items;
  for (int64_t i = 0; i < batch; ++i) {
    // Of what is there alone: padding has no place, so the first key that is none has position 0.
    const span_of& span = seen[static_cast<std::size_t>(i)];
    const sinkcache::cache_config config{.num_kv_heads = k.size(1),
                                         .head_dim = dim,
                                         .v_head_dim = v.size(3),
                                         .num_sink_tokens = std::max<int64_t>(0, num_sink_tokens - span.first),
                                         .window = span.window,
                                         .positions = sinkcache::positions::absolute,
                                         .inputs = sinkcache::inputs::rotated};
    const sinkcache::kv_piece keys{0, span.end - span.first, at(k, i, span.first), at(v, i, span.first)};
    const int64_t until = std::min(span.query + q_len, span.end);
    const int64_t row = std::clamp<int64_t>(span.first - span.query, 0, q_len);
    const int64_t n = std::max<int64_t>(0, std::min(q_len, span.end - span.query) - row);
    views.push_back(library::view_of(format_name(k), format_name(v), config, {strides(k), strides(v)}, keys,
                                     std::max<int64_t>(0, until - span.first), found));
    require(found);
    if (n == 0) continue;
    const float* const from = rows.data_ptr<float>() + (i * q_len + row) * heads * dim;
    float* const to = out.data_ptr<float>() + (i * q_len + row) * heads * v.size(3);
    if (q_len == 1)
      items.push_back({.q = {from, static_cast<std::size_t>(heads * dim)},
                       .keys = views.back().get(),
                       .out = {to, static_cast<std::size_t>(heads * v.size(3))}});
    else
      require(library::attend(params, {from, n, heads * dim}, *views.back(), {to, n, heads * v.size(3)}, workspace));
  }
  require(library::decode(params, items, workspace));  // all sequences at once
  return out.to(q.scalar_type());
}

// Booleans of one sequence and head, true where a query sees a key.
struct mask_rows {
  const bool* data;
  int64_t q_len, kv_len, row_stride;

  const bool* row(int64_t i) const { return data + i * row_stride; }
  int64_t first(int64_t i) const { return std::find(row(i), row(i) + kv_len, true) - row(i); }  // or kv_len
  int64_t end(int64_t i) const {
    int64_t column = kv_len;
    while (column > 0 && !row(i)[column - 1]) --column;
    return column;
  }

  // Keys in [first, end) that are in the window or pinned, and no others.
  bool says(const span_of& span, int64_t num_sink_tokens) const {
    for (int64_t i = 0; i < q_len; ++i) {
      const int64_t own = span.query + i, end_of = std::min(span.end, own + 1);
      const int64_t from = std::max(span.first, span.window > 0 ? own + 1 - span.window : 0);
      const int64_t pinned = span.window > 0 ? std::min({num_sink_tokens, from, end_of}) : 0;
      const bool* const r = row(i);
      const auto seen = [&](int64_t begin, int64_t end) {
        return begin < end ? std::count(r + begin, r + end, true) : int64_t{0};
      };
      const int64_t wanted = std::max<int64_t>(0, end_of - from) + std::max<int64_t>(0, pinned - span.first);
      if (seen(0, kv_len) != wanted || seen(from, end_of) + seen(span.first, pinned) != wanted) return false;
    }
    return true;
  }

  // The span of these rows if query 0 has that column.
  span_of span(int64_t query, int64_t window) const {
    span_of result{0, 0, query, window};
    for (int64_t i = 0; i < q_len; ++i)
      if (const int64_t at = first(i); at < kv_len) {
        result.first = at;
        break;
      }
    for (int64_t i = q_len; i-- > 0;)
      if (const int64_t at = end(i); at > 0) {
        result.end = at;
        break;
      }
    return result;
  }
};

// What a mask [batch, 1 or heads, q_len, kv_len], boolean or additive, says in four numbers a sequence, for attend:
// int64 [batch, 1, 1, 4]. Refuses one that says more than causality, the window, pinned tokens and padding at either
// end. `query` is the first query's column; without it the newest token's is the last, or the mask shows it.
at::Tensor mask_spans(const at::Tensor& mask, int64_t window, int64_t num_sink_tokens,
                      const c10::optional<at::Tensor>& query) {
  status found;
  found.require(mask.dim() == 4, "attention_mask.dim()", mask.dim(), "4");
  found.require(window >= 0, "sliding_window", window, "at least 0");
  require(found);
  at::Tensor visible = mask;
  if (mask.scalar_type() != at::kBool) {
    found.require(at::isFloatingType(mask.scalar_type()), "attention_mask's type", toString(mask.scalar_type()),
                  "boolean or floating");
    require(found);
    visible = mask.eq(0);
    const double lowest = mask.scalar_type() == at::kHalf       ? -65504.
                          : mask.scalar_type() == at::kBFloat16 ? -3.3895313892515355e38
                                                                : double{std::numeric_limits<float>::lowest()};
    if (!visible.logical_or(mask.le(lowest)).all().item<bool>())
      found.refuse("attention_mask was an arbitrary mask, had to be 0 where a key is seen and -inf where it is not");
    require(found);
  }
  if (visible.size(3) > 1 && visible.stride(3) != 1) visible = visible.contiguous();
  const int64_t batch = mask.size(0), q_len = mask.size(2), kv_len = mask.size(3);
  at::Tensor spans = at::empty({batch, 1, 1, span_size}, at::kLong);
  for (int64_t i = 0; i < batch; ++i) {
    const auto rows_of = [&](int64_t head) {
      return mask_rows{visible.data_ptr<bool>() + i * visible.stride(0) + head * visible.stride(1), q_len, kv_len,
                       visible.stride(2)};
    };
    const mask_rows rows = rows_of(0);
    span_of span = rows.span(query ? query->item<int64_t>() : kv_len - q_len, window);
    bool plain = span.query >= 0 && rows.says(span, num_sink_tokens);
    for (int64_t row = 0; row < q_len && !plain && !query; ++row)
      if (rows.end(row) > 0) {  // its own key is the last that it sees
        span.query = rows.end(row) - 1 - row;
        plain = span.query >= 0 && span.query <= kv_len - q_len && rows.says(span, num_sink_tokens);
        break;
      }
    for (int64_t head = 1; head < visible.size(1) && plain && visible.stride(1) != 0; ++head)
      plain = rows_of(head).says(span, num_sink_tokens);
    if (!plain)
      found.refuse(
          "attention_mask was an arbitrary mask, had to be causal with sliding_window {} and {} pinned tokens, besides "
          "padding before or after the tokens: sequence {}",
          window, num_sink_tokens, i);
    require(found);
    const int64_t numbers[span_size] = {span.first, span.end, span.query, span.window};
    std::copy_n(numbers, span_size, spans.data_ptr<int64_t>() + i * span_size);
  }
  return spans;
}

}  // namespace

TORCH_LIBRARY(sinkcache, m) {
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, float scaling, int sliding_window=0, int num_sink_tokens=0, "
      "float softcap=0, Tensor? sinks=None, Tensor? spans=None) -> Tensor");
  m.def("mask_spans(Tensor mask, int window=0, int num_sink_tokens=0, Tensor? query=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(sinkcache, CPU, m) {
  m.impl("attend", attend);
  m.impl("mask_spans", mask_spans);
}
