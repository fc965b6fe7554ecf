#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <sinkcache/rope_keys.hpp>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "json.hpp"
#include "numbers.hpp"
#include "safetensors.hpp"
#include "weights.hpp"

namespace loaders {
namespace {

std::string joined(const std::vector<std::string>& parts, const char* between) {
  std::string all;
  for (const std::string& part : parts) all += (all.empty() ? "" : between) + part;
  return all;
}

bool is_known(const std::string& key);

// The file's metadata, strings all of them, as what they stand for.
class metadata_reader {
 public:
  metadata_reader(const std::string& path, const std::map<std::string, std::string>& metadata)
      : path_(path), metadata_(metadata) {}

  const std::string& path() const { return path_; }

  const std::string* find(const std::string& key) const {
    const auto it = metadata_.find(key);
    return it == metadata_.end() ? nullptr : &it->second;
  }

  std::optional<index_t> optional_size(const std::string& key, index_t min, index_t max) const {
    const std::string* text = find(key);
    if (!text) return {};
    const std::optional<index_t> value = whole_number(*text, min, max);
    if (!value) refuse(key, *text, fmt::format("a whole number from {} to {}", min, max));
    return value;
  }

  index_t size(const std::string& key, index_t max) const {
    required(key);
    return *optional_size(key, 1, max);
  }

  double number(const std::string& key, double min, double max) const {
    const std::string& text = required(key);
    const std::optional<double> value = decimal_number(text, min, max);
    if (!value) refuse(key, text, fmt::format("a number from {} to {}", min, max));
    return *value;
  }

  // The place of the value among `allowed`; 0 where the key is missing.
  std::size_t one_of(const std::string& key, const std::vector<std::string>& allowed) const {
    const std::string* text = find(key);
    if (!text) return 0;
    const auto it = std::find(allowed.begin(), allowed.end(), *text);
    if (it == allowed.end()) refuse(key, *text, joined(allowed, " or "));
    return static_cast<std::size_t>(it - allowed.begin());
  }

  void refuse_unknown() const {
    for (const auto& [key, text] : metadata_)
      if (!is_known(key)) refuse(key, text, "absent: this decoder does not know what it asks for");
  }

  [[noreturn]] void refuse(const std::string& key, std::string_view text, const std::string& had_to_be) const {
    fail(path_, fmt::format("metadata: {} is {}, had to be {}", printable(key), quote(text), had_to_be));
  }

 private:
  const std::string& required(const std::string& key) const {
    const std::string* text = find(key);
    if (!text) fail(path_, fmt::format("metadata: {} is missing", key));
    return *text;
  }

  const std::string& path_;
  const std::map<std::string, std::string>& metadata_;
};

// Keys that are read below, and those that say nothing about what to compute. Any other is refused: it might change the
// result.
bool is_known(const std::string& key) {
  static const std::set<std::string, std::less<>> known = {
      "attention", "bos_token_id", "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings",
      "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "partial_rotary_factor", "rms_norm_eps",
      "rope_parameters", "rope_scaling", "rope_style", "rope_theta", "rotary_pct", "tie_word_embeddings", "vocab_size",
      // checked by check_nothing_else_is_asked_for
      "architectures", "attention_bias", "attention_multiplier", "attn_logit_softcapping", "embedding_multiplier",
      "embscale", "final_logit_softcapping", "hidden_act", "hidden_activation", "kv_lora_rank", "layer_types",
      "logits_scaling", "mlp_bias", "model_type", "no_rope_layer_interval", "no_rope_layers", "qk_rope_head_dim",
      "query_pre_attn_scalar", "residual_multiplier", "rope_interleaved", "rope_local_base_freq", "sliding_window",
      "tokenizer", "use_dynamic_ntk", "use_sliding_window",
      // training, text and file
      "_name_or_path", "attention_dropout", "dtype", "eos_token_id", "format", "initializer_range", "is_llama_config",
      "max_window_layers", "pad_token_id", "pretraining_tp", "torch_dtype", "train_args", "train_step",
      "transformers_version", "unk_token_id", "use_cache"};
  return known.contains(key);
}

// Keys that change what a model computes, with what this decoder computes, which is what a missing key means too.
void check_nothing_else_is_asked_for(const metadata_reader& metadata) {
  metadata.one_of("model_type", {"llama", "tiny-llama-sink"});  // the second: examples/models
  metadata.one_of("architectures", {R"(["LlamaForCausalLM"])", "LlamaForCausalLM"});
  metadata.refuse_unknown();
  for (const char* key : {"hidden_act", "hidden_activation"}) metadata.one_of(key, {"silu", "null", "None"});
  metadata.one_of("tokenizer", {"byte"});
  for (const char* key : {"attention_bias", "mlp_bias", "use_dynamic_ntk", "rope_interleaved"})
    metadata.one_of(key, {"false", "False", "null", "None"});
  // Qwen2's configurations name a window that they do not use.
  const std::string* const uses_window = metadata.find("use_sliding_window");
  if (metadata.one_of("use_sliding_window", {"false", "False", "true", "True"}) >= 2 || !uses_window)
    metadata.one_of("sliding_window", {"null", "None"});
  for (const char* key :
       {"rope_local_base_freq", "attention_multiplier", "query_pre_attn_scalar", "attn_logit_softcapping",
        "final_logit_softcapping", "no_rope_layers", "no_rope_layer_interval", "layer_types"})
    metadata.one_of(key, {"null", "None"});
  for (const char* key : {"embscale", "embedding_multiplier", "residual_multiplier", "logits_scaling"})
    metadata.one_of(key, {"1.0", "1"});
  for (const char* key : {"kv_lora_rank", "qk_rope_head_dim"})
    if (const std::string* text = metadata.find(key); text && *text != "null" && *text != "None")
      metadata.refuse(
          key, *text,
          "null: multi-head latent attention (MLA) caches a latent row and a rotary key that all heads share, "
          "not a key per head");
}

// What a file says of rope, as the library reads it: rope_parameters or, before transformers 5, rope_scaling are
// objects.
sinkcache::model_keys rope_keys(const metadata_reader& metadata) {
  sinkcache::model_keys keys;
  for (const char* key : {"rope_theta", "partial_rotary_factor", "rotary_pct", "max_position_embeddings"})
    if (const std::string* text = metadata.find(key)) keys[key] = *text;
  std::string object;
  for (const std::string key : {"rope_parameters", "rope_scaling"}) {
    const std::string* text = metadata.find(key);
    if (!text || *text == "null" || *text == "None") continue;
    if (!object.empty()) metadata.refuse(key, *text, fmt::format("null beside {}", object));
    object = key;
    nlohmann::json parsed;
    try {
      parsed = parse_json(*text);
    } catch (const std::runtime_error& error) {
      metadata.refuse(key, *text, fmt::format("null or a JSON object, is {}", error.what()));
    }
    if (!parsed.is_object()) metadata.refuse(key, *text, "null or a JSON object");
    for (const auto& [name, value] : parsed.items()) {
      if (value.is_object())
        metadata.refuse("a key of " + key, name, "one that its type has: ropes that differ by layer are not done");
      keys[key + "." + name] = value.dump();
    }
  }
  return keys;
}

double read_rope_theta(const metadata_reader& metadata) {
  const sinkcache::model_keys keys = rope_keys(metadata);
  const auto within = keys.find("rope_parameters.rope_theta");
  if (metadata.find("rope_theta") || within == keys.end()) return metadata.number("rope_theta", 1, 1e12);
  const std::optional<double> theta = decimal_number(within->second, 1, 1e12);
  if (!theta) metadata.refuse(within->first, within->second, "a number from 1 to 1e12");
  return *theta;
}

sinkcache::rope read_rope(const metadata_reader& metadata, const model_config& c) {
  sinkcache::status found;
  const auto pairing = static_cast<sinkcache::rope_pairing>(metadata.one_of("rope_style", {"neox", "interleaved"}));
  const auto rope = sinkcache::try_rope_of_config(rope_keys(metadata), c.head_dim, found, pairing);
  if (!rope) fail_rope(metadata.path(), found);
  return *rope;
}

model_config read_config(const metadata_reader& metadata, bool has_lm_head) {
  if (!metadata.find("num_hidden_layers") && !metadata.find("hidden_size"))
    fail(metadata.path(),
         "has no configuration in its metadata, which had to hold num_hidden_layers, hidden_size and the other keys of "
         "config.json: such a file beside it is not read");
  check_nothing_else_is_asked_for(metadata);
  model_config c{};
  c.num_hidden_layers = metadata.size("num_hidden_layers", 1024);
  c.hidden_size = metadata.size("hidden_size", 1 << 16);
  c.num_attention_heads = metadata.size("num_attention_heads", 1 << 12);
  c.num_key_value_heads =
      metadata.optional_size("num_key_value_heads", 1, c.num_attention_heads).value_or(c.num_attention_heads);
  if (c.num_attention_heads % c.num_key_value_heads != 0)
    metadata.refuse("num_attention_heads", std::to_string(c.num_attention_heads),
                    fmt::format("a multiple of num_key_value_heads, {}", c.num_key_value_heads));
  if (const auto head_dim = metadata.optional_size("head_dim", 1, max_head_dim)) {
    c.head_dim = *head_dim;
  } else {
    c.head_dim = c.hidden_size / c.num_attention_heads;
    if (c.hidden_size % c.num_attention_heads != 0 || c.head_dim > max_head_dim)
      metadata.refuse("hidden_size", std::to_string(c.hidden_size),
                      fmt::format("head_dim (at most {}) times num_attention_heads, {}, as head_dim is missing",
                                  max_head_dim, c.num_attention_heads));
  }
  c.intermediate_size = metadata.size("intermediate_size", 1 << 20);
  c.vocab_size = metadata.size("vocab_size", 1 << 22);
  c.rope_theta = read_rope_theta(metadata);
  c.rms_norm_eps = static_cast<float>(metadata.number("rms_norm_eps", 0, 1));
  // In the order of attention_kind.
  c.attention = static_cast<attention_kind>(metadata.one_of("attention", {"softmax", "softmax1", "sink"}));
  c.tie_word_embeddings = metadata.find("tie_word_embeddings")
                              ? metadata.one_of("tie_word_embeddings", {"false", "False", "true", "True"}) >= 2
                              : !has_lm_head;
  if (const auto bos = metadata.optional_size("bos_token_id", 0, c.vocab_size - 1))
    c.bos_token_id = static_cast<int>(*bos);
  c.max_position_embeddings = metadata.optional_size("max_position_embeddings", 1, index_t{1} << 40);
  return c;
}

class safetensors_weights final : public weights {
 public:
  explicit safetensors_weights(const std::string& path) : path_(path), file_(safetensors::load(path)) {
    metadata = file_.metadata();
    const metadata_reader reader(path, metadata);
    config = read_config(reader, contains("lm_head.weight"));
    rope = read_rope(reader, config);
    check_frequencies(rope.width());
  }

  std::string own_name(const std::string& name) const override { return name; }
  // Frequencies are checked with the metadata.
  std::vector<std::string> own_names() const override {
    std::vector<std::string> names = file_.names();
    std::erase_if(names, is_frequencies);
    return names;
  }
  bool contains(const std::string& name) const override { return file_.contains(name); }
  const std::vector<std::int64_t>& shape(const std::string& name) const override { return file_.shape(name); }
  tensor read(const std::string& name) const override { return file_.read(name); }
  std::optional<coded_tensor> read_coded(const std::string&) const override { return {}; }

 private:
  // A buffer that old checkpoints have, in each layer or once.
  static bool is_frequencies(const std::string& name) { return name.ends_with("rotary_emb.inv_freq"); }

  // They say again what rope_theta says, maybe rounded to 16 bits.
  void check_frequencies(index_t width) const {
    for (const std::string& name : file_.names()) {
      if (!is_frequencies(name)) continue;
      const std::vector<float> values = file_.read(name).values;
      bool equal = values.size() == static_cast<std::size_t>(width / 2);
      for (std::size_t i = 0; equal && i < values.size(); ++i) {
        const double wanted = std::pow(config.rope_theta, -2 * static_cast<double>(i) / static_cast<double>(width));
        equal = std::abs(static_cast<double>(values[i]) - wanted) <= 0.01 * wanted + 1e-7;
      }
      if (!equal)
        fail(path_, fmt::format("tensor {} is not what it had to be, the {} frequencies of rope_theta, {}", quote(name),
                                width / 2, config.rope_theta));
    }
  }

  std::string path_;
  safetensors file_;
};

}  // namespace

std::unique_ptr<weights> open_safetensors_weights(const std::string& path) {
  return std::make_unique<safetensors_weights>(path);
}

}  // namespace loaders
