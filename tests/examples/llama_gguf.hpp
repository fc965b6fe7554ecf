#pragma once

// A plain model, and a vocabulary, as GGUF files have them.

#include <array>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "gguf_writer.hpp"
#include "plain_model.hpp"

namespace plain {

namespace w = gguf_writer;

inline std::uint32_t u32_of(const plain_model& m, const std::string& key) {
  return static_cast<std::uint32_t>(m.size(key));
}

// A plain model's metadata and tensors by the names of GGUF.
inline std::vector<std::string> llama_metadata(const plain_model& m) {
  return {w::metadata("general.architecture", "llama"),
          w::metadata("llama.block_count", u32_of(m, "num_hidden_layers")),
          w::metadata("llama.context_length", 64u),
          w::metadata("llama.embedding_length", u32_of(m, "hidden_size")),
          w::metadata("llama.feed_forward_length", u32_of(m, "intermediate_size")),
          w::metadata("llama.attention.head_count", u32_of(m, "num_attention_heads")),
          w::metadata("llama.attention.head_count_kv", u32_of(m, "num_key_value_heads")),
          w::metadata("llama.attention.key_length", static_cast<std::uint32_t>(m.head_dim())),
          w::metadata("llama.attention.value_length", static_cast<std::uint32_t>(m.head_dim())),
          w::metadata("llama.rope.freq_base", 5000.f),
          w::metadata("llama.attention.layer_norm_rms_epsilon", 1e-5f)};
}

inline std::string llama_name(std::string name) {
  const std::array<std::pair<std::string, std::string>, 13> words = {{{"model.embed_tokens", "token_embd"},
                                                                      {"model.norm", "output_norm"},
                                                                      {"lm_head", "output"},
                                                                      {"model.layers", "blk"},
                                                                      {"input_layernorm", "attn_norm"},
                                                                      {"post_attention_layernorm", "ffn_norm"},
                                                                      {"self_attn.q_proj", "attn_q"},
                                                                      {"self_attn.k_proj", "attn_k"},
                                                                      {"self_attn.v_proj", "attn_v"},
                                                                      {"self_attn.o_proj", "attn_output"},
                                                                      {"mlp.gate_proj", "ffn_gate"},
                                                                      {"mlp.up_proj", "ffn_up"},
                                                                      {"mlp.down_proj", "ffn_down"}}};
  for (const auto& [from, to] : words)
    if (const std::size_t at = name.find(from); at != std::string::npos) name.replace(at, from.size(), to);
  return name;
}

inline std::vector<std::uint64_t> dims_of(const plain_model::tensor& t) { return {t.shape.rbegin(), t.shape.rend()}; }

inline std::string f32_bytes(const std::vector<float>& values) {
  std::string bytes;
  for (const float value : values) bytes += w::f32(value);
  return bytes;
}

inline w::file llama_file(const plain_model& m) {
  w::file file;
  file.metadata = llama_metadata(m);
  for (const auto& [name, t] : m.tensors) file.add(llama_name(name), dims_of(t), w::F32, f32_bytes(t.values));
  return file;
}

inline void write(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// The bytes, "th" and "the", and more tokens with their types: 3 is control, 4 user defined, 5 unused.
inline std::vector<std::string> vocabulary_metadata(const std::vector<std::pair<std::string, std::uint32_t>>& more) {
  std::vector<std::pair<std::string, std::uint32_t>> tokens;
  int others = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool shown = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
    const int code = shown ? byte : others++;  // the alphabet that GPT-2 spells bytes in
    tokens.emplace_back(code < 128
                            ? std::string(1, static_cast<char>(code))
                            : std::string{static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))},
                        1);
  }
  tokens.insert(tokens.end(), {{"th", 1}, {"the", 1}});
  tokens.insert(tokens.end(), more.begin(), more.end());
  std::string texts, types;
  for (const auto& [text, type] : tokens) texts += w::string(text), types += w::u32(type);
  return {w::metadata("tokenizer.ggml.model", "gpt2"), w::metadata("tokenizer.ggml.pre", "smollm"),
          w::metadata("tokenizer.ggml.tokens", w::array, w::u32(w::text) + w::u64(tokens.size()) + texts),
          w::metadata("tokenizer.ggml.token_type", w::array, w::u32(w::int32) + w::u64(tokens.size()) + types),
          w::metadata("tokenizer.ggml.merges", w::array,
                      w::u32(w::text) + w::u64(2) + w::string("t h") + w::string("th e"))};
}

}  // namespace plain
