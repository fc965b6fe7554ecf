#include "engine/model.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "plain_model.hpp"

namespace {

using namespace plain;

const std::string models_dir = SINKCACHE_SOURCE_DIR "/examples/models/";

std::string refusal(const plain_model& m) {
  const temporary_file file;
  m.write(file.path);
  return refusal(file);
}

}  // namespace

TEST_CASE("trained models repeat the losses that were computed elsewhere") {
  int models = 0;
  for (const auto& entry : std::filesystem::directory_iterator(models_dir)) {
    const std::string name = entry.path().filename().string();
    if (!name.ends_with(".ref.json")) continue;
    ++models;
    const nlohmann::json reference = nlohmann::json::parse(std::ifstream(entry.path()));
    const auto ids = reference.at("first_ids").get<std::vector<int>>();
    const engine::model model(models_dir + name.substr(0, name.size() - 9) + ".safetensors");

    engine::session causal(model, compare::sink_window(0, 16));
    const auto logits = reference.at("logits_at_15_full_causal").get<doubles>();
    INFO(name);
    CHECK(worst_difference(causal.prefill(std::span(ids).first(16)), logits) < 1e-4);

    for (const nlohmann::json& run : reference.at("runs")) {
      const auto expected = run.at("nll_bits_first_512").get<doubles>();
      engine::session session(model, compare::sink_window(run.at("sinks"), run.at("window")));
      double worst = 0;
      for (std::size_t i = 0; i < expected.size(); ++i)
        worst = std::max(worst, std::abs(engine::loss_bits(session.decode(ids[i]), ids[i + 1]) - expected[i]));
      INFO("sinks " << run.at("sinks"));
      CHECK(worst < 2e-4);
    }
  }
  CHECK(models == 7);
}

TEST_CASE("random models of odd sizes compute what plain loops in double compute") {
  const std::vector<sizes> cases = {
      {3, 60, 6, 3, 0, 77, 300, false, "softmax"}, {2, 35, 5, 1, 14, 9, 31, false, "softmax1"},
      {1, 24, 4, 4, 2, 77, 300, true, "sink"},     {2, 7, 3, 3, 6, 1, 257, true, "softmax"},
      {2, 66, 8, 2, 34, 50, 65, false, "sink"},
  };
  const std::vector<std::pair<index_t, index_t>> caches = {{0, 7}, {2, 5}, {4, 1}, {1, 100}};
  std::uint64_t seed = 0;
  for (const sizes& s : cases) {
    const plain_model plain = random_model(s, ++seed);
    const temporary_file file;
    plain.write(file.path);
    const engine::model model(file.path);
    const std::vector<int> tokens = random_tokens(40, s.vocab, seed);
    for (const auto& [num_sink_tokens, window] : caches) {
      INFO("model " << seed << ", sinks " << num_sink_tokens << ", window " << window);
      plain_session expected(plain, num_sink_tokens, window);
      engine::session session(model, compare::sink_window(num_sink_tokens, window));
      double worst = 0;
      for (const int token : tokens)
        worst = std::max(worst, worst_difference(session.decode(token), expected.decode(token)));
      CHECK(worst < 2e-4);
    }
  }
}

TEST_CASE("prefill in any chunks is decode") {
  const engine::model model(models_dir + "nano-sink.safetensors");
  const std::vector<int> tokens = random_tokens(700, 256, 1);
  engine::session decoded(model, compare::sink_window(2, 50));
  std::span<const float> logits;
  for (const int token : tokens) logits = decoded.decode(token);
  const doubles expected(logits.begin(), logits.end());

  engine::session session(model, compare::sink_window(2, 50));
  for (const std::size_t chunk : {1u, 3u, 64u, 255u, 300u, 700u}) {
    session.clear();
    for (std::size_t first = 0; first < tokens.size(); first += chunk)
      logits = session.prefill(std::span(tokens).subspan(first, std::min(chunk, tokens.size() - first)));
    INFO("chunks of " << chunk);
    CHECK(worst_difference(logits, expected) < 2e-4);
  }
}

TEST_CASE("a session can leave out the model's own sink logits") {
  sizes s{2, 24, 4, 2, 6, 20, 50, true, "sink"};
  const plain_model with = random_model(s, 5);
  plain_model without = with;
  without.metadata["attention"] = "softmax";
  const temporary_file file;
  with.write(file.path);
  const engine::model model(file.path);
  engine::session session(model, compare::sink_window(0, 10), {.softmax = sinkcache::softmax_variant::standard()});
  plain_session expected(without, 0, 10);
  for (const int token : random_tokens(20, s.vocab, 2))
    CHECK(worst_difference(session.decode(token), expected.decode(token)) < 2e-4);
}

TEST_CASE("the loss is exact for logits of any size") {
  const std::vector<float> even(8, 3e4f), sure = {0, 1e4f};
  CHECK(engine::loss_bits(even, 5) == Approx(3));
  CHECK(engine::loss_bits(sure, 1) == 0);
  CHECK(engine::loss_bits(sure, 0) == Approx(1e4 * std::numbers::log2e));
}

TEST_CASE("rope_scaling and rope_parameters, as config.json has them, are what plain loops in double compute") {
  struct rope_case {
    std::map<std::string, std::string> metadata;
    std::size_t width;
    double theta;
    // What is left of theta^(-2i / width), by the papers.
    std::function<double(double i, double inv_freq)> scaled = [](double, double inv_freq) { return inv_freq; };
    double attention_factor = 1;
  };
  constexpr double two_pi = 2 * std::numbers::pi;
  const auto llama3 = [](double, double f) {
    const double turns = 64 * f / two_pi;
    if (turns < 1) return f / 8;
    if (turns > 4) return f;
    const double keep = (turns - 1) / 3;
    return keep * f + (1 - keep) * f / 8;
  };
  const auto yarn = [](double low, double high) {
    return [=](double i, double f) {
      const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
      return ramp * f / 4 + (1 - ramp) * f;
    };
  };
  // The pair that turns so many times in the original 64 tokens.
  const auto border = [](double times) { return 24 * std::log(64 / (times * two_pi)) / (2 * std::log(5000.)); };
  const std::vector<rope_case> cases = {
      {{{"rope_scaling", "null"}}, 24, 5000},
      {{{"rope_scaling", R"({"rope_type": "default"})"}}, 24, 5000},
      {{{"rope_scaling", R"({"type": "linear", "factor": 4.0})"}}, 24, 5000, [](double, double f) { return f / 4; }},
      {{{"rope_scaling", R"({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64})"}},
       24,
       5000,
       llama3},
      {{{"rope_scaling", R"({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4,
                             "beta_slow": 0.5, "truncate": false, "finetuned": true, "attention_factor": null})"}},
       24,
       5000,
       yarn(border(4), border(0.5)),
       0.1 * std::log(4) + 1},
      // The original length is the model's, where it is not given.
      {{{"rope_scaling", R"({"rope_type": "yarn", "factor": 4.0, "beta_fast": 4, "beta_slow": 0.5, "mscale": 1.0,
                             "mscale_all_dim": 0.5})"},
        {"max_position_embeddings", "64"}},
       24,
       5000,
       yarn(std::floor(border(4)), std::ceil(border(0.5))),
       (0.1 * std::log(4) + 1) / (0.05 * std::log(4) + 1)},
      {{{"rope_scaling", R"({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 4,
                             "beta_slow": 0.5, "attention_factor": 1.5})"}},
       24,
       5000,
       yarn(std::floor(border(4)), std::ceil(border(0.5))),
       1.5},
      {{{"partial_rotary_factor", "0.5"}}, 12, 5000},
      {{{"rotary_pct", "0.25"}}, 6, 5000},
      // As transformers 5 writes it.
      {{{"rope_parameters",
         R"({"rope_type": "linear", "factor": 2, "rope_theta": 700.0, "partial_rotary_factor": 0.5})"},
        {"rope_theta", "700"}},
       12,
       700,
       [](double, double f) { return f / 2; }},
      {{{"rope_parameters", R"({"rope_theta": 700.0})"}, {"rope_theta", ""}}, 24, 700},
  };
  for (std::size_t n = 0; n < cases.size(); ++n)
    for (const bool interleaved : {false, true}) {
      plain_model plain = random_model({2, 48, 4, 2, 24, 20, 50, true, "softmax"}, 30 + n);
      for (const auto& [key, value] : cases[n].metadata) plain.metadata[key] = value;
      if (plain.metadata.at("rope_theta").empty()) plain.metadata.erase("rope_theta");
      if (interleaved) plain.metadata["rope_style"] = "interleaved";
      const temporary_file file;
      plain.write(file.path);
      const engine::model model(file.path);
      CHECK(model.config().rope_theta == cases[n].theta);

      plain.interleaved = interleaved;
      plain.attention_factor = cases[n].attention_factor;
      for (std::size_t i = 0; i < cases[n].width / 2; ++i) {
        const auto pair = static_cast<double>(i);
        plain.inv_freq.push_back(
            cases[n].scaled(pair, std::pow(cases[n].theta, -2 * pair / static_cast<double>(cases[n].width))));
      }
      plain_session expected(plain, 2, 40);
      engine::session session(model, compare::sink_window(2, 40));
      double worst = 0;
      for (const int token : random_tokens(60, 50, n))
        worst = std::max(worst, worst_difference(session.decode(token), expected.decode(token)));
      INFO("case " << n << (interleaved ? ", interleaved" : ""));
      CHECK(worst < 2e-4);
    }
}

TEST_CASE("ropes that frequencies cannot tell are refused by name, bad ones with what they had to be") {
  const plain_model good = random_model({1, 8, 2, 1, 4, 6, 20, false, "softmax"}, 9);
  const std::vector<std::pair<std::map<std::string, std::string>, std::string>> cases = {
      {{{"rope_scaling", R"({"type": "dynamic", "factor": 2.0})"}},
       "metadata: rope_scaling.type was dynamic, had to be default, linear, llama3 or yarn: dynamic NTK changes its "
       "frequencies with the length of the sequence"},
      {{{"rope_scaling", R"({"rope_type": "longrope", "short_factor": [1], "long_factor": [2]})"}},
       "metadata: rope_scaling.rope_type was longrope, had to be default, linear, llama3 or yarn: longrope switches "
       "between two sets of frequencies as the sequence grows"},
      {{{"rope_scaling", R"({"type": "su", "short_factor": [1], "long_factor": [2]})"}},
       "rope_scaling.type was su, had to be default, linear, llama3 or yarn: longrope switches"},
      {{{"rope_scaling", R"({"type": "mrope", "mrope_section": [16, 24, 24]})"}},
       "metadata: rope_scaling.mrope_section was [16,24,24], had to be absent: M-RoPE gives each token three "
       "positions"},
      {{{"rope_parameters", R"({"rope_type": "default", "mrope_section": [16, 24, 24], "mrope_interleaved": true})"}},
       "rope_parameters.mrope_section"},
      {{{"rope_scaling", R"({"type": "mrope"})"}}, "M-RoPE gives each token three positions"},
      {{{"rope_scaling", R"({"rope_type": "default", "type": "mrope"})"}}, "M-RoPE gives each token three positions"},
      {{{"kv_lora_rank", "512"}},
       "metadata: kv_lora_rank is '512', had to be null: multi-head latent attention (MLA) caches"},
      {{{"qk_rope_head_dim", "64"}}, "metadata: qk_rope_head_dim is '64', had to be null: multi-head latent attention"},
      {{{"rope_scaling", R"({"rope_type": "spiral"})"}},
       "metadata: rope_scaling.rope_type was spiral, had to be default, linear, llama3 or yarn"},
      {{{"rope_scaling", R"({"rope_type": 3})"}}, "metadata: rope_scaling.rope_type was 3, had to be default"},
      {{{"rope_scaling", R"({"type": "linear", "factor": 1e999})"}}, "is JSON with a number that no double holds"},
      {{{"rope_scaling", "8"}}, "metadata: rope_scaling is '8', had to be null or a JSON object"},
      {{{"rope_scaling", "{'type': 'linear'}"}}, "metadata: rope_scaling is '{'type': 'linear'}', had to be null or a"},
      {{{"rope_scaling", R"({"factor": 8})"}},
       "metadata: rope_scaling.factor was 8, had to be absent: it is not known here"},
      {{{"rope_scaling", R"({"type": "linear"})"}}, "metadata: rope_scaling.factor is missing"},
      {{{"rope_scaling", R"({"type": "linear", "factor": "8"})"}}, "rope_scaling.factor was 8, had to be a number"},
      {{{"rope_scaling", R"({"type": "linear", "factor": 0.5})"}},
       "metadata: factor was 0.5, had to be from 1 to 2^64"},
      {{{"rope_scaling", R"({"type": "linear", "factor": 8, "truncate": true})"}},
       "rope_scaling.truncate was true, had to be absent"},
      {{{"rope_scaling", R"({"type": "yarn", "factor": 8})"}},
       "metadata: rope_scaling.original_max_position_embeddings is missing"},
      {{{"rope_scaling", R"({"type": "yarn", "factor": 8, "original_max_position_embeddings": 4096, "truncate": 0})"}},
       "rope_scaling.truncate was 0, had to be true or false"},
      {{{"rope_scaling", R"({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1,
                             "original_max_position_embeddings": 8192})"}},
       "low_freq_factor was 4, had to be above 0 and below high_freq_factor, 1"},
      {{{"rope_scaling", R"({"type": "linear", "factor": 8})"}, {"rope_parameters", R"({"rope_type": "default"})"}},
       "metadata: rope_scaling is '{\"type\": \"linear\", \"factor\": 8}', had to be null beside rope_parameters"},
      {{{"use_dynamic_ntk", "true"}}, "metadata: use_dynamic_ntk is 'true', had to be false"},
      {{{"rope_parameters", R"({"partial_rotary_factor": 1e300})"}},
       "metadata: partial_rotary_factor was 1e+300, had to be such that an even number"},
      {{{"rope_parameters", R"({"rope_theta": 0.5})"}, {"rope_theta", ""}}, "metadata: rope_theta is ''"},
      {{{"rope_parameters", R"({"rope_theta": 6000.0})"}},
       "metadata: rope_parameters.rope_theta was 6000.0, had to be as rope_theta beside it"},
      {{{"rope_parameters", R"({"full_attention": {"rope_type": "default"}})"}},
       "metadata: a key of rope_parameters is 'full_attention'"},
  };
  for (const auto& [metadata, message] : cases) {
    plain_model bad = good;
    for (const auto& [key, value] : metadata) bad.metadata[key] = value;
    CHECK_THAT(refusal(bad), Catch::Contains(message));
  }
}

TEST_CASE("what says nothing about the result may be in a file") {
  const auto changed = [](const auto& change) {
    plain_model m = random_model({2, 8, 2, 1, 4, 6, 20, true, "softmax"}, 9);
    change(m);
    return refusal(m);
  };
  const std::map<std::string, std::string> harmless = {{"model_type", "llama"},
                                                       {"architectures", R"(["LlamaForCausalLM"])"},
                                                       {"torch_dtype", "bfloat16"},
                                                       {"use_cache", "true"},
                                                       {"transformers_version", "4.48.0"},
                                                       {"eos_token_id", "[128001, 128008]"},
                                                       {"attention_bias", "null"},
                                                       {"hidden_activation", "silu"},
                                                       {"max_window_layers", "24"},
                                                       {"rope_interleaved", "false"}};
  for (const auto& entry : harmless)
    CHECK(changed([&](plain_model& m) { m.metadata[entry.first] = entry.second; }) == "accepted");
  for (const char* no : {"false", "False"})
    CHECK(changed([&](plain_model& m) {
            m.metadata["sliding_window"] = "4096", m.metadata["use_sliding_window"] = no;
          }) == "accepted");
  CHECK_THAT(
      changed([](plain_model& m) { m.metadata["sliding_window"] = "4096", m.metadata["use_sliding_window"] = "true"; }),
      Catch::Contains("metadata: sliding_window is '4096', had to be null"));

  // The embedding, saved twice.
  const auto with_head = [](float off) {
    return [=](plain_model& m) {
      m.tensors["lm_head.weight"] = m.tensors.at("model.embed_tokens.weight");
      m.tensors.at("lm_head.weight").values[5] += off;
    };
  };
  CHECK(changed(with_head(0)) == "accepted");
  CHECK_THAT(changed(with_head(0.5f)), Catch::Contains("tensor lm_head.weight had to equal model.embed_tokens.weight"));
  CHECK_THAT(changed([](plain_model& m) {
               m.tensors["lm_head.weight"] = {{20}, std::vector<float>(20)};
             }),
             Catch::Contains("tensor lm_head.weight is [20], had to be [20, 8]"));

  // The frequencies, as old checkpoints keep them. 5000^(-2/4) is 0.01414.
  const auto with_frequencies = [](std::vector<float> values) {
    return [=](plain_model& m) {
      for (const char* layer : {"model.layers.0.self_attn.", "model.layers.1.self_attn."})
        m.tensors[std::string(layer) + "rotary_emb.inv_freq"] = {{static_cast<std::int64_t>(values.size())}, values};
    };
  };
  CHECK(changed(with_frequencies({1, 0.0141421f})) == "accepted");
  CHECK(changed(with_frequencies({1, 0.01416f})) == "accepted");  // rounded to bf16
  for (const std::vector<float>& bad : {std::vector{1, 0.0145f}, {1}, {1, 0.0141421f, 0}, {NAN, 0.0141421f}})
    CHECK_THAT(changed(with_frequencies(bad)),
               Catch::Contains("tensor 'model.layers.0.self_attn.rotary_emb.inv_freq' is not what it had to be, the 2 "
                               "frequencies of rope_theta, 5000"));
}

TEST_CASE("a file without a configuration says where one was looked for, a shard what it is") {
  plain_model m = random_model({1, 8, 2, 1, 4, 6, 20, true, "softmax"}, 9);
  m.metadata = {{"format", "pt"}};
  CHECK_THAT(refusal(m), Catch::Contains("has no configuration in its metadata"));
  const temporary_file shard{std::filesystem::temp_directory_path() /
                             ("sinkcache_" + std::to_string(getpid()) + "-00001-of-00002.safetensors")};
  m.write(shard.path);
  CHECK(refusal(shard) == shard.path + ": is one shard of several, had to be a whole model");
}

TEST_CASE("a sink logit of -inf means that a head has no sink, any other that is not finite is refused") {
  plain_model m = random_model({1, 8, 2, 1, 4, 6, 20, false, "sink"}, 9);
  std::vector<float>& sinks = m.tensors.at("model.layers.0.self_attn.sinks").values;
  sinks = {-INFINITY, 1};
  CHECK(refusal(m) == "accepted");
  for (const float bad : {NAN, INFINITY}) {
    sinks[1] = bad;
    CHECK_THAT(refusal(m), Catch::Contains("tensor model.layers.0.self_attn.sinks holds"));
  }
}

TEST_CASE("nested metadata are refused however deep they are, and keys that are there twice") {
  const plain_model good = random_model({1, 8, 2, 1, 4, 6, 20, false, "softmax"}, 9);
  const auto refused = [&](const std::string& key, const std::string& value) {
    plain_model bad = good;
    bad.metadata[key] = value;
    return refusal(bad);
  };
  for (const char* key : {"rope_scaling", "rope_parameters"})
    for (const std::string open : {"[", "{\"a\":"})
      for (const std::string& value : {open, "{\"factor\": " + open}) {
        std::string deep = value;
        for (int i = 0; i < 100000; ++i) deep += open;
        CHECK_THAT(refused(key, deep), Catch::Contains("had to be null or a JSON object, is nested more than 8 deep"));
      }
  CHECK_THAT(refused("rope_scaling", R"({"type": "linear", "factor": 2, "factor": 4})"),
             Catch::Contains("is an object that has 'factor' twice"));
  CHECK_THAT(refused("rope_scaling", R"({"type": "linear", "factor": 2, "type": "linear"})"),
             Catch::Contains("is an object that has 'type' twice"));
}

TEST_CASE("a file that is not such a model is refused, and says why") {
  const plain_model good = random_model({1, 8, 2, 1, 4, 6, 20, false, "softmax"}, 9);
  CHECK(refusal(good) == "accepted");

  using change = std::function<void(plain_model&)>;
  const auto set = [](const char* key, const char* value) -> change {
    return [=](plain_model& m) { m.metadata[key] = value; };
  };
  const auto unset = [](const char* key) -> change { return [=](plain_model& m) { m.metadata.erase(key); }; };
  const auto tensor = [](const char* name, std::vector<std::int64_t> shape) -> change {
    return [=](plain_model& m) {
      std::int64_t count = 1;
      for (const std::int64_t dim : shape) count *= dim;
      m.tensors[name] = {shape, std::vector<float>(static_cast<std::size_t>(count), 0.5f)};
    };
  };
  const std::vector<std::pair<change, std::string>> cases = {
      {unset("hidden_size"), "metadata: hidden_size is missing"},
      {unset("rope_theta"), "metadata: rope_theta is missing"},
      {set("hidden_size", "8 "), "metadata: hidden_size is '8 ', had to be a whole number from 1 to 65536"},
      {set("hidden_size", "+8"), "had to be a whole number"},
      {set("hidden_size", "8.0"), "had to be a whole number"},
      {set("hidden_size", "-8"), "had to be a whole number"},
      {set("hidden_size", ""), "had to be a whole number"},
      {set("vocab_size", "99999999999999999999"), "metadata: vocab_size"},
      {set("num_hidden_layers", "0"), "metadata: num_hidden_layers is '0'"},
      {set("num_key_value_heads", "4"), "metadata: num_key_value_heads is '4'"},
      {[](plain_model& m) { m.metadata["num_attention_heads"] = "3", m.metadata.erase("head_dim"); },
       "metadata: hidden_size is '8', had to be head_dim (at most 512) times num_attention_heads, 3"},
      {set("head_dim", "3"), "metadata: head_dim was 3, had to be even"},
      {set("head_dim", "514"), "metadata: head_dim is '514'"},
      {set("rope_theta", "nan"), "metadata: rope_theta is 'nan', had to be a number"},
      {set("rope_theta", "0x10p"), "metadata: rope_theta"},
      {set("rms_norm_eps", "-1e-5"), "metadata: rms_norm_eps"},
      {set("attention", "linear"), "metadata: attention is 'linear', had to be softmax or softmax1 or sink"},
      {set("attention", "sink"), "tensor model.layers.0.self_attn.sinks is missing, had to be [2]"},
      {set("rope_style", "spiral"), "metadata: rope_style is 'spiral', had to be neox or interleaved"},
      {set("rope_local_base_freq", "10000.0"), "metadata: rope_local_base_freq"},
      {set("partial_rotary_factor", "0.3"),
       "metadata: partial_rotary_factor was 0.3, had to be such that an even number "
       "of the 4 dimensions of a head rotates"},
      {set("partial_rotary_factor", "0"), "metadata: partial_rotary_factor was 0, had to be such that"},
      {set("partial_rotary_factor", "1.5"), "metadata: partial_rotary_factor was 1.5, had to be such that"},
      {set("rotary_pct", "0.8"), "metadata: rotary_pct was 0.8, had to be such that"},
      {set("attention_bias", "true"), "metadata: attention_bias"},
      {set("hidden_act", "gelu"), "metadata: hidden_act is 'gelu', had to be silu"},
      {set("tokenizer", "bpe"), "metadata: tokenizer is 'bpe', had to be byte"},
      {set("bos_token_id", "20"), "metadata: bos_token_id is '20', had to be a whole number from 0 to 19"},
      {set("tie_word_embeddings", "maybe"), "metadata: tie_word_embeddings"},
      {set("tie_word_embeddings", "true"),
       "tensor lm_head.weight had to equal model.embed_tokens.weight, as tie_word_embeddings is true"},
      // Another architecture, in Llama's names, and keys that are not known.
      {set("model_type", "qwen2"), "metadata: model_type is 'qwen2', had to be llama or tiny-llama-sink"},
      {set("model_type", "smollm3"), "metadata: model_type is 'smollm3', had to be llama"},
      {set("architectures", R"(["GemmaForCausalLM"])"),
       R"(metadata: architectures is '["GemmaForCausalLM"]', had to be)"},
      {set("scale_emb", "12"),
       "metadata: scale_emb is '12', had to be absent: this decoder does not know what it asks"},
      {set("residual_multiplier", "0.22"), "metadata: residual_multiplier is '0.22', had to be 1.0"},
      {set("no_rope_layers", "[1, 0]"), "metadata: no_rope_layers is '[1, 0]', had to be null"},
      {set("no_rope_layer_interval", "4"), "metadata: no_rope_layer_interval is '4', had to be null"},
      {set("layer_types", R"(["sliding_attention"])"), "metadata: layer_types"},
      {set("hidden_activation", "gelu_pytorch_tanh"), "metadata: hidden_activation is 'gelu_pytorch_tanh', had to be"},
      {set("sliding_window", "4096"), "metadata: sliding_window is '4096', had to be null"},
      {set("\u009b2J", "1"), "metadata: \\xc2\\x9b2J is '1', had to be absent"},
      // Bounded memory: refused before anything of such a size is asked for.
      {set("intermediate_size", "1048576"),
       "tensor model.layers.0.mlp.gate_proj.weight is [6, 8], had to be [1048576, 8]"},
      {set("num_hidden_layers", "2"), "tensor model.layers.1.input_layernorm.weight is missing"},
      {tensor("model.layers.0.self_attn.q_proj.bias", {8}),
       "tensor 'model.layers.0.self_attn.q_proj.bias' is unexpected"},
      {tensor("model.layers.0.self_attn.sinks", {2}), "tensor 'model.layers.0.self_attn.sinks' is unexpected"},
      {tensor("model.layers.0.self_attn.k_proj.weight", {8, 8}),
       "tensor model.layers.0.self_attn.k_proj.weight is [8, 8], had to be [4, 8]"},
      {tensor("model.layers.0.mlp.down_proj.weight", {6, 8}), "is [6, 8], had to be [8, 6]"},
      {tensor("model.norm.weight", {8, 1}), "tensor model.norm.weight is [8, 1], had to be [8]"},
      {[](plain_model& m) { m.tensors.erase("model.norm.weight"); }, "tensor model.norm.weight is missing"},
      {[](plain_model& m) { m.tensors.at("lm_head.weight").values[7] = NAN; },
       "tensor lm_head.weight holds nan, had to hold finite numbers only"},
      {[](plain_model& m) { m.tensors.at("model.norm.weight").values[7] = -INFINITY; },
       "tensor model.norm.weight holds -inf, had to hold finite numbers only"},
      {[](plain_model& m) { m.tensors.at("model.layers.0.mlp.up_proj.weight").values[1] = -INFINITY; },
       "tensor model.layers.0.mlp.up_proj.weight holds -inf"},
      // C1 controls and those of direction: what a terminal would obey.
      {tensor("\u009b2J", {2}), "tensor '\\xc2\\x9b2J' is unexpected"},
      {tensor("\u202eabc", {2}), "tensor '\\xe2\\x80\\xaeabc' is unexpected"},
      {set("attention", "\u009b2J"), "metadata: attention is '\\xc2\\x9b2J'"},
      {set("rope_scaling", "{\"\u009b2J\": 1}"), "metadata: rope_scaling.\\xc2\\x9b2J was 1, had to be absent"},
      {set("rope_theta", "0x10"), "metadata: rope_theta is '0x10', had to be a number"},
      {set("rope_theta", "1e400"), "metadata: rope_theta is '1e400', had to be a number"},
  };
  for (const auto& [apply, message] : cases) {
    plain_model bad = good;
    apply(bad);
    CHECK_THAT(refusal(bad), Catch::Contains(message));
  }
}
