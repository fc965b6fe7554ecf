#include "text/tokenizer.hpp"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../catch.hpp"
#include "../effort.hpp"
#include "gguf_writer.hpp"

namespace {

using text::tokenizer;

const std::string data_dir = SINKCACHE_SOURCE_DIR "/tests/data/";

const tokenizer& smollm2() {
  static const tokenizer t(loaders::gguf::load(data_dir + "smollm2-vocab.gguf"));
  return t;
}

struct golden {
  std::string bytes;
  std::vector<int> ids, parsed;
};

std::vector<golden> goldens() {
  std::vector<golden> all;
  std::ifstream file(data_dir + "smollm2-tokens.jsonl");
  for (std::string entry_text; std::getline(file, entry_text);) {
    const nlohmann::json entry = nlohmann::json::parse(entry_text);
    golden g{
        .bytes = entry.value("text", ""), .ids = entry.at("ids"), .parsed = entry.value("parsed", entry.at("ids"))};
    const std::string hex = entry.value("hex", "");
    for (std::size_t i = 0; i < hex.size(); i += 2)
      g.bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    all.push_back(g);
  }
  return all;
}

// One line of the metadata, as in the file.
std::string line(const std::string& key, const auto& value) {
  return gguf_writer::metadata("tokenizer.ggml." + key, value);
}
std::string line(const std::string& key, const std::vector<std::string>& values) {
  std::string bytes = gguf_writer::u32(gguf_writer::text) + gguf_writer::u64(values.size());
  for (const std::string& value : values) bytes += gguf_writer::string(value);
  return gguf_writer::metadata("tokenizer.ggml." + key, gguf_writer::array, bytes);
}
std::string line(const std::string& key, const std::vector<std::int32_t>& values) {
  std::string bytes = gguf_writer::u32(gguf_writer::int32) + gguf_writer::u64(values.size());
  for (const std::int32_t value : values) bytes += gguf_writer::u32(static_cast<std::uint32_t>(value));
  return gguf_writer::metadata("tokenizer.ggml." + key, gguf_writer::array, bytes);
}

loaders::gguf parsed(const std::vector<std::string>& lines) {
  gguf_writer::file file;
  file.metadata = lines;
  const std::string bytes = file.bytes();
  return loaders::gguf::parse(std::as_bytes(std::span(bytes)), "test.gguf");
}

// Each test changes what it is about.
struct vocabulary {
  std::string model = "gpt2", pre = "smollm";
  std::vector<std::string> tokens = {"<|end|>", "a", "b", "c", "ab", "abc", "Ġ", "Ġa"};
  std::vector<std::int32_t> types = {3, 1, 1, 1, 1, 1, 1, 1};
  std::vector<std::string> merges = {"a b", "Ġ a", "ab c"};
  std::uint32_t bos = 0, eos = 0;
  bool adds_bos = false, adds_space = false;

  loaders::gguf file() const {
    return parsed({line("model", model), line("pre", pre), line("tokens", tokens), line("token_type", types),
                   line("merges", merges), line("bos_token_id", bos), line("eos_token_id", eos),
                   line("add_bos_token", adds_bos), line("add_space_prefix", adds_space)});
  }
  tokenizer build() const { return tokenizer(file()); }
};

std::string refusal(const loaders::gguf& file) {
  try {
    const tokenizer t(file);
  } catch (const loaders::file_error& error) {
    return error.what();
  }
  return "accepted";
}

// A vocabulary so changed is refused by a message that has all of `words`.
void check_refused(void (*change)(vocabulary&), const std::vector<std::string>& words) {
  vocabulary v;
  change(v);
  const std::string message = refusal(v.file());
  INFO(message);
  CHECK(message.starts_with("test.gguf: "));
  for (const std::string& word : words) {
    INFO(word);
    CHECK(message.find(word) != std::string::npos);
  }
}

std::string utf8(char32_t c) {
  const auto byte = [](char32_t bits) { return static_cast<char>(bits); };
  if (c < 0x80) return {byte(c)};
  if (c < 0x800) return {byte(0xc0 | c >> 6), byte(0x80 | (c & 63))};
  if (c < 0x10000) return {byte(0xe0 | c >> 12), byte(0x80 | (c >> 6 & 63)), byte(0x80 | (c & 63))};
  return {byte(0xf0 | c >> 18), byte(0x80 | (c >> 12 & 63)), byte(0x80 | (c >> 6 & 63)), byte(0x80 | (c & 63))};
}

// Everything that SmolLM2 has tokens for, common and rare alike.
char32_t random_code_point(effort::dice& dice) {
  for (;;) {
    const std::int64_t bound = std::vector<std::int64_t>{0x7f, 0x7ff, 0xffff, 0x3ffff, 0x10ffff}[dice.bits() % 5];
    const auto c = static_cast<char32_t>(dice.from_to(0, bound));
    if (c >= 0xd800 && c <= 0xdfff) continue;
    if (c >= 0x40000 && c <= 0xbffff) continue;
    if (c == 4 || c == 6 || c == 0x13 || c == 0x14 || c == 0x16 || c == 0x1d) continue;
    return c;
  }
}

std::string random_bytes(effort::dice& dice) {
  std::string bytes;
  for (std::int64_t n = dice.from_to(0, 40); n > 0; --n)
    bytes += dice.one_in(2) ? utf8(random_code_point(dice)) : std::string(1, static_cast<char>(dice.bits()));
  return bytes;
}

}  // namespace

TEST_CASE("SmolLM2's tokens are those of the reference tokenizer") {
  const std::vector<golden> all = goldens();
  CHECK(all.size() == 270);
  for (const golden& g : all) {
    INFO(g.bytes);
    CHECK(smollm2().encode(g.bytes) == g.ids);
    CHECK(smollm2().encode(g.bytes, tokenizer::special::parsed) == g.parsed);
  }
}

TEST_CASE("what the reference encoded is decoded, whole and token by token") {
  int round_trips = 0;
  for (const golden& g : goldens()) {
    INFO(g.bytes);
    const bool has_tokens = std::none_of(g.bytes.begin(), g.bytes.end(), [](char c) {
      return std::string_view("\x04\x06\x13\x14\x16\x1d\xf1\xf2").find(c) != std::string_view::npos;
    });
    if (has_tokens) {
      ++round_trips;
      CHECK(smollm2().decode(g.ids) == text::valid_utf8(g.bytes));
      CHECK(smollm2().decode(g.parsed) == text::valid_utf8(g.bytes));
    }
    text::utf8_stream stream;
    std::string streamed;
    for (const int id : g.ids) {
      const std::string piece = stream.push(smollm2().bytes(id));
      CHECK(text::valid_utf8(piece) == piece);
      streamed += piece;
    }
    streamed += stream.finish();
    CHECK(streamed == smollm2().decode(g.ids));
  }
  CHECK(round_trips > 250);
}

TEST_CASE("SmolLM2's metadata") {
  const tokenizer& t = smollm2();
  CHECK(t.size() == 49152);
  CHECK(t.bos() == 1);
  CHECK(t.eos() == 2);
  CHECK(!t.adds_bos());
  CHECK(t.bytes(2) == "<|im_end|>");
  CHECK(t.is_special(16));
  CHECK(!t.is_special(17));
  CHECK(t.find_special("<|im_start|>") == 1);
  CHECK(!t.find_special("<|im_start|"));
  CHECK(!t.find_special("<|im_start|>>"));
  CHECK(!t.find_special("a"));
  CHECK(!t.find_special(""));
}

TEST_CASE("random valid text comes back exactly, any bytes as the same bytes made valid") {
  effort::dice dice(1);
  for (int i = 0; i < effort::cases(2000); ++i) {
    std::string text;
    for (std::int64_t n = dice.from_to(0, 40); n > 0; --n) text += utf8(random_code_point(dice));
    CHECK(text::valid_utf8(text) == text);
    CHECK(smollm2().decode(smollm2().encode(text)) == text);

    const std::string bytes = random_bytes(dice), valid = text::valid_utf8(bytes);
    CHECK(text::valid_utf8(valid) == valid);
    CHECK(smollm2().encode(bytes) == smollm2().encode(valid));
  }
}

TEST_CASE("bytes in any pieces become the same whole characters") {
  effort::dice dice(2);
  for (int i = 0; i < effort::cases(2000); ++i) {
    const std::string bytes = random_bytes(dice);
    text::utf8_stream stream;
    std::string streamed;
    for (std::size_t first = 0; first < bytes.size();) {
      const auto size = static_cast<std::size_t>(dice.from_to(0, 5));
      const std::string piece = stream.push(std::string_view(bytes).substr(first, size));
      CHECK(text::valid_utf8(piece) == piece);
      streamed += piece;
      first += size;
    }
    CHECK(streamed + stream.finish() == text::valid_utf8(bytes));
    CHECK(stream.finish().empty());
  }
  text::utf8_stream stream;
  CHECK(stream.push("\xf0\x9f").empty());
  CHECK(stream.push("\x98").empty());
  CHECK(stream.push("\x80!") == "\U0001f600!");
  CHECK(stream.push("\xe2\x82").empty());
  CHECK(stream.push("x") == "\ufffdx");
  CHECK(text::valid_utf8("\xed\xa0\x80") == "\ufffd\ufffd\ufffd");
  CHECK(text::valid_utf8("\xf0\x9f\x98") == "\ufffd");
}

// The time is not judged; quadratic work on a million would take minutes.
TEST_CASE("long words and long texts") {
  const auto tokens_of = [](const std::string& unit, std::size_t bytes, tokenizer::special mode) {
    std::string text;
    while (text.size() < bytes) text += unit;
    const std::vector<int> ids = smollm2().encode(text, mode);
    CHECK(smollm2().decode(ids) == text::valid_utf8(text));
    return ids.size();
  };
  const auto long_word = static_cast<std::size_t>(effort::cases(10)) * 100'000;
  CHECK(tokens_of("a", long_word, tokenizer::special::as_text) == long_word / 4);
  for (const std::string unit : {"ab", " ", "7", "\n", "é", "<|im_end|>", "\xff"}) {
    INFO(unit);
    for (const auto mode : {tokenizer::special::as_text, tokenizer::special::parsed}) tokens_of(unit, 30'000, mode);
  }
}

TEST_CASE("pairs are joined by rank, the leftmost of equals first") {
  vocabulary v;
  const tokenizer t = v.build();
  CHECK(t.encode("abc abab ac") == std::vector{5, 6, 4, 4, 7, 3});
  CHECK(t.encode("abc") == std::vector{5});
  CHECK(t.encode("aab bab") == std::vector{1, 4, 6, 2, 4});
  CHECK(t.encode("xaxbx") == std::vector{4});  // what has no token is not there
  CHECK(t.encode("").empty());

  v.tokens = {"<|end|>", "a", "aa", "aaa", "aaaa"};
  v.types = {3, 1, 1, 1, 1};
  v.merges = {"a a", "aa a", "aa aa"};
  CHECK(v.build().encode("aaaaa") == std::vector{2, 3});
  v.merges = {"a a", "aa aa", "aa a"};
  CHECK(v.build().encode("aaaaa") == std::vector{4, 1});
}

TEST_CASE("the longest special token wins") {
  vocabulary v;
  v.tokens = {"<a", "<a>", "<a>>", "é", "<", "a", ">", "Ã", "©"};
  v.types = {3, 3, 3, 3, 1, 1, 1, 1, 1};
  v.merges = {};
  const tokenizer t = v.build();
  CHECK(t.encode("<a>><a><<aé", tokenizer::special::parsed) == std::vector{2, 1, 4, 0, 3});
  CHECK(t.encode("<a>é") == std::vector{4, 5, 6, 7, 8});
  CHECK(t.find_special("<a>") == 1);
  CHECK(t.bytes(7) == "\xc3");
  CHECK(t.decode(std::vector{7, 8, 3, 7}) == "éé\ufffd");
  CHECK_THROWS_AS(t.bytes(9), std::out_of_range);
  CHECK_THROWS_AS(t.bytes(-1), std::out_of_range);
}

TEST_CASE("words that fine-tuning has added are found in any text, and padding nowhere") {
  vocabulary v;
  v.tokens = {"<|end|>", "a", "b", "c", "ab", "abc", "Ġ", "Ġa", "<think>", "ab c", "<", "[PAD]", "[PAD]", "a", ""};
  v.types = {3, 1, 1, 1, 1, 1, 1, 1, 4, 4, 1, 5, 5, 5, 5};
  const tokenizer t = v.build();
  CHECK(t.encode("a<think>b") == std::vector{1, 8, 2});
  CHECK(t.encode("abc<think>ab cab") == std::vector{5, 8, 9, 4});  // before the merges, as special tokens are
  CHECK(t.encode("<thin<think><|end|>") == std::vector{10, 8, 10});
  CHECK(t.encode("<think><|end|>", tokenizer::special::parsed) == std::vector{8, 0});
  CHECK(t.decode(std::vector{1, 8, 9, 11, 14, 1}) == "a<think>ab ca");
  CHECK_FALSE(t.is_special(8));
  CHECK_FALSE(t.find_special("<think>").has_value());
  CHECK_FALSE(t.is_unused(10));
  for (int token = 11; token < 15; ++token) CHECK(t.is_unused(token));
}

TEST_CASE("a vocabulary that is not one is refused by name") {
  const std::string text = "tokenizer.ggml.tokens", merges = "tokenizer.ggml.merges";
  CHECK(refusal(vocabulary().file()) == "accepted");

  check_refused([](vocabulary& v) { v.model = "llama"; }, {"tokenizer.ggml.model", "llama", "gpt2"});
  check_refused([](vocabulary& v) { v.pre = "qwen2"; }, {"tokenizer.ggml.pre", "qwen2", "smollm"});
  check_refused([](vocabulary& v) { v.adds_space = true; }, {"tokenizer.ggml.add_space_prefix", "true", "false"});
  check_refused([](vocabulary& v) { v.bos = 8; }, {"tokenizer.ggml.bos_token_id", "8", "7"});
  check_refused([](vocabulary& v) { v.eos = 0xffffffff; }, {"tokenizer.ggml.eos_token_id", "4294967295"});

  check_refused([](vocabulary& v) { v.tokens = {}, v.types = {}; }, {text, "1 to "});
  check_refused([](vocabulary& v) { v.types.pop_back(); }, {"tokenizer.ggml.token_type", "8 integers"});
  check_refused([](vocabulary& v) { v.types[2] = 6; }, {text + " 2", "'b'", "type 6"});
  check_refused([](vocabulary& v) { v.types[2] = -1; }, {text + " 2", "type -1"});
  check_refused([](vocabulary& v) { v.types[2] = 2; }, {text + " 2", "type 2", "5 (unused)"});
  check_refused([](vocabulary& v) { v.types[2] = 259; }, {text + " 2", "type 259"});
  check_refused([](vocabulary& v) { v.tokens[2] = "\xff", v.types[2] = 4; }, {text + " 2", "\\xff", "UTF-8"});
  check_refused([](vocabulary& v) { v.tokens[2] = "a", v.types[2] = 4; }, {text + " 1 and 2", "unique"});
  check_refused([](vocabulary& v) { v.types[2] = 4; }, {merges + " 0", "needs 'b'", "normal"});
  check_refused([](vocabulary& v) { v.types[2] = 5; }, {merges + " 0", "needs 'b'", "normal"});
  check_refused([](vocabulary& v) { v.tokens[3] = ""; }, {text + " 3", "0 bytes"});
  check_refused([](vocabulary& v) { v.tokens[3] = std::string(1025, 'c'); }, {text + " 3", "1025 bytes", "1024"});
  check_refused([](vocabulary& v) { v.tokens[3] = "c d"; }, {text + " 3", "stand for bytes"});
  check_refused([](vocabulary& v) { v.tokens[3] = "\u4e2d"; }, {text + " 3", "stand for bytes"});
  check_refused([](vocabulary& v) { v.tokens[3] = "\xff"; }, {text + " 3", "\\xff", "stand for bytes"});
  check_refused([](vocabulary& v) { v.tokens[0] = "\xff"; }, {text + " 0", "\\xff", "UTF-8"});
  check_refused([](vocabulary& v) { v.tokens[3] = "a"; }, {text + " 1 and 3", "'a'", "unique"});
  check_refused([](vocabulary& v) { v.tokens[0] = "a"; }, {text + " 0 and 1", "unique"});

  check_refused([](vocabulary& v) { v.merges[1] = "ab"; }, {merges + " 1", "'ab'", "two tokens"});
  check_refused([](vocabulary& v) { v.merges[1] = "a b c"; }, {merges + " 1", "two tokens"});
  check_refused([](vocabulary& v) { v.merges[1] = "a b"; }, {merges + " 0 and 1", "'a b'", "unique"});
  check_refused([](vocabulary& v) { v.merges[1] = " a"; }, {merges + " 1", "needs ''"});
  check_refused([](vocabulary& v) { v.merges[1] = "a "; }, {merges + " 1", "needs ''"});
  check_refused([](vocabulary& v) { v.merges[1] = "a x"; }, {merges + " 1", "needs 'x'"});
  check_refused([](vocabulary& v) { v.merges[1] = "b c"; }, {merges + " 1", "needs 'bc'"});
  check_refused([](vocabulary& v) { v.merges[1] = "<|end|> a"; }, {merges + " 1", "'<|end|>'", "normal"});

  std::map<std::string, std::string> lines = {{"model", line("model", "gpt2")},
                                              {"pre", line("pre", "smollm")},
                                              {"tokens", line("tokens", std::vector<std::string>{"a"})},
                                              {"token_type", line("token_type", std::vector<std::int32_t>{1})},
                                              {"merges", line("merges", std::vector<std::string>{})}};
  const auto file = [&lines] {
    std::vector<std::string> all;
    for (const auto& [key, bytes] : lines) all.push_back(bytes);
    return parsed(all);
  };
  CHECK(refusal(file()) == "accepted");
  for (auto& [key, bytes] : lines) {
    INFO(key);
    const std::string good = bytes;
    bytes = line(key, std::uint32_t{1});
    CHECK(refusal(file()).find("tokenizer.ggml." + key) != std::string::npos);
    bytes = line("something_else", true);
    CHECK(refusal(file()).find("tokenizer.ggml." + key) != std::string::npos);
    bytes = good;
  }
}

TEST_CASE("random damage to a vocabulary is refused or harmless") {
  effort::dice dice(3);
  const std::vector<std::string> bits = {"", " ", "a", "b", "ab", "abc", "Ġ", "<|end|>", "\xff", "a b", "é", "Ã", "©"};
  int accepted = 0;
  for (int i = 0; i < effort::cases(1000); ++i) {
    vocabulary v;
    for (std::int64_t n = dice.from_to(1, 3); n > 0; --n) {
      const std::string& bit = bits[dice.bits() % bits.size()];
      switch (dice.bits() % 4) {
        case 0:
          v.tokens[dice.bits() % v.tokens.size()] = bit;
          break;
        case 1:
          v.types[dice.bits() % v.types.size()] = static_cast<std::int32_t>(dice.from_to(0, 6));
          break;
        case 2:
          v.merges[dice.bits() % v.merges.size()] = bit + " " + bits[dice.bits() % bits.size()];
          break;
        default:
          v.merges.push_back(bit);
      }
    }
    try {
      const tokenizer t = v.build();
      ++accepted;
      for (int n = 0; n < 10; ++n)
        for (const auto mode : {tokenizer::special::as_text, tokenizer::special::parsed}) {
          const std::vector<int> ids = t.encode(bits[dice.bits() % bits.size()] + "abcab" + random_bytes(dice), mode);
          CHECK(std::all_of(ids.begin(), ids.end(), [&t](int id) { return id >= 0 && id < t.size(); }));
          CHECK(t.decode(ids) == text::valid_utf8(t.decode(ids)));
        }
    } catch (const loaders::file_error&) {
    }
  }
  CHECK(accepted > 0);
}
