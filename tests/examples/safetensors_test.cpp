#include "loaders/safetensors.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "file_errors.hpp"

namespace {

using loaders::file_error;
using loaders::safetensors;

constexpr auto file_name = "hostile.safetensors";

std::string length_prefix(std::uint64_t n) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>((n >> (8 * i)) & 255);
  return out;
}

std::string file_of(const std::string& header, const std::string& data) {
  return length_prefix(header.size()) + header + data;
}

std::string tensor_entry(const std::string& name, const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

safetensors parse(const std::string& file) { return safetensors::parse(std::as_bytes(std::span(file)), file_name); }

// The error, or "" where there is none; a file that is accepted must also be readable to its last value.
std::string error_of(const std::string& file) {
  try {
    const safetensors parsed = parse(file);
    for (const std::string& name : parsed.names()) {
      std::uint64_t product = 1;
      for (const std::int64_t dim : parsed.shape(name)) product *= static_cast<std::uint64_t>(dim);
      if (parsed.read(name).values.size() != product) return "the values of " + name + " do not fill its shape";
    }
    return "";
  } catch (const file_error& e) {
    return e.what();
  }
}

bool is_clean(const std::string& error) { return error.empty() || is_presentable(error, file_name); }

std::string repeated(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

// A file in memory that uses every part of the format: metadata, three dtypes, an empty tensor, a scalar, padding.
std::string small_file() {
  const std::string header = R"({"__metadata__":{"format":"pt","n":"2"},)" + tensor_entry("b", "F16", "[2]", "[8,12]") +
                             "," + tensor_entry("a", "F32", "[1,2]", "[0,8]") + "," +
                             tensor_entry("none", "F32", "[3,0]", "[12,12]") + "," +
                             tensor_entry("one", "BF16", "[]", "[12,14]") + "}   ";
  std::string data = length_prefix(0xc0200000'3f800000u);  // 1 and -2.5
  data += length_prefix(0x3f80'fc00'3c00u).substr(0, 6);   // 1 and -inf, 1
  return file_of(header, data);
}

std::size_t header_end(const std::string& file) {
  std::size_t n = 0;
  for (int i = 7; i >= 0; --i) n = n * 256 + static_cast<unsigned char>(file[static_cast<std::size_t>(i)]);
  return 8 + n;
}

// A folder that goes away with the test.
struct scratch_folder {
  scratch_folder() {
    std::string name = (std::filesystem::temp_directory_path() / "safetensors-test-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~scratch_folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  std::string write(const std::string& name, const std::string& content) const {
    const std::string file = (path / name).string();
    std::ofstream(file, std::ios::binary) << content;
    return file;
  }
  std::filesystem::path path;
};

std::string load_error(const std::string& path) {
  try {
    safetensors::load(path);
    return "";
  } catch (const file_error& e) {
    return e.what();
  }
}

}  // namespace

TEST_CASE("safetensors: a good file is read as it is", "[safetensors]") {
  const safetensors file = parse(small_file());
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}, {"n", "2"}});
  CHECK(file.names() == std::vector<std::string>{"a", "b", "none", "one"});
  CHECK(file.contains("a"));
  CHECK_FALSE(file.contains("c"));
  CHECK_FALSE(file.contains("__metadata__"));
  CHECK(file.shape("a") == std::vector<std::int64_t>{1, 2});
  CHECK(file.read("a").shape == std::vector<std::int64_t>{1, 2});
  CHECK(file.read("a").values == std::vector<float>{1.0f, -2.5f});
  CHECK(file.read("b").values == std::vector<float>{1.0f, -std::numeric_limits<float>::infinity()});
  CHECK(file.read("none").shape == std::vector<std::int64_t>{3, 0});
  CHECK(file.read("none").values.empty());
  CHECK(file.read("one").shape.empty());
  CHECK(file.read("one").values == std::vector<float>{1.0f});
  CHECK_THROWS_AS(file.shape("c"), file_error);
  CHECK_THROWS_WITH(file.read("c\n\x1b[2J"), "hostile.safetensors: has no tensor 'c\\x0a\\x1b[2J'");
}

TEST_CASE("safetensors: what is odd but allowed is accepted", "[safetensors]") {
  const std::string w = tensor_entry("w", "F32", "[1]", "[0,4]");
  const std::string four(4, '\0');
  CHECK(error_of(file_of("{}", "")) == "");
  CHECK(parse(file_of("{}", "")).metadata().empty());
  CHECK(error_of(file_of(R"({"__metadata__":{}})", "")) == "");
  CHECK(error_of(file_of("{" + w + "}" + std::string(1000, ' '), four)) == "");
  CHECK(error_of(file_of("{\n\t" + w + "\r\n}", four)) == "");
  CHECK(error_of(file_of("{" + tensor_entry("", "F32", "[1]", "[0,4]") + "}", four)) == "");
  CHECK(error_of(file_of("{" + tensor_entry("\u00e9\\u00e9", "F32", "[1]", "[0,4]") + "}", four)) == "");
  CHECK(error_of(file_of(R"({"w":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}})", four)) == "");
  CHECK(error_of(file_of("{" + tensor_entry("w", "F32", "[1,1,1,1,1,1,1,1]", "[0,4]") + "}", four)) == "");
  CHECK(error_of(file_of("{" + tensor_entry("w", "F32", "[0,1099511627776]", "[0,0]") + "}", "")) == "");
  CHECK(error_of(file_of(R"({"__metadata__":{"w":"1"},)" + w + "}", four)) == "");
  for (const char* nan_or_inf : {"\xff\xff\xff\xff", "\xff\xff\xbf\x7f"}) {
    CHECK(error_of(file_of("{" + w + "}", nan_or_inf)) == "");
    CHECK(std::isnan(parse(file_of("{" + w + "}", nan_or_inf)).read("w").values[0]));
  }
  CHECK(std::isinf(parse(file_of("{" + w + "}", std::string("\0\0\x80\x7f", 4))).read("w").values[0]));
}

TEST_CASE("safetensors: every hostile file gets an error that names what is wrong", "[safetensors]") {
  struct hostile {
    std::string file, phrase;
  };
  const auto header = [](const std::string& text, std::size_t data_bytes = 0) {
    return file_of(text, std::string(data_bytes, '\0'));
  };
  const auto one = [&](const std::string& dtype, const std::string& shape, const std::string& offsets,
                       std::size_t data_bytes) {
    return header("{" + tensor_entry("w", dtype, shape, offsets) + "}", data_bytes);
  };
  const auto two = [&](const std::string& first, const std::string& second, std::size_t data_bytes) {
    return header("{" + tensor_entry("v", "F16", "[4]", first) + "," + tensor_entry("w", "F16", "[4]", second) + "}",
                  data_bytes);
  };
  const std::string w = tensor_entry("w", "F32", "[1]", "[0,4]");
  const std::string nul(1, '\0');
  const std::string dims_8 = "1,1,1,1,1,1,1,1";

  const std::vector<hostile> cases = {
      // the header's length
      {"", "is 0 bytes long, must be at least 8"},
      {"1234567", "is 7 bytes long, must be at least 8"},
      {length_prefix(0), "header begins with '', must begin with '{'"},
      {length_prefix(1), "header length is 1, must be at most the 0 bytes"},
      {length_prefix(3) + "{}", "header length is 3, must be at most the 2 bytes"},
      {length_prefix(safetensors::max_header_bytes) + "{}", "header length is 16777216, must be at most the 2 bytes"},
      {length_prefix(safetensors::max_header_bytes + 1) + "{}", "header length is 16777217, must be at most 16777216"},
      {length_prefix(100'000'000) + "{}", "header length is 100000000, must be at most 16777216"},
      {length_prefix(std::uint64_t{1} << 63) + "{}", "header length is 9223372036854775808, must be at most"},
      {length_prefix(~std::uint64_t{0}) + "{}", "header length is 18446744073709551615, must be at most"},
      {length_prefix(~std::uint64_t{0} - 7) + "{}", "header length is 18446744073709551608, must be at most"},
      {std::string("\0\0\0\0\0\0\0\2{}", 10), "header length is 144115188075855872, must be at most"},  // big-endian
      {"GGUF\3\0\0\0" + std::string(20, '\0'), "must be at most 16777216: not a safetensors file?"},
      // the header as JSON
      {header(" {}"), "header begins with ' ', must begin with '{'"},
      {header("\xef\xbb\xbf{}"), "header begins with '\\xef', must begin with '{'"},
      {header("[]"), "header begins with '[', must begin with '{'"},
      {header("PK\3\4"), "header begins with 'P', must begin with '{'"},
      {header("{"), "cannot be read at its byte 2"},
      {header("{\"w\""), "must be one JSON object in UTF-8, but cannot be read at its byte 5"},
      {header("{x}"), "cannot be read at its byte 2"},
      {header("{} x"), "cannot be read at its byte 4"},
      {header("{}{}"), "cannot be read at its byte 3"},
      {header("{},"), "cannot be read at its byte 3"},
      {header("{" + w + ",}", 4), "cannot be read at its byte"},
      {header("{'w':1}"), "cannot be read at its byte 2"},
      {header("{/**/}"), "cannot be read at its byte 2"},
      {header("{}" + nul + "{}"), "header has a NUL at its byte 3"},
      {header("{}" + nul), "header has a NUL at its byte 3"},
      {header("{\"w" + nul + "\":1}"), "header has a NUL at its byte 4"},
      {header("{\"\xff\":1}"), "cannot be read at its byte 3"},
      {header("{\"\xc0\xaf\":1}"), "cannot be read at its byte 3"},          // overlong
      {header("{\"\xed\xa0\x80\":1}"), "cannot be read at its byte 4"},      // surrogate in UTF-8
      {header("{\"\xf4\x90\x80\x80\":1}"), "cannot be read at its byte 4"},  // above U+10FFFF
      {header("{\"\\ud800\":1}"), "cannot be read at its byte"},
      {header("{\"\x1b[2J\":1}"), "cannot be read at its byte 3, after"},
      {header("{\"__metadata__\":{\"a\":\"\xe9\"}}"), "cannot be read at its byte 24"},
      // nesting
      {header(std::string(100'000, '[')), "header begins with '['"},
      {header(R"({"w":)" + std::string(100'000, '[')), "entry 'w' is an array, must be an object"},
      {header(repeated(R"({"w":)", 100'000)), "tensor 'w' has a field 'w'"},
      {header(R"({"w":{"shape":)" + std::string(100'000, '[')), "shape of tensor 'w' holds an array"},
      {header(R"({"w":{"shape":{"a":1}}})"), "shape of tensor 'w' is an object, must be an array"},
      {header(R"({"w":{"dtype":)" + std::string(100'000, '[')), "dtype of tensor 'w' is an array, must be a string"},
      {header(R"({"w":{"data_offsets":[{}]}})"), "data_offsets of tensor 'w' holds an object"},
      {header(R"({"__metadata__":{"a":)" + repeated(R"({"a":)", 100'000)), "'a' in __metadata__ is an object"},
      {header(R"({"__metadata__":{"a":)" + std::string(100'000, '[')), "'a' in __metadata__ is an array"},
      // duplicates
      {header("{" + w + "," + w + "}", 4), "the header has tensor 'w' twice"},
      {header("{" + w + "," + tensor_entry("\\u0077", "F32", "[1]", "[4,8]") + "}", 8), "has tensor 'w' twice"},
      {header(R"({"__metadata__":{},"__metadata__":{}})"), "has '__metadata__' twice"},
      {header(R"({"__metadata__":{"a":"1","b":"2","a":"3"}})"), "__metadata__ has 'a' twice"},
      {header(R"({"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4), "'w' has dtype twice"},
      {header(R"({"w":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}})", 4), "'w' has shape twice"},
      {header(R"({"w":{"shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]}})", 4), "'w' has data_offsets twice"},
      // metadata
      {header(R"({"__metadata__":{"a":3}})"), "'a' in __metadata__ is the number 3, must be a string"},
      {header(R"({"__metadata__":{"a":-3}})"), "'a' in __metadata__ is the number -3, must be a string"},
      {header(R"({"__metadata__":{"a":null}})"), "'a' in __metadata__ is null, must be a string"},
      {header(R"({"__metadata__":{"a":true}})"), "'a' in __metadata__ is true, must be a string"},
      {header(R"({"__metadata__":[]})"), "entry '__metadata__' is an array, must be an object"},
      {header(R"({"__metadata__":"a"})"), "entry '__metadata__' is the string 'a', must be an object"},
      {header(R"({"__metadata__":null})"), "entry '__metadata__' is null, must be an object"},
      // a tensor's fields
      {header(R"({"w":1})"), "entry 'w' is the number 1, must be an object"},
      {header(R"({"w":{}})"), "tensor 'w' has no dtype"},
      {header(R"({"w":{"shape":[1],"data_offsets":[0,4]}})", 4), "tensor 'w' has no dtype"},
      {header(R"({"w":{"dtype":"F32","data_offsets":[0,4]}})", 4), "tensor 'w' has no shape"},
      {header(R"({"w":{"dtype":"F32","shape":[1]}})", 4), "tensor 'w' has no data_offsets"},
      {header(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", 4), "tensor 'w' has a field 'x'"},
      {header(R"({"w":{"Dtype":"F32"}})"), "tensor 'w' has a field 'Dtype'"},
      {header(R"({"w":{"dtype":32}})"), "dtype of tensor 'w' is the number 32, must be a string"},
      {header(R"({"w":{"dtype":null}})"), "dtype of tensor 'w' is null, must be a string"},
      {header(R"({"w":{"shape":"[1]"}})"), "shape of tensor 'w' is the string '[1]', must be an array"},
      {header(R"({"w":{"data_offsets":4}})"), "data_offsets of tensor 'w' is the number 4, must be an array"},
      {header(R"({"a\u0000b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4),
       "'a\\x00b' must not hold control"},
      {header(R"({"a\u001b[2J":1})"), "'a\\x1b[2J' must not hold control"},
      {header("{\"a\x7f\":1}"), "'a\\x7f' must not hold control"},
      {header(R"({"a\nb":1})"), "'a\\x0ab' must not hold control"},
      {header("{\"" + std::string(1'000'000, 'n') + "\":1}"),
       "entry '" + std::string(60, 'n') + "...' is the number 1"},
      // dtypes
      {one("I64", "[1]", "[0,8]", 8), "tensor 'w' has dtype 'I64' (64 bits, not supported), must be F32, F16 or BF16"},
      {one("F64", "[1]", "[0,8]", 8), "tensor 'w' has dtype 'F64' (64 bits, not supported)"},
      {one("U8", "[1]", "[0,1]", 1), "tensor 'w' has dtype 'U8' (8 bits, not supported)"},
      {one("F4", "[2]", "[0,1]", 1), "tensor 'w' has dtype 'F4' (4 bits, not supported)"},
      {one("f32", "[1]", "[0,4]", 4), "tensor 'w' has dtype 'f32', must be F32, F16 or BF16"},
      {one("", "[1]", "[0,4]", 4), "tensor 'w' has dtype '', must be F32, F16 or BF16"},
      {one("\\u001b]0;\\u0007", "[1]", "[0,4]", 4), "tensor 'w' has dtype '\\x1b]0;\\x07', must be F32"},
      // shapes
      {one("F32", "[-1]", "[0,4]", 4), "shape of tensor 'w' holds the number -1, must hold non-negative integers"},
      {one("F32", "[-1,-1]", "[0,4]", 4), "shape of tensor 'w' holds the number -1"},
      {one("F32", "[-0]", "[0,0]", 0), "shape of tensor 'w' holds the number -0"},
      {one("F32", "[1.0]", "[0,4]", 4), "shape of tensor 'w' holds the number 1.0"},
      {one("F32", "[1e0]", "[0,4]", 4), "shape of tensor 'w' holds the number 1e0"},
      {one("F32", "[1e999]", "[0,4]", 4), "after '1e999'"},
      {one("F32", "[01]", "[0,4]", 4), "cannot be read at its byte"},
      {one("F32", "[NaN]", "[0,4]", 4), "cannot be read at its byte"},
      {one("F32", "[\"1\"]", "[0,4]", 4), "shape of tensor 'w' holds the string '1'"},
      {one("F32", "[true]", "[0,4]", 4), "shape of tensor 'w' holds true"},
      {one("F32", "[null]", "[0,4]", 4), "shape of tensor 'w' holds null"},
      {one("F32", "[1099511627777]", "[0,4]", 4), "holds 1099511627777, must hold at most 1099511627776"},
      {one("F32", "[9223372036854775807]", "[0,4]", 4), "shape of tensor 'w' holds 9223372036854775807, must hold at"},
      {one("F32", "[18446744073709551615]", "[0,4]", 4), "shape of tensor 'w' holds 18446744073709551615, must hold"},
      {one("F32", "[18446744073709551616]", "[0,4]", 4), "shape of tensor 'w' holds the number 18446744073709551616"},
      {one("F32", "[-9223372036854775809]", "[0,4]", 4), "shape of tensor 'w' holds the number -9223372036854775809"},
      {one("F32", "[" + std::string(100'000, '9') + "]", "[0,4]", 4), "cannot be read at its byte"},
      {one("F32", "[" + dims_8 + ",1]", "[0,4]", 4), "shape of tensor 'w' has more than 8 dimensions"},
      {one("F32", "[1" + repeated(",1", 1'000'000) + "]", "[0,4]", 4), "has more than 8 dimensions"},
      {one("F32", "[1099511627776,1099511627776]", "[0,4]", 4),
       "[1099511627776, 1099511627776] of tensor 'w' overflows"},
      {one("F32", "[4294967296,4294967296]", "[0,0]", 0), "of tensor 'w' overflows"},    // 2^66, 0 in 64 bits
      {one("F32", "[4294967296,1073741824,2]", "[0,0]", 0), "of tensor 'w' overflows"},  // 2^65
      {one("F32", "[2147483649,2147483648]", "[0,0]", 0), "of tensor 'w' overflows"},    // above 2^63
      {one("F16", "[2147483648,2147483648,2]", "[0,0]", 0), "of tensor 'w' overflows"},  // exactly 2^64
      {one("F32", "[1099511627776,1099511627776,0]", "[0,0]", 0), "of tensor 'w' overflows"},
      {one("F32", "[0,1099511627776,1099511627776]", "[0,0]", 0), "of tensor 'w' overflows"},
      {one("F32", "[2]", "[0,4]", 4), "takes 8 bytes as F32 of shape [2], but its data_offsets [0, 4] hold 4"},
      {one("F32", "[1]", "[0,8]", 8), "takes 4 bytes as F32 of shape [1], but its data_offsets [0, 8] hold 8"},
      {one("BF16", "[2]", "[0,8]", 8), "takes 4 bytes as BF16 of shape [2], but"},
      {one("F32", "[0]", "[0,4]", 4), "takes 0 bytes as F32 of shape [0], but"},
      {one("F32", "[]", "[0,0]", 0), "takes 4 bytes as F32 of shape [], but"},
      // offsets
      {one("F32", "[1]", "[4,0]", 4), "data_offsets of tensor 'w' is [4, 0], must not run backwards"},
      {one("F32", "[1]", "[18446744073709551612,0]", 4), "is [18446744073709551612, 0], must not run backwards"},
      {one("F32", "[1]", "[-4,0]", 4), "data_offsets of tensor 'w' holds the number -4"},
      {one("F32", "[1]", "[0,4.0]", 4), "data_offsets of tensor 'w' holds the number 4.0"},
      {one("F32", "[1]", "[0,\"4\"]", 4), "data_offsets of tensor 'w' holds the string '4'"},
      {one("F32", "[1]", "[0,4e0]", 4), "data_offsets of tensor 'w' holds the number 4e0"},
      {one("F32", "[1]", "[]", 4), "data_offsets of tensor 'w' holds 0 numbers, must hold 2"},
      {one("F32", "[1]", "[4]", 4), "data_offsets of tensor 'w' holds 1 numbers, must hold 2"},
      {one("F32", "[1]", "[0,4,4]", 4), "data_offsets of tensor 'w' holds more than 2 numbers"},
      {one("F32", "[1]", "[0,4]", 0), "ends at 4, must end within the 0 bytes of data"},
      {one("F32", "[1]", "[0,4]", 3), "ends at 4, must end within the 3 bytes of data: is the file truncated?"},
      {one("F32", "[1]", "[0,18446744073709551615]", 4), "ends at 18446744073709551615, must end within the 4 bytes"},
      {one("F32", "[268435456]", "[0,1073741824]", 4), "ends at 1073741824, must end within the 4 bytes of data"},
      {one("F32", "[1]", "[18446744073709551612,18446744073709551615]", 4), "ends at 18446744073709551615, must end"},
      // the layout of all together
      {one("F32", "[1]", "[0,4]", 5), "end at 4 of the data, must end with it at 5: trailing bytes"},
      {one("F32", "[1]", "[4,8]", 8),
       "'w' begins at 4 of the data, must begin at 0, where the one before ends: there is a gap"},
      {header("{}", 1), "end at 0 of the data, must end with it at 1: trailing bytes"},
      {two("[0,8]", "[0,8]", 8), "begins at 0 of the data, must begin at 8, where the one before ends: they overlap"},
      {two("[0,8]", "[4,12]", 12),
       "'w' begins at 4 of the data, must begin at 8, where the one before ends: they overlap"},
      {two("[4,12]", "[0,8]", 12),
       "'v' begins at 4 of the data, must begin at 8, where the one before ends: they overlap"},
      {two("[0,8]", "[9,17]", 17),
       "'w' begins at 9 of the data, must begin at 8, where the one before ends: there is a gap"},
      {two("[0,8]", "[8,16]", 17), "end at 16 of the data, must end with it at 17: trailing bytes"},
      {two("[0,8]", "[8,16]", 15), "ends at 16, must end within the 15 bytes of data"},
      {header("{" + w + "," + tensor_entry("none", "F32", "[0]", "[2,2]") + "}", 4), "'none' begins at 2 of the data"},
      {header("{" + tensor_entry("none", "F32", "[0]", "[1,1]") + "}", 1), "'none' begins at 1 of the data"},
  };
  CHECK(cases.size() >= 40);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const std::string error = error_of(cases[i].file);
    INFO("case " << i << ", expected: " << cases[i].phrase << "\nerror: " << error);
    CHECK(error.find(cases[i].phrase) != std::string::npos);
    CHECK(is_presentable(error, file_name));
  }
}

TEST_CASE("safetensors: the dtype table knows every name of the format", "[safetensors]") {
  for (const char* dtype : {"BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16",
                            "U16", "I32", "U32", "I64", "U64", "F64", "C64"}) {
    const std::string error = error_of(file_of("{" + tensor_entry("w", dtype, "[0]", "[0,0]") + "}", ""));
    INFO(error);
    CHECK(error.find(std::string("'") + dtype + "' (") != std::string::npos);
  }
}

TEST_CASE("safetensors: a large hostile header costs no more than its size", "[safetensors]") {
  // Very many tensors that share a long prefix: neither the sort nor the maps may go quadratic.
  std::string header = "{";
  const std::string prefix(40, 'p');
  int n = 0;
  for (; header.size() < safetensors::max_header_bytes / 8; ++n) {
    if (n > 0) header += ",";
    header += tensor_entry(prefix + std::to_string(n), "F32", "[0]", "[0,0]");
  }
  CHECK(parse(file_of(header + "}", "")).names().size() == static_cast<std::size_t>(n));
  CHECK(error_of(file_of(header + "," + tensor_entry(prefix + "0", "F32", "[0]", "[0,0]") + "}", "")).find("twice") !=
        std::string::npos);

  std::string full = "{}";
  full.resize(safetensors::max_header_bytes, ' ');
  CHECK(error_of(file_of(full, "")) == "");
  CHECK(error_of(file_of(full + " ", "")).find("must be at most 16777216") != std::string::npos);
}

TEST_CASE("safetensors: every truncation is refused", "[safetensors]") {
  const std::string file = small_file();
  REQUIRE(error_of(file) == "");
  for (std::size_t n = 0; n < file.size(); ++n) {
    const std::string error = error_of(file.substr(0, n));
    INFO("cut to " << n << " bytes: " << error);
    CHECK(is_presentable(error, file_name));
  }
  CHECK(error_of(file + "x").find("trailing bytes") != std::string::npos);
}

TEST_CASE("safetensors: every change of one byte of the header is refused cleanly or read cleanly", "[safetensors]") {
  const std::string good = small_file();
  const std::size_t end = header_end(good);
  std::size_t accepted = 0, refused = 0;
  for (std::size_t i = 0; i < end; ++i) {
    const bool all_values = i < 8 || i % 4 == 0;  // elsewhere each bit alone
    for (int flip = 1; flip < 256; flip = all_values ? flip + 1 : flip * 2) {
      std::string file = good;
      file[i] = static_cast<char>(file[i] ^ flip);
      const std::string error = error_of(file);
      if (!is_clean(error)) FAIL("byte " << i << " xor " << flip << ": " << error);
      (error.empty() ? accepted : refused) += 1;
      // No other length leaves the JSON and the data where they are, but for the padding.
      if (i < 8 && error.empty()) FAIL("header length changed in byte " << i << " by " << flip);
    }
  }
  CHECK(accepted > 0);
  CHECK(refused > 10 * accepted);
}

TEST_CASE("safetensors: every removed or doubled byte is refused cleanly or read cleanly", "[safetensors]") {
  const std::string good = small_file();
  const std::string header = good.substr(8, header_end(good) - 8), data = good.substr(header_end(good));
  for (std::size_t i = 0; i < header.size(); ++i) {
    const std::string removed = error_of(file_of(std::string(header).erase(i, 1), data));
    const std::string doubled = error_of(file_of(std::string(header).insert(i, 1, header[i]), data));
    INFO("byte " << i << ": " << removed << " | " << doubled);
    CHECK(is_clean(removed));
    CHECK(is_clean(doubled));
  }
}

TEST_CASE("safetensors: all 65536 patterns of F16 and BF16 are converted exactly", "[safetensors]") {
  std::string data;
  for (int i = 0; i < 65536; ++i) data += {static_cast<char>(i & 255), static_cast<char>(i >> 8)};
  struct layout {
    const char* dtype;
    int exponent_bits, mantissa_bits;
  };
  for (const layout l : {layout{"F16", 5, 10}, layout{"BF16", 8, 7}}) {
    const safetensors file = parse(file_of("{" + tensor_entry("w", l.dtype, "[256,256]", "[0,131072]") + "}", data));
    const std::vector<float> values = file.read("w").values;
    REQUIRE(values.size() == 65536);
    int wrong = 0;
    for (int i = 0; i < 65536; ++i) {
      const int mantissa = i & ((1 << l.mantissa_bits) - 1);
      const int exponent = (i >> l.mantissa_bits) & ((1 << l.exponent_bits) - 1);
      const int bias = (1 << (l.exponent_bits - 1)) - 1;
      double magnitude = 0;
      if (exponent == (1 << l.exponent_bits) - 1) {
        magnitude = mantissa == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
      } else if (exponent == 0) {
        magnitude = std::ldexp(mantissa, 1 - bias - l.mantissa_bits);
      } else {
        magnitude = std::ldexp(mantissa + (1 << l.mantissa_bits), exponent - bias - l.mantissa_bits);
      }
      const double expected = i < 32768 ? magnitude : -magnitude;
      const float got = values[static_cast<std::size_t>(i)];
      const bool same = std::isnan(expected) ? std::isnan(got) && std::signbit(got) == (i >= 32768)
                                             : double{got} == expected && std::signbit(got) == std::signbit(expected);
      wrong += !same;
    }
    INFO(l.dtype);
    CHECK(wrong == 0);
  }
}

TEST_CASE("safetensors: what is no readable regular file is refused at once", "[safetensors]") {
  const scratch_folder folder;
  const std::string missing = (folder.path / "missing").string();
  CHECK(load_error(missing).rfind(missing + ": cannot be opened: ", 0) == 0);
  CHECK(load_error("").find("cannot be opened") != std::string::npos);
  CHECK(load_error(folder.path.string()) == folder.path.string() + ": is a directory, must be a regular file");
  CHECK(load_error("/dev/zero") == "/dev/zero: is a pipe, socket or device, must be a regular file");
  const std::string fifo = (folder.path / "fifo").string();
  REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
  CHECK(load_error(fifo) == fifo + ": is a pipe, socket or device, must be a regular file");
  const std::string empty = folder.write("empty", "");
  CHECK(load_error(empty).rfind(empty + ": is 0 bytes long, must be at least 8", 0) == 0);
  const std::string locked = folder.write("locked", small_file());
  REQUIRE(::chmod(locked.c_str(), 0) == 0);
  if (::geteuid() != 0) CHECK(load_error(locked).rfind(locked + ": cannot be opened: ", 0) == 0);
}

TEST_CASE("safetensors: a file on disk is read like one in memory", "[safetensors]") {
  const scratch_folder folder;
  const std::string path = folder.write("small", small_file());
  const safetensors on_disk = safetensors::load(path);
  const safetensors in_memory = parse(small_file());
  CHECK(on_disk.metadata() == in_memory.metadata());
  CHECK(on_disk.names() == in_memory.names());
  for (const std::string& name : in_memory.names()) {
    CHECK(on_disk.read(name).shape == in_memory.read(name).shape);
    CHECK(on_disk.read(name).values == in_memory.read(name).values);
  }
  const std::size_t shorter = header_end(small_file()) + 4;
  std::filesystem::resize_file(path, shorter);
  CHECK_THROWS_WITH(on_disk.read("a"), path + ": ends at byte " + std::to_string(shorter) +
                                           ", must go on as when it was opened: has it changed?");
}

TEST_CASE("safetensors: a claim of a terabyte costs nothing until it is read", "[safetensors]") {
  const scratch_folder folder;
  const std::string header = "{" + tensor_entry("w", "F32", "[274877906944]", "[0,1099511627776]") + "}";
  const std::string path = folder.write("sparse", file_of(header, ""));
  std::error_code unsupported;
  std::filesystem::resize_file(path, 8 + header.size() + (std::uintmax_t{1} << 40), unsupported);
  if (!unsupported) CHECK(safetensors::load(path).shape("w") == std::vector<std::int64_t>{274877906944});
}

TEST_CASE("safetensors: the shipped models load", "[safetensors]") {
  for (const char* name : {"tiny-natural", "tiny-softmax-natural", "tiny-softmax", "tiny-softmax1", "tiny-sink",
                           "nano-softmax", "nano-sink"}) {
    const safetensors model =
        safetensors::load(std::string(SINKCACHE_SOURCE_DIR) + "/examples/models/" + name + ".safetensors");
    INFO(name);
    CHECK(model.metadata().at("num_hidden_layers") == "4");
    CHECK(model.contains("model.layers.3.self_attn.sinks") == (model.metadata().at("attention") == "sink"));
    const std::int64_t hidden = std::stoll(model.metadata().at("hidden_size"));
    CHECK(model.shape("model.embed_tokens.weight") == std::vector<std::int64_t>{257, hidden});
    std::size_t parameters = 0, odd = 0;
    for (const std::string& tensor_name : model.names()) {
      for (const float value : model.read(tensor_name).values) {
        ++parameters;
        odd += !(std::abs(value) < 100);
      }
    }
    CHECK(odd == 0);
    CHECK(parameters > (hidden == 128 ? 750'000u : 240'000u));
    CHECK(parameters < (hidden == 128 ? 790'000u : 260'000u));
  }
}
