// What stream_chat makes of a file before it talks.

#include <string>
#include <utility>
#include <vector>

#include "../catch.hpp"
#include "chat/options.hpp"
#include "chat/text_model.hpp"
#include "compare/loaded_model.hpp"
#include "compare/options.hpp"
#include "llama_gguf.hpp"

namespace {

using chat::text_model;
using plain::temporary_file;
namespace w = gguf_writer;
using words = std::vector<std::pair<std::string, std::uint32_t>>;

const words chat_marks = {{"<|im_start|>", 3}, {"<|im_end|>", 3}, {"<think>", 4}, {"[PAD]", 5}};
constexpr int im_start = 258, im_end = 259, think = 260, pad = 261;

constexpr const char* chatml =
    "{% if true %}{{ '<|im_start|>system\nThe sea.<|im_end|>\n' }}{% endif %}<|im_start|>user\n";

void write_model(const temporary_file& file, sinkcache::index_t rows, const words& more,
                 const std::vector<std::string>& metadata = {}) {
  const plain::plain_model m = plain::random_model({1, 8, 2, 1, 4, 6, rows, true, "softmax"}, 9);
  w::file gguf = plain::llama_file(m);
  for (const std::string& each : plain::vocabulary_metadata(more)) gguf.metadata.push_back(each);
  gguf.metadata.insert(gguf.metadata.end(), metadata.begin(), metadata.end());
  plain::write(file.path, gguf.bytes());
}

template <class Model>
std::string refusal(const temporary_file& file) {
  try {
    const Model model(file.path);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "accepted";
}

std::vector<int> bytes(const std::string& text) {
  return {reinterpret_cast<const unsigned char*>(text.data()),
          reinterpret_cast<const unsigned char*>(text.data()) + text.size()};
}

std::vector<int> joined(const std::vector<std::vector<int>>& parts) {
  std::vector<int> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

}  // namespace

TEST_CASE("every program has one rule for vocabularies") {
  const auto both = [](const temporary_file& file) {
    const std::string refused = refusal<compare::loaded_model>(file);
    CHECK(refusal<text_model>(file) == refused);
    return refused;
  };
  const temporary_file file;
  for (const sinkcache::index_t rows : {262, 263, 320}) {  // padded or not
    write_model(file, rows, chat_marks);
    CHECK(both(file) == "accepted");
  }
  write_model(file, 261, chat_marks);
  CHECK_THAT(both(file), Catch::Contains("tokenizer.ggml.tokens has 262 tokens, had to have at most 261"));
  const plain::plain_model m = plain::random_model({1, 8, 2, 1, 4, 6, 257, true, "softmax"}, 9);
  plain::write(file.path, plain::llama_file(m).bytes());
  CHECK_THAT(both(file), Catch::Contains("metadata: tokenizer.ggml.model is missing"));

  for (const sinkcache::index_t rows : {256, 257}) {
    plain::random_model({1, 8, 2, 1, 4, 6, rows, true, "softmax"}, 9).write(file.path);
    CHECK(both(file) == "accepted");
  }
  for (const sinkcache::index_t rows : {200, 255, 258, 4096}) {
    plain::random_model({1, 8, 2, 1, 4, 6, rows, true, "softmax"}, 9).write(file.path);
    CHECK_THAT(both(file), Catch::Contains("tokens and no tokenizer, had to have 256 (bytes) or 257"));
  }
}

TEST_CASE("a chat begins with the system turn of its template, and with BOS where the model expects it") {
  const temporary_file file;
  const std::string turn = "system\nThe sea.";
  write_model(file, 262, chat_marks, {w::metadata("tokenizer.chat_template", chatml)});
  const std::vector<int> plain_turn = joined({{im_start}, bytes(turn), {im_end}, bytes("\n")});
  // Bytes are their own tokens here but for the alphabet's order.
  const text_model model(file.path);
  CHECK(model.system_turn().size() == plain_turn.size());
  CHECK(model.system_turn().front() == im_start);
  CHECK(model.system_turn()[model.system_turn().size() - 2] == im_end);

  write_model(file, 262, chat_marks,
              {w::metadata("tokenizer.chat_template", chatml), w::metadata("tokenizer.ggml.add_bos_token", true),
               w::metadata("tokenizer.ggml.bos_token_id", 259u)});
  const std::vector<int> with_bos = text_model(file.path).system_turn();
  CHECK(with_bos.size() == plain_turn.size() + 1);
  CHECK(with_bos.front() == 259);

  write_model(file, 262, chat_marks, {w::metadata("tokenizer.chat_template", "<|im_start|>user")});
  CHECK(text_model(file.path).system_turn().empty());
  write_model(file, 262, chat_marks, {w::metadata("tokenizer.chat_template", "<|start_header_id|>")});
  CHECK_THROWS_WITH(text_model(file.path).system_turn(), Catch::Contains("has no ChatML template"));
  write_model(file, 262, {{"<|im_start|>", 4}, {"<|im_end|>", 3}, {"a1", 5}, {"a2", 5}},
              {w::metadata("tokenizer.chat_template", chatml)});
  CHECK_THROWS_WITH(text_model(file.path).system_turn(), Catch::Contains("has no ChatML template"));
}

TEST_CASE("what is no text is not drawn: padding never, special tokens not where a model only writes") {
  const temporary_file file;
  write_model(file, 264, chat_marks);
  const text_model model(file.path);
  const std::vector<bool> writes = model.banned(true), talks = model.banned(false);
  REQUIRE(writes.size() == 264);
  for (std::size_t token = 0; token < 264; ++token) {
    const bool is_padding = token == pad || token >= 262, is_control = token == im_start || token == im_end;
    CHECK(talks[token] == is_padding);
    CHECK(writes[token] == (is_padding || is_control));
  }
  CHECK(model.bytes(think) == "<think>");
  CHECK(model.encode("the<think>") == std::vector<int>{257, think});
}

TEST_CASE("in a chat the whole system turn is pinned, or it is said that it is not") {
  const auto parsed = [](std::vector<const char*> arguments) {
    arguments.insert(arguments.begin(), "stream_chat");
    return *chat::parse_options(static_cast<int>(arguments.size()), arguments.data());
  };
  CHECK(parsed({}).policy == "sinks:system");
  CHECK(parsed({"--write", "x"}).policy == "sinks:4");
  CHECK(pinned_tokens(parsed({}), 21) == 21);
  CHECK(pinned_tokens(parsed({}), 0) == 4);
  CHECK(pinned_tokens(parsed({"--cache", "3"}), 0) == 2);
  CHECK(pinned_tokens(parsed({"--cache", "22"}), 21) == 21);
  CHECK_THROWS_WITH(pinned_tokens(parsed({"--cache", "21"}), 21),
                    Catch::Contains("--cache is 21, had to be above 21, the tokens of the system turn"));
  CHECK(pinned_tokens(parsed({"--policy", "sinks:31"}), 21) == 31);
  CHECK(pinned_tokens(parsed({"--policy", "window"}), 21) == 0);
  CHECK(pinned_tokens(parsed({"--write", "x"}), 0) == 4);

  for (const char* policy : {"sinks:system", "sinks:21", "sinks:31", "full"})
    CHECK(pinning_hint(parsed({"--policy", policy}), 21).empty());
  CHECK(pinning_hint(parsed({"--policy", "sinks:4"}), 21) ==
        "--policy sinks:4 pins 4 of the 21 tokens of the system turn, and the model will forget the others: "
        "sinks:system pins all");
  CHECK_THAT(pinning_hint(parsed({"--policy", "window"}), 21), Catch::Contains("pins 0 of the 21 tokens"));

  CHECK_THROWS_WITH(
      parsed({"--policy", "sinks:system", "--write", "x"}),
      Catch::Contains("--policy is 'sinks:system', had to be window, sinks:N with N from 1 to 511, or full"));
  CHECK_THROWS_WITH(parsed({"--policy", "sinks:512"}), Catch::Contains("N from 1 to 511, sinks:system, or full"));
}
