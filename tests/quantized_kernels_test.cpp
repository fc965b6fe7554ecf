// How rows of few bits are multiplied where they lie, against double arithmetic on what they decode to: in integers
// where the processor has them, else as floats.

#include <sinkcache/quantized.hpp>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "random_case.hpp"

namespace proof {
namespace {

bool in_place(const kv_reader& reader) { return reader.dots != nullptr; }

// Rows of a tile in exactly as much memory as they take, and decoded.
struct tile_case {
  index_t dim, padded, n, bytes;
  std::vector<std::byte> rows;
  std::vector<float> decoded;

  tile_rows tile() const { return {rows.data(), bytes, bytes}; }
};
template <class F>
tile_case draw_tile(effort::dice& dice, index_t dim, index_t n) {
  tile_case t{dim, (dim + 15) / 16 * 16, n, F::block_bytes(dim), {}, {}};
  t.rows.resize(as_size(n * t.bytes));
  t.decoded.resize(as_size(n * t.padded));
  for (index_t j = 0; j < n; ++j) {
    std::vector<float> row(as_size(dim));
    const double scale = std::exp2(8 * dice.uniform() - 4);
    for (float& x : row) x = dice.one_in(20) ? 0 : static_cast<float>(scale * normal(dice));
    if (dice.one_in(10)) row.assign(row.size(), 0.f);
    F::encode(row.data(), dim, t.rows.data() + j * t.bytes);
    F::decode(t.rows.data() + j * t.bytes, 0, dim, t.decoded.data() + j * t.padded);
  }
  return t;
}

// Logits, or weights, of some rows as kernels lay them out, by row and key.
constexpr index_t group_floats = 4 * (128 + 16);
float& of_key(std::vector<float>& logits, index_t count, index_t row, index_t key) {
  float* found = nullptr;
  detail::in_groups(count, [&]<int Rows>(index_t first, index_t group) {
    if (row >= first && row < first + Rows) found = &logits[as_size(group * group_floats + key * Rows + row - first)];
  });
  return *found;
}

using aligned = std::unique_ptr<float, void (*)(void*)>;
aligned floats(index_t n) {
  auto* const memory = static_cast<float*>(std::aligned_alloc(64, as_size((4 * n + 63) / 64 * 64)));
  std::fill_n(memory, n, 0.f);
  return {memory, std::free};
}

// What readers without kernels of their own are read through.
template <class F>
const kv_reader* reader_for(tile_case& t) {
  if (in_place(reader_of<F>)) return &reader_of<F>;
  const kv_rows from{.reader = &reader_of<F>, .base = t.rows.data(), .block = t.bytes};
  std::vector<float> loaded(as_size(t.n * t.padded));
  reader_of<F>.load(from, 0, t.n, t.dim, t.padded, loaded.data());
  CHECK(loaded == t.decoded);
  t.bytes = 4 * t.padded;
  t.rows.resize(as_size(t.n * t.bytes));
  std::memcpy(t.rows.data(), loaded.data(), t.rows.size());
  return &reader_of<f32>;
}

std::vector<float> dots_of(const kv_reader& reader, const tile_case& t, const std::vector<float>& q, index_t count) {
  const aligned rows = floats(count * t.padded), packed = floats(count * t.padded);
  for (index_t r = 0; r < count; ++r) std::copy_n(q.data() + r * t.dim, t.dim, rows.get() + r * t.padded);
  std::vector<float> logits(as_size((count / 4 + 2) * group_floats));
  const float* const q_packed = reader.pack(rows.get(), count, t.padded, packed.get());
  reader.dots(q_packed, count, t.padded, t.tile(), t.n, t.tile(), logits.data());
  return logits;
}

std::vector<double> sums_of(const kv_reader& reader, const tile_case& t, const std::vector<float>& weights,
                            index_t count) {
  const aligned d = floats(64), rest = floats(64), o = floats(count * t.padded), o_rest = floats(count * t.padded);
  const detail::running_states to{{d.get(), d.get(), o.get(), t.padded}, rest.get(), o_rest.get()};
  reader.add(weights.data(), count, t.tile(), 0, t.n, t.padded, to, t.tile());
  std::vector<double> sums(as_size(count * t.padded));
  for (std::size_t i = 0; i < sums.size(); ++i)
    sums[i] = static_cast<double>(o.get()[i]) + static_cast<double>(o_rest.get()[i]);
  return sums;
}

template <class F>
void check_dots(effort::dice& dice, index_t dim, index_t n, index_t count) {
  tile_case t = draw_tile<F>(dice, dim, n);
  const kv_reader* const reader = reader_for<F>(t);
  std::vector<float> q(as_size(count * dim));
  const double scale = one_of(dice, {1e-30, 1e-3, 1., 1e4});
  for (float& x : q) x = static_cast<float>(scale * normal(dice));
  if (dice.one_in(4)) std::fill_n(q.begin(), dim, 0.f), q[0] = static_cast<float>(scale);
  std::vector<float> logits = dots_of(*reader, t, q, count);
  for (index_t r = 0; r < count; ++r) {
    const std::vector<float> one(q.begin() + r * dim, q.begin() + (r + 1) * dim);
    std::vector<float> alone = dots_of(*reader, t, one, 1);
    double most = 0, total = 0;
    for (float x : one)
      most = std::max(most, std::abs(static_cast<double>(x))), total += std::abs(static_cast<double>(x));
    for (index_t j = 0; j < n; ++j) {
      double sum = 0, keys = 0, size = 0;
      for (index_t d = 0; d < dim; ++d) {
        const double k = static_cast<double>(t.decoded[as_size(j * t.padded + d)]);
        sum += static_cast<double>(one[as_size(d)]) * k;
        size += std::abs(static_cast<double>(one[as_size(d)]) * k);
        keys += std::abs(k);
      }
      // Half a unit of the query for each element, and what floats round.
      const double unit = std::max(most / 32639, total / 8.4e6);
      const float found = of_key(logits, count, r, j);
      REQUIRE(std::abs(static_cast<double>(found) - sum) <= 0.51 * unit * keys + 8 * u * size + 4 * u * std::abs(sum));
      const bool in_integers = in_place(reader_of<F>) && t.padded >= 48;
      if (in_integers) REQUIRE(found == of_key(alone, 1, 0, j));  // whatever rows are beside
    }
  }
}

template <class F>
void check_add(effort::dice& dice, index_t dim, index_t n, index_t count) {
  tile_case t = draw_tile<F>(dice, dim, n);
  const kv_reader* const reader = reader_for<F>(t);
  std::vector<float> weights(as_size((count / 4 + 2) * group_floats), 0.f);
  const double spread = one_of(dice, {0., 1., 30.}), scale = one_of(dice, {1., 1e-20, 1e-29});
  for (index_t r = 0; r < count; ++r)
    for (index_t j = 0; j < n; ++j)
      of_key(weights, count, r, j) = static_cast<float>((r == 1 ? scale : 1) * std::exp2(-spread * dice.uniform()));
  const std::vector<double> sums = sums_of(*reader, t, weights, count);
  for (index_t r = 0; r < count; ++r) {
    std::vector<float> one(as_size(2 * group_floats), 0.f);
    double unit = 0;
    for (index_t j = 0; j < n; ++j) {
      of_key(one, 1, 0, j) = of_key(weights, count, r, j);
      const double d = static_cast<double>(detail::bf16_at(t.rows.data() + j * t.bytes));
      unit = std::max(unit, static_cast<double>(of_key(weights, count, r, j)) * d / 32639);
    }
    const std::vector<double> alone = sums_of(*reader, t, one, 1);
    for (index_t d = 0; d < dim; ++d) {
      double sum = 0, steps = 0, size = 0;
      for (index_t j = 0; j < n; ++j) {
        const double v = static_cast<double>(t.decoded[as_size(j * t.padded + d)]);
        sum += static_cast<double>(of_key(one, 1, 0, j)) * v;
        size += std::abs(static_cast<double>(of_key(one, 1, 0, j)) * v);
        const double s = static_cast<double>(detail::bf16_at(t.rows.data() + j * t.bytes));
        steps += s > 0 ? std::abs(v) / s : 0;
      }
      const double bound = in_place(reader_of<F>) ? 0.51 * unit * steps + 4 * u * size : 8 * u * size;
      REQUIRE(std::abs(sums[as_size(r * t.padded + d)] - sum) <= bound);
      if (in_place(reader_of<F>)) REQUIRE(sums[as_size(r * t.padded + d)] == alone[as_size(d)]);
    }
  }
}

template <class F>
void check_format() {
  effort::dice dice(31);
  for (int i = 0; i < effort::cases(200); ++i) {
    const index_t dim =
        dice.one_in(3) ? one_of<index_t>(dice, {16, 32, 48, 64, 80, 96, 128, 576}) : dice.from_to(1, 200);
    const index_t n = dice.one_in(3) ? 128 : dice.from_to(1, 128), count = dice.one_in(8) ? 32 : dice.from_to(1, 9);
    INFO(F::name << ", head_dim " << dim << ", " << n << " rows, " << count << " queries");
    check_dots<F>(dice, dim, n, count);
    check_add<F>(dice, dim, n, count);
  }
}

TEST_CASE("rows of few bits where they lie: q8") { check_format<q8>(); }
TEST_CASE("rows of few bits where they lie: q6") { check_format<q6>(); }
TEST_CASE("rows of few bits where they lie: q4") { check_format<q4>(); }
TEST_CASE("rows of few bits where they lie: q2") { check_format<q2>(); }

TEST_CASE("rows of few bits where they lie: NaN of a query stays in its row, NaN of a key in its logits") {
  if (!in_place(reader_of<q8>)) return;
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  effort::dice dice(32);
  tile_case t = draw_tile<q8>(dice, 64, 20);
  std::vector<float> q(3 * 64, 1.f), bad_row(64, nan);
  q8::encode(bad_row.data(), 64, t.rows.data() + 7 * t.bytes);
  for (float bad : {nan, infinity}) {
    q[64 + 5] = bad;
    std::vector<float> logits = dots_of(reader_of<q8>, t, q, 3);
    for (index_t r = 0; r < 3; ++r)
      for (index_t j = 0; j < 20; ++j) CHECK(std::isfinite(of_key(logits, 3, r, j)) == (r != 1 && j != 7));
  }
  // A weight of NaN: in its row alone. A value of NaN: in all rows, even with a weight of 0.
  std::vector<float> weights(2 * group_floats, 0.5f);
  for (bool of_value : {true, false}) {
    if (!of_value) q8::encode(q.data(), 64, t.rows.data() + 7 * t.bytes);
    for (index_t r = 0; r < 3; ++r) of_key(weights, 3, r, 7) = of_value ? 0 : r == 2 ? nan : 1;
    const std::vector<double> sums = sums_of(reader_of<q8>, t, weights, 3);
    for (index_t r = 0; r < 3; ++r)
      for (index_t d = 0; d < 64; ++d) CHECK(std::isfinite(sums[as_size(r * 64 + d)]) == (!of_value && r != 2));
  }
}

}  // namespace
}  // namespace proof
