#include <fmt/format.h>

#include <cmath>
#include <map>
#include <set>
#include <sinkcache/rope_keys.hpp>
#include <utility>

#include "gguf.hpp"
#include "weights.hpp"

namespace loaders {
namespace {

index_t size(const gguf& file, const std::string& key, index_t max) {
  const auto value = file.integer(key, 1, max);
  if (!value) file.refuse(key, fmt::format("a whole number from 1 to {}", max));
  return *value;
}

double number(const gguf& file, const std::string& key, double min, double max) {
  const auto value = file.number(key, min, max);
  if (!value) file.refuse(key, fmt::format("a number from {} to {}", min, max));
  return *value;
}

// What llama.cpp writes for this architecture and this decoder does, or what says nothing about what to compute. Any
// other key is refused: it would silently change the result.
void check_nothing_else_is_asked_for(const gguf& file) {
  const std::set<std::string> known = {"attention.head_count",
                                       "attention.head_count_kv",
                                       "attention.key_length",
                                       "attention.layer_norm_rms_epsilon",
                                       "attention.value_length",
                                       "block_count",
                                       "context_length",
                                       "embedding_length",
                                       "expert_count",
                                       "expert_used_count",
                                       "feed_forward_length",
                                       "tensor_data_layout",
                                       "vocab_size"};
  const std::map<std::string, std::string> why = {
      {"attention.kv_lora_rank", "multi-head latent attention (MLA) caches a latent row, not a key per head"},
      {"attention.key_length_mla", "multi-head latent attention (MLA) caches a latent row, not a key per head"},
      {"attention.sliding_window", "every layer attends to all that its cache holds"}};
  for (const std::string& key : file.keys()) {
    if (!key.starts_with("llama.") || known.contains(key.substr(6))) continue;
    if (key.starts_with("llama.rope.")) continue;  // read_rope knows those
    const auto reason = why.find(key.substr(6));
    file.refuse(
        key, reason == why.end() ? "absent: this decoder does not know what it asks for" : "absent: " + reason->second);
  }
  for (const char* key : {"llama.expert_count", "llama.expert_used_count"})
    if (file.integer(key, 0, 1 << 20).value_or(0) != 0) file.refuse(key, "0: mixtures of experts (MoE) are not done");
  for (const char* key : {"rope_factors_long.weight", "rope_factors_short.weight"})
    if (file.contains(key))
      file.fail(
          fmt::format("tensor {} had to be absent: longrope switches between two sets of frequencies as the "
                      "sequence grows",
                      key));
}

// Before any tensor is looked at: what else there is may be unlike a model in every other way too.
void require_model(const gguf& file) {
  if (file.has("general.type") && file.string("general.type") != "model")
    file.refuse("general.type", "model: an adapter, a projector or a matrix of importance is none by itself");
  if (file.integer("split.count", 0, 1 << 16).value_or(1) > 1)
    file.refuse("split.count", "1: this is one shard of several, which `llama-gguf-split --merge` makes one file of");
  if (file.string("general.architecture") != "llama") file.refuse("general.architecture", "llama");
}

model_config read_config(const gguf& file) {
  if (file.names().empty()) file.fail("holds metadata only, a vocabulary say, had to hold the tensors of a model");
  check_nothing_else_is_asked_for(file);
  model_config c{};
  c.num_hidden_layers = size(file, "llama.block_count", 1024);
  c.hidden_size = size(file, "llama.embedding_length", 1 << 16);
  c.num_attention_heads = size(file, "llama.attention.head_count", 1 << 12);
  c.num_key_value_heads =
      file.integer("llama.attention.head_count_kv", 1, c.num_attention_heads).value_or(c.num_attention_heads);
  if (c.num_attention_heads % c.num_key_value_heads != 0)
    file.refuse("llama.attention.head_count",
                fmt::format("a multiple of llama.attention.head_count_kv, {}", c.num_key_value_heads));
  if (const auto head_dim = file.integer("llama.attention.key_length", 1, max_head_dim)) {
    c.head_dim = *head_dim;
  } else {
    c.head_dim = c.hidden_size / c.num_attention_heads;
    if (c.hidden_size % c.num_attention_heads != 0 || c.head_dim > max_head_dim)
      file.refuse("llama.embedding_length",
                  fmt::format("a head's size (at most {}) times llama.attention.head_count, {}", max_head_dim,
                              c.num_attention_heads));
  }
  if (file.integer("llama.attention.value_length", 1, max_head_dim).value_or(c.head_dim) != c.head_dim)
    file.refuse("llama.attention.value_length", fmt::format("{}, as long as a key", c.head_dim));
  c.intermediate_size = size(file, "llama.feed_forward_length", 1 << 20);
  c.rope_theta = file.number("llama.rope.freq_base", 1, 1e12).value_or(10000);
  c.rms_norm_eps = static_cast<float>(number(file, "llama.attention.layer_norm_rms_epsilon", 0, 1));
  c.attention = attention_kind::softmax;
  c.max_position_embeddings = file.integer("llama.context_length", 1, index_t{1} << 40);
  c.tie_word_embeddings = !file.contains("output.weight");
  // The rows of the embedding; the metadata need not tell.
  constexpr index_t largest_vocab = 1 << 22;
  c.vocab_size = file.contains("token_embd.weight") ? file.shape("token_embd.weight").front()
                                                    : size(file, "llama.vocab_size", largest_vocab);
  if (c.vocab_size > largest_vocab)
    file.fail(fmt::format("tensor token_embd.weight has {} rows, must have at most {}", c.vocab_size, largest_vocab));
  if (file.integer("llama.vocab_size", 1, largest_vocab).value_or(c.vocab_size) != c.vocab_size)
    file.refuse("llama.vocab_size", fmt::format("{}, the rows of token_embd.weight", c.vocab_size));
  if (file.flag("tokenizer.ggml.add_bos_token").value_or(false))
    if (const auto bos = file.integer("tokenizer.ggml.bos_token_id", 0, c.vocab_size - 1))
      c.bos_token_id = static_cast<int>(*bos);
  return c;
}

// llama.cpp rotates neighbouring dimensions of this architecture, and its converter has reordered the rows of q and k
// to suit: the other pairing than in Hugging Face's file of the same model.
sinkcache::rope read_rope(const gguf& file, const model_config& c) {
  sinkcache::model_keys keys;
  for (const std::string& key : file.keys())
    if (key == "general.architecture" || key == "llama.context_length" || key.starts_with("llama.rope."))
      keys[key] = file.text(key);
  std::vector<float> rope_freqs;
  if (file.contains("rope_freqs.weight")) {
    rope_freqs = file.read("rope_freqs.weight").values;
    if (file.shape("rope_freqs.weight").size() != 1 || rope_freqs.empty())
      file.fail("tensor rope_freqs.weight had to be a row of numbers");
  }
  sinkcache::status found;
  const auto rope = sinkcache::try_rope_of_gguf(keys, c.head_dim, rope_freqs, found);
  if (!rope) fail_rope(file.path(), found);
  return *rope;
}

class gguf_weights final : public weights {
 public:
  explicit gguf_weights(const std::string& path) : file_(gguf::load(path, require_model)) {
    config = read_config(file_);
    rope = read_rope(file_, config);
  }

  std::string own_name(const std::string& name) const override {
    static const std::map<std::string, std::string> in_layer = {
        {"input_layernorm", "attn_norm"}, {"self_attn.q_proj", "attn_q"},      {"self_attn.k_proj", "attn_k"},
        {"self_attn.v_proj", "attn_v"},   {"self_attn.o_proj", "attn_output"}, {"post_attention_layernorm", "ffn_norm"},
        {"mlp.gate_proj", "ffn_gate"},    {"mlp.up_proj", "ffn_up"},           {"mlp.down_proj", "ffn_down"}};
    if (name == "model.embed_tokens.weight") return "token_embd.weight";
    if (name == "model.norm.weight") return "output_norm.weight";
    if (name == "lm_head.weight") return "output.weight";
    // model.layers.N.PART.weight
    const std::size_t layer = std::string("model.layers.").size(), part = name.find('.', layer) + 1,
                      end = name.rfind(".weight");
    return "blk." + name.substr(layer, part - layer) + in_layer.at(name.substr(part, end - part)) + ".weight";
  }
  // rope_freqs is read with the metadata.
  std::vector<std::string> own_names() const override {
    std::vector<std::string> names = file_.names();
    std::erase(names, "rope_freqs.weight");
    return names;
  }
  bool contains(const std::string& name) const override { return file_.contains(name); }
  const std::vector<std::int64_t>& shape(const std::string& name) const override { return file_.shape(name); }
  tensor read(const std::string& name) const override { return file_.read(name); }
  std::optional<coded_tensor> read_coded(const std::string& name) const override {
    if (!file_.is_coded(name)) return {};
    return file_.read_coded(name);
  }

 private:
  gguf file_;
};

}  // namespace

std::unique_ptr<weights> open_gguf_weights(const std::string& path) { return std::make_unique<gguf_weights>(path); }

}  // namespace loaders
