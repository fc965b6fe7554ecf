// This library's attention over llama.cpp's own cells (SINKCACHE_CELLS=1): cells move, shift and leave as llama.cpp has
// them, only the product is computed here.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <sinkcache/sinkcache.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ggml/ggml_attention.hpp"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "sinkcache_llama.h"

namespace {

// What the cells of one cache hold, filled in for each batch, and the operators that read it: they live as long as the
// graph does.
class cells_input final : public llm_graph_input_i {
 public:
  cells_input(const llm_graph_context& graph, const llama_kv_cache_context* cache, bool windowed,
              std::int64_t num_streams)
      : windowed(windowed),
        cache_(cache),
        num_streams_(num_streams),
        num_sequences_(static_cast<int>(graph.cparams.n_seq_max)),
        workspaces_(static_cast<std::size_t>(std::max({1, graph.cparams.n_threads, graph.cparams.n_threads_batch}))) {
    const std::int64_t cells = cache->get_n_kv();
    const auto numbers = [&](std::int64_t a, std::int64_t b, std::int64_t c) {
      ggml_tensor* const t = ggml_new_tensor_3d(graph.ctx0, GGML_TYPE_I32, a, b, c);
      ggml_set_input(t);
      return t;
    };
    tensors = {numbers(graph.n_tokens, 1, 1), numbers(cells, num_streams, 1), numbers(graph.n_tokens, 1, 1),
               numbers((num_sequences_ + 31) / 32, cells, num_streams)};
  }
  ~cells_input() override { report(); }

  void set_input(const llama_ubatch* ubatch) override {
    report();
    const auto tokens = static_cast<std::int64_t>(ubatch->n_tokens), cells = tensors.cell_positions->ne[0];
    std::vector<std::int32_t> of(ubatch->n_tokens), positions(static_cast<std::size_t>(cells * num_streams_), -1);
    const auto words = static_cast<std::size_t>(tensors.cell_sequences->ne[0]);
    std::vector<std::int32_t> sequences(positions.size() * words);
    for (std::size_t i = 0; i < of.size(); ++i) of[i] = ubatch->seq_id[i][0];
    for (std::int64_t stream = 0; stream < num_streams_; ++stream) {
      const llama_kv_cells& held =
          cache_->sinkcache_kv()->get_cells(of[static_cast<std::size_t>(stream * (tokens / num_streams_))]);
      for (std::int64_t cell = 0; cell < cells; ++cell) {
        const auto i = static_cast<std::uint32_t>(cell);
        const auto at = static_cast<std::size_t>(stream * cells + cell);
        if (held.is_empty(i)) continue;
        positions[at] = held.pos_get(i);
        for (int s = 0; s < num_sequences_; ++s)
          if (held.seq_has(i, s))
            sequences[at * words + static_cast<std::size_t>(s / 32)] |= static_cast<std::int32_t>(1u << s % 32);
      }
    }
    const auto put = [](ggml_tensor* t, const std::int32_t* values) {
      ggml_backend_tensor_set(t, values, 0, ggml_nbytes(t));
    };
    put(tensors.positions, ubatch->pos), put(tensors.sequences, of.data());
    put(tensors.cell_positions, positions.data()), put(tensors.cell_sequences, sequences.data());
  }

  bool can_reuse(const llm_graph_params& params) override {
    if (const auto* both = dynamic_cast<const llama_kv_cache_iswa_context*>(params.mctx))
      cache_ = windowed ? both->get_swa() : both->get_base();
    else
      cache_ = dynamic_cast<const llama_kv_cache_context*>(params.mctx);
    return cache_ != nullptr && tensors.positions->ne[0] == params.ubatch.n_tokens &&
           tensors.cell_positions->ne[0] == cache_->get_n_kv() &&
           num_streams_ == (params.cparams.kv_unified ? 1 : params.ubatch.n_seqs_unq);
  }

  ggml_attention& add(sinkcache::attention_params params, const sinkcache::cache_config& config) {
    operators_.push_back(std::make_unique<ggml_attention>(std::move(params), config, workspaces_));
    return *operators_.back();
  }

  const bool windowed;
  ggml_cells tensors;

 private:
  void report() noexcept {
    for (const auto& each : operators_)
      if (const sinkcache::status found = each->take_refused(); !found)
        LLAMA_LOG_ERROR("%s (in the last batch)\n", found.c_str());
  }

  const llama_kv_cache_context* cache_;
  std::int64_t num_streams_;
  int num_sequences_;
  std::vector<sinkcache::workspace> workspaces_;
  std::vector<std::unique_ptr<ggml_attention>> operators_;
};

[[noreturn]] void refuse(int il, const char* what) {
  throw std::runtime_error("sinkcache: layer " + std::to_string(il) + " has " + what + "; unset SINKCACHE_CELLS");
}

}  // namespace

ggml_tensor* sinkcache_cells_attention(const llm_graph_context& graph, llm_graph_input_i* inp, ggml_tensor* q,
                                       ggml_tensor* k, ggml_tensor* v, ggml_tensor* kq_b, ggml_tensor* sinks,
                                       ggml_tensor* v_mla, float kq_scale, int il) {
  const char* const asked = std::getenv("SINKCACHE_CELLS");
  if (asked == nullptr || *asked == '\0') return nullptr;
  const bool windowed = graph.hparams.is_swa(static_cast<std::uint32_t>(il));
  const llama_kv_cache_context* cache = nullptr;
  ggml_tensor *k_cells = nullptr, *v_cells = nullptr;
  bool rotated = false;
  if (const auto* one = dynamic_cast<const llm_graph_input_attn_kv*>(inp)) {
    cache = one->mctx, k_cells = one->get_k_idxs(), v_cells = one->get_v_idxs();
    rotated = one->self_k_rot != nullptr || one->self_v_rot != nullptr;
  } else if (const auto* two = dynamic_cast<const llm_graph_input_attn_kv_iswa*>(inp)) {
    cache = windowed ? two->mctx->get_swa() : two->mctx->get_base();
    k_cells = windowed ? two->get_k_idxs_swa() : two->get_k_idxs(),
    v_cells = windowed ? two->get_v_idxs_swa() : two->get_v_idxs();
    rotated = windowed ? two->self_k_rot_swa != nullptr || two->self_v_rot_swa != nullptr
                       : two->self_k_rot != nullptr || two->self_v_rot != nullptr;
  }
  if (cache == nullptr) return nullptr;
  if (kq_b != nullptr || v_mla != nullptr) refuse(il, "a bias for each key, or MLA");
  if (rotated) refuse(il, "cells that went through a Hadamard transform (LLAMA_ATTN_ROT_DISABLE=1 has them plain)");
  if (graph.hparams.use_alibi) refuse(il, "ALiBi");
  if (!graph.cparams.causal_attn || graph.cparams.training) refuse(il, "attention that is not causal, or is trained");
  if (graph.hparams.n_pos_per_embd() > 1) refuse(il, "several positions a token (M-RoPE)");
  if (windowed && graph.hparams.swa_type != LLAMA_SWA_TYPE_STANDARD)
    refuse(il, "a window that is chunked or looks ahead");

  for (ggml_tensor* t : {q, k, v})
    if (t != nullptr) ggml_build_forward_expand(graph.gf, t);
  if (k != nullptr) ggml_build_forward_expand(graph.gf, cache->cpy_k(graph.ctx0, k, k_cells, il));
  if (v != nullptr) ggml_build_forward_expand(graph.gf, cache->cpy_v(graph.ctx0, v, v_cells, il));
  // As ggml_flash_attn_ext takes them: [dim, cells, heads, streams].
  k = ggml_permute(graph.ctx0, cache->get_k(graph.ctx0, il), 0, 2, 1, 3);
  v = cache->get_v(graph.ctx0, il);
  v = v->nb[1] > v->nb[2] ? ggml_permute(graph.ctx0, v, 1, 2, 0, 3) : ggml_permute(graph.ctx0, v, 0, 2, 1, 3);
  const std::int64_t streams = k->ne[3], tokens = q->ne[2] / streams;
  q = ggml_view_4d(graph.ctx0, q, q->ne[0], q->ne[1], tokens, streams, q->nb[1], q->nb[2],
                   q->nb[2] * static_cast<std::size_t>(tokens), 0);
  q = ggml_permute(graph.ctx0, q, 0, 2, 1, 3);

  cells_input* input = nullptr;
  for (const auto& each : graph.res->inputs)
    if (auto* const cells = dynamic_cast<cells_input*>(each.get()); cells != nullptr && cells->windowed == windowed)
      input = cells;
  if (input == nullptr)
    input =
        static_cast<cells_input*>(graph.res->add_input(std::make_unique<cells_input>(graph, cache, windowed, streams)));

  sinkcache::attention_params params{.num_qo_heads = q->ne[2], .sm_scale = kq_scale};
  if (graph.hparams.attn_soft_cap) params.logits_soft_cap = graph.hparams.f_attn_logit_softcapping;
  if (sinks != nullptr) {
    std::vector<float> logits(static_cast<std::size_t>(ggml_nelements(sinks)));
    if (sinks->buffer != nullptr && sinks->data != nullptr)
      ggml_backend_tensor_get(sinks, logits.data(), 0, ggml_nbytes(sinks));
    params.softmax = sinkcache::softmax_variant::sink_logits(logits);
  }
  sinkcache::status found;
  ggml_tensor* const cur =
      input
          ->add(std::move(params), {.window = windowed ? static_cast<sinkcache::index_t>(graph.hparams.n_swa) : 0,
                                    .positions = sinkcache::positions::absolute})
          .build(graph.ctx0, q, k, v, input->tensors, found);
  if (cur == nullptr) throw std::runtime_error(std::string(found.message()) + "; unset SINKCACHE_CELLS");
  return ggml_reshape_2d(graph.ctx0, cur, cur->ne[0] * cur->ne[1], cur->ne[2] * cur->ne[3]);
}
