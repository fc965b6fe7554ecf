// llama.cpp's memory and attention by this library: docs/llama-cpp.md says where each part goes and why.

#include "sinkcache_llama.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <sinkcache/named_caches.hpp>
#include <sinkcache/sinkcache.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ggml/ggml_caches.hpp"
#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

namespace {

using sinkcache::index_t;

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error("sinkcache: " + what); }

index_t number_of(const char* variable, index_t otherwise) {
  const char* const text = std::getenv(variable);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (*end != '\0' || value < 0) refuse(std::string(variable) + " was '" + text + "', had to be a number, at least 0");
  return static_cast<index_t>(value);
}

std::string text_of(const char* variable, const char* otherwise) {
  const char* const text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? otherwise : text;
}

// What the environment says.
struct options {
  index_t sink_tokens = number_of("SINKCACHE_SINK_TOKENS", 4), window = number_of("SINKCACHE_WINDOW", 0),
          rollback = number_of("SINKCACHE_ROLLBACK", 64);  // as many as ngram-mod drafts
  std::string policy = text_of("SINKCACHE_POLICY", "sinks"), positions = text_of("SINKCACHE_POSITIONS", "in_cache"),
              format = text_of("SINKCACHE_FORMAT", "");
};

using formats = sinkcache::format_list<sinkcache::f32, sinkcache::f16, sinkcache::bf16, sinkcache::q8, sinkcache::q4>;

// This library's format of as many bits.
std::string format_of(ggml_type type) {
  return type == GGML_TYPE_Q8_0 ? "q8" : type == GGML_TYPE_Q4_0 ? "q4" : ggml_type_name(type);
}

// What a status says, without the library's name.
std::string words(const sinkcache::status& found) { return std::string(found.message().substr(11)); }

// The ROPE node that rows went through on their way from the projection; null: none. What stands between is either the
// same in every direction, or refused: a rotation has to commute with it.
ggml_tensor* rope_before(ggml_tensor* rows, const char* name, int il) {
  bool commutes = true;
  for (ggml_tensor* t = rows; t != nullptr; t = t->src[0]) switch (t->op) {
      case GGML_OP_ROPE:
        if (!commutes) refuse(std::string(name) + " of layer " + std::to_string(il) + " are changed after their rope");
        return t;
      case GGML_OP_MUL_MAT:
      case GGML_OP_NONE:
        return nullptr;
      case GGML_OP_VIEW:
      case GGML_OP_RESHAPE:
      case GGML_OP_PERMUTE:
      case GGML_OP_CONT:
      case GGML_OP_CPY:
      case GGML_OP_SCALE:
      case GGML_OP_RMS_NORM:
      case GGML_OP_L2_NORM:
        break;
      default:
        commutes = false;
    }
  return nullptr;
}

float float_of(const ggml_tensor* rope, int i) {
  float value = 0;
  std::memcpy(&value, rope->op_params + i, sizeof value);
  return value;
}

std::vector<float> floats_of(const ggml_tensor* t) {
  std::vector<float> values(t == nullptr ? 0 : static_cast<std::size_t>(ggml_nelements(t)));
  if (t == nullptr) return values;
  if (t->type != GGML_TYPE_F32)
    refuse(std::string(t->name) + " was of type " + ggml_type_name(t->type) + ", had to be f32");
  // Absent in a context that is only measured.
  if (t->buffer != nullptr && t->data != nullptr) ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
  return values;
}

// What the node rotates by, without its factor on lengths: that stays in the graph, at position 0.
sinkcache::rope rope_of(const ggml_tensor* node, int il) {
  if (node == nullptr) return sinkcache::rope::none();
  const int width = node->op_params[1], mode = node->op_params[2], context = node->op_params[4];
  if (mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX)
    refuse("the rope of layer " + std::to_string(il) + " has several positions a token (M-RoPE), had to have one");
  if (node->op_params[15] != 0) refuse("the rope of layer " + std::to_string(il) + " leaves out the first dimensions");
  const double base = float_of(node, 5), scale = float_of(node, 6), extrapolated = float_of(node, 7);
  float ramp[2] = {0, 0};
  if (extrapolated != 0)
    ggml_rope_yarn_corr_dims(width, context, float_of(node, 5), float_of(node, 9), float_of(node, 10), ramp);
  const std::vector<float> factors = floats_of(node->src[2]);
  std::vector<float> inv_freq;
  for (int i = 0; i < width / 2; ++i) {
    const double factor = factors.empty() || factors[static_cast<std::size_t>(i)] == 0
                              ? 1
                              : static_cast<double>(factors[static_cast<std::size_t>(i)]);
    const double plain = std::pow(base, -2.0 * i / width) / factor;
    const double y = (i - static_cast<double>(ramp[0])) / std::max(0.001, static_cast<double>(ramp[1] - ramp[0]));
    const double mix = extrapolated * (1 - std::clamp(y, 0.0, 1.0));
    inv_freq.push_back(static_cast<float>(plain * (scale * (1 - mix) + mix)));
  }
  return sinkcache::rope(inv_freq, mode == GGML_ROPE_TYPE_NORMAL ? sinkcache::rope_pairing::interleaved
                                                                 : sinkcache::rope_pairing::half_split);
}

struct layer {
  std::unique_ptr<ggml_caches> caches;
  sinkcache::named_cache kind;
  std::vector<std::int32_t> rope_params;  // of the node that the layer was made for
};

class sinkcache_context;

// Where llama.cpp keeps cells: caches of every layer and sequence.
class sinkcache_memory_impl final : public llama_memory_i {
 public:
  sinkcache_memory_impl(const llama_model& model, const llama_memory_params& params, const llama_cparams& cparams)
      : hparams_(model.hparams),
        team_(std::max<index_t>({1, cparams.n_threads, cparams.n_threads_batch})),
        workspace_(team_),
        longest_window_(params.swa_full ? 0 : llama_model_n_swa(&model)),
        layers_(static_cast<std::size_t>(hparams_.n_layer_all)),
        sequences_(cparams.n_seq_max) {
    const auto only = [](bool served, const char* what) {
      if (!served)
        refuse(std::string("this memory does not serve ") + what + "; leave out SINKCACHE_WINDOW (--sink-window)");
    };
    only(model.arch != LLM_ARCH_GROK, "Grok's scaled logits");
    only(model.arch != LLM_ARCH_T5 && hparams_.n_rel_attn_bkts == 0, "relative attention biases");
    only(model.arch != LLM_ARCH_GEMMA3N && model.arch != LLM_ARCH_GEMMA4, "layers that share another's keys");
    only(model.arch != LLM_ARCH_GEMMA4_ASSISTANT && model.arch != LLM_ARCH_DFLASH, "draft models over another's cache");
    only(!hparams_.is_mla(), "MLA");
    only(!hparams_.use_alibi, "ALiBi");
    only(hparams_.causal_attn && cparams.causal_attn, "attention that is not causal");
    only(hparams_.n_pos_per_embd() == 1, "several positions a token (M-RoPE)");
    only(hparams_.swa_type == LLAMA_SWA_TYPE_NONE || hparams_.swa_type == LLAMA_SWA_TYPE_STANDARD,
         "windows that are chunked or look ahead");
    only(!cparams.training, "training");
    only(params.ctx_type == LLAMA_CONTEXT_TYPE_DEFAULT, "contexts for drafts");
    if (options_.positions != "in_cache" && options_.positions != "absolute")
      refuse("SINKCACHE_POSITIONS was '" + options_.positions + "', had to be in_cache or absolute");
    k_format_ = options_.format.empty() ? format_of(params.type_k) : options_.format;
    v_format_ = options_.format.empty() ? format_of(params.type_v) : options_.format;
    LLAMA_LOG_INFO("sinkcache: %td + %td tokens, policy %s, %s and %s, positions %s\n", options_.sink_tokens,
                   options_.window, options_.policy.c_str(), k_format_.c_str(), v_format_.c_str(),
                   options_.positions.c_str());
  }

  // The layer, made when its first graph is built.
  ggml_caches& layer_of(int il, const ggml_tensor* q, const ggml_tensor* k, const ggml_tensor* v, ggml_tensor* q_rope,
                        ggml_tensor* k_rope, ggml_tensor* sinks, float scale) {
    layer& of = layers_.at(static_cast<std::size_t>(il));
    const auto parameters = [](const ggml_tensor* rope) {
      return rope == nullptr ? std::vector<std::int32_t>() : std::vector(rope->op_params, rope->op_params + 16);
    };
    if (parameters(q_rope) != parameters(k_rope))
      refuse("queries and keys of layer " + std::to_string(il) + " differ in their rope");
    if (of.caches != nullptr) {
      if (of.rope_params != parameters(k_rope)) refuse("the rope of layer " + std::to_string(il) + " changed");
      return *of.caches;
    }
    const bool sliding = hparams_.is_swa(static_cast<std::uint32_t>(il));
    sinkcache::cache_config config{.num_kv_heads = k->ne[1], .head_dim = k->ne[0], .v_head_dim = v->ne[0]};
    config.window = options_.window, config.num_sink_tokens = options_.sink_tokens;
    config.rollback = options_.rollback, config.rope = rope_of(k_rope, il);
    if (options_.positions == "absolute") config.positions = sinkcache::positions::absolute;
    // A layer with a window of its own keeps that: its keys beyond it were never seen.
    if (sliding) config.window = hparams_.n_swa, config.num_sink_tokens = 0;
    sinkcache::attention_params params{.num_qo_heads = q->ne[1], .sm_scale = scale};
    if (hparams_.attn_soft_cap) params.logits_soft_cap = hparams_.f_attn_logit_softcapping;
    if (sinks != nullptr) params.softmax = sinkcache::softmax_variant::sink_logits(floats_of(sinks));
    of.kind = {sliding ? "sinks" : options_.policy, k_format_, v_format_, config, q->ne[1]};
    sinkcache::status found;
    if (sinkcache::try_make_cache<formats>(of.kind, found) == nullptr)
      refuse("layer " + std::to_string(il) + ": " + words(found));
    of.rope_params = parameters(k_rope);
    of.caches = std::make_unique<ggml_caches>(std::move(params), team_, workspace_);
    return *of.caches;
  }

  llama_memory_context_ptr init_batch(llama_batch_allocr& balloc, std::uint32_t n_ubatch, bool) override;
  llama_memory_context_ptr init_full() override;
  llama_memory_context_ptr init_update(llama_context*, bool) override;

  // Before a graph is computed: tokens follow those that their sequences have, and there are caches for them.
  bool prepare(const std::vector<llama_ubatch>& ubatches) {
    for (layer& of : layers_)
      if (of.caches != nullptr)
        if (const sinkcache::status found = of.caches->take_refused(); !found)
          LLAMA_LOG_ERROR("%s (in the last batch)\n", found.c_str());
    std::vector<llama_pos> next(sequences_.size());
    for (std::size_t s = 0; s < next.size(); ++s) next[s] = sequences_[s].next;
    for (const llama_ubatch& ubatch : ubatches)
      for (std::uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (ubatch.n_seq_id[i] != 1) return failed("a token was of %d sequences, had to be of one", ubatch.n_seq_id[i]);
        const auto s = static_cast<std::size_t>(ubatch.seq_id[i][0]);
        if (s >= sequences_.size()) return failed("a token's sequence was %d, had to be below n_seq_max", int(s));
        if (!sequences_[s].broken.empty()) return failed(("sequence %d: " + sequences_[s].broken).c_str(), int(s));
        if (next[s] < 0) {
          if (!add(static_cast<llama_seq_id>(s), ubatch.pos[i])) return false;
          next[s] = ubatch.pos[i];
        }
        if (ubatch.pos[i] != next[s])
          return failed("a token's position was %d, had to follow its sequence's last", ubatch.pos[i]);
        ++next[s];
      }
    return true;
  }

  void apply(const llama_ubatch& ubatch) {
    for (std::uint32_t i = 0; i < ubatch.n_tokens; ++i)
      sequences_[static_cast<std::size_t>(ubatch.seq_id[i][0])].next = ubatch.pos[i] + 1;
  }

  // Keys are rotated as they are read, so nothing would have to be shifted, but tokens cannot be taken from the middle.
  bool get_can_shift() const override { return false; }

  void clear(bool) override {
    for (std::size_t s = 0; s < sequences_.size(); ++s) forget(static_cast<llama_seq_id>(s));
  }

  bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override {
    if (seq_id < 0) {
      bool all = true;
      for (std::size_t s = 0; s < sequences_.size(); ++s) all &= seq_rm(static_cast<llama_seq_id>(s), p0, p1);
      return all;
    }
    sequence& of = sequences_.at(static_cast<std::size_t>(seq_id));
    p0 = std::max(p0, of.first);
    if (of.next < 0 || p0 >= of.next || (p1 >= 0 && p1 <= p0)) return true;  // it has none of them
    if (p1 >= 0 && p1 < of.next) {
      LLAMA_LOG_ERROR(
          "sinkcache: positions %d to %d of sequence %d lie before its end, %d: only its newest tokens can be "
          "removed\n",
          p0, p1 - 1, seq_id, of.next);
      return false;
    }
    if (p0 == of.first) return forget(seq_id), true;
    const index_t seen = p0 - of.first;
    for (const layer& l : layers_)
      if (const auto* cache = l.caches ? l.caches->get(seq_id) : nullptr;
          cache != nullptr && cache->seen() > seen && seen < cache->min_truncate()) {
        LLAMA_LOG_WARN("sinkcache: sequence %d cannot go back to %d: what was seen then is evicted\n", seq_id, p0);
        LLAMA_LOG_WARN("sinkcache: SINKCACHE_ROLLBACK, how many tokens it can go back, was %td\n", options_.rollback);
        return false;
      }
    for (const layer& l : layers_)
      if (auto* cache = l.caches ? l.caches->get(seq_id) : nullptr; cache != nullptr && cache->seen() > seen)
        if (const sinkcache::status found = cache->try_truncate(seen); !found) of.broken = found.message();
    of.next = p0;
    return true;
  }

  void seq_cp(llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1) override {
    if (from == to) return;
    forget(to);
    const sequence& source = sequences_.at(static_cast<std::size_t>(from));
    sequence& target = sequences_.at(static_cast<std::size_t>(to));
    if (source.next < 0) return;
    if (p0 > source.first) {
      target.broken = "was copied from the middle of another, had to be from its start";
      return;
    }
    for (layer& l : layers_)
      if (const auto* cache = l.caches ? l.caches->get(from) : nullptr; cache != nullptr) {
        sinkcache::status found;
        l.caches->set(to, cache->try_clone_any(found), source.first);
        if (!found) target.broken = found.message();
      }
    target.first = source.first, target.next = source.next;
    if (p1 >= 0 && p1 < target.next && !seq_rm(to, p1, -1))
      target.broken = "was copied up to where the other cannot go back";
  }

  void seq_keep(llama_seq_id seq_id) override {
    for (std::size_t s = 0; s < sequences_.size(); ++s)
      if (static_cast<llama_seq_id>(s) != seq_id) forget(static_cast<llama_seq_id>(s));
  }

  // Callers ask get_can_shift() first. One that does not gets an error at its next batch.
  void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override {
    sequence& of = sequences_.at(static_cast<std::size_t>(seq_id));
    if (shift != 0 && of.next >= 0 && p0 < of.next && (p1 < 0 || p1 > p0))
      of.broken = "its positions were shifted, which this memory does not do";
  }
  void seq_div(llama_seq_id seq_id, llama_pos, llama_pos, int d) override {
    sequence& of = sequences_.at(static_cast<std::size_t>(seq_id));
    if (d != 1 && of.next >= 0) of.broken = "its positions were divided, which this memory does not do";
  }

  // Callers take it for the oldest position that is held, and go back as far as a window of the model's lies after it.
  llama_pos seq_pos_min(llama_seq_id seq_id) const override {
    const sequence& of = sequences_.at(static_cast<std::size_t>(seq_id));
    if (of.next < 0) return -1;
    index_t least = 0;
    for (const layer& l : layers_)
      if (const auto* cache = l.caches ? l.caches->get(seq_id) : nullptr; cache != nullptr)
        least = std::max<index_t>(least, cache->min_truncate());
    return static_cast<llama_pos>(of.first + std::max<index_t>(0, least - 1 - longest_window_));
  }
  llama_pos seq_pos_max(llama_seq_id seq_id) const override {
    return std::max(-1, sequences_.at(static_cast<std::size_t>(seq_id)).next - 1);
  }

  std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override {
    std::size_t bytes = 0;
    for (const layer& l : layers_)
      for (std::size_t s = 0; s < sequences_.size(); ++s)
        if (const auto* cache = l.caches ? l.caches->get(static_cast<llama_seq_id>(s)) : nullptr; cache != nullptr)
          bytes += cache->nbytes();
    return {{ggml_backend_cpu_buffer_type(), bytes}};
  }

  // The state of one sequence is a word that cannot be read again: of no bytes llama-server would think that it had.
  void state_write(llama_io_write_i& io, llama_seq_id seq_id, llama_state_seq_flags) const override {
    if (seq_id < 0) refuse("caches cannot be saved");
    LLAMA_LOG_WARN("sinkcache: caches cannot be saved: the state of sequence %d will not load\n", seq_id);
    const std::uint32_t nothing = 0;
    io.write(&nothing, sizeof nothing);
  }
  void state_read(llama_io_read_i&, llama_seq_id, llama_state_seq_flags) override {
    refuse("caches cannot be saved, so there is none to load");
  }

 private:
  struct sequence {
    llama_pos first = 0, next = -1;  // below 0: it has no tokens
    std::string broken;              // why no more can come
  };

  static bool failed(const char* what, int value) {
    LLAMA_LOG_ERROR((std::string("sinkcache: ") + what + "\n").c_str(), value);
    return false;
  }

  // Caches for a sequence whose first token is at `first`; those that it had are used again.
  bool add(llama_seq_id seq_id, llama_pos first) {
    for (layer& l : layers_) {
      if (l.caches == nullptr) continue;
      sinkcache::status found;
      std::unique_ptr<sinkcache::any_kv_cache> cache = l.caches->take(seq_id);
      if (cache == nullptr) cache = sinkcache::try_make_cache<formats>(l.kind, found);
      if (cache == nullptr) return failed((std::string(found.message()) + " (sequence %d)").c_str(), seq_id);
      cache->clear();
      l.caches->set(seq_id, std::move(cache), first);
    }
    sequences_[static_cast<std::size_t>(seq_id)].first = first;
    return true;
  }
  void forget(llama_seq_id seq_id) {
    sequences_.at(static_cast<std::size_t>(seq_id)) = {};
    for (layer& l : layers_)
      if (auto* cache = l.caches ? l.caches->get(seq_id) : nullptr; cache != nullptr) cache->clear();
  }

  const options options_;
  const llama_hparams& hparams_;
  std::string k_format_, v_format_;
  ggml_team team_;
  sinkcache::workspace workspace_;
  index_t longest_window_;  // of the model's layers, as callers count it
  std::vector<layer> layers_;
  std::vector<sequence> sequences_;
};

class sinkcache_context final : public llama_memory_context_i {
 public:
  sinkcache_context(sinkcache_memory_impl* memory, llama_memory_status status) : memory(memory), status_(status) {}
  sinkcache_context(sinkcache_memory_impl* memory, std::vector<llama_ubatch> ubatches)
      : memory(memory), status_(LLAMA_MEMORY_STATUS_SUCCESS), ubatches_(std::move(ubatches)) {}

  bool next() override { return ++current_ < ubatches_.size(); }
  bool apply() override {
    if (!ubatches_.empty()) memory->apply(ubatches_[current_]);
    return true;
  }
  const llama_ubatch& get_ubatch() const override { return ubatches_[current_]; }
  llama_memory_status get_status() const override { return status_; }

  sinkcache_memory_impl* const memory;

 private:
  llama_memory_status status_;
  std::vector<llama_ubatch> ubatches_;
  std::size_t current_ = 0;
};

llama_memory_context_ptr sinkcache_memory_impl::init_batch(llama_batch_allocr& balloc, std::uint32_t n_ubatch, bool) {
  balloc.split_reset();
  std::vector<llama_ubatch> ubatches;
  for (;;) {
    llama_ubatch ubatch = balloc.split_simple(n_ubatch);
    if (ubatch.n_tokens == 0) break;
    ubatches.push_back(std::move(ubatch));
  }
  if (balloc.get_n_used() < balloc.get_n_tokens() || !prepare(ubatches))
    return std::make_unique<sinkcache_context>(this, LLAMA_MEMORY_STATUS_FAILED_PREPARE);
  return std::make_unique<sinkcache_context>(this, std::move(ubatches));
}
llama_memory_context_ptr sinkcache_memory_impl::init_full() {
  return std::make_unique<sinkcache_context>(this, LLAMA_MEMORY_STATUS_SUCCESS);
}
llama_memory_context_ptr sinkcache_memory_impl::init_update(llama_context*, bool) {
  return std::make_unique<sinkcache_context>(this, LLAMA_MEMORY_STATUS_NO_UPDATE);
}

// The tokens' positions and sequences, and zeros: the position at which the graph's own ropes leave keys as they are.
struct token_tensors {
  ggml_tensor *positions = nullptr, *sequences = nullptr, *origin = nullptr;

  explicit token_tensors(const llm_graph_context& graph) {
    for (ggml_tensor** t : {&positions, &sequences, &origin}) {
      *t = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I32, graph.n_tokens);
      ggml_set_input(*t);
    }
  }
  virtual ~token_tensors() = default;

  void set(const llama_ubatch& ubatch) const {
    std::vector<std::int32_t> of(ubatch.n_tokens);
    for (std::uint32_t i = 0; i < ubatch.n_tokens; ++i) of[i] = ubatch.seq_id[i][0];
    const std::vector<std::int32_t> zeros(ubatch.n_tokens);
    put(positions, ubatch.pos), put(sequences, of.data()), put(origin, zeros.data());
  }
  static void put(ggml_tensor* t, const std::int32_t* values) {
    if (t->buffer != nullptr) ggml_backend_tensor_set(t, values, 0, ggml_nbytes(t));
  }
};

template <class Input>
struct sinkcache_graph_input final : Input, token_tensors {
  explicit sinkcache_graph_input(const llm_graph_context& graph)
      : Input(graph.hparams, graph.cparams, nullptr), token_tensors(graph) {}
  void set_input(const llama_ubatch* ubatch) override { set(*ubatch); }
  bool can_reuse(const llm_graph_params& params) override { return positions->ne[0] == params.ubatch.n_tokens; }
};

ggml_tensor* append_and_attend(const llm_graph_context& graph, sinkcache_memory_impl& memory,
                               const token_tensors& input, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                               ggml_tensor* kq_b, ggml_tensor* sinks, ggml_tensor* v_mla, float kq_scale, int il) {
  if (k == nullptr || v == nullptr)
    refuse("layer " + std::to_string(il) + " shares another's keys, had to have its own");
  if (kq_b != nullptr || v_mla != nullptr) refuse("layer " + std::to_string(il) + " has a bias for each key, or MLA");
  ggml_tensor *const q_rope = rope_before(q, "queries", il), *const k_rope = rope_before(k, "keys", il);
  ggml_caches& layer = memory.layer_of(il, q, k, v, q_rope, k_rope, sinks, kq_scale);
  for (ggml_tensor* rope : {q_rope, k_rope})
    if (rope != nullptr) {
      ggml_build_forward_expand(graph.gf, rope->src[1]);  // inp_pos is still filled in
      rope->src[1] = input.origin;
    }
  ggml_build_forward_expand(graph.gf, input.origin);
  for (ggml_tensor** t : {&q, &k, &v}) {
    if ((*t)->nb[1] != (*t)->nb[0] * static_cast<std::size_t>((*t)->ne[0])) *t = ggml_cont(graph.ctx0, *t);
    ggml_build_forward_expand(graph.gf, *t);
  }
  sinkcache::status found;
  ggml_tensor* const cur = layer.build(graph.ctx0, q, k, v, input.positions, input.sequences, found);
  if (cur == nullptr) refuse("layer " + std::to_string(il) + ": " + words(found));
  return ggml_reshape_2d(graph.ctx0, cur, cur->ne[0] * cur->ne[1], cur->ne[2]);
}

}  // namespace

llama_memory_i* sinkcache_memory(const llama_model& model, const llama_memory_params& params,
                                 const llama_cparams& cparams) {
  const auto given = [](const char* variable) { return !text_of(variable, "").empty(); };
  if (given("SINKCACHE_WINDOW")) {
    if (given("SINKCACHE_CELLS")) refuse("SINKCACHE_WINDOW and SINKCACHE_CELLS were both set, had to be one of them");
    return new sinkcache_memory_impl(model, params, cparams);
  }
  for (const char* const variable : {"SINKCACHE_SINK_TOKENS", "SINKCACHE_POLICY"})
    if (given(variable)) refuse(std::string(variable) + " was set without SINKCACHE_WINDOW (--sink-window)");
  return nullptr;
}

template <class Input>
Input* sinkcache_input(const llm_graph_context& graph) {
  if (dynamic_cast<const sinkcache_context*>(graph.mctx) == nullptr) return nullptr;
  return static_cast<Input*>(graph.res->add_input(std::make_unique<sinkcache_graph_input<Input>>(graph)));
}
template llm_graph_input_attn_kv* sinkcache_input(const llm_graph_context&);
template llm_graph_input_attn_kv_iswa* sinkcache_input(const llm_graph_context&);

ggml_tensor* sinkcache_attention(const llm_graph_context& graph, llm_graph_input_i* inp, ggml_tensor* wo,
                                 ggml_tensor* wo_b, ggml_tensor* wo_s, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                                 ggml_tensor* kq_b, ggml_tensor* sinks, ggml_tensor* v_mla, float kq_scale, int il) {
  const auto* const context = dynamic_cast<const sinkcache_context*>(graph.mctx);
  ggml_tensor* cur = context != nullptr
                         ? append_and_attend(graph, *context->memory, dynamic_cast<const token_tensors&>(*inp), q, k, v,
                                             kq_b, sinks, v_mla, kq_scale, il)
                         : sinkcache_cells_attention(graph, inp, q, k, v, kq_b, sinks, v_mla, kq_scale, il);
  if (cur == nullptr) return nullptr;
  ggml_build_forward_expand(graph.gf, cur);
  graph.cb(cur, "kqv_out", il);
  if (wo != nullptr) cur = graph.build_lora_mm(wo, cur, wo_s);
  if (wo_b != nullptr) cur = ggml_add(graph.ctx0, cur, wo_b);
  return cur;
}
