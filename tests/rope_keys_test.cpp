// Rope from a model's own keys: of what models have them, and what is refused. examples/loaders reads its files with
// it, so engine_test and engine_gguf_test compare what comes out with plain loops.

#include <sinkcache/rope_keys.hpp>

#include <clocale>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch.hpp"

using namespace sinkcache;

namespace {

std::string refusal(const model_keys& keys, index_t head_dim = 128) {
  status found;
  CHECK(!try_rope_of_config(keys, head_dim, found));
  return std::string(found.message());
}
std::string gguf_refusal(const model_keys& keys, index_t head_dim = 128, std::span<const float> rope_freqs = {}) {
  status found;
  CHECK(!try_rope_of_gguf(keys, head_dim, rope_freqs, found));
  return std::string(found.message());
}

TEST_CASE("rope_keys: what config.json of well-known models says") {
  CHECK(rope_of_config({{"rope_theta", "10000.0"}, {"rope_scaling", "null"}}, 64) == rope::plain(64, 10000));
  // Llama 3.1 8B
  CHECK(rope_of_config({{"rope_theta", "500000.0"},
                        {"max_position_embeddings", "131072"},
                        {"rope_scaling.factor", "8.0"},
                        {"rope_scaling.low_freq_factor", "1.0"},
                        {"rope_scaling.high_freq_factor", "4.0"},
                        {"rope_scaling.original_max_position_embeddings", "8192"},
                        {"rope_scaling.rope_type", "llama3"}},
                       128) == rope::llama3(128, 500000, {8, 1, 4, 8192}));
  // gpt-oss, as transformers 5 writes it, words in quotes
  CHECK(rope_of_config({{"rope_parameters.rope_theta", "150000"},
                        {"rope_parameters.rope_type", "\"yarn\""},
                        {"rope_parameters.factor", "32.0"},
                        {"rope_parameters.beta_fast", "32.0"},
                        {"rope_parameters.beta_slow", "1.0"},
                        {"rope_parameters.truncate", "false"},
                        {"rope_parameters.original_max_position_embeddings", "4096"}},
                       64) ==
        rope::yarn(64, 150000, {.factor = 32, .original_max_position_embeddings = 4096, .truncate = false}));
  // What is not said: beta_fast is 32, beta_slow 1.
  CHECK(rope_of_config({{"rope_theta", "150000"},
                        {"rope_scaling.type", "yarn"},
                        {"rope_scaling.factor", "32"},
                        {"rope_scaling.truncate", "false"},
                        {"rope_scaling.original_max_position_embeddings", "4096"}},
                       64) == rope::yarn(64, 150000,
                                         {.factor = 32,
                                          .original_max_position_embeddings = 4096,
                                          .beta_fast = 32,
                                          .beta_slow = 1,
                                          .truncate = false}));
  CHECK(rope_of_config({{"rope_theta", "1e4"}, {"rope_scaling.type", "linear"}, {"rope_scaling.factor", "4"}}, 64) ==
        rope::linear(64, 10000, 4));
  // Where a scaling does not say what it was trained for, the model does; GPT-NeoX rotates a quarter of a head.
  CHECK(rope_of_config({{"rope_theta", "10000"},
                        {"max_position_embeddings", "2048"},
                        {"rotary_pct", "0.25"},
                        {"rope_scaling.type", "yarn"},
                        {"rope_scaling.factor", "2"}},
                       96, rope_pairing::interleaved) ==
        rope::yarn(24, 10000, {.factor = 2, .original_max_position_embeddings = 2048}, rope_pairing::interleaved));
}

TEST_CASE("rope_keys: numbers are a file's, whatever the program's locale writes before decimals") {
  const std::string before = std::setlocale(LC_NUMERIC, nullptr);
  for (const char* comma : {"de_DE.UTF-8", "fr_FR.UTF-8", "ru_RU.UTF-8"})
    if (std::setlocale(LC_NUMERIC, comma) != nullptr) break;
  const auto read = [] {
    status found;
    return try_rope_of_config({{"rope_theta", "10000.5"}}, 64, found);
  };
  const std::optional<rope> found = read();
  std::setlocale(LC_NUMERIC, before.c_str());
  CHECK(found == rope::plain(64, 10000.5));
}

TEST_CASE("rope_keys: what frequencies cannot tell, and what is wrong, is refused in exact words") {
  CHECK(refusal({}) == "sinkcache: rope_theta is missing");
  CHECK(refusal({{"rope_theta", "nan"}}) == "sinkcache: rope_theta was nan, had to be a number");
  CHECK(refusal({{"rope_theta", "0x10"}}) == "sinkcache: rope_theta was 0x10, had to be a number");
  CHECK(refusal({{"rope_theta", ""}}) == "sinkcache: rope_theta was , had to be a number");
  CHECK(refusal({{"rope_theta", "0.5"}}) == "sinkcache: theta was 0.5, had to be finite and at least 1");
  CHECK(refusal({{"rope_theta", "5"}, {"rope_parameters.rope_theta", "6"}}) ==
        "sinkcache: rope_parameters.rope_theta was 6, had to be as rope_theta beside it");
  CHECK(refusal({{"rope_theta", "5"}, {"rope_parameters.rope_type", "default"}, {"rope_scaling.factor", "6"}}) ==
        "sinkcache: rope_scaling was given, had to be null beside rope_parameters");
  CHECK(refusal({{"rope_theta", "5"}, {"partial_rotary_factor", "0.1"}}, 30) ==
        "sinkcache: partial_rotary_factor was 0.1, had to be such that an even number of the 30 dimensions of a head "
        "rotates");
  CHECK(refusal({{"rope_theta", "5"}, {"rope_scaling.type", "dynamic"}, {"rope_scaling.factor", "6"}}) ==
        "sinkcache: rope_scaling.type was dynamic, had to be default, linear, llama3 or yarn: dynamic NTK changes its "
        "frequencies with the length of the sequence");
  CHECK(refusal({{"rope_theta", "5"}, {"rope_parameters.rope_type", "proportional"}}) ==
        "sinkcache: rope_parameters.rope_type was proportional, had to be default, linear, llama3 or yarn: give "
        "rope(inv_freq) with zeros, see docs/rope.md");
  CHECK_THAT(refusal({{"rope_theta", "5"}, {"rope_scaling.mrope_section", "[16, 24, 24]"}}),
             Catch::Contains("M-RoPE gives each token three positions"));
  CHECK(refusal({{"rope_theta", "5"}, {"rope_scaling.type", "linear"}}) == "sinkcache: rope_scaling.factor is missing");
  CHECK(refusal({{"rope_theta", "5"},
                 {"rope_scaling.type", "linear"},
                 {"rope_scaling.factor", "2"},
                 {"rope_scaling.short", "3"}}) ==
        "sinkcache: rope_scaling.short was 3, had to be absent: it is not known here");
  CHECK_THROWS_WITH(rope_of_config({}, 4), "sinkcache: rope_theta is missing");
}

// A host that hands over all of config.json, or none of an object's keys, must not get another model's rope.
TEST_CASE(
    "rope_keys: an object as text, one rope for each type of layer, and other names of the same are not passed over") {
  const auto with = [](const std::string& key, const std::string& value) {
    return model_keys{{"rope_theta", "10000"}, {"max_position_embeddings", "8192"}, {key, value}};
  };
  for (const std::string name : {"rope_scaling", "rope_parameters"}) {
    CHECK(refusal(with(name, R"({"rope_type": "llama3", "factor": 8.0})")) ==
          "sinkcache: " + name + " was given as text, had to be its keys, each with '" + name + ".' before it");
    CHECK(rope_of_config(with(name, "{}"), 64) == rope::plain(64, 10000));
    CHECK(rope_of_config(with(name, "None"), 64) == rope::plain(64, 10000));
  }
  CHECK(refusal({{"rope_parameters.full_attention.rope_theta", "1e6"},
                 {"rope_parameters.sliding_attention.rope_theta", "1e4"}}) ==
        "sinkcache: rope_parameters.full_attention.rope_theta was 1e6, had to be that of one type of layer, as "
        "rope_parameters.rope_theta");
  CHECK(refusal(with("rope_local_base_freq", "10000")) ==
        "sinkcache: rope_local_base_freq was 10000, had to be absent: layers differ, so give each its own keys");
  CHECK_THAT(refusal(with("no_rope_layers", "[1, 1, 1, 0]")), Catch::Contains("layers differ"));
  CHECK(refusal(with("rope_ratio", "500")) ==
        "sinkcache: rope_ratio was 500, had to be 1: multiply rope_theta by it instead");
  CHECK(rope_of_config(with("rope_ratio", "1"), 64) == rope::plain(64, 10000));

  // GPT-NeoX's name for theta, and names for what rotates; two of them have to agree.
  CHECK(rope_of_config({{"rotary_emb_base", "50000"}}, 64) == rope::plain(64, 50000));
  CHECK(rope_of_config(with("rotary_emb_base", "1e4"), 64) == rope::plain(64, 10000));
  CHECK(refusal(with("rotary_emb_base", "50000")) ==
        "sinkcache: rotary_emb_base was 50000, had to be as rope_theta beside it");
  for (const char* name : {"partial_rotary_factor", "rotary_pct", "rope_pct"})
    CHECK(rope_of_config(with(name, "0.25"), 64) == rope::plain(16, 10000));
  CHECK(rope_of_config(with("rotary_dim", "16"), 64) == rope::plain(16, 10000));
  model_keys two = with("partial_rotary_factor", "0.4");
  two["rotary_dim"] = "32";
  CHECK(rope_of_config(two, 80) == rope::plain(32, 10000));
  two["rotary_dim"] = "40";
  CHECK(refusal(two, 80) == "sinkcache: rotary_dim was 40, had to rotate as many dimensions as the keys beside it, 32");
  two = with("rope_parameters.partial_rotary_factor", "0.5");
  two["partial_rotary_factor"] = "0.25";
  CHECK_THAT(refusal(two), Catch::Contains("had to rotate as many dimensions as the keys beside it, 64"));
  CHECK(refusal(with("rotary_dim", "130")) ==
        "sinkcache: rotary_dim was 130, had to be such that an even number of the 128 dimensions of a head rotates");

  // The length that a model was trained for may stand beside the scaling, as in Phi 3.
  CHECK(rope_of_config({{"rope_theta", "10000"},
                        {"max_position_embeddings", "131072"},
                        {"original_max_position_embeddings", "4096"},
                        {"rope_scaling.type", "yarn"},
                        {"rope_scaling.factor", "32"}},
                       64) == rope::yarn(64, 10000, {.factor = 32, .original_max_position_embeddings = 4096}));
}

TEST_CASE("rope_keys: pairs of dimensions are those that llama.cpp rotates for an architecture") {
  const auto pairing_of = [](const std::string& architecture) {
    return rope_of_gguf({{"general.architecture", architecture}}, 64).pairing();
  };
  for (const char* name : {"llama", "baichuan", "command-r", "deepseek", "deepseek2", "granite", "internlm2", "minicpm",
                           "olmo", "smollm3", "starcoder", "xverse"}) {
    CAPTURE(name);
    CHECK(pairing_of(name) == rope_pairing::interleaved);
  }
  for (const char* name : {"falcon", "gemma", "gemma2", "gpt-oss", "gptneox", "nemotron", "olmo2", "phi2", "phi3",
                           "qwen", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2"}) {
    CAPTURE(name);
    CHECK(pairing_of(name) == rope_pairing::half_split);
  }
}

TEST_CASE("rope_keys: what GGUF says") {
  // Pairs are the architecture's.
  CHECK(rope_of_gguf({{"general.architecture", "llama"}, {"llama.rope.freq_base", "500000"}}, 64) ==
        rope::plain(64, 500000, rope_pairing::interleaved));
  CHECK(rope_of_gguf({{"general.architecture", "qwen2"}, {"qwen2.rope.freq_base", "1000000"}}, 64) ==
        rope::plain(64, 1000000));
  CHECK(rope_of_gguf({{"general.architecture", "phi2"}, {"phi2.rope.dimension_count", "32"}}, 80) ==
        rope::plain(32, 10000));
  CHECK(rope_of_gguf({{"general.architecture", "mine"}}, 64, {}, rope_pairing::half_split) == rope::plain(64, 10000));
  CHECK(rope_of_gguf({{"general.architecture", "gpt-oss"},
                      {"gpt-oss.rope.freq_base", "150000"},
                      {"gpt-oss.rope.scaling.type", "yarn"},
                      {"gpt-oss.context_length", "131072"},
                      {"gpt-oss.rope.scaling.factor", "32"},
                      {"gpt-oss.rope.scaling.original_context_length", "4096"}},
                     64) == rope::yarn(64, 150000, {.factor = 32, .original_max_position_embeddings = 4096}));
  CHECK(rope_of_gguf({{"general.architecture", "llama"}, {"llama.rope.scaling.factor", "4"}}, 64) ==
        rope::linear(64, 10000, 4, rope_pairing::interleaved));
  CHECK(
      rope_of_gguf(
          {{"general.architecture", "llama"}, {"llama.rope.scaling.type", "none"}, {"llama.rope.scaling.factor", "4"}},
          64) == rope::plain(64, 10000, rope_pairing::interleaved));
  // Llama 3.1: what frequencies are divided by.
  const std::vector<float> by = {1, 8};
  const std::vector<float> inv_freq = {1, static_cast<float>(1 / (100. * 8))};
  CHECK(rope_of_gguf({{"general.architecture", "llama"}}, 4, by) == rope(inv_freq, rope_pairing::interleaved));

  // Where a scaling does not say what it was trained for, the model does.
  CHECK(rope_of_gguf({{"general.architecture", "qwen2"},
                      {"qwen2.rope.scaling.type", "yarn"},
                      {"qwen2.context_length", "32768"},
                      {"qwen2.rope.scaling.factor", "4"}},
                     64) == rope::yarn(64, 10000, {.factor = 4, .original_max_position_embeddings = 32768}));

  CHECK(gguf_refusal({}) == "sinkcache: general.architecture is missing");
  CHECK(gguf_refusal({{"general.architecture", "mine"}}) ==
        "sinkcache: general.architecture was mine, had to be one whose pairing is known here: say which");
  const auto llama = [](const std::string& key, const std::string& value) {
    return model_keys{{"general.architecture", "llama"}, {"llama.rope." + key, value}};
  };
  CHECK(gguf_refusal(llama("dimension_count", "130")) ==
        "sinkcache: llama.rope.dimension_count was 130, had to be even and from 2 to head_dim, 128");
  CHECK_THAT(gguf_refusal(llama("dimension_sections", "[16, 24, 24]")), Catch::Contains("M-RoPE gives each token"));
  for (const std::string name : {"attn_factor", "yarn_attn_factor", "yarn_ext_factor"}) {
    CHECK(gguf_refusal(llama("scaling." + name, "0.5")) ==
          "sinkcache: llama.rope.scaling." + name + " was 0.5, had to be 1");
    CHECK(rope_of_gguf(llama("scaling." + name, "1.0"), 64) == rope::plain(64, 10000, rope_pairing::interleaved));
  }
  CHECK_THAT(gguf_refusal(llama("scaling.type", "longrope")), Catch::Contains("longrope switches between two sets"));
  CHECK(gguf_refusal(llama("freq_base_swa", "10000")) ==
        "sinkcache: llama.rope.freq_base_swa was 10000, had to be absent: it is not known here");
  CHECK(gguf_refusal(llama("scaling.factor", "2"), 4, by) ==
        "sinkcache: rope_freqs was given, had to be absent beside a scaling of rope");
  CHECK(gguf_refusal(llama("freq_base", "10000"), 8, by) == "sinkcache: rope_freqs.size() was 2, had to be exactly 4");
  const std::vector<float> bad = {1, std::numeric_limits<float>::quiet_NaN()};
  CHECK(gguf_refusal(llama("freq_base", "10000"), 4, bad) ==
        "sinkcache: a number of rope_freqs was nan, had to be from 0.001 to 1e6");
  for (const float edge : {1e-3f, 1e6f}) {
    const float outside = std::nextafter(edge, edge < 1 ? 0.f : 1e7f);
    const std::vector<float> inside = {1, edge}, beyond = {1, outside};
    CHECK_NOTHROW(rope_of_gguf(llama("freq_base", "10000"), 4, inside));
    CHECK_THAT(gguf_refusal(llama("freq_base", "10000"), 4, beyond), Catch::Contains("had to be from 0.001 to 1e6"));
  }
}

}  // namespace
