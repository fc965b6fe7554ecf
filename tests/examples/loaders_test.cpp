// What a file is that is none of ours, and what the loaders share.

#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "../catch.hpp"
#include "compare/files.hpp"
#include "gguf_writer.hpp"
#include "loaders/json.hpp"
#include "loaders/numbers.hpp"
#include "loaders/weights.hpp"
#include "text/utf8.hpp"

namespace {

using namespace std::string_literals;

struct temporary_file {
  explicit temporary_file(const std::string& bytes, const std::string& ending = "")
      : path((std::filesystem::temp_directory_path() / ("sinkcache_loaders_" + std::to_string(getpid()) + ending))
                 .string()) {
    std::ofstream(path, std::ios::binary) << bytes;
  }
  ~temporary_file() { std::filesystem::remove(path); }
  std::string path;
};

std::string refusal(const temporary_file& file) {
  try {
    loaders::weights::open(file.path);
  } catch (const loaders::file_error& error) {
    return error.what();
  }
  return "accepted";
}

// The message without the path, which it begins with.
std::string refusal(const std::string& bytes, const std::string& ending = "") {
  const temporary_file file(bytes, ending);
  const std::string message = refusal(file);
  CHECK(message.starts_with(file.path + ": "));
  return message.substr(std::min(message.size(), file.path.size() + 2));
}

std::string small_length(std::uint64_t length) { return gguf_writer::u64(length); }

}  // namespace

TEST_CASE("a file that is neither GGUF nor safetensors is named as what it is") {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "is empty, had to be a GGUF or safetensors file"},
      {"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 98\n", "is a Git LFS pointer"},
      {"<!DOCTYPE html><html><head><title>404</title></head></html>", "is a web page"},
      {"\n  <html><head><title>404</title></head></html>", "is a web page"},
      {"PK\x03\x04\0\0\x08\x08\0\0\0\0archive/data.pkl"s, "is a zip archive, as PyTorch saves checkpoints"},
      {"\x80\x02}q"s + std::string(100, '\0'), "is a pickle, as PyTorch saves checkpoints"},
      {"\x1f\x8b\x08\0\0\0\0\0\0\x03"s, "is compressed by gzip"},
      {"\x28\xb5\x2f\xfd\x04\0aaaa"s, "is compressed by zstd"},
      {"\xfd"
       "7zXZ\0aaaa"s,
       "is compressed by xz"},
      {"BZh91AY&SY\x80", "is compressed by bzip2"},
      {"7z\xbc\xaf\x27\x1c"s, "is a 7z archive"},
      {"\x89HDF\r\n\x1a\n"s, "is an HDF5 file, as Keras saves weights"},
      {"\xef\xbb\xbf<!doctype html>", "is a web page"},
      {"Entry not found", "is text that begins with 'Entry not found'; had to be a GGUF or safetensors file"},
      {"Invalid username or password.\n", "is text that begins with 'Invalid username or password.'"},
      {R"({"metadata": {"total_size": 1}, "weight_map": {}})", "is JSON: an index or a configuration"},
      {"GGUX\3\0\0\0"s + std::string(100, '\0'), "begins with 'GGUX', had to begin with 'GGUF'"},
      {"gguf\3\0\0\0"s + std::string(100, '\0'), "begins with 'gguf', had to begin with 'GGUF'"},
      {"GGU", "begins with 'GGU', had to begin with 'GGUF'"},
      {"GGML\3\0\0\0"s + std::string(100, '\0'), "header length is"},
      {"tjgg\3\0\0\0"s, "is in a format that llama.cpp had before GGUF (GGJT)"},
      {"lmgg\3\0\0\0"s, "is in a format that llama.cpp had before GGUF (GGML)"},
      {"FUGG\3\0\0\0"s, "is a GGUF file of the other byte order"}};
  for (const std::string ending : {"", ".gguf", ".safetensors"})
    for (const auto& [bytes, message] : cases) {
      if (message.starts_with("header") && ending == ".gguf") continue;
      INFO(ending);
      CHECK_THAT(refusal(bytes, ending), Catch::StartsWith(message));
    }
  // What is called .gguf is not judged as the other format.
  CHECK(refusal("abcd\1efghijkl", ".gguf") == "begins with 'abcd', had to begin with 'GGUF'");
  CHECK(refusal("\xc2\x9b"
                "2J",
                ".gguf") == "begins with '\\xc2\\x9b2J', had to begin with 'GGUF'");
}

TEST_CASE("a safetensors file is one whatever length its header begins with") {
  for (const std::uint64_t length : {0x8b1fULL, 0x3cULL, 0x7bULL, 0x0a0aULL}) {  // gzip, <, { and newlines
    std::string header = R"({"__metadata__":{"hidden_size":"0"}})";
    header.resize(length, ' ');
    if (length < 0x100) header = "{}" + std::string(length - 2, ' ');
    CHECK_THAT(refusal(small_length(length) + header), Catch::Contains("metadata"));
  }
}

TEST_CASE("a sparse file of a terabyte is refused by its size") {
  constexpr std::uint64_t terabyte = std::uint64_t{1} << 40;
  const auto stretched = [](const std::string& begin, const auto& check) {
    const temporary_file file(begin);
    if (::truncate(file.path.c_str(), static_cast<off_t>(terabyte)) != 0) return;  // a file system without sparse files
    check(file);
  };
  const std::string header = R"({"a":{"dtype":"F32","shape":[)" + std::to_string((terabyte - 128) / 4) +
                             R"(],"data_offsets":[0,)" + std::to_string(terabyte - 128) + "]}}";
  const std::string padded = header + std::string(120 - header.size(), ' ');
  stretched(small_length(120) + padded, [](const temporary_file& file) {
    CHECK_THAT(refusal(file), Catch::Contains("has 1099511627776 bytes, must have at most the"));
  });
  stretched("GGUF", [](const temporary_file& file) {
    CHECK_THAT(refusal(file), Catch::Contains("has 1099511627776 bytes, must have at most the"));
  });
  stretched("text", [](const temporary_file& file) {
    CHECK_THROWS_WITH(compare::read_file(file.path), Catch::Contains("has more than 1073741824 bytes"));
  });
}

TEST_CASE("numbers are decimal, and nothing else is read as one") {
  using loaders::decimal_number, loaders::whole_number;
  constexpr std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
  CHECK(whole_number<int>("010", 0, 100) == 10);
  CHECK(whole_number<int>("-5", -5, 5) == -5);
  CHECK(whole_number<std::uint64_t>("18446744073709551615", 0, most) == most);
  for (const char* text : {"", " 1", "1 ", "+1", "0x10", "1e2", "1.0", "101", "-1", "18446744073709551616"})
    CHECK_FALSE(whole_number<std::uint64_t>(text, 0, 100).has_value());
  CHECK(decimal_number("1.5", 0, 2) == 1.5);
  CHECK(decimal_number("5e5", 0, 1e6) == 5e5);
  CHECK(decimal_number("-0.5", -1, 1) == -0.5);
  for (const char* text : {"", "-", "nan", "inf", "0x1p3", " 1", "1 ", "+1", ".5", "1e", "1e400", "1-1", "3", "1,5"})
    CHECK_FALSE(decimal_number(text, 0, 2).has_value());
}

TEST_CASE("JSON of strangers is shallow, has no key twice, and is JSON") {
  CHECK(loaders::parse_json(R"({"a": {"a": [1, {"a": 2}]}, "b": {"a": 1}})").at("b").at("a") == 1);
  CHECK(loaders::parse_json("[[[[[[[[1]]]]]]]]").size() == 1);
  CHECK_THROWS_WITH(loaders::parse_json("[[[[[[[[[1]]]]]]]]]"), "nested more than 8 deep");
  CHECK_THROWS_WITH(loaders::parse_json(R"({"b": [{"a": {}, "c": 1, "a": 2}]})"), "an object that has 'a' twice");
  for (const char* text : {"", "{", "{'a': 1}", "\xff", "[1]]"})
    CHECK_THROWS_WITH(loaders::parse_json(text), "no JSON");
  CHECK_THROWS_WITH(loaders::parse_json("[1e999]"), "JSON with a number that no double holds");
}

TEST_CASE("text that goes to a terminal cannot control it") {
  CHECK(text::without_controls("a\tb\nc d") == "a\tb\nc d");
  CHECK(text::without_controls("a\x1b[2J\x7f\u009b2J\u0085") == "a[2J2J");
  CHECK(text::without_controls("\u00a0\u202eabc\u2066d\u200f\u00e9") == "\u00a0abcd\u200f\u00e9");
  CHECK(text::harmless("a\tb\n\u00e9: \ufffd") == "a\tb\n\u00e9: \ufffd");
  CHECK(text::harmless("\x1b[2J\x7f\u009b\u202e") == "\\x1b[2J\\x7f\\xc2\\x9b\\xe2\\x80\\xae");
  CHECK(text::harmless("\x9b"
                       "2J\xe2\x80") == "\\x9b2J\\xe2\\x80");
}
