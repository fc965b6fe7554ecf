// Storage formats against plain arithmetic in double: every 16-bit pattern, and every place where rounding turns.

#include <sinkcache/with_formats.hpp>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "plain_format.hpp"

using namespace sinkcache;
using plain::ieee16, plain::rounded, plain::value_of;

namespace {

static_assert(kv_format<f32> && kv_format<f16> && kv_format<bf16> && !kv_format<float>);
static_assert(f32::block_rows == 1 && f16::block_rows == 1 && bf16::block_rows == 1);
static_assert(f32::block_bytes(1) == 64 && f32::block_bytes(16) == 64 && f32::block_bytes(17) == 128);
static_assert(f16::block_bytes(1) == 64 && f16::block_bytes(32) == 64 && f16::block_bytes(33) == 128);
static_assert(bf16::block_bytes(128) == 256 && f32::block_bytes(128) == 512 && f32::block_bytes(512) == 2048);

template <class F>
constexpr std::uint16_t infinity = static_cast<std::uint16_t>(((1 << ieee16<F>::exponent_bits) - 1)
                                                              << (ieee16<F>::digits - 1));

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// Where `on`, subnormal floats are read and written as 0 while it lives, as a library linked with -ffast-math has it
// for a whole process.
class flushing {
 public:
  explicit flushing(bool on) : before_(mode()) {
    if (on) set_mode(before_ | bits);
  }
  ~flushing() { set_mode(before_); }
  flushing(const flushing&) = delete;
  flushing& operator=(const flushing&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr unsigned bits = 0x8040;
  static unsigned mode() { return _mm_getcsr(); }
  static void set_mode(unsigned mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  static constexpr std::uint64_t bits = 1 << 24;
  static std::uint64_t mode() {
    std::uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(std::uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
  static constexpr unsigned bits = 0;
  static unsigned mode() { return 0; }
  static void set_mode(unsigned) {}
#endif

  decltype(mode()) before_;
};

// Through pointers, which keep the compiler from computing anything in another mode.
template <class F>
void encode(bool flush, const float* rows, index_t dim, std::byte* to) {
  void (*volatile encode)(const float*, index_t, std::byte*) = F::encode;
  const flushing mode(flush);
  encode(rows, dim, to);
}
template <class F>
void decode(bool flush, const std::byte* from, index_t dim, float* out) {
  void (*volatile decode)(const std::byte*, index_t, index_t, float*) = F::decode;
  const flushing mode(flush);
  decode(from, 0, dim, out);
}

// One row through the format, in a buffer with canaries around.
template <class F>
std::vector<float> encoded_and_decoded(const std::vector<float>& row, std::vector<std::byte>* stored = nullptr,
                                       bool flush = false) {
  const auto dim = static_cast<index_t>(row.size());
  const auto bytes = static_cast<std::size_t>(F::block_bytes(dim));
  constexpr std::size_t guard = 64;
  std::vector<std::byte> block(bytes + 2 * guard, std::byte{0xa5});
  encode<F>(flush, row.data(), dim, block.data() + guard);
  for (std::size_t i = 0; i < guard; ++i)
    if (block[i] != std::byte{0xa5} || block[guard + bytes + i] != std::byte{0xa5})
      FAIL("encode wrote out of its block");
  std::vector<float> out(row.size() + 2, 12345.f);
  decode<F>(flush, block.data() + guard, dim, out.data() + 1);
  if (out.front() != 12345.f || out.back() != 12345.f) FAIL("decode wrote out of its row");
  if (stored != nullptr) stored->assign(block.begin() + guard, block.end() - guard);
  return {out.begin() + 1, out.end() - 1};
}

// Every value passes among sixteen (whole vectors, however wide) and among seven (what is left over), in both modes.
constexpr std::size_t both_paths[] = {16, 7};

template <class F, class Check>
void through_both_paths(const std::vector<float>& values, const Check& check) {
  for (bool flush : {false, true})
    for (std::size_t at_once : both_paths)
      for (std::size_t i = 0; i < values.size(); i += at_once) {
        std::vector<float> row(at_once, 1.f);
        const std::size_t n = std::min(at_once, values.size() - i);
        std::copy_n(values.begin() + static_cast<std::ptrdiff_t>(i), n, row.begin());
        const std::vector<float> out = encoded_and_decoded<F>(row, nullptr, flush);
        for (std::size_t j = 0; j < n; ++j)
          if (!check(row[j], out[j])) FAIL(row[j] << " came back as " << out[j] << (flush ? ", flushing" : ""));
      }
}

std::uint16_t half_at(const std::byte* from, std::size_t i) {
  std::uint16_t half;
  std::memcpy(&half, from + 2 * i, 2);
  return half;
}

TEMPLATE_TEST_CASE("16-bit formats: the reference takes every value back to its pattern", "", f16, bf16) {
  for (std::uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const double value = value_of<TestType>(static_cast<std::uint16_t>(pattern));
    if (!std::isnan(value) && plain::pattern_of<TestType>(value) != pattern) FAIL(pattern << ": " << value);
  }
}

template <class F>
void check_all_patterns(bool flush) {
  for (std::size_t at_once : both_paths)
    for (std::uint32_t first = 0; first < 65536; first += static_cast<std::uint32_t>(at_once)) {
      const auto dim = static_cast<index_t>(at_once);
      std::array<std::byte, 64> block{}, again{};
      for (std::size_t i = 0; i < at_once; ++i) {
        const auto pattern = static_cast<std::uint16_t>(first + i);
        std::memcpy(block.data() + 2 * i, &pattern, 2);
      }
      std::array<float, both_paths[0]> row{};
      decode<F>(flush, block.data(), dim, row.data());
      encode<F>(flush, row.data(), dim, again.data());
      for (std::size_t i = 0; i < at_once; ++i) {
        const std::uint16_t pattern = half_at(block.data(), i);
        const double value = value_of<F>(pattern);
        // A signalling NaN comes back quiet.
        const int quiet = std::isnan(value) ? 1 << (ieee16<F>::digits - 2) : 0;
        if (!same(row[i], value) || half_at(again.data(), i) != (pattern | quiet)) {
          CAPTURE(pattern, value, row[i], half_at(again.data(), i));
          FAIL();
        }
      }
    }
}

TEMPLATE_TEST_CASE("16-bit formats: all 65536 patterns decode, and encode to themselves", "", f16, bf16) {
  check_all_patterns<TestType>(false);
}
TEMPLATE_TEST_CASE("16-bit formats: the same where subnormal floats are flushed to 0", "", f16, bf16) {
  check_all_patterns<TestType>(true);
}

TEMPLATE_TEST_CASE("16-bit formats: round to nearest even, between any two neighbours", "", f16, bf16) {
  std::vector<float> values;
  for (std::uint16_t below = 0; below < infinity<TestType>; ++below) {
    const auto above = static_cast<std::uint16_t>(below + 1);
    const double low = value_of<TestType>(below);
    // Behind the largest value, the next one would be where infinity is.
    const double high = above == infinity<TestType> ? std::ldexp(1.0, 2 - ieee16<TestType>::lowest_exponent)
                                                    : value_of<TestType>(above);
    const auto middle = static_cast<float>((low + high) / 2);
    REQUIRE(static_cast<double>(middle) == (low + high) / 2);
    for (float x : {middle, std::nextafter(middle, 0.f), std::nextafter(middle, std::numeric_limits<float>::max()),
                    std::nextafter(static_cast<float>(low), std::numeric_limits<float>::max())}) {
      values.push_back(x);
      values.push_back(-x);
    }
    const bool even_is_low = below % 2 == 0;
    if (!same(rounded<TestType>(middle), even_is_low                   ? low
                                         : above == infinity<TestType> ? std::numeric_limits<double>::infinity()
                                                                       : high))
      FAIL("the reference is wrong at " << middle);
  }
  through_both_paths<TestType>(values, [](float x, float out) { return same(out, rounded<TestType>(x)); });
}

TEMPLATE_TEST_CASE("16-bit formats: random floats of every size", "", f16, bf16) {
  effort::dice dice(1);
  std::vector<float> values(static_cast<std::size_t>(effort::cases(50000)));
  for (float& x : values) x = std::bit_cast<float>(static_cast<std::uint32_t>(dice.bits()));
  through_both_paths<TestType>(values, [](float x, float out) { return same(out, rounded<TestType>(x)); });
}

TEMPLATE_TEST_CASE("16-bit formats: the ends of the range", "", f16, bf16) {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  constexpr float largest = std::numeric_limits<float>::max(), smallest = std::numeric_limits<float>::denorm_min();
  const std::vector<float> values = {0.f,     -0.f,     inf,      -inf,      nan,      std::copysign(nan, -1.f),
                                     largest, -largest, smallest, -smallest, 65504.f,  65519.996f,
                                     65520.f, -65520.f, 65536.f,  0x1p-24f,  0x1p-25f, 0x1.000002p-25f};
  through_both_paths<TestType>(values, [](float x, float out) { return same(out, rounded<TestType>(x)); });
  // NaNs whose payload lies in the bits that are dropped stay NaNs.
  for (std::uint32_t pattern : {0x7f800001u, 0xff800001u, 0x7fbfffffu, 0x7fc00000u, 0xffffffffu})
    through_both_paths<TestType>({std::bit_cast<float>(pattern)}, [](float, float out) { return std::isnan(out); });
}

TEST_CASE("f16: largest and smallest") {
  CHECK(encoded_and_decoded<f16>({65504.f, 65519.f, 65520.f, 0x1p-24f, 0x1p-25f}) ==
        std::vector<float>{65504.f, 65504.f, std::numeric_limits<float>::infinity(), 0x1p-24f, 0.f});
}

TEST_CASE("f32: every bit") {
  effort::dice dice(2);
  for (std::size_t dim = 1; dim <= 70; ++dim) {
    std::vector<float> row(dim);
    for (float& x : row) x = std::bit_cast<float>(static_cast<std::uint32_t>(dice.bits()));
    const std::vector<float> out = encoded_and_decoded<f32>(row);
    REQUIRE(std::memcmp(out.data(), row.data(), dim * sizeof(float)) == 0);
  }
}

TEMPLATE_TEST_CASE("formats: every width, padding zeroed", "", f32, f16, bf16) {
  effort::dice dice(3);
  for (std::size_t dim = 1; dim <= 70; ++dim) {
    CAPTURE(dim);
    REQUIRE(TestType::block_bytes(static_cast<index_t>(dim)) % 64 == 0);
    std::vector<float> row(dim);
    for (float& x : row) x = 4 * dice.signed_unit();
    std::vector<std::byte> stored;
    const std::vector<float> out = encoded_and_decoded<TestType>(row, &stored);
    constexpr std::size_t width = std::is_same_v<TestType, f32> ? 4 : 2;
    for (std::size_t i = 0; i < dim; ++i) {
      if constexpr (width == 2)
        REQUIRE(same(out[i], rounded<TestType>(row[i])));
      else
        REQUIRE(same(out[i], row[i]));
    }
    for (std::size_t i = dim * width; i < stored.size(); ++i) REQUIRE(stored[i] == std::byte{0});
    // What was decoded is stored as the same bytes.
    std::vector<std::byte> again;
    REQUIRE(encoded_and_decoded<TestType>(out, &again) == out);
    REQUIRE(again == stored);
  }
}

// What storage costs.

struct cost {
  index_t bytes;          // of a row of 128
  double relative_error;  // of a number in the format's normal range, at most: half a unit in the last place
};

template <class F>
double worst_relative_error() {
  double worst = 0;
  for (int i = 0; i < 1 << 16; ++i) {
    const float x = 1 + static_cast<float>(i) * 0x1p-16f;  // all of [1, 2), in steps of 2^-16
    const auto out = static_cast<double>(encoded_and_decoded<F>({x})[0]);
    worst = std::max(worst, std::abs(out - static_cast<double>(x)) / static_cast<double>(x));
  }
  return worst;
}

TEST_CASE("formats: what each costs") {
  //             bytes  relative error
  const cost in_f32{512, 0};
  const cost in_f16{256, 0x1p-11};  // 4.9e-4
  const cost in_bf16{256, 0x1p-8};  // 3.9e-3

  CHECK(f32::block_bytes(128) == in_f32.bytes);
  CHECK(f16::block_bytes(128) == in_f16.bytes);
  CHECK(bf16::block_bytes(128) == in_bf16.bytes);
  CHECK(worst_relative_error<f32>() == in_f32.relative_error);
  for (const auto& [found, stated] : {std::pair(worst_relative_error<f16>(), in_f16.relative_error),
                                      std::pair(worst_relative_error<bf16>(), in_bf16.relative_error)}) {
    CHECK(found <= stated);
    CHECK(found > 0.99 * stated);
  }
}

// Chosen by name.

struct eighths : f32 {
  static constexpr const char* name = "eighths";
};
static_assert(kv_format<eighths>);

TEST_CASE("formats: two names choose two types") {
  const auto chosen = [](std::string_view k, std::string_view v) {
    return with_formats(k, v, [](auto k_format, auto v_format) {
      return std::string(decltype(k_format)::name) + "/" + std::string(decltype(v_format)::name);
    });
  };
  for (const std::string k : {"f32", "f16", "bf16", "q8", "q6", "q4", "q2"})
    for (const std::string v : {"f32", "f16", "bf16", "q8", "q6", "q4", "q2"}) CHECK(chosen(k, v) == k + "/" + v);
  CHECK(with_formats("f16", "f32",
                     [](auto k, auto v) { return std::same_as<decltype(k), f16> && std::same_as<decltype(v), f32>; }));
  int calls = 0;
  with_formats("f16", "bf16", [&](auto, auto) { ++calls; });
  CHECK(calls == 1);
  CHECK_THROWS_WITH(chosen("q8_0", "f16"),
                    "sinkcache: the format of keys was 'q8_0', had to be f32, f16, bf16, q8, q6, q4 or q2");
  CHECK_THROWS_WITH(chosen("f16", "F16"),
                    "sinkcache: the format of values was 'F16', had to be f32, f16, bf16, q8, q6, q4 or q2");
  CHECK_THROWS_WITH(chosen("", ""), "sinkcache: the format of keys was '', had to be f32, f16, bf16, q8, q6, q4 or q2");
  CHECK_THROWS_WITH(
      chosen("f16", std::string(300, 'x')),
      "sinkcache: the format of values was '" + std::string(32, 'x') + "', had to be f32, f16, bf16, q8, q6, q4 or q2");
}

TEST_CASE("formats: a wrong name is a status for who asks") {
  int calls = 0;
  const auto count = [&](auto, auto) { ++calls; };
  CHECK(try_with_formats("bf16", "f32", count).ok());
  CHECK(calls == 1);
  CHECK(try_with_formats("bf16", "half", count).message() ==
        "sinkcache: the format of values was 'half', had to be f32, f16, bf16, q8, q6, q4 or q2");
  CHECK(calls == 1);
  const status passed_on = try_with_formats("f32", "f32", [](auto k, auto) {
    status found;
    found.require(!std::same_as<decltype(k), f32>, "k", "f32", "something else");
    return found;
  });
  CHECK(passed_on.message() == "sinkcache: k was f32, had to be something else");
}

TEST_CASE("formats: one's own can be chosen too") {
  CHECK(with_formats<eighths>("eighths", "f32", [](auto k, auto) { return std::same_as<decltype(k), eighths>; }));
  CHECK(with_formats<eighths>("f16", "bf16", [](auto k, auto) { return std::same_as<decltype(k), f16>; }));
  CHECK(try_with_formats<eighths>("f16", "ninths", [](auto, auto) {}).message() ==
        "sinkcache: the format of values was 'ninths', had to be f32, f16, bf16, q8, q6, q4, q2 or eighths");
}

TEST_CASE("formats: a call that takes some refuses the others by name") {
  const auto viewed = [](viewed_format auto, viewed_format auto) {};
  CHECK(try_with_formats("f16", "f32", viewed));
  CHECK(try_with_formats("f16", "q8", viewed).message() ==
        "sinkcache: the format of values was 'q8', had to be f32, f16 or bf16");
  CHECK(try_with_formats<q8, eighths>("q4", "eighths", [](auto, auto) {}));
  CHECK(try_with_formats<q8>("q9", "q8", [](auto, auto) {}).message() ==
        "sinkcache: the format of keys was 'q9', had to be f32, f16, bf16, q8, q6, q4 or q2");
}

}  // namespace
