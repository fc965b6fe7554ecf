// What docs/architecture.md promises of numbers that are infinite, NaN, or so large that a sum of them would not fit:
// for every format, softmax and way to attend.

#include <fmt/format.h>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "random_case.hpp"

namespace proof {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN(), largest = std::numeric_limits<float>::max();
constexpr index_t dim = 32, heads = 2;

enum class way { decode, few_rows, panels, states };
constexpr way ways[] = {way::decode, way::few_rows, way::panels, way::states};

softmax_variant variant(int i) {
  if (i == 0) return softmax_variant::standard();
  if (i == 1) return softmax_variant::softmax1();
  return softmax_variant::sink_logits(std::vector<float>{2.f, -infinity});
}

struct layer_tokens {
  matrix q, k, v;

  explicit layer_tokens(index_t n, std::uint64_t seed = 1) : q(n, heads * dim), k(n, dim), v(n, dim) {
    effort::dice dice(seed);
    for (matrix* m : {&q, &k, &v})
      for (index_t i = 0; i < m->size(); ++i) m->data()[i] = dice.signed_unit();
  }
};

// Rows as F stores them, where a view reads them.
template <class F>
std::shared_ptr<kv_source> view_of(const layer_tokens& t, std::vector<std::byte>& memory) {
  const index_t n = t.k.rows(), bytes = F::block_bytes(dim);
  memory.resize(as_size(2 * n * bytes));
  for (index_t i = 0; i < n; ++i) {
    F::encode(t.k.row(i).data(), dim, memory.data() + i * bytes);
    F::encode(t.v.row(i).data(), dim, memory.data() + (n + i) * bytes);
  }
  auto view =
      std::make_shared<kv_view<F>>(cache_config{.num_kv_heads = 1, .head_dim = dim, .window = n, .rope = rope::none()},
                                   kv_layout{{.token = dim}, {.token = dim}});
  view->assign(kv_piece{0, n, memory.data(), memory.data() + n * bytes}, n);
  return view;
}

// What the newest rows of q get, `asked` of them, or the newest alone.
struct result {
  matrix out;
  std::vector<float> lse;
};
result attend(const layer_tokens& t, const kv_source& keys, const softmax_variant& softmax, way by) {
  const attention attention({.num_qo_heads = heads, .softmax = softmax, .sm_scale = 1.f});
  const index_t asked = by == way::panels ? std::min<index_t>(24, t.q.rows()) : by == way::few_rows ? 3 : 1;
  result r{matrix(asked, heads * dim), std::vector<float>(as_size(asked * heads))};
  workspace w;
  const auto q = t.q.bottomRows(asked);
  if (by == way::decode) {
    attention.decode(q, keys, r.out, w, {.lse = r.lse});
  } else if (by == way::states) {
    attention_state state(heads, dim);
    attention.attend(q, keys, state, w);
    for (index_t h = 0; h < heads; ++h)
      r.lse[as_size(h)] = state.finish(softmax, h, {r.out.data() + h * dim, as_size(dim)});
  } else {
    attention.attend(q, keys, r.out, w, {.lse = r.lse});
  }
  return r;
}

// Every query that is asked against the definition, over rows as they are stored. Where that is infinite or NaN, the
// output has to be; `row_alike`: in whatever column.
std::string wrong(const layer_tokens& t, const matrix& k, const matrix& v, const result& r,
                  const softmax_variant& softmax, bool row_alike = false) {
  oracle::layer layer;
  layer.num_qo_heads = as_size(heads);
  layer.head_dim = layer.v_head_dim = as_size(dim);
  for (index_t h = 0; h < heads; ++h) layer.sink_logits.push_back(softmax.sink(h));
  const index_t n = t.q.rows(), asked = r.out.rows();
  for (index_t i = 0; i < asked; ++i) {
    const position_t query = n - asked + i;
    std::vector<position_t> visible;
    for (position_t p = 0; p <= query; ++p) visible.push_back(p);
    const auto exact = oracle::attend(layer, t.q.row(query).data(), query, visible, k.data(), v.data());
    double most = 0;
    for (index_t j = 0; j < v.size(); ++j)
      if (std::isfinite(v.data()[j])) most = std::max(most, std::abs(static_cast<double>(v.data()[j])));
    for (index_t h = 0; h < heads; ++h) {
      const oracle::answer& e = exact[as_size(h)];
      const double bound = 16 * u * (1 + e.a);
      const auto lse = static_cast<double>(r.lse[as_size(i * heads + h)]);
      if (std::isfinite(e.lse) ? !(std::abs(lse - e.lse) <= bound) : !std::isnan(lse))
        return fmt::format("query {}, head {}: lse {} instead of {}", query, h, lse, e.lse);
      const bool any = std::any_of(e.out.begin(), e.out.end(), [](double x) { return !std::isfinite(x); });
      for (index_t d = 0; d < dim; ++d) {
        const double x = e.out[as_size(d)];
        const auto found = static_cast<double>(r.out(i, h * dim + d));
        const bool right = row_alike && any    ? !std::isfinite(found)
                           : std::isnan(x)     ? std::isnan(found)
                           : !std::isfinite(x) ? found == x
                                               : std::abs(found - x) <= bound * most;
        if (!right) return fmt::format("query {}, head {}, column {}: {} instead of {}", query, h, d, found, x);
      }
    }
  }
  return "";
}

struct format {
  const char* name;
  bool views;     // read in place, in blocks of 32
  bool few_bits;  // a row is infinite or NaN as a whole
  double error;   // of an element, as a part of the row's largest
  float largest;  // value that it holds, in a row of `dim`
  std::function<std::shared_ptr<kv_source>(const layer_tokens&, std::vector<std::byte>&)> make;
};

template <class F>
std::shared_ptr<kv_source> cache_of(const layer_tokens& t, std::vector<std::byte>&) {
  auto cache = std::make_shared<kv_cache<F>>(cache_config{.num_kv_heads = 1,
                                                          .head_dim = dim,
                                                          .num_sink_tokens = 2,
                                                          .window = t.k.rows(),
                                                          .rope = rope::none(),
                                                          .rollback = 63,
                                                          .recent = 8});
  cache->append(t.k, t.v);
  return cache;
}

// Of an element, whatever the others are: a row with a norm of 3.38e38 at most is held.
const float few_bits_largest = 3.38e38f / std::sqrt(static_cast<float>(dim));

const std::vector<format>& formats() {
  static const std::vector<format> all = {{"f32", false, false, 0, largest, cache_of<f32>},
                                          {"f16", false, false, 0x1p-11, 65504, cache_of<f16>},
                                          {"bf16", false, false, 0x1p-8, 0x1.fep127f, cache_of<bf16>},
                                          {"q8", false, true, 0x1p-7, few_bits_largest, cache_of<q8>},
                                          {"q6", false, true, 0x1p-5, few_bits_largest, cache_of<q6>},
                                          {"q4", false, true, 0x1p-3, few_bits_largest, cache_of<q4>},
                                          {"q2", false, true, 1, few_bits_largest, cache_of<q2>},
                                          {"view of f32", true, false, 0, largest, view_of<f32>},
                                          {"view of f16", true, false, 0x1p-11, 65504, view_of<f16>},
                                          {"q8_0", true, true, 0x1p-7, 127 * 65504.f, view_of<q8_0>},
                                          {"q4_0", true, true, 0x1p-3, 8 * 65504.f, view_of<q4_0>}};
  return all;
}

template <class Check>
void for_all(const Check& check) {
  for (const format& f : formats())
    for (int softmax = 0; softmax < 3; ++softmax)
      for (const way by : ways) {
        INFO(f.name << ", softmax " << softmax << ", way " << static_cast<int>(by));
        check(f, variant(softmax), by);
      }
}

TEST_CASE("extremes: an infinite value is what outputs of its column are; both signs, or a NaN, are NaN") {
  constexpr index_t n = 50, bad = 7, column = 5;
  for_all([&](const format& f, const softmax_variant& softmax, way by) {
    for (const float x : {infinity, -infinity, nan}) {
      layer_tokens t(n);
      t.v(bad, column) = x;
      if (x == infinity) t.v(bad + 10, column + 1) = -infinity, t.v(bad, column + 1) = infinity;
      std::vector<std::byte> memory;
      const result r = attend(t, *f.make(t, memory), softmax, by);
      if (f.error == 0 || f.few_bits) {
        if (f.few_bits) {
          for (index_t i = 0; i < r.out.size(); ++i) REQUIRE(!std::isfinite(r.out.data()[i]));
          for (const float lse : r.lse) REQUIRE(std::isfinite(lse));
        } else {
          REQUIRE(wrong(t, t.k, t.v, r, softmax) == "");
        }
        continue;
      }
      for (index_t i = 0; i < r.out.rows(); ++i)
        for (index_t h = 0; h < heads; ++h)
          for (index_t d = 0; d < dim; ++d) {
            const float found = r.out(i, h * dim + d);
            if (d == column)
              REQUIRE((std::isnan(x) ? std::isnan(found) : found == x));
            else
              REQUIRE((d == column + 1 && x == infinity ? std::isnan(found) : std::isfinite(found)));
          }
    }
  });
}

TEST_CASE(
    "extremes: a NaN in a key is NaN to who sees it; so is a logit of infinity; one of -infinity counts nothing") {
  constexpr index_t n = 50, bad = 7, column = 5;
  for_all([&](const format& f, const softmax_variant& softmax, way by) {
    for (const float x : {infinity, -infinity, nan}) {
      layer_tokens t(n);
      for (index_t i = 0; i < n; ++i)
        for (index_t h = 0; h < heads; ++h) t.q(i, h * dim + column) = 0.5f;
      t.k(bad, column) = x;
      std::vector<std::byte> memory;
      const result r = attend(t, *f.make(t, memory), softmax, by);
      if (x == -infinity && !f.few_bits) {
        layer_tokens finite = t;  // so far down that double arithmetic gives it nothing
        finite.k(bad, column) = -1e6f;
        if (f.error == 0) {
          for (index_t i = 0; i < r.out.size(); ++i) REQUIRE(std::isfinite(r.out.data()[i]));
          const result without = attend(finite, *f.make(finite, memory), softmax, by);
          REQUIRE((r.out - without.out).cwiseAbs().maxCoeff() < 1e-6f);
        } else {
          for (index_t i = 0; i < r.out.size(); ++i) REQUIRE(std::isfinite(r.out.data()[i]));
        }
        continue;
      }
      for (index_t i = 0; i < r.out.size(); ++i) REQUIRE(std::isnan(r.out.data()[i]));
      for (const float lse : r.lse) REQUIRE(std::isnan(lse));
    }
  });
}

TEST_CASE("extremes: values whose weighted sum fits are right, though what they add up to on the way does not fit") {
  for_all([&](const format& f, const softmax_variant& softmax, way by) {
    // Two slices of decode, and a maximum that grows from tile to tile by more than weights have binary places.
    for (const bool grows : {false, true}) {
      constexpr index_t n = 700;
      layer_tokens t(n);
      for (index_t i = 0; i < n; ++i)
        for (index_t d = 0; d < dim; ++d) {
          t.v(i, d) = f.largest * (d % 4 == 0 ? 1.f : d % 4 == 1 ? -1.f : t.v(i, d));
          t.k(i, d) *= 0.1f;
        }
      for (index_t i = 0; i < n && grows; ++i) {
        t.q(i, 0) = t.q(i, dim) = 1;
        t.k(i, 0) = static_cast<float>(i / 128 * 100);
      }
      std::vector<std::byte> memory;
      const result r = attend(t, *f.make(t, memory), softmax, by);
      if (f.error == 0) {
        REQUIRE(wrong(t, t.k, t.v, r, softmax) == "");
      } else {
        // The sink takes a little; rows that are not plain are off by what rounding left of them.
        for (index_t i = 0; i < r.out.size(); ++i) REQUIRE(std::isfinite(r.out.data()[i]));
        for (index_t d = 0; d < 2 && !f.few_bits; ++d)
          for (index_t h = 0; h < heads; ++h)
            REQUIRE(std::abs(std::abs(r.out(0, h * dim + d)) / f.largest - 1) < 0.03f);
      }
    }
  });
}

TEST_CASE("extremes: who asks is told how much of what is seen is no number") {
  constexpr index_t n = 40, bad = 7;
  for (const format& f : formats()) {
    INFO(f.name);
    layer_tokens t(n);
    std::vector<std::byte> memory;
    CHECK(num_not_finite(*f.make(t, memory)) == 0);
    t.v(bad, 3) = nan;
    t.v(bad, 4) = infinity;
    t.k(bad + 1, 5) = -infinity;
    CHECK(num_not_finite(*f.make(t, memory)) == (f.few_bits ? 2 * dim : 3));
  }
  // As a token that f16 cannot hold comes and leaves; a pinned one stays.
  const matrix ones = matrix::Ones(1, 16);
  for (const bool pinned : {false, true}) {
    kv_cache<f16> cache({.num_kv_heads = 2,
                         .head_dim = 8,
                         .num_sink_tokens = pinned ? 1 : 0,
                         .window = 5,
                         .positions = positions::absolute,
                         .rope = rope::none()});
    CHECK(num_not_finite(cache) == 0);
    matrix k = matrix::Constant(1, 16, 65519.f), v = k;
    cache.append(k, v);
    CHECK(num_not_finite(cache) == 0);
    cache.clear();
    k(0, 3) = 65520.f, v(0, 9) = -70000.f, v(0, 10) = 1e30f;
    cache.append(k, v);
    for (index_t i = 0; i < 9; ++i) {
      CHECK(num_not_finite(cache) == (i < 5 || pinned ? 3 : 0));
      cache.append(ones, ones);
    }
  }
  // Rows in any order, and pages.
  std::vector<float> pool(4 * 2 * 4, 1.f);
  pool[2 * 8 + 1] = infinity;  // page 2
  const std::int32_t table[] = {3, 2}, elsewhere[] = {3, 1};
  kv_view<f32> view({.num_kv_heads = 1, .head_dim = 4, .rope = rope::none()}, {{.token = 4}, {.token = 4}});
  view.assign(kv_pages{pool.data(), pool.data(), 8, 8, 4, 2, table}, 4);
  CHECK(num_not_finite(view) == 2);
  view.assign(kv_pages{pool.data(), pool.data(), 8, 8, 4, 2, elsewhere}, 4);
  CHECK(num_not_finite(view) == 0);
}

TEST_CASE("extremes: a row of few bits is held up to its norm's limit; past it nothing plausible comes out") {
  constexpr index_t n = 12;  // 2 pinned, 2 of few bits, 8 that are spared
  for (const format& f : formats()) {
    if (f.views || !f.few_bits) continue;
    INFO(f.name);
    std::vector<std::byte> memory;
    const auto output = [&](const matrix& row, index_t& not_finite) {
      layer_tokens t(n);
      t.v = row.replicate(n, 1);
      const std::shared_ptr<kv_source> cache = f.make(t, memory);
      not_finite = num_not_finite(*cache);
      return matrix(attend(t, *cache, variant(0), way::decode).out.leftCols(dim));
    };
    matrix one_hot = matrix::Zero(1, dim), outlier = matrix::Ones(1, dim), by_turns(1, dim);
    one_hot(0, 9) = outlier(0, dim - 1) = 3e38f;
    for (index_t d = 0; d < dim; ++d) by_turns(0, d) = d % 2 == 0 ? f.largest : -f.largest;
    for (const matrix& row :
         {one_hot, outlier, by_turns, matrix(matrix::Constant(1, dim, f.largest)), matrix(matrix::Zero(1, dim)),
          matrix(matrix::Constant(1, dim, 1e-39f)), matrix(matrix::Constant(1, dim, -1e-30f))}) {
      index_t not_finite = 0;
      const matrix out = output(row, not_finite);
      CHECK(not_finite == 0);
      double error = 0, norm = 0;
      for (index_t d = 0; d < dim; ++d) {
        error += std::pow(static_cast<double>(out(0, d)) - static_cast<double>(row(0, d)), 2);
        norm += std::pow(static_cast<double>(row(0, d)), 2);
      }
      // What the largest of the transformed row may be off by, in all of its elements.
      CHECK(std::sqrt(error) <= f.error * std::sqrt(norm * dim) + 1e-38);
    }
    for (const float x : {3e38f, -3e38f}) {
      index_t not_finite = 0;
      const matrix out = output(matrix::Constant(1, dim, x), not_finite);
      CHECK(not_finite == 10 * 1 + 2 * dim);  // an element of the transform, of few bits all
      for (index_t d = 0; d < dim; ++d) CHECK(!std::isfinite(out(0, d)));
    }
  }
}

TEST_CASE("extremes: states of large values merge to what one state holds") {
  for (int softmax = 0; softmax < 3; ++softmax)
    for (const float size : {largest, largest / 40}) {
      constexpr index_t n = 120, parts = 12;
      layer_tokens t(n);
      for (index_t i = 0; i < t.v.size(); ++i) t.v.data()[i] = t.v.data()[i] < 0 ? -size : size;
      t.v.leftCols(3).setConstant(size);
      const attention attention({.num_qo_heads = heads, .softmax = variant(softmax), .sm_scale = 1.f});
      workspace w;
      attention_state state(heads, dim);
      for (index_t part = 0; part < parts; ++part) {
        layer_tokens of(n / parts);
        of.k = t.k.middleRows(part * n / parts, n / parts);
        of.v = t.v.middleRows(part * n / parts, n / parts);
        std::vector<std::byte> memory;
        if (part % 2 == 0) {
          attention.attend(t.q.bottomRows(1), *cache_of<f32>(of, memory), state, w);
        } else {
          attention_state other(heads, dim);
          attention.attend(t.q.bottomRows(1), *cache_of<f32>(of, memory), other, w);
          state.merge(other);
        }
      }
      result r{matrix(1, heads * dim), std::vector<float>(as_size(heads))};
      for (index_t h = 0; h < heads; ++h)
        r.lse[as_size(h)] = state.finish(variant(softmax), h, {r.out.data() + h * dim, as_size(dim)});
      INFO("softmax " << softmax << ", values of " << size);
      CHECK(wrong(t, t.k, t.v, r, variant(softmax)) == "");
    }
}

}  // namespace
}  // namespace proof
