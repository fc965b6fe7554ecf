// Rotary positions against exact integer arithmetic: phases from a longer constant than the library's, sines and
// cosines in long double.

#include <sinkcache/rope.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <numbers>
#include <string>
#include <type_traits>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"

using namespace sinkcache;

namespace {

static_assert(std::is_nothrow_move_constructible_v<rope> && std::is_copy_assignable_v<rope>);
static_assert(sizeof(rope) < 4096);
static_assert(!std::is_convertible_v<std::span<const float>, rope>);

constexpr double bound = 1e-7;  // of each sine and cosine

// The reference.

// 1 / 2 pi, 384 bits behind the point, in digits of 32 bits.
constexpr std::array<std::uint32_t, 12> inverse_two_pi = {0x28be60db, 0x9391054a, 0x7f09d5f4, 0x7d4d3770,
                                                          0x36d8a566, 0x4f10e410, 0x7f9458ea, 0xf7aef158,
                                                          0x6dc91b8e, 0x909374b8, 0x01924bba, 0x82746487};

// floor(inv_freq * 2^64 / 2 pi) modulo 2^64, by the school's long multiplication.
std::uint64_t exact_turns(float inv_freq) {
  if (inv_freq == 0) return 0;
  const int exponent = std::ilogb(inv_freq) - 23;
  const auto mantissa = static_cast<std::uint64_t>(std::scalbn(static_cast<double>(inv_freq), -exponent));
  std::array<std::uint32_t, 13> product{};  // mantissa / 2 pi, the first digit in front of the point
  std::uint64_t carry = 0;
  for (std::size_t i = 12; i-- > 0;) {
    carry += mantissa * inverse_two_pi[i];
    product[i + 1] = static_cast<std::uint32_t>(carry);
    carry >>= 32;
  }
  product[0] = static_cast<std::uint32_t>(carry);
  std::uint64_t turns = 0;
  for (int i = 0; i < 64; ++i) {
    // Bit i of the result weighs 2^(i - 64), which is 2^(i - 64 - exponent) of the product.
    const int weight = i - 64 - exponent;
    if (weight > 31 || weight < -384) continue;
    const int bit = 31 - weight;  // from the left
    turns |= static_cast<std::uint64_t>(product[static_cast<std::size_t>(bit / 32)] >> (31 - bit % 32) & 1u) << i;
  }
  return turns;
}

struct direction {
  double cos, sin;
};

direction exact_direction(std::uint64_t phase) {
  const long double angle = std::ldexp(static_cast<long double>(phase), -64) * 2 * std::numbers::pi_v<long double>;
  return {static_cast<double>(std::cos(angle)), static_cast<double>(std::sin(angle))};
}

double error(const rope::angles& angles, index_t pair, direction exact) {
  return std::max(std::abs(static_cast<double>(angles.cos[pair]) - exact.cos),
                  std::abs(static_cast<double>(angles.sin[pair]) - exact.sin));
}

// 2 KB of floats, off the stack of every test.
const rope::angles& angles_at(const rope& rope, position_t position, bool scaled = true) {
  static rope::angles angles;
  rope.angles_at(position, scaled, angles);
  return angles;
}

// The position whose phase is `phase`, for odd turns: one over them, by Newton's iteration in the 2-adic numbers.
position_t position_of(std::uint64_t phase, std::uint64_t turns) {
  std::uint64_t inverse = turns;
  for (int i = 0; i < 6; ++i) inverse *= 2 - turns * inverse;
  return static_cast<position_t>(phase * inverse);
}

float random_inv_freq(effort::dice& dice) {
  const auto exponent = static_cast<int>(dice.from_to(-149, 31));
  return std::min(0x1p32f, static_cast<float>(std::ldexp(1 + dice.uniform(), exponent)));
}

position_t random_position(effort::dice& dice) {
  return static_cast<position_t>(dice.bits() >> dice.from_to(2, 60));  // of every length up to 2^62
}

// Phases.

TEST_CASE("rope: turns per position are exact for every inv_freq") {
  effort::dice dice(1);
  std::vector<float> inv_freq = {0.f,
                                 -0.f,
                                 1.f,
                                 0.5f,
                                 1e-4f,
                                 0x1p32f,
                                 std::nextafter(0x1p32f, 0.f),
                                 std::numeric_limits<float>::min(),
                                 std::numeric_limits<float>::denorm_min(),
                                 std::numeric_limits<float>::denorm_min() * 3,
                                 0x1p-61f,
                                 0x1p-62f,
                                 0x1.921fb4p-62f,
                                 0x1.921fb6p-62f,  // about 2 pi / 2^64: less and more than a 2^-64th of a turn
                                 0x1p-63f};
  while (inv_freq.size() < 256) inv_freq.push_back(random_inv_freq(dice));
  for (int round = effort::cases(10); round > 0; --round) {
    const rope rope(inv_freq);
    // In the phase of position 2^k, bit 63 - k of the turns is half a turn: if one were off, some k would show it.
    for (int k = 0; k < 64; ++k) {
      const rope::angles& angles = angles_at(rope, static_cast<position_t>(std::uint64_t{1} << k));
      for (std::size_t i = 0; i < inv_freq.size(); ++i) {
        const std::uint64_t phase = exact_turns(inv_freq[i]) << k;
        if (!(error(angles, static_cast<index_t>(i), exact_direction(phase)) <= bound)) {
          CAPTURE(inv_freq[i], k, phase, error(angles, static_cast<index_t>(i), exact_direction(phase)));
          FAIL();
        }
      }
    }
    for (float& f : inv_freq) f = random_inv_freq(dice);
  }
}

TEST_CASE("rope: sines and cosines at random positions up to 2^62") {
  effort::dice dice(2);
  double worst = 0;
  for (int round = effort::cases(300); round > 0; --round) {
    std::vector<float> inv_freq(256);
    for (float& f : inv_freq) f = random_inv_freq(dice);
    const rope rope(inv_freq);
    const position_t position = random_position(dice) * (dice.one_in(2) ? 1 : -1);
    const rope::angles& angles = angles_at(rope, position);
    for (std::size_t i = 0; i < inv_freq.size(); ++i)
      worst = std::max(worst, error(angles, static_cast<index_t>(i),
                                    exact_direction(static_cast<std::uint64_t>(position) * exact_turns(inv_freq[i]))));
  }
  CAPTURE(worst);
  CHECK(worst <= bound);
  CHECK(worst >= bound / 4);  // the reference is no copy of what it checks
}

TEST_CASE("rope: sines and cosines at and around every eighth of a turn") {
  std::vector<float> odd;  // frequencies of which some position hits any phase exactly
  for (float f = 0.7f; odd.size() < 4; f = std::nextafter(f, 1.f))
    if (exact_turns(f) % 2 == 1) odd.push_back(f);
  const rope rope(odd);
  for (std::uint64_t eighth = 0; eighth < 8; ++eighth)
    for (int shift = 0; shift < 64; ++shift)
      for (int sign : {-1, 0, 1})
        for (std::size_t i = 0; i < odd.size(); ++i) {
          const std::uint64_t phase = (eighth << 61) + (std::uint64_t{1} << shift) * static_cast<std::uint64_t>(sign);
          const position_t position = position_of(phase, exact_turns(odd[i]));
          REQUIRE(static_cast<std::uint64_t>(position) * exact_turns(odd[i]) == phase);
          const rope::angles& angles = angles_at(rope, position);
          const auto pair = static_cast<index_t>(i);
          if (!(error(angles, pair, exact_direction(phase)) <= bound)) {
            CAPTURE(eighth, shift, sign, error(angles, pair, exact_direction(phase)));
            FAIL();
          }
          if (sign == 0 && eighth % 2 == 0) {  // quarter turns are exact
            REQUIRE(std::abs(angles.cos[pair]) == (eighth % 4 == 0 ? 1.f : 0.f));
            REQUIRE(std::abs(angles.sin[pair]) == (eighth % 4 == 0 ? 0.f : 1.f));
          }
        }
}

TEST_CASE("rope: the angle is position * inv_freq, in radians") {
  effort::dice dice(3);
  const std::vector<float> inv_freq = {1.f, 0.31f, 0.01f, 1e-4f, 1e-6f};
  const rope rope(inv_freq);
  for (int i = 0; i < 300; ++i) {
    const position_t position = dice.from_to(-(1 << 20), 1 << 20);
    const rope::angles& angles = angles_at(rope, position);
    for (std::size_t j = 0; j < inv_freq.size(); ++j) {
      const long double angle = static_cast<long double>(position) * static_cast<long double>(inv_freq[j]);
      const direction exact = {static_cast<double>(std::cos(angle)), static_cast<double>(std::sin(angle))};
      REQUIRE(error(angles, static_cast<index_t>(j), exact) <= bound);
    }
  }
}

// Turning rows.

std::vector<float> random_row(effort::dice& dice, index_t dim) {
  std::vector<float> row(static_cast<std::size_t>(dim));
  for (float& x : row) x = 2 * dice.signed_unit();
  return row;
}

std::vector<float> turned(const rope& rope, const std::vector<float>& row, position_t position, bool scaled = true) {
  std::vector<float> out(row.size());
  rope.turn(angles_at(rope, position, scaled), row.data(), static_cast<index_t>(row.size()), out.data());
  return out;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

TEST_CASE("rope: a row turns as the paper says, in both pairings") {
  effort::dice dice(4);
  for (int round = effort::cases(300); round > 0; --round) {
    const auto dim = static_cast<index_t>(dice.from_to(2, 80)), pairs = static_cast<index_t>(dice.from_to(1, dim / 2));
    const float factor = dice.one_in(2) ? 1.f : 0.5f + static_cast<float>(dice.uniform());
    std::vector<float> inv_freq(static_cast<std::size_t>(pairs));
    for (float& f : inv_freq) f = static_cast<float>(dice.uniform());
    const rope half_split(inv_freq, rope_pairing::half_split, factor);
    const rope interleaved(inv_freq, rope_pairing::interleaved, factor);
    REQUIRE(half_split.width() == 2 * pairs);

    const position_t position = random_position(dice);
    const std::vector<float> row = random_row(dice, dim);
    std::vector<float> paired(row);  // the same pairs, laid out for interleaved
    const auto n = static_cast<std::size_t>(pairs);
    for (std::size_t i = 0; i < n; ++i) paired[2 * i] = row[i], paired[2 * i + 1] = row[i + n];
    const std::vector<float> out = turned(half_split, row, position),
                             out_paired = turned(interleaved, paired, position);

    for (std::size_t i = 0; i < n; ++i) {
      const direction by = exact_direction(static_cast<std::uint64_t>(position) * exact_turns(inv_freq[i]));
      const auto a = static_cast<double>(row[i]), b = static_cast<double>(row[i + n]), f = static_cast<double>(factor);
      const double allowed = 3 * bound * f * (std::abs(a) + std::abs(b));
      REQUIRE(std::abs(static_cast<double>(out[i]) - f * (a * by.cos - b * by.sin)) <= allowed);
      REQUIRE(std::abs(static_cast<double>(out[i + n]) - f * (b * by.cos + a * by.sin)) <= allowed);
      REQUIRE((out_paired[2 * i] == out[i] && out_paired[2 * i + 1] == out[i + n]));
    }
    // Behind the rotary width nothing happens, not even the factor.
    for (std::size_t i = 2 * n; i < row.size(); ++i) REQUIRE((out[i] == row[i] && out_paired[i] == row[i]));

    // In place.
    for (const rope* in : {&half_split, &interleaved}) {
      std::vector<float> copy(row);
      in->turn(angles_at(*in, position), copy.data(), dim, copy.data());
      REQUIRE(copy == turned(*in, row, position));
    }
  }
}

TEST_CASE("rope: what a query sees of a key depends on their distance alone") {
  effort::dice dice(5);
  for (int round = effort::cases(200); round > 0; --round) {
    const index_t dim = 2 * static_cast<index_t>(dice.from_to(1, 64));
    const rope rope = rope::plain(dim, 10000.0);
    const std::vector<float> k = random_row(dice, dim), q = random_row(dice, dim);
    const position_t distance = dice.from_to(0, 1 << 20);
    const double size = std::sqrt(dot(k, k) * dot(q, q));
    const double at_start = dot(turned(rope, q, distance), turned(rope, k, 0));
    for (position_t p : {position_t{1}, position_t{1} << 24, position_t{1} << 40, (position_t{1} << 62) - distance,
                         random_position(dice) / 2, -distance, random_position(dice) / -2}) {
      CAPTURE(p, distance, dim);
      REQUIRE(std::abs(dot(turned(rope, q, p + distance), turned(rope, k, p)) - at_start) <= 6 * bound * size);
    }
  }
}

TEST_CASE("rope: phases wrap without a trace") {
  // 2^62 positions of a whole number of quarter turns each, in fixed point: the same bits.
  std::vector<float> inv_freq;
  for (float f = 0.5f; inv_freq.size() < 8; f = std::nextafter(f, 1.f))
    if (exact_turns(f) % 4 == 0) inv_freq.push_back(f);
  const rope rope(inv_freq);
  for (position_t p : {position_t{0}, position_t{1}, position_t{12345}, position_t{1} << 40}) {
    const rope::angles here = angles_at(rope, p), there = angles_at(rope, p + (position_t{1} << 62));
    for (index_t i = 0; i < 8; ++i) REQUIRE((here.cos[i] == there.cos[i] && here.sin[i] == there.sin[i]));
  }
}

TEST_CASE("rope: at position 0 nothing turns, to the bit") {
  effort::dice dice(6);
  const rope rope(rope::plain(64, 10000.0));
  const std::vector<float> row = random_row(dice, 64);
  CHECK(turned(rope, row, 0) == row);
}

TEST_CASE("rope: attention factor") {
  effort::dice dice(7);
  const std::vector<float> inv_freq = {1.f, 0.1f, 0.01f}, row = random_row(dice, 7);
  const rope plain(inv_freq), scaled(inv_freq, rope_pairing::half_split, 1.25f);
  const std::vector<float> without = turned(plain, row, 1000), with = turned(scaled, row, 1000);
  for (std::size_t i = 0; i < 7; ++i) CHECK(std::abs(with[i] - without[i] * (i < 6 ? 1.25f : 1.f)) < 1e-6f);
  CHECK(turned(scaled, row, 1000, false) == without);
  CHECK(turned(plain, row, 1000, false) == without);
  for (std::size_t i = 0; i < 6; ++i) CHECK(turned(scaled, row, 0)[i] == row[i] * 1.25f);
}

TEST_CASE("rope: none") {
  effort::dice dice(8);
  CHECK(rope::none().width() == 0);
  CHECK(rope(std::span<const float>()).width() == 0);
  const std::vector<float> row = random_row(dice, 33);
  for (position_t p : {position_t{0}, position_t{1}, position_t{1} << 62}) CHECK(turned(rope::none(), row, p) == row);
}

TEST_CASE("rope: plain is theta^(-2i / head_dim), in double, rounded once") {
  effort::dice dice(9);
  for (const auto& [dim, theta] :
       {std::pair<index_t, double>{2, 10000.0}, {64, 10000.0}, {128, 500000.0}, {96, 1e6}, {512, 10000.0}, {80, 1.0}}) {
    CAPTURE(dim, theta);
    std::vector<float> inv_freq;
    for (index_t i = 0; i < dim / 2; ++i)
      inv_freq.push_back(
          static_cast<float>(1.0 / std::pow(theta, static_cast<double>(2 * i) / static_cast<double>(dim))));
    const std::vector<float> row = random_row(dice, dim);
    CHECK(rope::plain(dim, theta).width() == dim);
    CHECK(turned(rope::plain(dim, theta), row, 4'000'000'000) == turned(rope(inv_freq), row, 4'000'000'000));
  }
}

// Errors.

TEST_CASE("rope: errors name the argument, its value and what it had to be") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const auto with_freq = [](float f) { return rope(std::vector<float>{1.f, f}); };
  const auto with_factor = [](float f) { return rope(std::vector<float>{1.f}, rope_pairing::half_split, f); };

  CHECK_NOTHROW(rope(std::vector<float>(256, 1.f)));
  CHECK_THROWS_WITH(rope(std::vector<float>(257, 1.f)), "sinkcache: inv_freq.size() was 257, had to be at most 256");
  CHECK_NOTHROW(with_freq(0x1p32f));
  CHECK_NOTHROW(with_freq(0.f));
  CHECK_THROWS_WITH(with_freq(-1.5f), "sinkcache: an inv_freq was -1.5, had to be from 0 to 2^32");
  CHECK_THROWS_WITH(with_freq(nan), "sinkcache: an inv_freq was nan, had to be from 0 to 2^32");
  CHECK_THROWS_WITH(with_freq(inf), "sinkcache: an inv_freq was inf, had to be from 0 to 2^32");
  CHECK_THROWS_AS(with_freq(std::nextafter(0x1p32f, inf)), std::invalid_argument);
  CHECK_THROWS_AS(with_freq(-std::numeric_limits<float>::denorm_min()), std::invalid_argument);

  CHECK_THROWS_WITH(with_factor(0.f), "sinkcache: attention_factor was 0, had to be finite and above 0");
  CHECK_THROWS_WITH(with_factor(-1.f), "sinkcache: attention_factor was -1, had to be finite and above 0");
  CHECK_THROWS_WITH(with_factor(inf), "sinkcache: attention_factor was inf, had to be finite and above 0");
  CHECK_THROWS_WITH(with_factor(nan), "sinkcache: attention_factor was nan, had to be finite and above 0");

  for (index_t dim : {-2, 0, 1, 3, 127, 514})
    CHECK_THROWS_WITH(rope::plain(dim, 1e4),
                      "sinkcache: head_dim was " + std::to_string(dim) + ", had to be even and from 2 to 512");
  CHECK_THROWS_WITH(rope::plain(64, 0.5), "sinkcache: theta was 0.5, had to be finite and at least 1");
  CHECK_THROWS_WITH(rope::plain(64, std::nan("")), "sinkcache: theta was nan, had to be finite and at least 1");
  CHECK_THROWS_WITH(rope::plain(64, HUGE_VAL), "sinkcache: theta was inf, had to be finite and at least 1");
}

}  // namespace
