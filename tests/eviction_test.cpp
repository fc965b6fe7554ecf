// The library's eviction policies against the literal ones of eviction_oracle.hpp, through the suite of
// eviction_case.hpp. A user's is in user_policy_test.cpp.

#include <sinkcache/eviction.hpp>
#include <sinkcache/redundancy_policies.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "eviction_case.hpp"

namespace proof {
namespace {

void check_policy(const eviction_policy& policy, std::uint64_t seed, int usual) {
  CHECK(run_eviction_cases(policy, seed, effort::cases(usual)) == "");
}

}  // namespace

TEST_CASE("eviction: random is the oracle's") {
  check_policy({"random"}, 1000, 30);
  check_policy({"random", {{"draw", "once"}}}, 1100, 20);
}

TEST_CASE("eviction: h2o is the oracle's") {
  check_policy({"h2o"}, 2000, 20);
  check_policy({"h2o", {{"normalise", "lifetime"}}}, 2100, 30);
}

TEST_CASE("eviction: tova is the oracle's") { check_policy({"tova"}, 3000, 20); }

TEST_CASE("eviction: snapkv is the oracle's") {
  check_policy({"snapkv"}, 4000, 20);
  check_policy({"snapkv", {{"window", 3.}, {"kernel", 3.}, {"pool_pinned", 0.}}}, 4100, 30);
  check_policy({"snapkv", {{"window", 1.}, {"kernel", 1.}}}, 4200, 20);
  check_policy({"snapkv", {{"window", 5.}, {"kernel", 5.}, {"pool", "avg"}}}, 4300, 20);
  check_policy({"snapkv", {{"form", "rkv"}}}, 4400, 20);
}

TEST_CASE("eviction: what looks at keys alone is the oracle's") {
  check_policy({"knorm"}, 5000, 20);
  check_policy({"keydiff"}, 5100, 30);
  check_policy({"mean_key"}, 5200, 30);
}

TEST_CASE("eviction: lagkv is the oracle's") {
  check_policy({"lagkv"}, 6000, 30);
  check_policy({"lagkv", {{"lag", 4.}}}, 6100, 30);
  check_policy({"lagkv", {{"lag", 9.}, {"cross", 1.}, {"v_ratio", .5}}}, 6200, 30);
  check_policy({"lagkv", {{"lag", 5.}, {"mode", "fifo"}}}, 6300, 20);
  check_policy({"lagkv", {{"lag", 4.}, {"mode", "fifo"}, {"ratio", .75}}}, 6400, 20);
}

TEST_CASE("eviction: gkv is the oracle's") {
  check_policy({"gkv"}, 7000, 20);
  check_policy({"gkv", {{"window", 2.}, {"combine", "mean"}, {"decay", .5}}}, 7100, 30);
  check_policy({"gkv", {{"window", 4.}, {"combine", "sum"}, {"kernel", 5.}, {"redundancy", 1.}}}, 7200, 30);
}

TEST_CASE("eviction: rkv is the oracle's") {
  check_policy({"rkv"}, 7300, 20);
  check_policy({"rkv", {{"window", 3.}, {"kernel", 3.}, {"lambda", .5}}}, 7400, 30);
}

// What redundancy says of keys [rows, head_dim] at these positions, with what it remembers.
std::vector<double> redundancy_of(const std::vector<std::vector<float>>& keys, const std::vector<position_t>& at,
                                  std::span<float> copies) {
  const auto n = static_cast<index_t>(keys.size()), d = static_cast<index_t>(keys.front().size());
  const sinkcache::kv_geometry geometry{.num_kv_heads = 1, .head_dim = d, .v_head_dim = d};
  std::vector<float> scratch(static_cast<std::size_t>(sinkcache::detail::redundancy_floats({n, d, d, 1})));
  const auto read = [](const void* of, index_t, index_t row, bool, float* to) noexcept {
    const auto& key = (*static_cast<const std::vector<std::vector<float>>*>(of))[static_cast<std::size_t>(row)];
    std::copy(key.begin(), key.end(), to);
  };
  const sinkcache::scored_head head{.kv_head = 0,
                                    .num_kv_heads = 1,
                                    .group = 1,
                                    .rows = n,
                                    .window = 0,
                                    .num_sink_tokens = 0,
                                    .budget = n,
                                    .seen = at.back() + 1,
                                    .whole = 0,
                                    .sm_scale = 1,
                                    .geometry = geometry,
                                    .at = at,
                                    .pinned = {},
                                    .sums = {},
                                    .given = {},
                                    .carried = {},
                                    .scratch = scratch,
                                    .queries = {},
                                    .reader = {&keys, read, nullptr}};
  sinkcache::detail::double_scratch memory(head.scratch);
  const sinkcache::detail::double_row found = sinkcache::detail::redundancy(head, memory, copies);
  return {found.begin(), found.end()};
}
// The same by looking at all pairs, in double.
std::vector<double> redundancy_by_pairs(const std::vector<std::vector<float>>& keys) {
  const std::size_t n = keys.size();
  std::vector<std::vector<double>> units;
  for (const std::vector<float>& key : keys) {
    std::vector<double>& unit = units.emplace_back(key.begin(), key.end());
    double sum = 0;
    for (const double x : unit) sum += x * x;
    for (double& x : unit) x /= sum > 0 ? std::sqrt(sum) : 1;
  }
  std::vector<double> mean(n), red;
  for (std::size_t i = 0; i < n; ++i) {
    std::vector<double> like(n);
    std::size_t newest = 0;
    for (std::size_t j = 0; j < n; ++j) {
      for (std::size_t k = 0; k < units[i].size() && i != j; ++k) like[j] += units[i][k] * units[j][k];
      if (like[j] > 0.5) newest = j;
    }
    like[newest] = 0;
    for (std::size_t j = 0; j < n; ++j) mean[j] += like[j] / static_cast<double>(n);
  }
  double sum = 0;
  for (const double m : mean) sum += std::exp(m);
  for (const double m : mean) red.push_back(std::exp(m) / sum);
  return red;
}

// Keys whose cosine is 0.5, or next to it; some leave and others come, as in a cache.
TEST_CASE("eviction: R-KV finds the newest copies, whatever it remembers of them") {
  for (int i = 0; i < effort::cases(30); ++i) {
    effort::dice dice(7900 + static_cast<std::uint64_t>(i));
    const bool whole = dice.one_in(2);
    const index_t d = whole ? 4 : dice.from_to(1, 9) * 8;
    std::vector<std::vector<float>> keys;
    std::vector<position_t> at;
    std::vector<float> copies;
    const bool remembers = !dice.one_in(4);
    for (position_t seen = 0, event = 0; event < 4; ++event) {
      for (index_t more = dice.from_to(1, 150); more > 0; --more) {
        std::vector<float> key(as_size(d));
        for (float& x : key) x = whole ? static_cast<float>(dice.from_to(-1, 1)) : dice.signed_unit();
        if (!whole && !keys.empty() && dice.one_in(2)) {
          // Next to half of an earlier one: of that one and what is at right angles to it.
          const std::vector<float>& other = keys[as_size(dice.from_to(0, std::ssize(keys) - 1))];
          double squares = 0, product = 0, rest = 0;
          for (std::size_t k = 0; k < key.size(); ++k)
            squares += double{other[k]} * double{other[k]}, product += double{other[k]} * double{key[k]};
          for (std::size_t k = 0; k < key.size(); ++k) {
            key[k] -= static_cast<float>(product / squares) * other[k];
            rest += double{key[k]} * double{key[k]};
          }
          const double off = 1 + static_cast<double>(dice.from_to(-3, 3)) * 3e-8;
          for (std::size_t k = 0; k < key.size() && rest > 0; ++k)
            key[k] = static_cast<float>(off * double{other[k]} + std::sqrt(3 * squares / rest) * double{key[k]});
        }
        keys.push_back(key);
        at.push_back(seen++);
        copies.push_back(std::numeric_limits<float>::quiet_NaN());
      }
      INFO("seed " << 7900 + i << ", event " << event << ", " << keys.size() << " keys of " << d);
      const std::vector<double> found = redundancy_of(keys, at, {copies.data(), remembers ? copies.size() : 0}),
                                expected = redundancy_by_pairs(keys);
      double worst = 0;
      for (std::size_t row = 0; row < keys.size(); ++row)
        worst = std::max(worst, std::abs(found[row] / expected[row] - 1));
      CHECK(worst <= 1e-7);
      for (std::size_t row = keys.size(); row-- > 1;)
        if (dice.one_in(3)) {
          const auto place = static_cast<std::ptrdiff_t>(row);
          keys.erase(keys.begin() + place), at.erase(at.begin() + place), copies.erase(copies.begin() + place);
        }
    }
  }
}

TEST_CASE("eviction: expected attention is the oracle's") {
  check_policy({"expected_attention"}, 7500, 8);
  check_policy({"expected_attention", {{"T", 32.}}}, 7600, 30);
  check_policy({"expected_attention", {{"T", 7.}, {"covariance", 0.}, {"vnorm", 0.}}}, 7700, 20);
  check_policy({"expected_attention", {{"T", 7.}, {"epsilon", .02}}}, 7800, 20);
}

TEST_CASE("eviction: NaN is the lowest score, and no sum remembers it") {
  eviction_tally tally;
  for (int i = 0; i < effort::cases(20); ++i)
    for (const eviction_policy& policy :
         {eviction_policy{"h2o"}, eviction_policy{"knorm"}, eviction_policy{"expected_attention", {{"T", 32.}}}}) {
      eviction_case c = draw_eviction(9000 + static_cast<std::uint64_t>(i), policy);
      effort::dice dice(c.seed);
      c.rules.accounts = false;
      const bool queries = c.setup.policy.name != "knorm";
      for (int bad = 0; bad < 4; ++bad) {
        const index_t token = dice.from_to(0, c.tokens - 1);
        for (matrix* m : {queries ? &c.q : &c.k, queries ? &c.raw_q : &c.raw_k})
          m->row(token).setConstant(std::numeric_limits<float>::quiet_NaN());
      }
      CHECK(run_eviction_case(c, tally) == "");
    }
  CHECK(tally.sets >= 3 * effort::cases(20));
}

TEST_CASE("eviction: budgets by layer and head are the oracle's") {
  effort::dice dice(80);
  for (int i = 0; i < effort::cases(200); ++i) {
    const index_t layers = dice.from_to(1, 60), fixed = dice.from_to(0, 40),
                  budget = fixed + dice.from_to(1, dice.one_in(2) ? 300 : 12);
    INFO(layers << " layers, " << budget << " rows, " << fixed << " fixed");
    const std::vector<index_t> found = sinkcache::pyramid_budgets(layers, budget, fixed);
    const auto expected = pyramid_budgets(as_size(layers), budget, fixed, 20.);
    REQUIRE(found.size() == expected.size());
    index_t sum = 0;
    for (std::size_t layer = 0; layer < found.size(); ++layer) {
      sum += found[layer];
      CHECK(std::abs(found[layer] - expected[layer]) <= 1);  // of equal remainders rounding chooses
    }
    CHECK(sum == layers * budget);
  }
}

}  // namespace proof
