// The library's eviction policies against the literal ones of eviction_oracle.hpp, through the suite of
// eviction_case.hpp. A user's is in user_policy_test.cpp.

#include <sinkcache/eviction.hpp>

#include <cmath>
#include <cstdint>
#include <limits>
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
