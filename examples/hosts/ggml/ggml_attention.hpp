#pragma once

// Attention over llama.cpp's KV cache as an operator of a ggml graph, on its CPU backend: what build_attn_mha asks of
// ggml_flash_attn_ext, without a mask.

#include <ggml.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <sinkcache/sinkcache.hpp>
#include <span>
#include <utility>
#include <vector>

// One layer's. Keys and values are read where they lie, at any strides: f32, f16 or bf16. Cell i of a stream holds its
// position i; cells behind the newest token's are not read.
class ggml_attention {
 public:
  using index_t = sinkcache::index_t;
  using status = sinkcache::status;

  // Of the configuration counts num_sink_tokens, window (0 for none), positions and rope; shapes come from the tensors.
  // Workspaces, one for each thread, can be shared by all operators of a graph, which run one after the other.
  ggml_attention(sinkcache::attention_params params, const sinkcache::cache_config& config,
                 std::span<sinkcache::workspace> workspaces)
      : attention_(std::move(params)), config_(config), workspaces_(workspaces), refused_(workspaces.size()) {
    config_.inputs = sinkcache::inputs::rotated;
  }
  ggml_attention(const ggml_attention&) = delete;  // graphs point to it
  ggml_attention& operator=(const ggml_attention&) = delete;

  // Tensors as for ggml_flash_attn_ext, views and permuted ones too: q f32 [head_dim, tokens, heads, streams], k
  // [head_dim, cells, kv_heads, streams], v [v_head_dim, cells, kv_heads, streams]; positions of the queries, i32
  // [tokens * streams]. Gives f32 [v_head_dim, heads, tokens, streams], or null and in `found` why.
  ggml_tensor* build(ggml_context* graph, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, ggml_tensor* positions,
                     status& found) {
    found = check(q, k, v, positions);
    if (!found) return nullptr;
    ggml_tensor* args[] = {q, k, v, positions};
    return ggml_custom_4d(graph, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3], args, 4, &compute,
                          static_cast<int>(workspaces_.size()), this);
  }

  // Ask after each compute: the first thing that was refused since the last time. Its output was not written.
  status take_refused() noexcept {
    status first;
    for (status& found : refused_)
      if (const status taken = std::exchange(found, status()); first) first = taken;
    return first;
  }

 private:
  // What can be told before there is memory.
  status check(const ggml_tensor* q, const ggml_tensor* k, const ggml_tensor* v,
               const ggml_tensor* positions) const noexcept {
    status found;
    const index_t heads = attention_.params().num_qo_heads;
    found.require(!workspaces_.empty(), "workspaces.size()", workspaces_.size(), "at least 1");
    found.require(q->type == GGML_TYPE_F32, "q's type", ggml_type_name(q->type), "f32");
    found.require(q->ne[0] == k->ne[0], "q->ne[0]", q->ne[0], "that of k,", k->ne[0]);
    found.require(q->ne[2] == heads, "q->ne[2]", q->ne[2], "num_qo_heads,", heads);
    found.require(heads % k->ne[2] == 0, "k->ne[2]", k->ne[2], "a divisor of num_qo_heads,", heads);
    found.require(q->nb[0] == sizeof(float), "q->nb[0]", q->nb[0], "4: dimensions side by side");
    found.require(q->nb[2] == q->nb[0] * static_cast<std::size_t>(q->ne[0]) || heads == 1, "q->nb[2]", q->nb[2],
                  "q->nb[0] * q->ne[0], a token's heads side by side:", q->nb[0] * static_cast<std::size_t>(q->ne[0]));
    found.require(q->nb[1] % sizeof(float) == 0, "q->nb[1]", q->nb[1], "a multiple of 4");
    found.require(k->ne[3] == q->ne[3], "k->ne[3]", k->ne[3], "that of q,", q->ne[3]);
    for (int i = 1; i < 4; ++i)
      found.require(v->ne[i] == k->ne[i], "v->ne[1], [2] or [3]", v->ne[i], "that of k,", k->ne[i]);
    found.require(positions->type == GGML_TYPE_I32, "positions' type", ggml_type_name(positions->type), "i32");
    found.require(ggml_is_contiguous(positions) && ggml_nelements(positions) == q->ne[1] * q->ne[3],
                  "ggml_nelements(positions)", ggml_nelements(positions), "one for each token, side by side,",
                  q->ne[1] * q->ne[3]);
    if (!found) return found;
    return with_view(k, v, [](auto& view) { return view.try_set_seen(0); });
  }

  // Calls f with a view of such tensors that holds no tokens so far.
  template <class F>
  status with_view(const ggml_tensor* k, const ggml_tensor* v, F&& f) const noexcept {
    return sinkcache::try_with_formats<sinkcache::q8_0, sinkcache::q4_0>(
        ggml_type_name(k->type), ggml_type_name(v->type),
        [&]<sinkcache::viewed_format K, sinkcache::viewed_format V>(K, V) -> status {
          status found;
          sinkcache::cache_config config = config_;
          config.num_kv_heads = k->ne[2];
          config.head_dim = k->ne[0];
          config.v_head_dim = v->ne[0];
          const sinkcache::kv_layout layout{strides<K>(*k), strides<V>(*v)};
          std::optional view = sinkcache::kv_view<K, V>::try_create(config, layout, found);
          return view ? f(*view) : found;
        });
  }

  // In elements; of a quantised type nb[0] is a block's bytes.
  template <class F>
  static sinkcache::kv_strides strides(const ggml_tensor& t) noexcept {
    const index_t block = ggml_blck_size(t.type);
    const auto elements = [&](int i) {
      return static_cast<index_t>(t.nb[i]) / static_cast<index_t>(ggml_type_size(t.type)) * block;
    };
    return {elements(2), elements(1), sinkcache::unit_format<F> ? 1 : elements(0)};
  }

  // Called from C, by all threads of the graph at once.
  static void compute(ggml_tensor* out, int thread, int num_threads, void* self) {
    static_cast<ggml_attention*>(self)->compute(*out, thread, num_threads);
  }

  void compute(ggml_tensor& out, index_t thread, index_t num_threads) noexcept {
    const ggml_tensor &q = *out.src[0], &k = *out.src[1], &v = *out.src[2];
    // Threads share KV heads as far as they go round, and tokens.
    num_threads = std::min(num_threads, static_cast<index_t>(workspaces_.size()));
    const index_t tokens = q.ne[1], kv_heads = k.ne[2];
    const index_t by_heads = tokens == 1 ? std::min(num_threads, kv_heads) : std::gcd(num_threads, kv_heads);
    const index_t by_rows = std::min(tokens, num_threads / by_heads);
    if (thread >= by_heads * by_rows) return;
    const index_t head = thread % by_heads, row = thread / by_heads;
    const auto begin = [](index_t all, index_t parts, index_t i) { return all * i / parts; };
    sinkcache::call_part part;
    part.first_kv_head = begin(kv_heads, by_heads, head);
    part.num_kv_heads = begin(kv_heads, by_heads, head + 1) - part.first_kv_head;
    part.first_row = begin(tokens, by_rows, row);
    part.num_rows = begin(tokens, by_rows, row + 1) - part.first_row;

    const auto at = [](const ggml_tensor& t, std::size_t bytes) { return static_cast<std::byte*>(t.data) + bytes; };
    const auto* positions = static_cast<const std::int32_t*>(out.src[3]->data);
    const status found = with_view(&k, &v, [&](auto& view) {
      status stream_found;
      for (index_t stream = 0; stream < q.ne[3] && stream_found; ++stream, positions += tokens) {
        const auto s = static_cast<std::size_t>(stream);
        const index_t newest = positions[tokens - 1];
        for (index_t i = 0; i < tokens; ++i)
          stream_found.require(positions[i] == newest - (tokens - 1 - i), "a query's position", positions[i],
                               "one below the next query's:", newest - (tokens - 1 - i));
        stream_found.require(newest < k.ne[1], "the newest query's position", newest, "below the cells,", k.ne[1]);
        if (stream_found)
          stream_found =
              view.try_assign(sinkcache::kv_piece{0, k.ne[1], at(k, s * k.nb[3]), at(v, s * v.nb[3])}, newest + 1);
        if (stream_found)
          stream_found = attention_.try_attend(
              {reinterpret_cast<const float*>(at(q, s * q.nb[3])), tokens, q.ne[2] * q.ne[0],
               static_cast<index_t>(q.nb[1] / sizeof(float))},
              view, {reinterpret_cast<float*>(at(out, s * out.nb[3])), tokens, out.ne[1] * out.ne[0]},
              workspaces_[static_cast<std::size_t>(thread)], nullptr, part);
      }
      return stream_found;
    });
    if (status& kept = refused_[static_cast<std::size_t>(thread)]; !found && kept) kept = found;
  }

  sinkcache::attention attention_;
  sinkcache::cache_config config_;
  std::span<sinkcache::workspace> workspaces_;
  std::vector<status> refused_;  // one a thread
};
