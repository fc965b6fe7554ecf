// Rows of few bits against an encoder in plain double arithmetic, byte for byte; their error; the Hadamard transform.

#include <sinkcache/quantized.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "plain_quantized.hpp"

using namespace sinkcache;

namespace {

std::size_t as_size(index_t n) { return static_cast<std::size_t>(n); }

template <class F>
std::vector<std::byte> encoded(const std::vector<float>& y) {
  const auto dim = static_cast<index_t>(y.size());
  std::vector<std::byte> bytes(as_size(F::block_bytes(dim)) + 1, std::byte{0xee});
  F::encode(y.data(), dim, bytes.data());
  CHECK(bytes.back() == std::byte{0xee});
  bytes.pop_back();
  return bytes;
}

// Stores what the plain encoder does, and reads what it means, within the format's error.
template <class F>
void check_row(const std::vector<float>& y) {
  const plain::quantized_row expected(F::bits, y);
  const std::vector<std::byte> bytes = encoded<F>(y);
  REQUIRE(bytes == expected.bytes());
  std::vector<float> decoded(y.size() + 1, 7.f);
  F::decode(bytes.data(), 0, static_cast<index_t>(y.size()), decoded.data());
  CHECK(decoded.back() == 7.f);
  double largest = 0;
  for (float x : y) largest = std::max(largest, std::abs(static_cast<double>(x)));
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double x = static_cast<double>(decoded[i]);
    if (std::isnan(expected.d())) {
      REQUIRE(std::isnan(x));
      continue;
    }
    REQUIRE(x == static_cast<double>(static_cast<float>(expected.value(i))));
    // Where the scale is below the normal floats it is a multiple of 2^-133, values are of 2^-149.
    const double error = std::abs(x - static_cast<double>(y[i])), least = (0x1p-133 + 0x1p-148) / 2;
    if (F::bits == 2)
      REQUIRE(error <= std::max(expected.d() / 2, largest - 1.5 * expected.d()));
    else
      REQUIRE(error <= largest * F::error + least);
  }
}
void check_formats(const std::vector<float>& y) {
  check_row<q8>(y);
  check_row<q6>(y);
  check_row<q4>(y);
  check_row<q2>(y);
}

std::vector<float> random_row(effort::dice& dice, index_t dim) {
  std::vector<float> y(as_size(dim));
  const double scale = std::exp2(40 * dice.uniform() - 20);
  for (float& x : y) {
    const double normal = std::sqrt(-2 * std::log(1 - dice.uniform())) * std::cos(6.283185307179586 * dice.uniform());
    x = static_cast<float>(scale * normal);
  }
  // Where steps meet: multiples of a power of two, and the floats before and after.
  if (dice.one_in(3))
    for (float& x : y) {
      x = static_cast<float>(dice.from_to(-40, 40)) * 0.125f;
      if (dice.one_in(3)) x = std::nextafter(x, dice.one_in(2) ? 100.f : -100.f);
    }
  return y;
}

template <class F>
std::string hex(const std::vector<float>& y) {
  std::string text;
  for (std::byte byte : encoded<F>(y))
    for (int shift : {4, 0}) text += "0123456789abcdef"[static_cast<unsigned>(byte) >> shift & 15u];
  return text;
}

}  // namespace

TEST_CASE("quantised rows: the bytes of rows written out") {
  std::vector<float> y(16, 0.f);
  for (std::size_t i = 0; i < 16; ++i) y[i] = static_cast<float>(i) - 8;  // max 8, rms sqrt(21.5) = 4.64
  CHECK(hex<q8>(y) ==
        "803d"
        "00102030405060708090a0b0c0d0e0f0");
  CHECK(hex<q6>(y) ==
        "803e"
        "40c840c840c840c8"
        "0055aaff");
  CHECK(hex<q4>(y) ==
        "803f"
        "1032547698badcfe");
  CHECK(hex<q2>(y) ==
        "9540"
        "0055aafe");
  CHECK(hex<q4>({1.f, -1.f, 0.f}) ==
        "003e"
        "0f08000000000000");
  CHECK(hex<q4>({0.f, -0.f}) ==
        "0000"
        "0000000000000000");
}

TEST_CASE("quantised rows: byte for byte what a plain encoder stores, in any number of elements") {
  effort::dice dice(25);
  for (index_t dim = 1; dim <= max_head_dim; dim += dim < 140 ? 1 : 7) {
    INFO("head_dim " << dim);
    check_formats(random_row(dice, dim));
  }
  for (int i = 0; i < effort::cases(2000); ++i) {
    const index_t dim = dice.one_in(2) ? 64 : dice.from_to(1, 130);
    INFO("case " << i << ", head_dim " << dim);
    check_formats(random_row(dice, dim));
  }
}

TEST_CASE("quantised rows: rows that break arithmetic") {
  const float most = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::denorm_min();
  for (index_t dim : {1, 2, 16, 33, 64, 80, 128, 576}) {
    INFO("head_dim " << dim);
    const auto size = as_size(dim);
    for (float x : {0.f, -0.f, 1.f, -1.f, 1e-3f, 3e38f, -3e38f, most, least, 7 * least, 1e-40f, 1.2e-38f, 1e-37f}) {
      INFO("x " << x);
      check_formats(std::vector<float>(size, x));  // constant
      std::vector<float> one_hot(size, 0.f), outlier(size, 1.f), by_turns(size, x);
      one_hot[size / 2] = x;
      outlier[size - 1] = x;
      for (std::size_t i = 0; i < size; i += 2) by_turns[i] = -x;
      check_formats(one_hot);
      check_formats(outlier);
      check_formats(by_turns);
    }
    for (double x : {plain::not_a_number, HUGE_VAL, -HUGE_VAL}) {
      std::vector<float> row(size, 1.f);
      row[size - 1] = static_cast<float>(x);
      check_formats(row);
    }
  }
}

TEST_CASE("Hadamard transform: orthogonal, its own inverse, the largest blocks first") {
  effort::dice dice(26);
  for (index_t dim = 1; dim <= max_head_dim; ++dim) {
    INFO("head_dim " << dim);
    std::vector<double> expected(as_size(dim), 0), row(as_size(dim));
    for (double& x : row) x = static_cast<double>(dice.signed_unit());
    for (index_t first = 0, n; first < dim; first += n) {
      for (n = 1; 2 * n <= dim - first;) n *= 2;
      for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < n; ++j) {
          int ones = 0;  // where the bits of both are 1
          for (index_t both = i & j; both > 0; both /= 2) ones += both % 2 != 0;
          const double factor = (ones % 2 == 0 ? 1 : -1) / std::sqrt(static_cast<double>(n));
          expected[as_size(first + i)] += factor * row[as_size(first + j)];
        }
    }
    // One float after the row has to stay.
    std::vector<float> y(as_size(dim) + 1, 7.f);
    for (index_t i = 0; i < dim; ++i) y[as_size(i)] = static_cast<float>(row[as_size(i)]);
    hadamard.apply(y.data(), dim);
    double norm = 0, of_row = 0;
    for (index_t i = 0; i < dim; ++i) {
      REQUIRE(std::abs(static_cast<double>(y[as_size(i)]) - expected[as_size(i)]) <= 3e-6);
      norm += static_cast<double>(y[as_size(i)]) * static_cast<double>(y[as_size(i)]);
      of_row += row[as_size(i)] * row[as_size(i)];
    }
    CHECK(norm == Approx(of_row).epsilon(1e-6));
    hadamard.undo(y.data(), dim);
    for (index_t i = 0; i < dim; ++i) REQUIRE(std::abs(static_cast<double>(y[as_size(i)]) - row[as_size(i)]) <= 3e-6);
    CHECK(y.back() == 7.f);
  }
}

TEST_CASE("Hadamard transform: overflows where a result is no float, and nowhere else") {
  for (index_t dim : {2, 8, 16, 64, 80, 128, 512, 576})
    for (float x : {3e38f, -3e38f, 1e36f}) {
      INFO("head_dim " << dim << ", x " << x);
      const auto n = static_cast<index_t>(std::bit_floor(as_size(dim)));
      std::vector<float> y(as_size(dim), 0.f);
      // Of the first two elements sums and differences: one of them is no float in between.
      y[0] = x, y[1] = x / 2;
      hadamard.apply(y.data(), dim);
      const double factor = static_cast<double>(x) / std::sqrt(static_cast<double>(n));
      for (index_t i = 0; i < n; ++i) {
        const double expected = factor * (i % 2 == 0 ? 1.5 : 0.5);
        REQUIRE(std::abs(static_cast<double>(y[as_size(i)]) - expected) <= std::abs(expected) * 1e-6);
      }
      hadamard.undo(y.data(), dim);
      REQUIRE(std::abs(y[0] - x) <= std::abs(x) * 1e-6f);
      REQUIRE(std::abs(y[1] - x / 2) <= std::abs(x) * 1e-6f);
    }
  std::vector<float> constant(64, 3e38f);
  hadamard.apply(constant.data(), 64);
  CHECK(std::isinf(constant[0]));
  for (std::size_t i = 1; i < 64; ++i) CHECK(constant[i] == 0);
}

TEST_CASE("Hadamard transform: the same bits on every processor") {
  std::vector<float> y(80);
  for (std::size_t i = 0; i < y.size(); ++i) y[i] = std::sqrt(static_cast<float>(i * i % 101) + 0.3f) - 4;
  hadamard.apply(y.data(), 80);
  std::uint32_t sum = 0;
  for (float x : y) sum = sum * 31 + std::bit_cast<std::uint32_t>(x);
  CHECK(sum == 3561136945u);
}
