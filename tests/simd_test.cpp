// Every operation that the kernel is written in, against its definition on single floats.

#include <sinkcache/detail/absorb.hpp>
#include <sinkcache/detail/simd.hpp>

#include <array>
#include <bit>
#include <cmath>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "plain_format.hpp"

using namespace sinkcache;
using detail::lanes, detail::vfloat;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
constexpr auto width = static_cast<std::size_t>(lanes);
using floats = std::array<float, width>;

vfloat vector_of(const floats& from) { return detail::load(from.data()); }
floats lanes_of(vfloat v) {
  floats to;
  detail::store(to.data(), v);
  return to;
}
bool same_bits(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

floats random_floats(effort::dice& dice) {
  floats f;
  for (float& x : f) x = dice.signed_unit() * 100;
  return f;
}

TEST_CASE("simd: as wide as the instruction set says") {
  const std::string set = isa();
  CHECK(lanes == (set == "avx512" ? 16 : set == "avx2" || set == "avx" ? 8 : 4));
  CHECK(sizeof(vfloat) == lanes * sizeof(float));
}

// What Linux says that the processor has; under emulation it speaks of another one.
TEST_CASE("simd: what the processor has beside what this was built for") {
  CHECK(built_for().file == std::string(isa()));
#if defined(__x86_64__)
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string line, best;
  while (std::getline(cpuinfo, line))
    if (line.rfind("flags", 0) == 0) {
      const auto has = [&](const char* flag) { return (line + " ").find(std::string(" ") + flag + " ") != line.npos; };
      best = has("avx512f") && has("avx512dq") ? "avx512" : has("avx2") ? "avx2" : has("avx") ? "avx" : "sse4";
      break;
    }
  if (!best.empty()) CHECK(built_for().processor == best);
#endif
}

TEST_CASE("simd: load, store, broadcast") {
  effort::dice dice(1);
  std::array<float, 2 * width + 3> memory{};
  for (float& x : memory) x = dice.signed_unit();
  const auto before = memory;
  for (std::size_t at = 0; at <= width; ++at) {  // no alignment needed
    std::array<float, 2 * width + 3> to{};
    detail::store(to.data() + at, detail::load(memory.data() + at));
    for (std::size_t i = 0; i < to.size(); ++i) REQUIRE(to[i] == (i >= at && i < at + width ? before[i] : 0.f));
  }
  for (float x : {0.f, -0.f, 1.5f, inf, -inf, std::numeric_limits<float>::denorm_min()})
    for (float lane : lanes_of(detail::broadcast(x))) REQUIRE(same_bits(lane, x));
  for (float lane : lanes_of(detail::broadcast(nan))) REQUIRE(std::isnan(lane));
}

TEST_CASE("simd: max and min, the second where either is NaN") {
  effort::dice dice(2);
  const float specials[] = {0.f, -0.f, 1.f, -1.f, inf, -inf, nan, 3e38f, -3e38f};
  for (float a : specials)
    for (float b : specials) {
      const bool second = std::isnan(a) || std::isnan(b);
      const float larger = second ? b : std::max(b, a), smaller = second ? b : std::min(b, a);
      for (float lane : lanes_of(detail::max(detail::broadcast(a), detail::broadcast(b))))
        REQUIRE((std::isnan(larger) ? std::isnan(lane) : lane == larger));
      for (float lane : lanes_of(detail::min(detail::broadcast(a), detail::broadcast(b))))
        REQUIRE((std::isnan(smaller) ? std::isnan(lane) : lane == smaller));
    }
  for (int i = 0; i < 100; ++i) {
    const floats a = random_floats(dice), b = random_floats(dice),
                 m = lanes_of(detail::max(vector_of(a), vector_of(b)));
    for (std::size_t j = 0; j < width; ++j) REQUIRE(m[j] == std::max(a[j], b[j]));
  }
}

// Joins lanes with f as join_lanes<Width> should: lane i with all lanes that lie a multiple of Width from it.
template <int Width>
void check_joined(effort::dice& dice) {
  const floats f = random_floats(dice);
  const floats sums = lanes_of(detail::join_lanes<Width>(vector_of(f), [](vfloat a, vfloat b) { return a + b; }));
  const floats largest =
      lanes_of(detail::join_lanes<Width>(vector_of(f), [](vfloat a, vfloat b) { return detail::max(a, b); }));
  for (std::size_t i = 0; i < width; ++i) {
    double sum = 0, size = 0;
    float most = -inf;
    for (std::size_t j = i % Width; j < width; j += Width) {
      sum += static_cast<double>(f[j]);
      size += std::abs(static_cast<double>(f[j]));
      most = std::max(most, f[j]);
    }
    REQUIRE(std::abs(static_cast<double>(sums[i]) - sum) <= 4 * 0x1p-24 * size);
    REQUIRE(largest[i] == most);
  }
}

template <int Period>
void check_repeated(const std::array<float, 4>& from) {
  const floats repeated = lanes_of(detail::repeated<Period>(from.data()));
  for (std::size_t i = 0; i < width; ++i) REQUIRE(same_bits(repeated[i], from[i % Period]));
}

TEST_CASE("simd: repeated, every bit") {
  check_repeated<1>({nan, 1, 2, 3});
  check_repeated<2>({-0.f, std::numeric_limits<float>::denorm_min(), nan, nan});
  check_repeated<4>({-inf, nan, 0x1.fffffep127f, -1});
}

TEST_CASE("simd: from_lane, and repeated from any lane on, every bit") {
  std::array<float, 2 * width> both;
  for (std::size_t i = 0; i < both.size(); ++i) both[i] = std::bit_cast<float>(0x7fa00001u + static_cast<unsigned>(i));
  const vfloat a = detail::load(both.data()), b = detail::load(both.data() + lanes);
  const floats half = lanes_of(detail::from_lane<lanes / 2>(a, b)),
               three_quarters = lanes_of(detail::from_lane<3 * lanes / 4>(a, b)),
               next = lanes_of(detail::repeated<3, lanes>(a));
  for (std::size_t i = 0; i < width; ++i) {
    REQUIRE(same_bits(half[i], both[i + width / 2]));
    REQUIRE(same_bits(three_quarters[i], both[i + 3 * width / 4]));
    REQUIRE(same_bits(next[i], both[(width + i) % 3]));
  }
}

TEST_CASE("simd: every_second and by_turns, every bit") {
  std::array<float, 2 * width> both;
  for (std::size_t i = 0; i < both.size(); ++i) both[i] = std::bit_cast<float>(0x7fa00001u + static_cast<unsigned>(i));
  const vfloat a = detail::load(both.data()), b = detail::load(both.data() + lanes);
  const vfloat even = detail::every_second<0>(a, b), odd = detail::every_second<1>(a, b);
  const floats first = lanes_of(detail::by_turns<0>(even, odd)), second = lanes_of(detail::by_turns<lanes>(even, odd));
  for (std::size_t i = 0; i < width; ++i) {
    REQUIRE(same_bits(lanes_of(even)[i], both[2 * i]));
    REQUIRE(same_bits(lanes_of(odd)[i], both[2 * i + 1]));
    REQUIRE(same_bits(first[i], both[i]));
    REQUIRE(same_bits(second[i], both[width + i]));
  }
}

TEST_CASE("simd: every_third, every bit") {
  vfloat v[3];
  for (std::size_t i = 0; i < 3; ++i) {
    floats some;
    for (std::size_t j = 0; j < width; ++j)
      some[j] = std::bit_cast<float>(0x7fa00001u + static_cast<unsigned>(i * width + j));
    v[i] = vector_of(some);
  }
  const floats rows[] = {lanes_of(detail::every_third<0>(v)), lanes_of(detail::every_third<1>(v)),
                         lanes_of(detail::every_third<2>(v))};
  for (std::size_t r = 0; r < 3; ++r)
    for (std::size_t i = 0; i < width; ++i)
      REQUIRE(same_bits(rows[r][i], std::bit_cast<float>(0x7fa00001u + static_cast<unsigned>(3 * i + r))));
}

TEST_CASE("simd: transpose, every bit") {
  vfloat v[lanes];
  for (std::size_t i = 0; i < width; ++i) {
    floats row;
    for (std::size_t j = 0; j < width; ++j)
      row[j] = std::bit_cast<float>(0x7fa00001u + static_cast<unsigned>(i * width + j));
    v[i] = vector_of(row);
  }
  detail::transpose(v);
  for (std::size_t i = 0; i < width; ++i)
    for (std::size_t j = 0; j < width; ++j)
      REQUIRE(same_bits(lanes_of(v[i])[j], std::bit_cast<float>(0x7fa00001u + static_cast<unsigned>(j * width + i))));
}

TEST_CASE("simd: join_lanes") {
  effort::dice dice(3);
  for (int i = 0; i < 300; ++i) {
    check_joined<1>(dice);
    check_joined<2>(dice);
    check_joined<4>(dice);
    check_joined<lanes>(dice);
  }
  floats one;
  one.fill(-inf);
  for (std::size_t i = 0; i < width; ++i) {  // every lane counts
    one[i] = nan;
    CHECK(std::isnan(lanes_of(detail::join_lanes<1>(vector_of(one), [](vfloat a, vfloat b) { return a + b; }))[0]));
    one[i] = -inf;
  }
}

template <class V>
void check_sums_across(effort::dice& dice) {
  constexpr auto n = sizeof(V) / sizeof(float);
  const auto sums_of = [](const V(&v)[4]) {
    const V v01 = detail::join_pair(v[0], v[1]), v23 = detail::join_pair(v[2], v[3]);
    return detail::sums_of_lanes(detail::join_pairs(v01, v23));
  };
  for (int trial = 0; trial < 500; ++trial) {
    V v[4];
    double sum[4] = {}, size[4] = {};
    for (int i = 0; i < 4; ++i) {
      std::array<float, n> plain;
      for (float& x : plain) {
        x = dice.signed_unit() * 100;
        sum[i] += static_cast<double>(x);
        size[i] += std::abs(static_cast<double>(x));
      }
      v[i] = detail::load<V>(plain.data());
    }
    const detail::vquad sums = sums_of(v);
    for (int i = 0; i < 4; ++i) REQUIRE(std::abs(static_cast<double>(sums[i]) - sum[i]) <= 4 * 0x1p-24 * size[i]);
    // The same vector among others, in another place, even beside NaNs: the same bits.
    const auto moved = static_cast<int>(dice.from_to(0, 3));
    V others[4];
    for (V& other : others) other = nan - V{};
    others[moved] = v[0];
    REQUIRE(same_bits(sums_of(others)[moved], sums[0]));
  }
}

TEST_CASE("simd: sums across vectors stay apart, and all associate alike") {
  effort::dice dice(4);
  check_sums_across<vfloat>(dice);
#if defined(__AVX__)
  check_sums_across<detail::voct>(dice);
#endif
}

TEST_CASE("simd: ceil") {
  effort::dice dice(6);
  const auto ceil_of = [](float x) { return lanes_of(detail::ceil(detail::broadcast(x)))[0]; };
  for (int i = 0; i < 20000; ++i) {
    const auto x = static_cast<float>(std::ldexp(dice.signed_unit(), static_cast<int>(dice.from_to(-30, 40))));
    REQUIRE(ceil_of(x) == std::ceil(x));
  }
  for (float x : {0.f, 1.f, -1.f, 0.5f, -0.5f, 0x1p23f - 0.5f, 0x1p23f + 1, -0x1p23f + 0.5f, 0x1p24f, -0x1p24f, 0x1p31f,
                  -0x1p31f, 3e38f, -3e38f, inf, -inf})
    REQUIRE(ceil_of(x) == std::ceil(x));
  CHECK(std::isnan(ceil_of(nan)));
}

TEST_CASE("simd: add_product") {
  effort::dice dice(7);
  for (int i = 0; i < 1000; ++i) {
    const floats a = random_floats(dice), b = random_floats(dice), c = random_floats(dice),
                 sum = lanes_of(detail::add_product(vector_of(a), vector_of(b), vector_of(c)));
    for (std::size_t j = 0; j < width; ++j) {
      const double exact = static_cast<double>(a[j]) + static_cast<double>(b[j]) * static_cast<double>(c[j]);
      REQUIRE(std::abs(static_cast<double>(sum[j]) - exact) <= 0x1p-23 * (std::abs(exact) + 1e4));
    }
#if defined(__AVX512DQ__)
    for (const float& factor : c) {
      const floats by_memory = lanes_of(detail::add_product(vector_of(a), vector_of(b), &factor)),
                   by_register = lanes_of(detail::add_product(vector_of(a), vector_of(b), detail::broadcast(factor)));
      for (std::size_t j = 0; j < width; ++j) REQUIRE(same_bits(by_memory[j], by_register[j]));
    }
#endif
  }
}

TEST_CASE("simd: exp2_nonpositive over its whole range") {
  double worst = 0, worst_absolute = 0;
  const auto lowest = std::bit_cast<std::uint32_t>(-100.f);
  const auto step = static_cast<std::uint32_t>(std::max(1, 20000 / effort::cases(10)));
  float at = 0;
  for (std::uint32_t pattern = 0x80000000u; pattern <= lowest; pattern += step) {
    const auto x = std::bit_cast<float>(pattern);
    const double exact = std::exp2(static_cast<double>(x)),
                 error = static_cast<double>(detail::exp2_nonpositive(x)) - exact;
    worst_absolute = std::max(worst_absolute, std::abs(error));
    if (std::abs(error) / exact > worst) worst = std::abs(error) / exact, at = x;
  }
  CAPTURE(worst, worst_absolute, at);
  CHECK(worst <= 1.2e-7);
  CHECK(worst_absolute <= 1e-7);

  CHECK(detail::exp2_nonpositive(0.f) == 1.f);
  CHECK(detail::exp2_nonpositive(-0.f) == 1.f);
  for (int n = 0; n <= 100; ++n) REQUIRE(detail::exp2_nonpositive(static_cast<float>(-n)) == std::ldexp(1.f, -n));
  // Never above 1, and never rising as x falls: weights keep the order of their logits.
  float last = 1;
  for (float x = 0; x > -0.01f; x = std::nextafter(x - 1e-7f, -inf)) {
    const float y = detail::exp2_nonpositive(x);
    REQUIRE(y <= 1.f);
    REQUIRE(y <= last * (1 + 0x1p-22f));
    last = y;
  }
}

TEST_CASE("simd: exp2_nonpositive is cut at -100") {
  CHECK(detail::exp2_nonpositive(-100.f) == 0x1p-100f);
  for (float x : {std::nextafter(-100.f, -inf), -100.5f, -126.f, -127.f, -150.f, -1e4f, -0x1p23f, -3e9f, -1e38f,
                  std::numeric_limits<float>::lowest(), -inf})
    CHECK(same_bits(detail::exp2_nonpositive(x), 0.f));
  CHECK(std::isnan(detail::exp2_nonpositive(nan)));
  CHECK(std::isnan(detail::exp2_nonpositive(-nan)));

  // Lane by lane as one by one.
  floats mixed;
  for (std::size_t i = 0; i < width; ++i) mixed[i] = -20.25f * static_cast<float>(i);
  mixed[1] = nan;
  mixed[2] = -inf;
  const floats powers = lanes_of(detail::exp2_nonpositive(vector_of(mixed)));
  for (std::size_t i = 0; i < width; ++i)
    CHECK((i == 1 ? std::isnan(powers[i]) : same_bits(powers[i], detail::exp2_nonpositive(mixed[i]))));
}

TEST_CASE("simd: scaled_tanh") {
  const auto tanh_of = [](float x, float scale) {
    return lanes_of(detail::scaled_tanh(detail::broadcast(x), scale))[0];
  };
  double worst = 0, worst_scaled = 0, worst_in_proportion = 0;
  const auto highest = std::bit_cast<std::uint32_t>(40.f);
  const auto step = static_cast<std::uint32_t>(std::max(1, 40000 / effort::cases(10)));
  for (std::uint32_t pattern = 0; pattern <= highest; pattern += step) {
    const auto x = std::bit_cast<float>(pattern);
    const float y = tanh_of(x, 1), scaled = tanh_of(x, 43.5f);
    const double exact = std::tanh(static_cast<double>(x));
    worst = std::max(worst, std::abs(static_cast<double>(y) - exact));
    worst_scaled = std::max(worst_scaled, std::abs(scaled / 43.5 - exact));
    if (x >= 0x1p-100f && x < 0.1f)
      worst_in_proportion = std::max(worst_in_proportion, std::abs(static_cast<double>(y) / exact - 1));
    REQUIRE(y <= 1.f);
    REQUIRE(scaled <= 43.5f);
    REQUIRE(tanh_of(-x, 1) == -y);
    REQUIRE(tanh_of(-x, 43.5f) == -scaled);
  }
  CAPTURE(worst, worst_scaled, worst_in_proportion);
  CHECK(worst <= 3e-7);
  CHECK(worst_scaled <= 4e-7);  // coefficients and products of them are rounded once more
  CHECK(worst_in_proportion <= 4e-7);
  for (const float large : {9.5f, 1e30f, inf}) {
    const float y = tanh_of(large, 1);
    CHECK(y <= 1.f);
    CHECK(y >= 1.f - 3e-7f);
    CHECK(tanh_of(-large, 1) == -y);
  }
  CHECK(tanh_of(0.f, 30.f) == 0.f);
  CHECK(std::isnan(tanh_of(nan, 30.f)));
}

// Rounded to nearest even. A NaN keeps its sign and its upper bits, and becomes quiet.
template <class F>
std::uint16_t to_half(float x) {
  if (!std::isnan(x)) return plain::pattern_of<F>(plain::rounded<F>(x));
  constexpr int fraction_bits = plain::ieee16<F>::digits - 1;
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto exponent = static_cast<std::uint32_t>((1 << plain::ieee16<F>::exponent_bits) - 1) << fraction_bits;
  const std::uint32_t fraction = (bits & 0x7fffffu) >> (23 - fraction_bits), quiet = 1u << (fraction_bits - 1);
  return static_cast<std::uint16_t>((bits >> 31) << 15 | exponent | fraction | quiet);
}
template <class F>
float from_half(std::uint16_t half) {
  return static_cast<float>(plain::value_of<F>(half));
}

// format_test.cpp knows what is right; here, that many at once are as one by one.
template <class F, class Load>
void compare_loads(const Load& load) {
  constexpr std::size_t n = sizeof(load(nullptr)) / sizeof(float);
  for (std::uint32_t first = 0; first < 0x10000; first += n) {
    std::array<std::uint16_t, n> halves;
    for (std::size_t i = 0; i < n; ++i) halves[i] = static_cast<std::uint16_t>(first + i);
    const auto loaded = load(reinterpret_cast<const std::byte*>(halves.data()));
    for (std::size_t i = 0; i < n; ++i) {
      const float one = from_half<F>(halves[i]), other = loaded[static_cast<int>(i)];
      REQUIRE((std::isnan(one) ? std::isnan(other) : same_bits(other, one)));
    }
  }
}
template <class F>
void compare_conversions() {
  effort::dice dice(5);
  for (int trial = 0; trial < effort::cases(5000); ++trial) {
    floats from;
    for (float& x : from) {
      x = std::bit_cast<float>(static_cast<std::uint32_t>(dice.bits()));
      if (dice.one_in(2))
        x = static_cast<float>(std::ldexp(dice.signed_unit(), static_cast<int>(dice.from_to(-30, 20))));
    }
    std::array<std::uint16_t, width + 1> halves;
    halves.back() = 0x7777;
    F::store(reinterpret_cast<std::byte*>(halves.data()), vector_of(from));
    const floats loaded = lanes_of(F::load(reinterpret_cast<const std::byte*>(halves.data())));
    for (std::size_t i = 0; i < width; ++i) {
      REQUIRE(halves[i] == to_half<F>(from[i]));
      REQUIRE((std::isnan(from[i]) ? std::isnan(loaded[i]) : same_bits(loaded[i], from_half<F>(halves[i]))));
    }
    REQUIRE(halves.back() == 0x7777);
  }
  compare_loads<F>([](const std::byte* p) { return F::load(p); });
}

TEST_CASE("simd: conversions to and from 16 bits, many at once as one by one") {
  compare_conversions<f16>();
  compare_conversions<bf16>();
#if defined(__AVX512DQ__)
  compare_loads<f16>([](const std::byte* p) { return f16::load_eight(p); });
#endif
}

TEST_CASE("simd: bf16 of even and of odd number, from anywhere") {
  const auto upper_half = [](std::uint16_t half) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16);
  };
  for (std::uint32_t first = 0; first < 0x10000; first += 2 * static_cast<std::uint32_t>(lanes))
    for (const std::size_t shift : {std::size_t{0}, std::size_t{1}}) {
      std::array<std::uint16_t, 2 * width + 1> halves{};
      for (std::size_t i = 0; i < 2 * width; ++i) halves[shift + i] = static_cast<std::uint16_t>(first + i);
      const auto* const from = reinterpret_cast<const std::byte*>(halves.data() + shift);
      const floats even = lanes_of(bf16::load_even(from)), odd = lanes_of(bf16::load_odd(from));
      for (std::size_t i = 0; i < width; ++i) {
        REQUIRE(same_bits(even[i], upper_half(halves[shift + 2 * i])));
        REQUIRE(same_bits(odd[i], upper_half(halves[shift + 2 * i + 1])));
      }
    }
}

TEST_CASE("simd: for_each_index takes each index once") {
  for (index_t n = 0; n <= 70; ++n) {
    std::vector<int> taken(static_cast<std::size_t>(n) + 1, 0);
    detail::for_each_index(n, [&](index_t i) { ++taken[static_cast<std::size_t>(i)]; });
    REQUIRE(taken.back() == 0);
    taken.pop_back();
    for (const int times : taken) REQUIRE(times == 1);
  }
}

}  // namespace
