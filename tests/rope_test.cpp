// Rotary positions against exact integer arithmetic: phases from a longer constant than the library's, sines and
// cosines in long double. Scalings against what PyTorch computes; attention over rows that an engine rotated itself.

#include <fmt/format.h>

#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numbers>
#include <string>
#include <type_traits>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"

using namespace sinkcache;

namespace {

static_assert(std::is_nothrow_move_constructible_v<rope> && std::is_copy_assignable_v<rope>);
static_assert(sizeof(rope) < 4096);
static_assert(!std::is_convertible_v<std::span<const float>, rope>);

constexpr double bound = 1e-7;  // of each sine and cosine

// The reference.

// 1 / 2 pi, 384 bits after the point, in digits of 32 bits.
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

// The turns per position of each pair, bit for bit: in the phase of position 2^k, bit 63 - k is half a turn.
std::vector<std::uint64_t> turns_of(const rope& rope) {
  std::vector<std::uint64_t> turns(static_cast<std::size_t>(rope.width() / 2));
  for (int k = 0; k < 64; ++k) {
    const rope::angles& angles = angles_at(rope, static_cast<position_t>(std::uint64_t{1} << k));
    for (std::size_t i = 0; i < turns.size(); ++i) {
      const bool in_upper_half = angles.sin[i] < 0 || (angles.sin[i] == 0 && angles.cos[i] < 0);
      if (in_upper_half) turns[i] |= std::uint64_t{1} << (63 - k);
    }
  }
  return turns;
}

double inv_freq_of(std::uint64_t turns) { return std::ldexp(static_cast<double>(turns), -64) * 2 * std::numbers::pi; }

float random_inv_freq(effort::dice& dice) {
  const auto exponent = static_cast<int>(dice.from_to(-149, 31));
  return std::min(0x1p32f, static_cast<float>(std::ldexp(1 + dice.uniform(), exponent)));
}

position_t random_position(effort::dice& dice) {
  return static_cast<position_t>(dice.bits() >> dice.from_to(2, 60));  // of every length up to 2^62
}

// Phases.

TEST_CASE("rope: the oracle's division by 2 pi gives what the multiplication by 1 / 2 pi here does") {
  effort::dice dice(16);
  for (float f : {0.f, 1.f, 0.5f, 1e-4f, 0x1p32f, 0x1p-61f, 0x1.921fb4p-62f, 0x1.921fb6p-62f, 0x1p-149f})
    CHECK(oracle::turns_per_position(f) == exact_turns(f));
  for (int i = effort::cases(5000); i > 0; --i) {
    const float f = random_inv_freq(dice);
    if (oracle::turns_per_position(f) != exact_turns(f)) {
      CAPTURE(f, oracle::turns_per_position(f), exact_turns(f));
      FAIL();
    }
  }
}

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

// Rotating rows.

std::vector<float> random_row(effort::dice& dice, index_t dim) {
  std::vector<float> row(static_cast<std::size_t>(dim));
  for (float& x : row) x = 2 * dice.signed_unit();
  return row;
}

std::vector<float> rotated(const rope& rope, const std::vector<float>& row, position_t position, bool scaled = true) {
  std::vector<float> out(row.size());
  rope.rotate(angles_at(rope, position, scaled), row.data(), static_cast<index_t>(row.size()), out.data());
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
    const std::vector<float> out = rotated(half_split, row, position),
                             out_paired = rotated(interleaved, paired, position);

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
      in->rotate(angles_at(*in, position), copy.data(), dim, copy.data());
      REQUIRE(copy == rotated(*in, row, position));
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
    const double at_start = dot(rotated(rope, q, distance), rotated(rope, k, 0));
    for (position_t p : {position_t{1}, position_t{1} << 24, position_t{1} << 40, (position_t{1} << 62) - distance,
                         random_position(dice) / 2, -distance, random_position(dice) / -2}) {
      CAPTURE(p, distance, dim);
      REQUIRE(std::abs(dot(rotated(rope, q, p + distance), rotated(rope, k, p)) - at_start) <= 6 * bound * size);
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
  CHECK(rotated(rope, row, 0) == row);
}

TEST_CASE("rope: attention factor") {
  effort::dice dice(7);
  const std::vector<float> inv_freq = {1.f, 0.1f, 0.01f}, row = random_row(dice, 7);
  const rope plain(inv_freq), scaled(inv_freq, rope_pairing::half_split, 1.25f);
  const std::vector<float> without = rotated(plain, row, 1000), with = rotated(scaled, row, 1000);
  for (std::size_t i = 0; i < 7; ++i) CHECK(std::abs(with[i] - without[i] * (i < 6 ? 1.25f : 1.f)) < 1e-6f);
  CHECK(rotated(scaled, row, 1000, false) == without);
  CHECK(rotated(plain, row, 1000, false) == without);
  for (std::size_t i = 0; i < 6; ++i) CHECK(rotated(scaled, row, 0)[i] == row[i] * 1.25f);
}

TEST_CASE("rope: none") {
  effort::dice dice(8);
  CHECK(rope::none().width() == 0);
  CHECK(rope(std::span<const float>()).width() == 0);
  const std::vector<float> row = random_row(dice, 33);
  for (position_t p : {position_t{0}, position_t{1}, position_t{1} << 62}) CHECK(rotated(rope::none(), row, p) == row);
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
    const rope plain = rope::plain(dim, theta);
    const std::vector<float> row = random_row(dice, dim);
    CHECK(rotated(plain, row, 4'000'000'000) == rotated(rope(inv_freq), row, 4'000'000'000));
    const std::vector<std::uint64_t> turns = turns_of(plain);
    REQUIRE(turns.size() == inv_freq.size());
    for (std::size_t i = 0; i < turns.size(); ++i) CHECK(turns[i] == exact_turns(inv_freq[i]));
  }
}

// Scalings.

struct scaled_by_pytorch {
  const char* name;
  rope got;
  std::vector<float> inv_freq;
  std::vector<std::size_t> ulp_off;  // pairs whose power PyTorch rounds to the wrong side
};

// What Hugging Face's modeling_rope_utils.py (transformers 5.23) computes in PyTorch 1.13 on an x86 processor, printed
// with as many digits as a float needs.
std::vector<scaled_by_pytorch> scaled_by_pytorch_cases() {
  return {{"linear",
           rope::linear(40, 10000, 3),
           {3.3333334e-1f, 2.103191e-1f,  1.327024e-1f,  8.372954e-2f,  5.2829772e-2f, 3.3333335e-2f, 2.1031909e-2f,
            1.327024e-2f,  8.372954e-3f,  5.282978e-3f,  3.3333332e-3f, 2.103191e-3f,  1.3270235e-3f, 8.372956e-4f,
            5.282978e-4f,  3.3333336e-4f, 2.1031911e-4f, 1.3270236e-4f, 8.372957e-5f,  5.282978e-5f},
           {}},
          {"Llama 3.1 8B",
           rope::llama3(128, 500000, {8, 1, 4, 8192}),
           {1e+0f,         8.146172e-1f,  6.636013e-1f,  5.40581e-1f,   4.4036663e-1f, 3.5873023e-1f, 2.9222783e-1f,
            2.3805381e-1f, 1.9392276e-1f, 1.5797281e-1f, 1.2868738e-1f, 1.0483095e-1f, 8.53971e-2f,   6.956595e-2f,
            5.666962e-2f,  4.616405e-2f,  3.760603e-2f,  3.063452e-2f,  2.4955409e-2f, 2.0329105e-2f, 1.656044e-2f,
            1.349042e-2f,  1.0989529e-2f, 8.952259e-3f,  7.292665e-3f,  5.9407307e-3f, 4.8394212e-3f, 3.942276e-3f,
            3.211446e-3f,  2.1665706e-3f, 1.3718937e-3f, 8.5675146e-4f, 5.24846e-4f,   3.1269365e-4f, 1.7850779e-4f,
            9.556212e-5f,  7.7846555e-5f, 6.3415144e-5f, 5.165907e-5f,  4.2082367e-5f, 3.4281024e-5f, 2.792591e-5f,
            2.2748929e-5f, 1.853167e-5f,  1.5096218e-5f, 1.2297639e-5f, 1.0017869e-5f, 8.160728e-6f,  6.6478697e-6f,
            5.4154693e-6f, 4.4115345e-6f, 3.5937119e-6f, 2.9274997e-6f, 2.3847917e-6f, 1.9426925e-6f, 1.5825508e-6f,
            1.2891732e-6f, 1.0501826e-6f, 8.554969e-7f,  6.9690253e-7f, 5.677088e-7f,  4.6246538e-7f, 3.7673226e-7f,
            3.068926e-7f},
           {}},
          {"Llama 3.2's numbers, width 96",
           rope::llama3(96, 500000, {32, 1, 4, 8192}),
           {1e+0f,         7.608016e-1f,  5.7881916e-1f, 4.4036663e-1f, 3.3503163e-1f, 2.5489265e-1f, 1.9392276e-1f,
            1.4753675e-1f, 1.1224619e-1f, 8.53971e-2f,   6.497026e-2f,  4.942948e-2f,  3.760603e-2f,  2.8610729e-2f,
            2.1767095e-2f, 1.656044e-2f,  1.2599208e-2f, 9.585502e-3f,  7.292665e-3f,  5.548271e-3f,  4.221135e-3f,
            3.211446e-3f,  1.8006797e-3f, 9.1258425e-4f, 4.295567e-4f,  1.7357197e-4f, 4.33578e-5f,   1.9461639e-5f,
            1.480645e-5f,  1.1264767e-5f, 8.570256e-6f,  6.520266e-6f,  4.960627e-6f,  3.7740544e-6f, 2.8713077e-6f,
            2.1844944e-6f, 1.6619674e-6f, 1.264428e-6f,  9.619785e-7f,  7.3187493e-7f, 5.5681187e-7f, 4.2362316e-7f,
            3.222933e-7f,  2.4520133e-7f, 1.8654949e-7f, 1.419272e-7f,  1.0797847e-7f, 8.2150166e-8f},
           {19}},
          {"gpt-oss",
           rope::yarn(64, 150000, {.factor = 32, .original_max_position_embeddings = 4096, .truncate = false}),
           {1e+0f,         6.890443e-1f,  4.7478205e-1f, 3.2714587e-1f, 2.25418e-1f,   1.5532298e-1f, 1.07024424e-1f,
            7.3744565e-2f, 5.0813273e-2f, 3.1705696e-2f, 1.9335e-2f,    1.1592049e-2f, 6.7949593e-3f, 3.860359e-3f,
            2.0937927e-3f, 1.0526022e-3f, 4.5648392e-4f, 1.293187e-4f,  3.830881e-5f,  2.6396468e-5f, 1.8188337e-5f,
            1.253257e-5f,  8.635496e-6f,  5.9502395e-6f, 4.0999785e-6f, 2.8250668e-6f, 1.9465963e-6f, 1.341291e-6f,
            9.2420896e-7f, 6.368209e-7f,  4.3879785e-7f, 3.0235114e-7f},
           {6, 10}},
          {"Qwen 2.5, YaRN",
           rope::yarn(128, 1000000, {.factor = 4, .original_max_position_embeddings = 32768}),
           {1e+0f,         8.058422e-1f,  6.4938164e-1f, 5.2329916e-1f, 4.216965e-1f,  3.3982083e-1f, 2.7384198e-1f,
            2.206734e-1f,  1.7782794e-1f, 1.4330126e-1f, 1.154782e-1f,  9.30572e-2f,   7.4989416e-2f, 6.0429644e-2f,
            4.8696753e-2f, 3.92419e-2f,   3.162278e-2f,  2.5482967e-2f, 2.0535251e-2f, 1.6548172e-2f, 1.3335215e-2f,
            1.0746079e-2f, 8.659643e-3f,  6.978306e-3f,  5.3753215e-3f, 4.131738e-3f,  3.1684227e-3f, 2.4234224e-3f,
            1.8482766e-3f, 1.4051124e-3f, 1.064361e-3f,  8.029598e-4f,  6.0294115e-4f, 4.5032357e-4f, 3.3424055e-4f,
            2.462584e-4f,  1.7984115e-4f, 1.2993149e-4f, 9.262301e-5f,  6.490394e-5f,  4.4456985e-5f, 3.5825316e-5f,
            2.8869548e-5f, 2.3264301e-5f, 1.8747356e-5f, 1.5107409e-5f, 1.2174189e-5f, 9.810475e-6f,  7.905694e-6f,
            6.3707416e-6f, 5.1338125e-6f, 4.1370427e-6f, 3.3338035e-6f, 2.6865196e-6f, 2.164911e-6f,  1.7445766e-6f,
            1.4058534e-6f, 1.1328959e-6f, 9.129353e-7f,  7.356818e-7f,  5.9284343e-7f, 4.7773824e-7f, 3.8498163e-7f,
            3.1023444e-7f},
           {37}},
          {"DeepSeek V2's numbers",
           rope::yarn(64, 10000, {.factor = 40, .original_max_position_embeddings = 4096}),
           {1e+0f,         7.498942e-1f,  5.6234133e-1f, 4.216965e-1f,  3.1622776e-1f, 2.3713736e-1f,  1.7782794e-1f,
            1.3335215e-1f, 1e-1f,         7.4989416e-2f, 5.623413e-2f,  3.9006926e-2f, 2.687936e-2f,   1.8378144e-2f,
            1.2447956e-2f, 8.334509e-3f,  5.5000004e-3f, 3.5619973e-3f, 2.2493652e-3f, 1.3705135e-3f,  7.905694e-4f,
            4.149904e-4f,  1.7782794e-4f, 3.3338034e-5f, 2.5e-5f,       1.8747354e-5f, 1.40585325e-5f, 1.0542412e-5f,
            7.9056945e-6f, 5.9284343e-6f, 4.4456983e-6f, 3.3338035e-6f},
           {}}};
}

TEST_CASE("rope: scalings have the bits that Hugging Face computes in float32") {
  for (const scaled_by_pytorch& c : scaled_by_pytorch_cases()) {
    INFO(c.name);
    const std::vector<std::uint64_t> turns = turns_of(c.got);
    REQUIRE(turns.size() == c.inv_freq.size());
    for (std::size_t i = 0; i < turns.size(); ++i) {
      const float f = c.inv_freq[i];
      INFO("pair " << i << ": " << inv_freq_of(turns[i]) << ", PyTorch " << f);
      if (std::count(c.ulp_off.begin(), c.ulp_off.end(), i) == 0)
        CHECK(turns[i] == exact_turns(f));
      else
        CHECK((turns[i] == exact_turns(std::nextafter(f, 0.f)) || turns[i] == exact_turns(std::nextafter(f, 2.f))));
    }
  }
}

float attention_factor_of(const rope& rope) { return angles_at(rope, 0).cos[0]; }

TEST_CASE("rope: YaRN's attention factor") {
  const auto factor = [](rope::yarn_scaling by) {
    by.original_max_position_embeddings = 4096;
    return attention_factor_of(rope::yarn(64, 10000, by));
  };
  // As Hugging Face computes it.
  CHECK(factor({.factor = 32}) == static_cast<float>(1.3465735902799727));
  CHECK(factor({.factor = 1}) == 1);
  CHECK(factor({.factor = 40, .mscale = 1, .mscale_all_dim = 1}) == 1);
  CHECK(factor({.factor = 40, .mscale = 0.707, .mscale_all_dim = 0.5}) == static_cast<float>(1.064468903941252));
  CHECK(factor({.factor = 40, .mscale = 0.707}) == static_cast<float>(1.3688879454113936));
  CHECK(factor({.factor = 40, .mscale = 1, .mscale_all_dim = 1, .attention_factor = 1.5}) == 1.5f);
  CHECK(attention_factor_of(rope::linear(64, 10000, 4)) == 1);
  CHECK(attention_factor_of(rope::llama3(64, 10000, {8, 1, 4, 8192})) == 1);
  effort::dice dice(10);
  const std::vector<float> row = random_row(dice, 66);
  const rope yarn = rope::yarn(64, 10000, {.factor = 32, .original_max_position_embeddings = 4096});
  const std::vector<float> at_start = rotated(yarn, row, 0);
  for (std::size_t i = 0; i < 66; ++i) CHECK(at_start[i] == (i < 64 ? row[i] * 1.3465735902799727f : row[i]));
  CHECK(rotated(yarn, row, 0, false) == row);
}

// A rope of any kind with random numbers, and its frequencies by the papers' formulas in double.
struct random_rope {
  std::string text;
  rope got = rope::none();
  std::vector<double> inv_freq, allowed;  // and how far off each may be
  float attention_factor = 1;
};

random_rope draw_rope(effort::dice& dice, rope_pairing pairing, index_t max_width = 512) {
  random_rope r;
  const index_t width = 2 * static_cast<index_t>(dice.from_to(1, dice.one_in(2) ? 32 : max_width / 2));
  const double theta = dice.one_in(4) ? 10000 : std::exp(0.5 + 16 * dice.uniform());
  const double factor = dice.one_in(5) ? 1 : std::exp2(6 * dice.uniform());
  const double original = static_cast<double>(dice.from_to(256, 40000));
  const double log_theta = std::log(theta), log_factor = std::log(factor);
  const auto dim = static_cast<double>(width);
  const int kind = static_cast<int>(dice.from_to(0, 4));
  // Each float32 operation is off by half an ulp; an exponent's error counts log(theta) times.
  const double ulp = 0x1p-24 * (log_theta + 12);
  r.text = fmt::format("kind {}, width {}, theta {}, factor {}, original {}", kind, width, theta, factor, original);

  double low = 1 + dice.uniform(), high = low + 0.5 + 4 * dice.uniform();  // llama3's factors
  rope::yarn_scaling yarn{.factor = factor, .original_max_position_embeddings = original};
  yarn.truncate = dice.one_in(2);
  if (dice.one_in(2))
    yarn.beta_slow = 0.5 + dice.uniform(), yarn.beta_fast = yarn.beta_slow * (2 + 30 * dice.uniform());
  const auto border = [&](double turns) {
    return dim * std::log(original / (turns * 2 * std::numbers::pi)) / (2 * log_theta);
  };
  double from = border(yarn.beta_fast), to = border(yarn.beta_slow);
  if (yarn.truncate) from = std::floor(from), to = std::ceil(to);
  from = std::max(from, 0.0), to = std::min(to, dim - 1);
  if (kind == 4 && !(to - from > 0.01)) return draw_rope(dice, pairing, max_width);  // no ramp to speak of

  for (index_t i = 0; i < width / 2; ++i) {
    const double plain = std::exp(-log_theta * static_cast<double>(2 * i) / dim),
                 turns = original * plain / (2 * std::numbers::pi);
    // How much of a frequency is left unscaled, and how far off that may be.
    double kept = 1, allowed = 0;
    if (kind == 2) kept = 0;
    if (kind == 3) kept = std::clamp((turns - low) / (high - low), 0.0, 1.0), allowed = ulp * high / (high - low);
    if (kind == 4)
      kept = 1 - std::clamp((static_cast<double>(i) - from) / (to - from), 0.0, 1.0),
      allowed = 0x1p-24 * (2 + 2 * dim / (to - from));
    r.inv_freq.push_back(plain * (kept + (1 - kept) * std::exp(-log_factor)));
    r.allowed.push_back(plain * (ulp + allowed));
  }
  std::vector<float> inv_freq(r.inv_freq.begin(), r.inv_freq.end());
  if (kind == 0) r.attention_factor = 0.5f + static_cast<float>(dice.uniform());
  if (kind == 4) r.attention_factor = static_cast<float>(0.1 * log_factor + 1);
  if (kind == 0) r.got = rope(inv_freq, pairing, r.attention_factor);
  if (kind == 1) r.got = rope::plain(width, theta, pairing);
  if (kind == 2) r.got = rope::linear(width, theta, factor, pairing);
  if (kind == 3) r.got = rope::llama3(width, theta, {factor, low, high, original}, pairing);
  if (kind == 4) r.got = rope::yarn(width, theta, yarn, pairing);
  return r;
}

// Of powers of two, so that all is exact.
TEST_CASE("rope: a ramp of YaRN that starts and ends at the first pair leaves that one alone") {
  std::vector<float> expected(16);
  for (int i = 0; i < 16; ++i) expected[static_cast<std::size_t>(i)] = std::ldexp(i == 0 ? 1.f : 0.25f, -i);
  CHECK(rope::yarn(32, 65536, {.factor = 4, .original_max_position_embeddings = 6, .attention_factor = 1.}) ==
        rope(expected));
}

TEST_CASE("rope: scalings are what their papers say") {
  effort::dice dice(11);
  double worst = 0;
  for (int round = effort::cases(1000); round > 0; --round) {
    const random_rope r = draw_rope(dice, rope_pairing::half_split);
    const std::vector<std::uint64_t> turns = turns_of(r.got);
    REQUIRE(turns.size() == r.inv_freq.size());
    for (std::size_t i = 0; i < turns.size(); ++i) {
      const double off = std::abs(inv_freq_of(turns[i]) - r.inv_freq[i]);
      worst = std::max(worst, off / r.allowed[i]);
      if (!(off <= r.allowed[i])) {
        CAPTURE(round, r.text, i, inv_freq_of(turns[i]), r.inv_freq[i]);
        FAIL();
      }
    }
  }
  CAPTURE(worst);
  CHECK(worst > 0.1);  // no bound that anything keeps
}

TEST_CASE("rope: whatever the scaling, rows turn exactly up to 2^62 and products depend on distance alone") {
  effort::dice dice(12);
  for (int round = effort::cases(300); round > 0; --round) {
    const rope_pairing pairing = dice.one_in(2) ? rope_pairing::half_split : rope_pairing::interleaved;
    const random_rope r = draw_rope(dice, pairing);
    const auto dim = std::min<index_t>(512, r.got.width() + static_cast<index_t>(dice.from_to(0, 9)));
    CHECK(attention_factor_of(r.got) == r.attention_factor);
    const double factor = static_cast<double>(r.attention_factor);
    // The test above says what they have to be; this one, that a position's phase is so many times theirs.
    const std::vector<std::uint64_t> turns = turns_of(r.got);
    const std::vector<float> k = random_row(dice, dim), q = random_row(dice, dim);
    const position_t p = random_position(dice) / 2, distance = random_position(dice) >> dice.from_to(0, 61);
    CAPTURE(round, r.text, dim, p, distance);

    const std::vector<float> out = rotated(r.got, k, p);
    const std::size_t n = turns.size(), step = pairing == rope_pairing::half_split ? 1 : 2;
    const std::size_t apart = pairing == rope_pairing::half_split ? n : 1;
    bool exact = true;
    for (std::size_t i = 0; i < n; ++i) {
      const direction by = exact_direction(static_cast<std::uint64_t>(p) * turns[i]);
      const double a = static_cast<double>(k[i * step]), b = static_cast<double>(k[i * step + apart]);
      const double allowed = 3 * bound * factor * (std::abs(a) + std::abs(b));
      exact = exact && std::abs(static_cast<double>(out[i * step]) - factor * (a * by.cos - b * by.sin)) <= allowed &&
              std::abs(static_cast<double>(out[i * step + apart]) - factor * (b * by.cos + a * by.sin)) <= allowed;
    }
    CHECK(exact);
    CHECK(std::equal(out.begin() + 2 * static_cast<index_t>(n), out.end(), k.begin() + 2 * static_cast<index_t>(n)));
    const double size = factor * factor * std::sqrt(dot(k, k) * dot(q, q));
    const double at_start = dot(rotated(r.got, q, distance), rotated(r.got, k, 0));
    CHECK(std::abs(dot(rotated(r.got, q, p + distance), out) - at_start) <=
          6 * bound * std::max(1.0, 1 / (factor * factor)) * size);
  }
}

// Rows that the engine has rotated.

enum class engine_angles {
  exact,
  f32,            // float(position) * inv_freq in float32: Hugging Face, llama2.c, most others
  f32_multiplied  // float(position), times float(theta^(-2 / width)) from pair to pair: ggml
};

struct engine {
  const char* name;
  engine_angles angles;
  // How many roundings of 2^-24 the angle of pair i may be off, relatively.
  double roundings(std::size_t i) const {
    return angles == engine_angles::exact ? 0 : angles == engine_angles::f32 ? 1 : 1 + 3 * static_cast<double>(i);
  }
};

constexpr index_t rotated_dim = 64, pinned = 4, newest = 60;  // one head of so many dimensions over 4 + 60 tokens
constexpr double u = 0x1p-24;

// How the dimensions of a head pair up: the first and the second of pair i of n.
std::size_t first_of(rope_pairing pairing, std::size_t i) { return pairing == rope_pairing::half_split ? i : 2 * i; }
std::size_t second_of(rope_pairing pairing, std::size_t i, std::size_t n) {
  return pairing == rope_pairing::half_split ? i + n : 2 * i + 1;
}

struct rotating {
  std::vector<float> inv_freq;
  rope_pairing pairing = rope_pairing::half_split;
  float attention_factor = 1;
};

std::vector<float> rotated_by(const engine& engine, const rotating& as, const std::vector<float>& row,
                              position_t position) {
  std::vector<float> out(row);
  const std::size_t n = as.inv_freq.size();
  volatile float multiplied = static_cast<float>(position);  // volatile: float32 on every machine
  for (std::size_t i = 0; i < n; ++i) {
    const direction exact = exact_direction(static_cast<std::uint64_t>(position) * exact_turns(as.inv_freq[i]));
    float cos = static_cast<float>(exact.cos), sin = static_cast<float>(exact.sin);
    if (engine.angles != engine_angles::exact) {
      volatile float angle = static_cast<float>(position) * as.inv_freq[i];
      if (engine.angles == engine_angles::f32_multiplied) {
        angle = multiplied;
        multiplied = multiplied * as.inv_freq[1];  // theta^(-2 / width), of an unscaled rope
      }
      cos = std::cos(angle), sin = std::sin(angle);
    }
    const std::size_t a = first_of(as.pairing, i), b = second_of(as.pairing, i, n);
    out[a] = (row[a] * cos - row[b] * sin) * as.attention_factor;
    out[b] = (row[b] * cos + row[a] * sin) * as.attention_factor;
  }
  return out;
}

struct rotated_run {
  double error;    // of the output, in units of the largest |v|
  double allowed;  // by the bound of docs/rope.md
  double own;      // the library's own part of it
};

// Decodes the last of `tokens` tokens over the first 4 and the newest 60, which `by` has rotated (none: raw rows), and
// compares with attention in double over exactly rotated rows.
rotated_run decode_rotated(effort::dice& dice, const engine* by, positions positions, const rotating& as,
                           position_t first_position, position_t tokens) {
  const std::vector<float>& inv_freq = as.inv_freq;
  const rope rope(inv_freq, as.pairing, as.attention_factor);
  kv_cache<f32> cache({.num_kv_heads = 1,
                       .head_dim = rotated_dim,
                       .num_sink_tokens = pinned,
                       .window = newest,
                       .positions = positions,
                       .inputs = by == nullptr ? inputs::raw : inputs::rotated,
                       .rope = rope,
                       .first_position = first_position});
  const auto normal_row = [&] {
    std::vector<float> row(rotated_dim);
    for (float& x : row)
      x = static_cast<float>(std::sqrt(-2 * std::log(1 - dice.uniform())) *
                             std::cos(2 * std::numbers::pi * dice.uniform()));
    return row;
  };
  const auto as_matrix = [](const std::vector<float>& row) {
    return Eigen::Map<const matrix>(row.data(), 1, rotated_dim);
  };
  const auto as_engine = [&](const std::vector<float>& row, position_t p) {
    return by == nullptr ? row : rotated_by(*by, as, row, first_position + p);
  };

  std::vector<position_t> visible;
  std::vector<std::vector<float>> keys, values;
  const matrix filler = matrix::Zero(4096, rotated_dim);
  while (cache.seen() < tokens) {
    const position_t p = cache.seen();
    if (p >= pinned && p < tokens - newest) {
      const position_t n = std::min<position_t>(4096, tokens - newest - p);
      cache.append(filler.topRows(n), filler.topRows(n));
      continue;
    }
    visible.push_back(p), keys.push_back(normal_row()), values.push_back(normal_row());
    cache.append(as_matrix(as_engine(keys.back(), p)), as_matrix(values.back()));
  }
  const std::vector<float> q = normal_row(), q_given = as_engine(q, tokens - 1);
  matrix out(1, rotated_dim);
  workspace workspace;
  const attention attention({.num_qo_heads = 1});
  attention.decode(as_matrix(q_given), cache, out, workspace);

  // The same in double. In the cache's order the last token is at place visible.size() - 1.
  const std::size_t n = inv_freq.size(), count = visible.size();
  const double scale = static_cast<double>(1.f / std::sqrt(static_cast<float>(rotated_dim)));
  const double factor = static_cast<double>(as.attention_factor) * static_cast<double>(as.attention_factor);
  std::vector<double> logits(count), expected(rotated_dim);
  double v_max = 0, a = 0, rotated_wrongly = 0, sum = 0;
  for (std::size_t j = 0; j < count; ++j) {
    const auto distance = static_cast<std::uint64_t>(
        positions == positions::in_cache ? static_cast<position_t>(count - 1 - j) : tokens - 1 - visible[j]);
    double logit = 0, wrong = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t first = first_of(as.pairing, i), second = second_of(as.pairing, i, n);
      const auto qa = static_cast<double>(q[first]), qb = static_cast<double>(q[second]);
      const auto ka = static_cast<double>(keys[j][first]), kb = static_cast<double>(keys[j][second]);
      const direction turn = exact_direction(distance * exact_turns(inv_freq[i]));
      logit += factor * ((qa * ka + qb * kb) * turn.cos + (qa * kb - qb * ka) * turn.sin);
      // Half an ulp of both angles for each rounding.
      const double both = static_cast<double>(2 * first_position + tokens - 1 + visible[j]);
      if (by != nullptr)
        wrong += factor * std::hypot(qa, qb) * std::hypot(ka, kb) * by->roundings(i) * u * both *
                 static_cast<double>(inv_freq[i]);
    }
    for (std::size_t i = 2 * n; i < rotated_dim; ++i)
      logit += static_cast<double>(q[i]) * static_cast<double>(keys[j][i]);
    logits[j] = scale * logit;
    rotated_wrongly = std::max(rotated_wrongly, scale * wrong);
    a = std::max(a, scale * factor * std::sqrt(dot(q, q) * dot(keys[j], keys[j])));
    for (float v : values[j]) v_max = std::max(v_max, std::abs(static_cast<double>(v)));
  }
  for (double logit : logits) sum += std::exp(logit);
  double error = 0;
  for (std::size_t d = 0; d < rotated_dim; ++d) {
    for (std::size_t j = 0; j < count; ++j)
      expected[d] += std::exp(logits[j]) / sum * static_cast<double>(values[j][d]);
    error = std::max(error, std::abs(static_cast<double>(out(0, static_cast<index_t>(d))) - expected[d]));
  }
  // Logits off by at most e move an output by at most 2 tanh(e / 2) of the largest |v|. An engine that turns in float32
  // rounds sines, cosines, products and sums as well: 4 u of a row.
  const double own = 16 * u * (1 + a);
  const double engines = by == nullptr ? 0 : 2 * std::tanh((rotated_wrongly + 8 * u * a) / 2);
  return {error / v_max, engines + own, own};
}

TEST_CASE("rope: rows rotated with float32 angles are as far off as docs/rope.md says") {
  std::vector<float> inv_freq;
  for (const double theta : {10000., 500000.}) {
    inv_freq.clear();
    for (index_t i = 0; i < rotated_dim / 2; ++i)
      inv_freq.push_back(static_cast<float>(std::pow(theta, -2 * static_cast<double>(i) / rotated_dim)));
    for (const engine& by : {engine{"exact", engine_angles::exact}, engine{"f32", engine_angles::f32},
                             engine{"multiplied", engine_angles::f32_multiplied}})
      for (const positions positions : {positions::in_cache, positions::absolute}) {
        double before = 0;
        for (const position_t tokens : {1000, 100'000, 4'000'000}) {
          effort::dice dice(13);
          rotated_run worst{0, 0, 0};
          // The furthest by a far first position, the whole way for some.
          const bool whole = tokens <= 100'000 || (by.angles != engine_angles::f32_multiplied && theta == 10000);
          for (int i = !whole || tokens == 1000 ? 20 : tokens == 100'000 ? 5 : 1; i > 0; --i) {
            const rotated_run run =
                decode_rotated(dice, &by, positions, {inv_freq}, whole ? 0 : tokens - 1000, whole ? tokens : 1000);
            INFO(by.name << " angles, theta " << theta
                         << (positions == positions::in_cache ? ", in_cache" : ", absolute") << ", token " << tokens
                         << ": error " << run.error << ", allowed " << run.allowed);
            CHECK(run.error <= run.allowed);
            if (run.error > worst.error) worst = run;
          }
          if (std::getenv("SINKCACHE_SHOW"))
            std::printf("%-10s theta %6.0f %-8s token %7ld%s: error %.1e, allowed %.1e, the library's own %.1e\n",
                        by.name, theta, positions == positions::in_cache ? "in_cache" : "absolute",
                        static_cast<long>(tokens), whole ? "" : " (shifted)", worst.error, worst.allowed, worst.own);
          // The error is the engine's: exact angles have none of it, others have it grow with the position. Roundings
          // average out: what is measured stays far below the bound.
          if (by.angles == engine_angles::exact) {
            CHECK(worst.error <= 1e-6);
          } else {
            CHECK(worst.error <= worst.allowed / 20);
            if (tokens == 4'000'000) CHECK(worst.error > 10 * before);
          }
          before = std::max(before, worst.error);
        }
      }
  }
}

TEST_CASE("rope: raw rows and rows that the engine rotated give the same within the bound, up to 2^62") {
  effort::dice dice(14);
  const engine exact{"exact", engine_angles::exact}, f32_angles{"f32", engine_angles::f32};
  for (int round = effort::cases(100); round > 0; --round) {
    rotating as;
    as.pairing = dice.one_in(2) ? rope_pairing::half_split : rope_pairing::interleaved;
    const random_rope r = draw_rope(dice, as.pairing, rotated_dim);
    for (double f : r.inv_freq) as.inv_freq.push_back(static_cast<float>(f));
    if (dice.one_in(2)) as.attention_factor = 0.75f + static_cast<float>(dice.uniform());
    const position_t tokens = dice.from_to(pinned + newest, 2000), last = std::max(tokens, random_position(dice));
    for (const positions positions : {positions::in_cache, positions::absolute})
      for (const engine* by : {static_cast<const engine*>(nullptr), &exact, &f32_angles}) {
        const position_t first = (by == &f32_angles ? std::min<position_t>(last, 1 << 24) : last) - tokens;
        const rotated_run run = decode_rotated(dice, by, positions, as, first, tokens);
        CAPTURE(round, r.text, first, tokens, by == nullptr ? "raw" : by->name, positions == positions::in_cache);
        CHECK(run.error <= run.allowed);
      }
  }
}

TEST_CASE("rope: a gap taken off a float32 angle leaves that angle's own rounding") {
  // An engine at position p turns by fl(p f); the library takes the gap off exactly; the engine itself, at the place in
  // the cache, would have rotated by fl((p - gap) f). What stays is the rounding at p, at most u p f.
  std::vector<float> inv_freq;
  for (int i = 0; i < 32; ++i) inv_freq.push_back(static_cast<float>(std::pow(10000., -i / 32.)));
  const rope rope(inv_freq);
  for (const position_t p : {1000, 100'000, 4'000'000}) {
    const position_t place = 63, gap = p - place;
    double worst = 0;
    for (std::size_t i = 0; i < inv_freq.size(); ++i) {
      const float f = inv_freq[i];
      std::vector<float> row(64);
      row[i] = 1;
      volatile float angle = static_cast<float>(p) * f;
      row[i] = std::cos(angle), row[i + 32] = std::sin(angle);
      rope.rotate(angles_at(rope, -gap, false), row.data(), 64, row.data());
      volatile float itself = static_cast<float>(place) * f;
      const double off = std::hypot(static_cast<double>(row[i] - std::cos(itself)),
                                    static_cast<double>(row[i + 32] - std::sin(itself)));
      CHECK(off <= u * static_cast<double>(p + place) * static_cast<double>(f) + 8 * u);
      worst = std::max(worst, off);
    }
    CAPTURE(p, worst);
    if (p == 4'000'000) CHECK(worst > 0.05);  // radians
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
                      "sinkcache: width was " + std::to_string(dim) + ", had to be even and from 2 to 512");
  const auto both = rope_pairing::interleaved;
  CHECK(rope::plain(64, 1e4, both).width() == 64);
  const auto throws = [](const auto& make, const std::string& message) {
    CHECK_THROWS_WITH(make(), "sinkcache: " + message);
  };
  for (index_t dim : {-2, 0, 1, 127, 514}) {
    const std::string message = "width was " + std::to_string(dim) + ", had to be even and from 2 to 512";
    throws([=] { return rope::linear(dim, 1e4, 2); }, message);
    throws([=] { return rope::llama3(dim, 1e4, {8, 1, 4, 8192}); }, message);
    throws([=] { return rope::yarn(dim, 1e4, {8, 4096}); }, message);
  }
  for (const auto& [factor, text] :
       {std::pair<double, std::string>{0.5, "0.5"}, {0, "0"}, {-2, "-2"}, {NAN, "nan"}, {HUGE_VAL, "inf"}}) {
    const std::string message = "factor was " + text + ", had to be from 1 to 2^64";
    throws([&, f = factor] { return rope::linear(64, 1e4, f); }, message);
    throws([&, f = factor] { return rope::llama3(64, 1e4, {f, 1, 4, 8192}); }, message);
    throws([&, f = factor] { return rope::yarn(64, 1e4, {f, 4096}); }, message);
  }
  for (const auto& [original, text] : {std::pair<double, std::string>{0, "0"}, {NAN, "nan"}, {HUGE_VAL, "inf"}}) {
    const std::string message = "original_max_position_embeddings was " + text + ", had to be from 1 to 2^64";
    throws([&, o = original] { return rope::llama3(64, 1e4, {8, 1, 4, o}); }, message);
    throws([&, o = original] { return rope::yarn(64, 1e4, {8, o}); }, message);
  }
  throws([] { return rope::linear(64, NAN, 2); }, "theta was nan, had to be from 1 to 2^64");
  throws([] { return rope::yarn(64, 1, {8, 4096}); }, "theta was 1, had to be above 1");
  throws(
      [] {
        return rope::llama3(64, 1e4, {8, 4, 4, 8192});
      },
      "low_freq_factor was 4, had to be above 0 and below high_freq_factor, 4");
  throws(
      [] {
        return rope::llama3(64, 1e4, {8, 0, 4, 8192});
      },
      "low_freq_factor was 0, had to be above 0 and below high_freq_factor, 4");
  throws(
      [] {
        return rope::llama3(64, 1e4, {8, NAN, 4, 8192});
      },
      "low_freq_factor was nan, had to be above 0 and below high_freq_factor, 4");
  throws([] { return rope::llama3(64, 1e4, {8, 1, NAN, 8192}); }, "high_freq_factor was nan, had to be finite");
  throws(
      [] {
        return rope::yarn(64, 1e4, {8, 4096, 1, 1});
      },
      "beta_fast was 1, had to be finite and above beta_slow, 1");
  throws(
      [] {
        return rope::yarn(64, 1e4, {8, 4096, NAN, 1});
      },
      "beta_fast was nan, had to be finite and above beta_slow, 1");
  throws([] { return rope::yarn(64, 1e4, {8, 4096, 32, 0}); }, "beta_slow was 0, had to be above 0");
  throws([] { return rope::yarn(64, 1e4, {8, 4096, 32, NAN}); }, "beta_slow was nan, had to be above 0");
  throws([] { return rope::yarn(64, 1e4, {.factor = 8, .original_max_position_embeddings = 4096, .mscale = NAN}); },
         "an mscale was nan, had to be finite and at least 0");
  throws(
      [] {
        return rope::yarn(64, 1e4, {.factor = 8, .original_max_position_embeddings = 4096, .attention_factor = 0});
      },
      "attention_factor was 0, had to be finite and above 0");
  // Every pair turns less than once in 3 tokens, and more than 32 times in 2^60: there is no ramp.
  throws(
      [] {
        return rope::yarn(64, 1e4, {8, 3});
      },
      "original_max_position_embeddings was 3, had to be such that pairs turn from beta_slow to beta_fast times in it");
  CHECK_THROWS_AS(rope::yarn(64, 1e4, {8, 0x1p60}), std::invalid_argument);
  // What turns has to fit a head.
  throws(
      [] { return kv_cache<f32>({.num_kv_heads = 1, .head_dim = 64, .window = 8, .rope = rope::linear(66, 1e4, 2)}); },
      "rope's width was 66, had to be at most head_dim, 64");

  CHECK_THROWS_WITH(rope::plain(64, 0.5), "sinkcache: theta was 0.5, had to be finite and at least 1");
  CHECK_THROWS_WITH(rope::plain(64, std::nan("")), "sinkcache: theta was nan, had to be finite and at least 1");
  CHECK_THROWS_WITH(rope::plain(64, HUGE_VAL), "sinkcache: theta was inf, had to be finite and at least 1");
}

TEST_CASE("rope: what the factories refuse, the try_ functions return, and they make the same") {
  status found;
  const std::vector<float> inv_freq = {1, 0.1f}, bad = {1, -1};
  CHECK(rope::try_create(inv_freq, found, rope_pairing::interleaved, 2) ==
        rope(inv_freq, rope_pairing::interleaved, 2));
  CHECK(rope::try_plain(64, 1e4, found) == rope::plain(64, 1e4));
  CHECK(rope::try_linear(64, 1e4, 2, found, rope_pairing::interleaved) ==
        rope::linear(64, 1e4, 2, rope_pairing::interleaved));
  CHECK(rope::try_llama3(64, 1e4, {8, 1, 4, 8192}, found) == rope::llama3(64, 1e4, {8, 1, 4, 8192}));
  CHECK(rope::try_yarn(64, 1e4, {8, 4096}, found) == rope::yarn(64, 1e4, {8, 4096}));
  CHECK(found.ok());
  CHECK(!rope::try_create(bad, found));
  CHECK(found.message() == "sinkcache: an inv_freq was -1, had to be from 0 to 2^32");
  CHECK(!rope::try_plain(63, 1e4, found));
  CHECK(found.message() == "sinkcache: width was 63, had to be even and from 2 to 512");
  CHECK(!rope::try_linear(64, 1e4, 0.5, found));
  CHECK(found.message() == "sinkcache: factor was 0.5, had to be from 1 to 2^64");
  CHECK(!rope::try_llama3(64, 1e4, {8, 4, 1, 8192}, found));
  CHECK(found.message() == "sinkcache: low_freq_factor was 4, had to be above 0 and below high_freq_factor, 1");
  CHECK(!rope::try_yarn(64, 1, {8, 4096}, found));
  CHECK(found.message() == "sinkcache: theta was 1, had to be above 1");
}

// Gemma 4's full layers: a quarter of the pairs of the whole head rotate, dimension i with i + half the head.
TEST_CASE("rope: proportional is inv_freq with zeros") {
  constexpr index_t dim = 32, rotated = 4;
  std::vector<float> inv_freq(dim / 2, 0.f);
  for (index_t i = 0; i < rotated; ++i)
    inv_freq[static_cast<std::size_t>(i)] = static_cast<float>(std::pow(1e6, -2. * static_cast<double>(i) / dim));
  const rope proportional(inv_freq);
  effort::dice dice(5);
  std::array<float, dim> from, to;
  for (float& x : from) x = dice.signed_unit();
  for (const position_t position : {position_t{1}, position_t{777}, position_t{100000}}) {
    rope::angles at;
    proportional.angles_at(position, true, at);
    proportional.rotate(at, from.data(), dim, to.data());
    for (std::size_t i = 0; i < dim / 2; ++i) {
      const double a = static_cast<double>(from[i]), b = static_cast<double>(from[i + dim / 2]);
      const double angle = static_cast<double>(position) * static_cast<double>(inv_freq[i]);
      CHECK(std::abs(static_cast<double>(to[i]) - (a * std::cos(angle) - b * std::sin(angle))) < 1e-6);
      CHECK(std::abs(static_cast<double>(to[i + dim / 2]) - (b * std::cos(angle) + a * std::sin(angle))) < 1e-6);
      if (i >= rotated) CHECK((to[i] == from[i] && to[i + dim / 2] == from[i + dim / 2]));
    }
  }
}

// M-RoPE (Qwen2-VL): a token has three positions, and pairs go by one of them each. The engine rotates; what comes out
// has to be attention by the differences of all three, whatever the window evicts.
TEST_CASE("rope: M-RoPE is served where inputs come rotated and positions are absolute") {
  constexpr index_t dim = 32, pairs = dim / 2, kv_heads = 2, heads = 4;
  constexpr std::array<index_t, 3> sections = {4, 6, 6};
  using place = std::array<double, 3>;
  std::vector<place> places;  // some text, an image of 5 x 4 patches, more text
  for (double t = 0; t < 6; ++t) places.push_back({t, t, t});
  for (double y = 0; y < 5; ++y)
    for (double x = 0; x < 4; ++x) places.push_back({6, 6 + y, 6 + x});
  for (double t = 11; t < 19; ++t) places.push_back({t, t, t});
  const auto angle = [&](index_t pair, const place& at) {
    const std::size_t axis = pair < sections[0] ? 0 : pair < sections[0] + sections[1] ? 1 : 2;
    return at[axis] * std::pow(1e4, -2. * static_cast<double>(pair) / dim);
  };
  const auto rotated = [&](const float* from, const place& at, double* to) {
    for (index_t i = 0; i < pairs; ++i) {
      const double a = static_cast<double>(from[i]), b = static_cast<double>(from[i + pairs]), by = angle(i, at);
      to[i] = a * std::cos(by) - b * std::sin(by);
      to[i + pairs] = b * std::cos(by) + a * std::sin(by);
    }
  };
  effort::dice dice(6);
  const auto tokens = static_cast<index_t>(places.size());
  const auto random = [&](index_t cols) {
    matrix m(tokens, cols);
    for (index_t i = 0; i < m.size(); ++i) m.data()[i] = 2 * dice.signed_unit();
    return m;
  };
  const matrix q = random(heads * dim), k = random(kv_heads * dim), v = random(kv_heads * dim);
  const auto by_engine = [&](const matrix& from) {
    matrix to = from;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t head = 0; head < from.cols() / dim; ++head) {
        std::array<double, dim> row;
        rotated(from.row(t).data() + head * dim, places[static_cast<std::size_t>(t)], row.data());
        for (index_t d = 0; d < dim; ++d) to(t, head * dim + d) = static_cast<float>(row[static_cast<std::size_t>(d)]);
      }
    return to;
  };
  const cache_config config{.num_kv_heads = kv_heads,
                            .head_dim = dim,
                            .num_sink_tokens = 2,
                            .window = 15,
                            .positions = positions::absolute,
                            .inputs = inputs::rotated};
  kv_cache<f32> cache(config);
  const attention attention({.num_qo_heads = heads});
  workspace scratch;
  matrix out(tokens, heads * dim);
  attention.prefill(by_engine(q), by_engine(k), v, cache, out, scratch);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t head = 0; head < heads; ++head) {
      std::array<double, dim> expected{};
      double sum = 0;
      for (index_t p = 0; p <= t; ++p) {
        if (p >= config.num_sink_tokens && p <= t - config.window) continue;
        // The query, rotated by how far the key is off in each direction.
        place apart = places[static_cast<std::size_t>(t)];
        for (std::size_t axis = 0; axis < 3; ++axis) apart[axis] -= places[static_cast<std::size_t>(p)][axis];
        std::array<double, dim> row;
        rotated(q.row(t).data() + head * dim, apart, row.data());
        double logit = 0;
        for (index_t d = 0; d < dim; ++d)
          logit += row[static_cast<std::size_t>(d)] * static_cast<double>(k(p, head / 2 * dim + d));
        const double weight = std::exp(logit / std::sqrt(static_cast<double>(dim)));
        sum += weight;
        for (index_t d = 0; d < dim; ++d)
          expected[static_cast<std::size_t>(d)] += weight * static_cast<double>(v(p, head / 2 * dim + d));
      }
      for (index_t d = 0; d < dim; ++d)
        CHECK(std::abs(static_cast<double>(out(t, head * dim + d)) - expected[static_cast<std::size_t>(d)] / sum) <
              1e-5);
    }
}

}  // namespace
