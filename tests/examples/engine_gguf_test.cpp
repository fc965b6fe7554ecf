// Models of the llama architecture from GGUF files.

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numbers>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../catch.hpp"
#include "engine/model.hpp"
#include "llama_gguf.hpp"
#include "loaders/gguf.hpp"

namespace {

using namespace plain;

// Random blocks, with scales that give the values about the same size as in a random model.
std::string random_blocks(std::uint32_t type, std::size_t values, double rms, effort::dice& dice) {
  struct layout {
    std::uint32_t type;
    std::size_t values, bytes, scale_at;
    double scale;          // of the values' root mean square
    double min_per_scale;  // 0: no minimum; it lies behind the scale
  };
  const std::array<layout, 14> layouts = {{{w::F16, 1, 2, 0, 1, 0},
                                           {w::BF16, 1, 2, 0, 1, 0},
                                           {w::F32, 1, 4, 0, 1, 0},
                                           {w::Q8_0, 32, 34, 0, 1 / 74., 0},
                                           {w::Q4_0, 32, 18, 0, 1 / 4.6, 0},
                                           {w::Q4_1, 32, 20, 0, 1 / 4.6, -7.5},
                                           {w::Q4_K, 256, 144, 0, 1 / 250., 7.5},
                                           {w::Q6_K, 256, 210, 208, 1 / 1350., 0},
                                           {w::Q5_0, 32, 22, 0, 1 / 9.2, 0},
                                           {w::Q5_1, 32, 24, 0, 1 / 9.2, -15.5},
                                           {w::IQ4_NL, 32, 18, 0, 1 / 65., 0},
                                           {w::Q2_K, 256, 84, 80, 1 / 17., 1.5},
                                           {w::Q3_K, 256, 110, 108, 1 / 43., 0},
                                           {w::Q5_K, 256, 176, 0, 1 / 500., 15.5}}};
  const layout& l =
      *std::find_if(layouts.begin(), layouts.end(), [=](const layout& each) { return each.type == type; });
  const auto f16 = [](double value) {  // normal ones only, rounded towards 0
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
    const std::uint32_t exponent = (bits >> 23 & 255) - 112;
    return w::u16((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3ff));
  };
  std::string out;
  for (std::size_t block = 0; block < values / l.values; ++block) {
    const double scale = rms * l.scale * (l.values == 1 ? dice.signed_unit() * std::sqrt(3.) : 0.5 + dice.uniform());
    if (type == w::F32) {
      out += w::f32(static_cast<float>(scale));
    } else if (type == w::BF16) {
      out += w::u16(std::bit_cast<std::uint32_t>(static_cast<float>(scale)) >> 16);
    } else {
      std::string bytes;
      for (std::size_t i = 0; i < l.bytes; ++i) bytes += static_cast<char>(dice.bits() & 255);
      bytes.replace(l.scale_at, 2, std::abs(scale) < 1e-4 ? w::u16(0) : f16(scale));
      if (l.min_per_scale != 0) bytes.replace(l.scale_at + 2, 2, f16(scale * l.min_per_scale));
      out += bytes;
    }
  }
  return out;
}

// A random file of the types given, in turn, and its weights as the reader dequantises them.
std::string quantised(plain_model& m, const std::vector<std::uint32_t>& types) {
  effort::dice dice(3);
  w::file file;
  file.metadata = llama_metadata(m);
  std::size_t next = 0;
  for (auto& [name, t] : m.tensors) {
    if (t.shape.size() == 1) {
      file.add(llama_name(name), dims_of(t), w::F32, f32_bytes(t.values));
      continue;
    }
    const std::uint32_t type = types[next++ % types.size()];
    double squares = 0;
    for (const float value : t.values) squares += value * value;
    const double rms = std::sqrt(squares / static_cast<double>(t.values.size()));
    file.add(llama_name(name), dims_of(t), type, random_blocks(type, t.values.size(), rms, dice));
  }
  const std::string bytes = file.bytes();
  const loaders::gguf read = loaders::gguf::parse(std::as_bytes(std::span(bytes)), "quantised");
  for (auto& [name, t] : m.tensors) t.values = read.read(llama_name(name)).values;
  m.interleaved = true;
  return bytes;
}

double worst_of(const engine::model& model, const plain_model& m, index_t tokens, index_t num_sink_tokens = 2,
                index_t window = 9) {
  plain_session expected(m, num_sink_tokens, window);
  engine::session session(model, compare::sink_window(num_sink_tokens, window));
  double worst = 0;
  for (const int token : random_tokens(tokens, m.size("vocab_size"), 8))
    worst = std::max(worst, worst_difference(session.decode(token), expected.decode(token)));
  return worst;
}

std::string refusal(const std::string& bytes) {
  const temporary_file file;
  write(file.path, bytes);
  return refusal(file);
}

}  // namespace

TEST_CASE("a GGUF model of every tensor type computes what plain loops in double compute of its weights") {
  const std::vector<std::vector<std::uint32_t>> types = {
      {w::F32},
      {w::F16},
      {w::BF16},
      {w::Q8_0},
      {w::Q4_0},
      {w::Q4_1},
      {w::Q4_K},
      {w::Q6_K},
      {w::Q8_0, w::Q4_1, w::F16, w::Q4_K, w::BF16, w::Q6_K, w::Q4_0},
      {w::Q5_0},
      {w::Q5_1},
      {w::Q5_K},
      {w::Q2_K},
      {w::Q3_K},
      {w::IQ4_NL},
      {w::Q5_0, w::Q8_0, w::Q3_K, w::Q5_1, w::IQ4_NL, w::Q2_K, w::Q5_K}};
  for (std::size_t i = 0; i < types.size(); ++i) {
    plain_model m = random_model({1 + static_cast<index_t>(i % 2), 256, 4, 2, 64, 256, 50, i % 3 != 0, "softmax"}, i);
    const temporary_file file;
    write(file.path, quantised(m, types[i]));
    const engine::model model(file.path);
    CHECK(model.config().tie_word_embeddings == (i % 3 != 0));
    CHECK(model.config().vocab_size == 50);
    INFO("case " << i);
    CHECK(worst_of(model, m, 20) < 1e-3);
  }
}

TEST_CASE("a GGUF file and a safetensors file of the same weights are one model") {
  plain_model m = random_model({2, 256, 4, 2, 64, 256, 50, false, "softmax"}, 4);
  const temporary_file gguf_file;
  write(gguf_file.path, quantised(m, {w::Q4_1, w::Q8_0, w::Q6_K}));
  const engine::model from_gguf(gguf_file.path);

  m.metadata["rope_style"] = "interleaved";
  const temporary_file safetensors_file;
  m.write(safetensors_file.path);
  const engine::model from_safetensors(safetensors_file.path);
  engine::session a(from_gguf, compare::sink_window(1, 10));
  engine::session b(from_safetensors, compare::sink_window(1, 10));
  const std::vector<int> tokens = random_tokens(30, 50, 1);
  const auto close = [](std::span<const float> x, std::span<const float> y) {
    return worst_difference(x, doubles(y.begin(), y.end())) < 1e-4;
  };
  CHECK(close(a.prefill(tokens), b.prefill(tokens)));
  CHECK(close(a.decode(7), b.decode(7)));
}

TEST_CASE("a session's logits are the same bits for any number of threads") {
  plain_model m = random_model({2, 256, 4, 2, 64, 512, 300, false, "softmax"}, 4);
  const temporary_file file;
  write(file.path, quantised(m, {w::Q4_1, w::F32, w::Q6_K}));
  const engine::model model(file.path);
  const std::vector<int> tokens = random_tokens(300, 300, 1);
  engine::session alone(model, compare::sink_window(1, 40));
  for (const index_t threads : {2, 3, 7}) {
    alone.clear();
    engine::session shared(model, compare::sink_window(1, 40), {.threads = threads});
    CHECK(std::ranges::equal(alone.prefill(tokens), shared.prefill(tokens)));
    for (int token = 0; token < 50; ++token) CHECK(std::ranges::equal(alone.decode(token), shared.decode(token)));
  }
}

// Hugging Face's Llama turns dimension i with i + dim / 2; llama.cpp's converter interleaves the two halves of each
// head of q and k, and llama.cpp turns 2i with 2i + 1.
TEST_CASE("a model that llama.cpp's converter has reordered is the model that it was") {
  const plain_model m = random_model({2, 48, 4, 2, 12, 20, 50, true, "softmax"}, 6);
  plain_model reordered = m;
  for (auto& [name, t] : reordered.tensors) {
    if (!name.ends_with("q_proj.weight") && !name.ends_with("k_proj.weight")) continue;
    const std::vector<float> from = t.values;
    const auto rows = static_cast<std::size_t>(t.shape[0]), cols = static_cast<std::size_t>(t.shape[1]);
    for (std::size_t row = 0; row < rows; ++row) {
      const std::size_t in_head = row % 12, source = row - in_head + in_head % 2 * 6 + in_head / 2;
      std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(source * cols), cols,
                  t.values.begin() + static_cast<std::ptrdiff_t>(row * cols));
    }
  }
  const temporary_file file;
  write(file.path, llama_file(reordered).bytes());
  CHECK(worst_of(engine::model(file.path), m, 30) < 2e-4);
}

TEST_CASE("the rope scalings of GGUF are what plain loops in double compute") {
  struct rope_case {
    std::vector<std::string> metadata;
    std::size_t width;
    std::function<double(double pair, double inv_freq)> scaled = [](double, double f) { return f; };
    double attention_factor = 1;
    std::vector<float> rope_freqs = {};
  };
  const auto border = [](double times) {
    return 24 * std::log(64 / (times * 2 * std::numbers::pi)) / (2 * std::log(5000.));
  };
  const double low = std::floor(border(4)), high = std::ceil(border(0.5));
  std::vector<float> factors;
  for (int i = 0; i < 12; ++i) factors.push_back(1.f + 0.5f * static_cast<float>(i));
  const std::vector<rope_case> cases = {
      {{w::metadata("llama.rope.scaling.type", "none"), w::metadata("llama.rope.scaling.factor", 4.f)}, 24},
      {{w::metadata("llama.rope.scaling.type", "linear")}, 24},
      {{w::metadata("llama.rope.scaling.factor", 4.f)}, 24, [](double, double f) { return f / 4; }},
      {{w::metadata("llama.rope.dimension_count", 12u)}, 12},
      {{w::metadata("llama.rope.scaling.type", "yarn"), w::metadata("llama.rope.scaling.factor", 4.f),
        w::metadata("llama.rope.scaling.original_context_length", 64u),
        w::metadata("llama.rope.scaling.yarn_beta_fast", 4.f), w::metadata("llama.rope.scaling.yarn_beta_slow", 0.5f),
        w::metadata("llama.rope.scaling.finetuned", true)},
       24,
       [=](double i, double f) {
         const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
         return ramp * f / 4 + (1 - ramp) * f;
       },
       0.1 * std::log(4) + 1},
      {{}, 24, [](double i, double f) { return f / (1 + 0.5 * i); }, 1, factors},
  };
  for (std::size_t n = 0; n < cases.size(); ++n) {
    plain_model m = random_model({2, 48, 4, 2, 24, 20, 50, true, "softmax"}, 30 + n);
    w::file f = llama_file(m);
    f.metadata.insert(f.metadata.end(), cases[n].metadata.begin(), cases[n].metadata.end());
    if (!cases[n].rope_freqs.empty()) f.add("rope_freqs.weight", {12}, w::F32, f32_bytes(cases[n].rope_freqs));
    const temporary_file file;
    write(file.path, f.bytes());
    m.interleaved = true;
    m.attention_factor = cases[n].attention_factor;
    for (std::size_t i = 0; i < cases[n].width / 2; ++i) {
      const auto pair = static_cast<double>(i);
      m.inv_freq.push_back(cases[n].scaled(pair, std::pow(5000., -2 * pair / static_cast<double>(cases[n].width))));
    }
    INFO("case " << n);
    CHECK(worst_of(engine::model(file.path), m, 50, 2, 40) < 2e-4);
  }
}

TEST_CASE("a GGUF file that asks for what the decoder does not do is refused by name") {
  const plain_model m = random_model({1, 8, 2, 1, 4, 6, 20, false, "softmax"}, 9);
  const w::file good = llama_file(m);
  CHECK(refusal(good.bytes()) == "accepted");
  const auto with = [&](const std::vector<std::string>& metadata) {
    w::file file = good;
    // Instead of those of the same key.
    for (const std::string& each : metadata) {
      const auto key_of = [](const std::string& entry) {
        return entry.substr(8, static_cast<unsigned char>(entry[0]));
      };
      std::erase_if(file.metadata, [&](const std::string& old) { return key_of(old) == key_of(each); });
      file.metadata.push_back(each);
    }
    return refusal(file.bytes());
  };
  const auto without = [&](const std::string& key) {
    w::file file = good;
    std::erase_if(file.metadata, [&](const std::string& old) { return old.starts_with(w::string(key)); });
    return refusal(file.bytes());
  };
  const auto with_tensor = [&](const std::string& name, std::uint64_t values, float value = 1) {
    w::file file = good;
    file.add(name, {values}, w::F32, f32_bytes(std::vector<float>(values, value)));
    return refusal(file.bytes());
  };
  const std::vector<std::pair<std::string, std::string>> cases = {
      {with({w::metadata("general.architecture", "qwen2")}),
       "metadata: general.architecture is 'qwen2', had to be llama"},
      {without("general.architecture"), "metadata: general.architecture is missing, had to be llama"},
      {with({w::metadata("general.type", "adapter")}),
       "metadata: general.type is 'adapter', had to be model: an adapter, a projector or a matrix of importance is "
       "none"},
      {with({w::metadata("split.count", w::uint16, w::u16(2)), w::metadata("split.no", w::uint16, w::u16(0))}),
       "metadata: split.count is 2 (uint16), had to be 1: this is one shard of several, which `llama-gguf-split"},
      {without("llama.block_count"), "metadata: llama.block_count is missing, had to be a whole number from 1 to 1024"},
      {with({w::metadata("llama.block_count", 0u)}), "metadata: llama.block_count is 0 (uint32), had to be a whole"},
      {with({w::metadata("llama.block_count", ~0u)}), "metadata: llama.block_count is 4294967295 (uint32), had to be"},
      {with({w::metadata("llama.block_count", "1")}), "metadata: llama.block_count is '1', had to be a whole number"},
      {with({w::metadata("llama.attention.head_count", 3u), w::metadata("llama.attention.head_count_kv", 2u)}),
       "metadata: llama.attention.head_count is 3 (uint32), had to be a multiple of llama.attention.head_count_kv, 2"},
      {with({w::metadata("llama.attention.head_count", w::array, w::u32(w::uint32) + w::u64(1) + w::u32(2))}),
       "metadata: llama.attention.head_count is an array of 1 uint32, had to be a single value"},
      {with({w::metadata("llama.attention.key_length", 513u)}),
       "llama.attention.key_length is 513 (uint32), had to be"},
      {with({w::metadata("llama.attention.value_length", 8u)}),
       "metadata: llama.attention.value_length is 8 (uint32), had to be 4, as long as a key"},
      {without("llama.feed_forward_length"), "metadata: llama.feed_forward_length is missing"},
      {without("llama.attention.layer_norm_rms_epsilon"),
       "layer_norm_rms_epsilon is missing, had to be a number from 0"},
      {with({w::metadata("llama.rope.freq_base", NAN)}),
       "metadata: llama.rope.freq_base is nan (float32), had to be a"},
      {with({w::metadata("llama.vocab_size", 21u)}),
       "metadata: llama.vocab_size is 21 (uint32), had to be 20, the rows of token_embd.weight"},
      {with({w::metadata("tokenizer.ggml.add_bos_token", true), w::metadata("tokenizer.ggml.bos_token_id", 20u)}),
       "metadata: tokenizer.ggml.bos_token_id is 20 (uint32), had to be a whole number from 0 to 19"},
      // other architectures under llama's name
      {with({w::metadata("llama.expert_count", 8u)}),
       "metadata: llama.expert_count is 8 (uint32), had to be 0: mixtures of experts (MoE) are not done"},
      {with({w::metadata("llama.attention.kv_lora_rank", 512u)}),
       "metadata: llama.attention.kv_lora_rank is 512 (uint32), had to be absent: multi-head latent attention (MLA)"},
      {with({w::metadata("llama.attention.sliding_window", 512u)}), "had to be absent: every layer attends to all"},
      {with({w::metadata("llama.attn_logit_softcapping", 50.f)}),
       "metadata: llama.attn_logit_softcapping is 50 (float32), had to be absent: this decoder does not know what it"},
      {with({w::metadata("llama.logit_scale", 2.f)}), "metadata: llama.logit_scale is 2 (float32), had to be absent"},
      // ropes
      {with({w::metadata("llama.rope.dimension_count", 3u)}),
       "llama.rope.dimension_count was 3, had to be even and from 2 to head_dim, 4"},
      {with({w::metadata("llama.rope.dimension_count", 6u)}),
       "llama.rope.dimension_count was 6, had to be even and from 2 to head_dim, 4"},
      {with({w::metadata("llama.rope.dimension_sections", w::array, w::u32(w::int32) + w::u64(1) + w::u32(2))}),
       "had to be absent: M-RoPE gives each token three positions"},
      {with({w::metadata("llama.rope.scaling.alpha", 1000.f)}),
       "had to be absent: dynamic NTK changes its frequencies"},
      {with({w::metadata("llama.rope.scaling.type", "longrope")}),
       "metadata: llama.rope.scaling.type was longrope, had to be none, linear or yarn: longrope switches between "
       "two"},
      {with({w::metadata("llama.rope.scaling.type", "dynamic")}),
       "metadata: llama.rope.scaling.type was dynamic, had to be none, linear or yarn"},
      {with({w::metadata("llama.rope.scaling.factor", 0.f)}), "metadata: factor was 0, had to be from 1 to 2^64"},
      {with({w::metadata("llama.rope.scaling.attn_factor", 1.5f)}),
       "metadata: llama.rope.scaling.attn_factor was 1.5, had to be 1"},
      {with({w::metadata("llama.rope.scaling.type", "yarn"), w::metadata("llama.rope.scaling.factor", 4.f),
             w::metadata("llama.rope.scaling.yarn_beta_fast", 0.5f)}),
       "metadata: beta_fast was 0.5, had to be finite and above beta_slow"},
      {with_tensor("rope_factors_long.weight", 2), "tensor rope_factors_long.weight had to be absent: longrope"},
      {with_tensor("rope_freqs.weight", 3), "metadata: rope_freqs.size() was 3, had to be exactly 2"},
      {with_tensor("rope_freqs.weight", 2, 0), "metadata: a number of rope_freqs was 0, had to be from 0.001 to 1e6"},
      {with_tensor("rope_freqs.weight", 2, NAN), "metadata: a number of rope_freqs was nan, had to be from"},
      // tensors
      {with_tensor("blk.0.attn_q.bias", 8), "tensor 'blk.0.attn_q.bias' is unexpected: no part of such a model"},
      {with({w::metadata("llama.block_count", 2u)}), "tensor blk.1.attn_norm.weight is missing, had to be [8]"},
      {with({w::metadata("llama.feed_forward_length", 1u << 20)}),
       "tensor blk.0.ffn_gate.weight is [6, 8], had to be [1048576, 8]"},
      {with({w::metadata("llama.embedding_length", 16u)}), "tensor token_embd.weight is [20, 8], had to be [20, 16]"},
  };
  for (const auto& [error, message] : cases) CHECK_THAT(error, Catch::Contains(message));

  // What there is to say of the file as a whole comes before anything about its tensors.
  w::file other;
  other.add("rwkv.weight", {32}, 23, std::string(64, '\0'));
  CHECK_THAT(refusal(other.bytes()), Catch::Contains("general.architecture is missing"));
  other.metadata = {w::metadata("general.architecture", "gemma3")};
  CHECK_THAT(refusal(other.bytes()), Catch::Contains("general.architecture is 'gemma3', had to be llama"));
  other.metadata = {w::metadata("split.count", w::uint16, w::u16(2))};
  CHECK_THAT(refusal(other.bytes()), Catch::Contains("one shard of several"));
  other.metadata = {w::metadata("general.architecture", "llama")};
  CHECK_THAT(refusal(other.bytes()), Catch::Contains("has type IQ4_XS, not supported"));
  other = {};
  other.metadata = llama_metadata(m);
  CHECK_THAT(refusal(other.bytes()), Catch::Contains("holds metadata only, a vocabulary say, had to hold the tensors"));
  for (const float bad : {NAN, -INFINITY}) {
    w::file unnormed = good;
    unnormed.data.replace(0, 4, w::f32(bad));
    CHECK_THAT(refusal(unnormed.bytes()), Catch::Contains(fmt::format("holds {}, had to hold finite", bad)));
  }
}
