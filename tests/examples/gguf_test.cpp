#include "loaders/gguf.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../fuzz/targets.hpp"
#include "file_errors.hpp"
#include "gguf_writer.hpp"

namespace {

using loaders::file_error;
using loaders::gguf;
namespace w = gguf_writer;

constexpr auto file_name = "hostile.gguf";

gguf parse(const std::string& file) { return gguf::parse(std::as_bytes(std::span(file)), file_name); }

template <class F>
std::string error_in(const F& f) {
  try {
    f();
    return "accepted";
  } catch (const file_error& e) {
    return e.what();
  }
}

std::string error_of(const std::string& file) {
  return error_in([&] { parse(file); });
}

// Uses every part of the format.
std::string small_file() {
  w::file f;
  f.metadata = {
      w::metadata("u8", w::uint8, w::u8(200)),
      w::metadata("i8", w::int8, w::u8(200)),
      w::metadata("u16", w::uint16, w::u16(50000)),
      w::metadata("i16", w::int16, w::u16(50000)),
      w::metadata("u32", 4000000000u),
      w::metadata("i32", w::int32, w::u32(4000000000u)),
      w::metadata("f32", -1.5f),
      w::metadata("yes", true),
      w::metadata("text", "two\nlines"),
      w::metadata("u64", w::uint64, w::u64(~std::uint64_t{0})),
      w::metadata("i64", w::int64, w::u64(~std::uint64_t{0})),
      w::metadata("f64", w::float64, w::f64(1e300)),
      w::metadata("words", w::array,
                  w::u32(w::text) + w::u64(3) + w::string("a") + w::string("") + w::string(std::string("\0b", 2))),
      w::metadata("numbers", w::array, w::u32(w::int16) + w::u64(2) + w::u16(1) + w::u16(65535)),
      w::metadata("reals", w::array, w::u32(w::float32) + w::u64(2) + w::f32(0.5f) + w::f32(2)),
      w::metadata("none", w::array, w::u32(w::boolean) + w::u64(0))};
  f.add("matrix", {3, 2}, w::F32, w::f32(1) + w::f32(2) + w::f32(3) + w::f32(4) + w::f32(5) + w::f32(-6));
  f.add("half", {1}, w::F16, w::u16(0x3c00));
  f.add("q", {32, 1, 1, 1}, w::Q8_0, w::u16(0x3800) + std::string(31, '\2') + '\x80');
  return f.bytes();
}

}  // namespace

TEST_CASE("gguf: a good file is read as it is") {
  const gguf file = parse(small_file());
  CHECK(file.keys().size() == 16);
  CHECK(file.integer("u8", 0, 255) == 200);
  CHECK(file.integer("i8", -128, 127) == -56);
  CHECK(file.integer("u16", 0, 65535) == 50000);
  CHECK(file.integer("i16", -99999, 0) == -15536);
  CHECK(file.integer("u32", 0, 4000000000) == 4000000000);
  CHECK(file.integer("i32", -4000000000, 0) == -294967296);
  CHECK(file.integer("i64", -1, -1) == -1);
  CHECK(file.number("f32", -2, 2) == -1.5);
  CHECK(file.number("f64", 0, 1e301) == 1e300);
  CHECK(file.flag("yes") == true);
  CHECK(file.string("text") == "two\nlines");
  CHECK(file.strings("words") == std::vector<std::string_view>{"a", "", std::string_view("\0b", 2)});
  CHECK(file.integers("numbers") == std::vector<std::int64_t>{1, -1});
  CHECK(file.numbers("reals") == std::vector<double>{0.5, 2});

  CHECK_FALSE(file.has("absent"));
  CHECK_FALSE(file.string("absent"));
  CHECK_FALSE(file.integer("absent", 0, 1));
  CHECK_FALSE(file.number("absent", 0, 1));
  CHECK_FALSE(file.flag("absent"));
  CHECK_FALSE(file.strings("absent"));

  CHECK(file.names() == std::vector<std::string>{"half", "matrix", "q"});
  CHECK(file.shape("matrix") == std::vector<std::int64_t>{2, 3});
  CHECK(file.read("matrix").values == std::vector<float>{1, 2, 3, 4, 5, -6});
  CHECK(file.read("half").values == std::vector<float>{1});
  CHECK(file.shape("q") == std::vector<std::int64_t>{1, 1, 1, 32});
  CHECK(file.type("q") == "Q8_0");
  CHECK(file.read("q").values[30] == 1);
  CHECK(file.read("q").values[31] == -64);

  gguf moved = file;
  const gguf to = std::move(moved);
  CHECK(to.string("text") == "two\nlines");
}

TEST_CASE("gguf: a value of another kind or out of bounds is refused with what it is") {
  const gguf file = parse(small_file());
  CHECK(error_in([&] { file.integer("u8", 0, 199); }) ==
        "hostile.gguf: metadata: u8 is 200 (uint8), had to be a whole number from 0 to 199");
  CHECK(error_in([&] { file.integer("u64", 0, 9); }) ==
        "hostile.gguf: metadata: u64 is 18446744073709551615 (uint64), had to be a whole number from 0 to 9");
  CHECK(error_in([&] { file.integer("f32", -9, 9); }) ==
        "hostile.gguf: metadata: f32 is -1.5 (float32), had to be a whole number from -9 to 9");
  CHECK(error_in([&] { file.number("u8", 0, 999); }) ==
        "hostile.gguf: metadata: u8 is 200 (uint8), had to be a number from 0 to 999");
  CHECK(error_in([&] { file.number("f32", 0, 1); }) ==
        "hostile.gguf: metadata: f32 is -1.5 (float32), had to be a number from 0 to 1");
  CHECK(error_in([&] { file.flag("u8"); }) == "hostile.gguf: metadata: u8 is 200 (uint8), had to be a bool");
  CHECK(error_in([&] { file.string("yes"); }) == "hostile.gguf: metadata: yes is true, had to be a string");
  CHECK(error_in([&] { file.integer("text", 0, 1); }) ==
        "hostile.gguf: metadata: text is 'two\\x0alines', had to be a whole number from 0 to 1");
  CHECK(error_in([&] { file.string("words"); }) ==
        "hostile.gguf: metadata: words is an array of 3 string, had to be a single value");
  CHECK(error_in([&] { file.strings("text"); }) ==
        "hostile.gguf: metadata: text is 'two\\x0alines', had to be an array");
  CHECK(error_in([&] { file.strings("numbers"); }) ==
        "hostile.gguf: metadata: numbers is an array of 2 int16, had to be an array of strings");
  CHECK(error_in([&] { file.integers("words"); }) ==
        "hostile.gguf: metadata: words is an array of 3 string, had to be an array of whole numbers");
  CHECK(error_in([&] { file.numbers("numbers"); }) ==
        "hostile.gguf: metadata: numbers is an array of 2 int16, had to be an array of floats");
  CHECK(error_in([&] { file.refuse("absent", "there"); }) ==
        "hostile.gguf: metadata: absent is missing, had to be there");
  CHECK(error_in([&] { file.read_coded("half"); }) == "hostile.gguf: tensor 'half' is F16, had to be quantised");
  CHECK(error_in([&] { file.read("absent"); }) == "hostile.gguf: has no tensor 'absent'");
  for (const float bad : {NAN, INFINITY}) {
    w::file f;
    f.metadata = {w::metadata("x", bad)};
    CHECK_THAT(error_in([&] { parse(f.bytes()).number("x", -1e300, 1e300); }), Catch::Contains("had to be a number"));
  }
}

TEST_CASE("gguf: what is odd but allowed is accepted") {
  const std::string four(4, '\0');
  CHECK(error_of(w::header(0, 0)) == "accepted");
  CHECK(error_of(w::padded(w::header(0, 0))) == "accepted");
  // The last tensor may end the file, or its padding.
  const std::string one = w::header(1, 0) + w::tensor("t", {1}, w::F32, 0);
  CHECK(error_of(w::padded(one) + four) == "accepted");
  CHECK(error_of(w::padded(one) + w::padded(four)) == "accepted");
  for (const std::uint32_t alignment : {1u, 8u, 64u, 65536u}) {
    const std::string head = w::header(2, 1) + w::metadata("general.alignment", alignment) +
                             w::tensor("a", {1}, w::F16, 0) +
                             w::tensor("b", {1}, w::F16, w::padded("12", alignment).size());
    const std::string file = w::padded(head, alignment) + w::padded(w::u16(0x3c00), alignment) + w::u16(0xc000);
    CHECK(error_of(file) == "accepted");
    CHECK(parse(file).read("b").values == std::vector<float>{-2});
  }
  CHECK(std::isnan(parse(w::padded(one) + w::f32(NAN)).read("t").values[0]));
}

TEST_CASE("gguf: every hostile file gets an error that names what is wrong") {
  constexpr std::uint64_t huge = ~std::uint64_t{0};
  const auto one_key = [](const std::string& bytes) { return w::header(0, 1) + bytes + std::string(64, '\0'); };
  const auto value = [&](std::uint32_t type, const std::string& bytes) {
    return one_key(w::metadata("k", type, bytes));
  };
  const auto array = [&](std::uint32_t type, std::uint64_t count, const std::string& bytes = "") {
    return value(w::array, w::u32(type) + w::u64(count) + bytes);
  };
  const auto one_tensor = [](const std::string& info, std::size_t data_bytes = 32) {
    return w::padded(w::header(1, 0) + info) + std::string(data_bytes, '\0');
  };
  const auto shaped = [&](const std::vector<std::uint64_t>& dims, std::uint32_t type = w::F32) {
    return one_tensor(w::tensor("t", dims, type, 0));
  };
  const auto two_tensors = [](const std::string& second, std::size_t data_bytes = 64) {
    return w::padded(w::header(2, 0) + w::tensor("t", {4}, w::F32, 0) + second) + std::string(data_bytes, '\0');
  };
  const auto aligned = [](std::uint32_t type, const std::string& bytes) {
    return w::header(0, 1) + w::metadata("general.alignment", type, bytes);
  };
  const std::string four = w::metadata("k", 4u);

  const std::vector<std::pair<std::string, std::string>> cases = {
      // the first bytes
      {"",
       "has 0 bytes, must have at least 4 more than the 0 up to here, within its first 24 bytes: is the file trunc"},
      {"GGU", "has 3 bytes, must have at least 4 more"},
      {"GGUF", "within its first 24 bytes"},
      {"GGUF" + w::u32(3) + w::u64(0), "has 16 bytes, must have at least 8 more than the 16 up to here"},
      {"FUGG" + w::header(0, 0).substr(4), "begins with 'FUGG', must begin with 'GGUF'"},
      {"\x1b[2J" + w::header(0, 0).substr(4), "begins with '\\x1b[2J', must"},
      {"GGUF" + w::u32(0) + std::string(16, '\0'), "is of GGUF version 0, must be 3"},
      {"GGUF" + w::u32(1) + std::string(16, '\0'), "is of GGUF version 1, must be 3"},
      {"GGUF" + w::u32(2) + std::string(16, '\0'), "is of GGUF version 2, must be 3"},
      {"GGUF" + w::u32(4) + std::string(16, '\0'), "is of GGUF version 4, must be 3"},
      {std::string("GGUF\0\0\0\3", 8) + std::string(16, '\0'), "version 50331648, must be 3: is it big-endian?"},
      // counts
      {w::header(huge, 0), "has 18446744073709551615 tensors, must have at most 65536"},
      {w::header(65537, 0), "has 65537 tensors, must have at most 65536"},
      {w::header(1, 0), "has 1 tensors, must have no more than fit into the 8 bytes that follow"},
      {w::header(0, huge), "has 18446744073709551615 metadata, must have at most 4096"},
      {w::header(0, 4096), "has 4096 metadata, must have no more than fit into the 0 bytes that follow"},
      {w::header(0, 2) + four, "has 2 metadata, must have no more than fit"},
      {w::header(0, 2) + four + std::string(3, '\0'), "has 2 metadata, must have no more than fit"},
      {w::header(0, 2) + four + w::u64(20) + "abc",
       "must have at least 20 more than the 49 up to here, within metadata 1"},
      // keys
      {one_key(w::u64(huge)), "has a string of 18446744073709551615 bytes in metadata 0, must be at most 256"},
      {one_key(w::u64(257)), "has a string of 257 bytes in metadata 0, must be at most 256"},
      {one_key(w::u64(256)), "must have at least 256 more"},
      {one_key(w::metadata("", 4u)), "metadata 0 has an empty name, must have a name"},
      {one_key(w::metadata("a\x1b[2J", 4u)), "metadata 0 is called 'a\\x1b[2J', must be called by printable ASCII"},
      {one_key(w::metadata("\xc3\xa9", 4u)), "metadata 0 is called '\\xc3\\xa9', must be called by printable ASCII"},
      {w::header(0, 2) + four + four, "has metadata 'k' twice, must have it once"},
      {w::header(0, 2) + four + w::metadata("k", "text"), "has metadata 'k' twice, must have it once"},
      // types and values
      {value(13, ""), "metadata 'k' has type 13, must have one from 0 to 12"},
      {value(~0u, ""), "metadata 'k' has type 4294967295, must"},
      {value(w::boolean, w::u8(2)), "metadata 'k' holds a bool of 2, must be 0 or 1"},
      {value(w::boolean, w::u8(255)), "metadata 'k' holds a bool of 255, must be 0 or 1"},
      {w::header(0, 1) + w::metadata("k", w::uint64, "1234567"),
       "metadata 'k' takes at least 8 bytes, must take no mor"},
      {w::header(0, 1) + w::metadata("k", w::text, "1234567"),
       "metadata 'k' takes at least 8 bytes, must take no more"},
      {value(w::text, w::u64(huge)),
       "has a string of 18446744073709551615 bytes in metadata 'k', must be at most 104857"},
      {value(w::text, w::u64(huge - 7)), "must be at most 1048576"},
      {value(w::text, w::u64(1 << 20)), "must have at least 1048576 more"},
      // arrays
      {array(w::array, 1), "metadata 'k' is an array of arrays, must not be nested"},
      {array(13, 1), "metadata 'k' has type 13, must have one from 0 to 12"},
      {array(w::uint8, huge), "metadata 'k' has 18446744073709551615 elements, must have at most 4194304"},
      {array(w::uint64, std::uint64_t{1} << 61), "elements, must have at most 4194304"},  // its bytes overflow
      {array(w::uint64, 4194304), "metadata 'k' takes at least 33554432 bytes, must take no more than the 64 that"},
      {array(w::text, 4194304), "metadata 'k' takes at least 33554432 bytes, must take no more than the 64 that"},
      {array(w::text, 2, w::string("a") + w::u64(huge)), "has a string of 18446744073709551615 bytes in metadata 'k'"},
      {array(w::text, 10, w::string("a")), "must take no more than"},
      {array(w::boolean, 3, w::u8(1) + w::u8(0) + w::u8(3)), "metadata 'k' holds a bool of 3, must be 0 or 1"},
      // alignment
      {aligned(w::uint32, w::u32(0)),
       "metadata: general.alignment is 0 (uint32), had to be a power of two up to 65536"},
      {aligned(w::uint32, w::u32(13)), "metadata: general.alignment is 13 (uint32), had to be a power of two"},
      {aligned(w::uint32, w::u32(1u << 31)),
       "general.alignment is 2147483648 (uint32), had to be a power of two up to"},
      {aligned(w::int32, w::u32(32)),
       "general.alignment is 32 (int32), had to be a power of two up to 65536, as uint32"},
      {aligned(w::uint64, w::u64(32)), "general.alignment is 32 (uint64), had to be a power of two"},
      {aligned(w::text, w::string("32")), "general.alignment is '32', had to be a power of two"},
      {aligned(w::array, w::u32(w::uint32) + w::u64(1) + w::u32(32)),
       "is an array of 1 uint32, had to be a power of two"},
      // a tensor's name
      {one_tensor(w::u64(huge)), "has a string of 18446744073709551615 bytes in tensor 0, must be at most 64"},
      {one_tensor(w::tensor(std::string(65, 'n'), {1}, w::F32, 0)), "has a string of 65 bytes in tensor 0, must be at"},
      {one_tensor(w::tensor("", {1}, w::F32, 0)), "tensor 0 has an empty name, must have a name"},
      {one_tensor(w::tensor("a\nb", {1}, w::F32, 0)), "tensor 0 is called 'a\\x0ab', must be called by printable"},
      {two_tensors(w::tensor("t", {4}, w::F32, 32)), "has tensor 't' twice, must have it once"},
      // its shape
      {shaped({}), "tensor 't' has 0 dimensions, must have 1 to 4"},
      {shaped({1, 1, 1, 1, 1}), "tensor 't' has 5 dimensions, must have 1 to 4"},
      {one_tensor(w::string("t") + w::u32(~0u)), "tensor 't' has 4294967295 dimensions, must have 1 to 4"},
      {shaped({0}), "tensor 't' has a dimension of 0, must be 1 to 1099511627776"},
      {shaped({4, 0}), "tensor 't' has a dimension of 0"},
      {shaped({huge}), "tensor 't' has a dimension of 18446744073709551615, must be 1 to"},
      {shaped({std::uint64_t{1} << 63}), "tensor 't' has a dimension of 9223372036854775808"},
      {shaped({(std::uint64_t{1} << 40) + 1}), "tensor 't' has a dimension of 1099511627777"},
      {shaped({std::uint64_t{1} << 40, std::uint64_t{1} << 40}), "tensor 't' has dimensions whose product overflows"},
      {shaped({std::uint64_t{1} << 32, std::uint64_t{1} << 32}), "dimensions whose product overflows"},
      {shaped({4, (1ull << 30) - 1, (1ull << 30) + 1}),
       "tensor 't' is F32 of shape [1073741825, 1073741823, 4], must tak"},
      {shaped({1ull << 40, 1ull << 22}), "tensor 't' is F32 of shape [4194304, 1099511627776], must take no more than"},
      {shaped({100}),
       "tensor 't' is F32 of shape [100], must take no more than the 96 bytes of the file: is it trunca"},
      {shaped({31}, w::Q8_0), "tensor 't' has rows of 31, must be of a multiple of 32, the block of Q8_0"},
      {shaped({1, 32}, w::Q4_0), "tensor 't' has rows of 1, must be of a multiple of 32, the block of Q4_0"},
      {shaped({128}, w::Q4_K), "tensor 't' has rows of 128, must be of a multiple of 256, the block of Q4_K"},
      // its type
      {shaped({32}, 9),
       "tensor 't' has type Q8_1, not supported, must be one of F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, "
       "Q4_K, Q5_K, Q6_K, IQ4_NL, BF16"},
      {shaped({256}, 16), "tensor 't' has type IQ2_XXS, not supported"},
      {shaped({32}, 26), "tensor 't' has type I32, not supported"},
      {shaped({32}, 39), "tensor 't' has type MXFP4, not supported"},
      {shaped({32}, 4), "tensor 't' has type Q4_2, not supported, must be one of F32"},
      {shaped({32}, 31), "tensor 't' has type Q4_0_4_4, not supported"},
      {shaped({32}, 33), "tensor 't' has type Q4_0_8_8, not supported"},
      {shaped({32}, 36), "tensor 't' has type IQ4_NL_4_4, not supported"},
      {shaped({32}, 38), "tensor 't' has type IQ4_NL_8_8, not supported"},
      {shaped({128}, 41), "tensor 't' has type Q1_0, not supported"},
      {shaped({128}, 42), "tensor 't' has type Q2_0, not supported"},
      {shaped({32}, 43), "tensor 't' has type 43, newer than this reader, must be one of F32"},
      {shaped({32}, 138), "tensor 't' has type 138, newer than this reader"},
      {shaped({32}, ~0u), "tensor 't' has type 4294967295, newer than this reader"},
      // its place
      {one_tensor(w::tensor("t", {8}, w::F32, 32)), "tensor 't' begins at 32 of the data, must begin at 0, after"},
      {one_tensor(w::tensor("t", {8}, w::F32, huge)),
       "tensor 't' begins at 18446744073709551615 of the data, must beg"},
      {two_tensors(w::tensor("u", {4}, w::F32, 0)), "tensor 'u' begins at 0 of the data, must begin at 32"},
      {two_tensors(w::tensor("u", {4}, w::F32, 16)), "tensor 'u' begins at 16 of the data, must begin at 32"},
      {two_tensors(w::tensor("u", {4}, w::F32, 64)), "tensor 'u' begins at 64 of the data, must begin at 32"},
      {two_tensors(w::tensor("u", {32}, w::F32, 32)),
       "has 160 bytes, must have 256 for its tensors: is the file trunc"},
      {two_tensors(w::tensor("u", {36}, w::F32, 32)),
       "tensor 'u' ends at 176 of the data, must end within the file of"},
      {one_tensor(w::tensor("t", {8}, w::F32, 0), 31),
       "has 95 bytes, must have 96 for its tensors: is the file truncat"},
      {w::header(1, 0) + w::tensor("t", {1}, w::F32, 0) + "1234", "has 61 bytes, must have 68"},
      {one_tensor(w::tensor("t", {1}, w::F32, 0), 36),
       "has 100 bytes, must end with its tensors at 68, but for paddin"},
      {w::header(0, 0) + std::string(32, '\0'),
       "has 56 bytes, must end with its tensors at 24, but for padding: traili"},
      {w::header(0, 1) + w::metadata("general.alignment", 1u) + "1", "trailing bytes"},
  };
  for (const auto& [file, message] : cases) {
    const std::string error = error_of(file);
    CHECK_THAT(error, Catch::Contains(message));
    CHECK(is_presentable(error, file_name));
  }
}

TEST_CASE("gguf: a header that never ends is given up at its limit") {
  std::string file = w::header(0, 70);
  for (int i = 0; i < 70; ++i)
    file += w::metadata("k" + std::to_string(i), w::text, w::string(std::string(1 << 20, 'x')));
  CHECK_THAT(error_of(file),
             Catch::Contains("has a header of more than 67108864 bytes, must have at most that; this is "
                             "within metadata 'k63'"));
}

TEST_CASE("gguf: a file cut short or changed anywhere is read or refused, never anything else") {
  const std::string file = small_file();
  for (std::size_t n = 0; n + 31 < file.size(); ++n) {
    const std::string error = error_of(file.substr(0, n));
    CHECK(is_presentable(error, file_name));
  }
  int refused = 0;
  for (std::size_t i = 0; i < file.size(); ++i)
    for (const int change : {1, 0x80, 0xff}) {
      std::string changed = file;
      changed[i] = static_cast<char>(changed[i] ^ change);
      const std::string error = error_of(changed);
      refused += error != "accepted";
      CHECK((error == "accepted" || is_presentable(error, file_name)));
      fuzz::gguf(std::as_bytes(std::span(changed)));
    }
  CHECK(refused > 500);
}

TEST_CASE("gguf: what is no regular file is told") {
  CHECK_THAT(error_in([] { gguf::load("/nonexistent.gguf"); }),
             Catch::Contains("/nonexistent.gguf: cannot be opened: No such file"));
  CHECK_THAT(error_in([] { gguf::load("/"); }), Catch::Contains("is a directory"));
  CHECK_THAT(error_in([] { gguf::is_gguf("/dev/null"); }), Catch::Contains("is a pipe, socket or device"));
}

// tests/golden/dequantised.gguf was written, and dequantised, by the Python package gguf: tools/golden/dequantised.py.
TEST_CASE("gguf: every type is dequantised to the floats that the reference makes of it") {
  const gguf file = gguf::load(SINKCACHE_SOURCE_DIR "/tests/golden/dequantised.gguf");
  for (const std::string type : {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K",
                                 "Q4_K", "Q5_K", "Q6_K"}) {
    INFO(type);
    CHECK(file.type(type) == type);
    const loaders::tensor ours = file.read(type), expected = file.read(type + ".expected");
    CHECK(ours.shape == std::vector<std::int64_t>{3, 512});
    CHECK(ours.values == expected.values);
    CHECK(file.is_coded(type) == (type.find('Q') != std::string::npos));
  }
  CHECK(file.string("general.architecture") == "golden");
  CHECK(file.strings("words") == std::vector<std::string_view>{"sink", "", "\u00e9"});
  CHECK(file.integers("integers") == std::vector<std::int64_t>{-3, 0, 2147483647});
  CHECK(file.number("pi", 3, 4) == 3.1415927410125732);
  CHECK(file.flag("flag") == true);
}
