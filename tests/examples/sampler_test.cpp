#include "chat/sampler.hpp"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../catch.hpp"

namespace {

using chat::sampler;

const std::vector<float> logits = {1.5f, -2, 3, 3, 0, 2.5f};
const std::vector<bool> none(logits.size());

std::vector<double> frequencies(const chat::sampler_config& config, const std::vector<bool>& banned, int draws) {
  sampler s(config);
  std::vector<double> share(logits.size());
  for (int i = 0; i < draws; ++i) share[static_cast<std::size_t>(s.draw(logits, banned))] += 1.0 / draws;
  return share;
}

}  // namespace

TEST_CASE("without a temperature, or one token to choose from, the likeliest is drawn, the first of equals") {
  sampler greedy({.temperature = 0, .top_k = 0, .seed = 1}), single({.temperature = 5, .top_k = 1, .seed = 1});
  for (int i = 0; i < 20; ++i) {
    CHECK(greedy.draw(logits, none) == 2);
    CHECK(single.draw(logits, none) == 2);
    CHECK(greedy.draw(logits, {false, false, true, true, false, false}) == 5);
    CHECK(single.draw(logits, {true, false, true, true, true, true}) == 1);
  }
}

TEST_CASE("tokens are drawn as often as the softmax of their logits says") {
  constexpr int draws = 20000;
  for (const std::size_t top_k : {0u, 2u, 4u, 100u}) {
    INFO("top_k " << top_k);
    const std::vector<bool> banned = {false, false, false, false, true, false};
    const std::vector<bool> is_candidate = {top_k != 2, top_k == 0 || top_k == 100, true, true, false, top_k != 2};
    double sum = 0;
    for (std::size_t i = 0; i < logits.size(); ++i) sum += is_candidate[i] ? std::exp(logits[i] / 1.5) : 0;
    const std::vector<double> share = frequencies({.temperature = 1.5, .top_k = top_k, .seed = 3}, banned, draws);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const double p = is_candidate[i] ? std::exp(logits[i] / 1.5) / sum : 0;
      CHECK(std::abs(share[i] - p) <= 5 * std::sqrt(p * (1 - p) / draws));
    }
  }
}

TEST_CASE("a seed draws the same tokens, another one others") {
  const auto drawn = [](std::uint64_t seed) {
    sampler s({.temperature = 1, .top_k = 0, .seed = seed});
    std::vector<int> tokens;
    for (int i = 0; i < 50; ++i) tokens.push_back(s.draw(logits, none));
    return tokens;
  };
  CHECK(drawn(1) == drawn(1));
  CHECK(drawn(1) != drawn(2));
}

TEST_CASE("logits of any size are drawn from, but not those that are no numbers") {
  sampler s({.temperature = 1e-3, .top_k = 0, .seed = 1});
  CHECK(s.draw(std::vector<float>{-3e38f, 3e38f, 0}, {false, false, false}) == 1);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    CHECK_THROWS_AS(s.draw(std::vector<float>{0, bad, 0}, {false, false, false}), std::runtime_error);
}

TEST_CASE("where no token may be drawn, that is said") {
  const std::vector<bool> all(logits.size(), true);
  for (const double temperature : {0., 1.}) {
    sampler s({.temperature = temperature, .top_k = 2, .seed = 1});
    CHECK_THROWS_WITH(s.draw(logits, all), Catch::Contains("no token may be drawn"));
  }
}
