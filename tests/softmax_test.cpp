// Partial states, how they merge and where the sink enters, against the softmax over all logits and the sink's column
// at once, in double.

#include <sinkcache/softmax.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"

using namespace sinkcache;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
constexpr double u = 0x1p-24;

// One token as one head sees it. The logit is in base 2, as states keep it, so that nothing is rounded before the test.
struct token {
  float logit2;
  std::vector<float> value;
};

attention_state state_of(const token& token) {
  attention_state state(1, static_cast<index_t>(token.value.size()));
  state.data()[0] = token.logit2;
  state.data()[1] = 1;
  std::copy(token.value.begin(), token.value.end(), state.data().begin() + 2);
  return state;
}

struct result {
  std::vector<double> out;
  double lse;
};

// One more column, of the sink, whose value is zero.
result concat_column_softmax(const std::vector<token>& tokens, std::size_t dim, float sink) {
  double largest = static_cast<double>(sink), sum = 0;
  for (const token& t : tokens) largest = std::max(largest, static_cast<double>(t.logit2) * std::numbers::ln2);
  result result{std::vector<double>(dim), -HUGE_VAL};
  if (std::isinf(largest)) return result;
  sum = std::exp(static_cast<double>(sink) - largest);
  for (const token& t : tokens) {
    const double weight = std::exp(static_cast<double>(t.logit2) * std::numbers::ln2 - largest);
    sum += weight;
    for (std::size_t i = 0; i < dim; ++i) result.out[i] += weight * static_cast<double>(t.value[i]);
  }
  for (double& x : result.out) x /= sum;
  result.lse = largest + std::log(sum);
  return result;
}

std::vector<token> random_tokens(effort::dice& dice, std::size_t n, std::size_t dim, double scale) {
  std::vector<token> tokens(n);
  for (token& t : tokens) {
    t.logit2 = static_cast<float>(scale * std::numbers::log2e * static_cast<double>(dice.signed_unit()));
    if (dice.one_in(4)) t.logit2 = tokens[0].logit2 + dice.signed_unit();  // near-ties
    for (std::size_t i = 0; i < dim; ++i) t.value.push_back(dice.signed_unit());
  }
  return tokens;
}

// Merges the tokens' states, and some identities, two at a time in any order.
attention_state merge_at_random(effort::dice& dice, const std::vector<token>& tokens, std::size_t dim) {
  std::vector<attention_state> states;
  for (const token& t : tokens) states.push_back(state_of(t));
  for (auto i = dice.from_to(0, 3); i > 0 || states.empty(); --i) states.emplace_back(1, static_cast<index_t>(dim));
  while (states.size() > 1) {
    const auto last = static_cast<std::int64_t>(states.size()) - 1;
    std::swap(states[static_cast<std::size_t>(dice.from_to(0, last))], states.back());
    const attention_state from = std::move(states.back());
    states.pop_back();
    states[static_cast<std::size_t>(dice.from_to(0, last - 1))].merge(from);
  }
  return states[0];
}

void check_close(const attention_state& state, const std::vector<token>& tokens, std::size_t dim, float sink,
                 const softmax_variant& variant) {
  const result exact = concat_column_softmax(tokens, dim, sink);
  const attention_output found = state.finish(variant, 0);
  // Each token's weight passes at most one merge a token, which rounds a few times; the sink's logit is rounded once,
  // on its way to base 2.
  const double of_sink = std::isinf(sink) ? 0 : 2 * std::abs(static_cast<double>(sink));
  const double allowed = (8 + 3 * static_cast<double>(tokens.size()) + of_sink) * u;
  CAPTURE(tokens.size(), dim, sink);
  for (std::size_t i = 0; i < dim; ++i)
    if (!(std::abs(static_cast<double>(found.out(0, static_cast<index_t>(i))) - exact.out[i]) <= allowed)) {
      CAPTURE(i, found.out(0, static_cast<index_t>(i)), exact.out[i]);
      FAIL();
    }
  if (std::isinf(exact.lse))
    REQUIRE(found.lse == -inf);
  else
    REQUIRE(std::abs(static_cast<double>(found.lse) - exact.lse) <= allowed + u * std::abs(exact.lse));
}

TEST_CASE("softmax: any tree of merges, finished once, is the softmax with the sink's column") {
  const auto seed = static_cast<std::uint64_t>(GENERATE(range(0, 10)));
  effort::dice dice(seed);
  for (int i = effort::cases(200); i > 0; --i) {
    const auto n = static_cast<std::size_t>(dice.one_in(10) ? 0 : dice.from_to(1, dice.one_in(2) ? 4 : 60));
    const auto dim = static_cast<std::size_t>(dice.from_to(1, 20));
    const double scales[] = {1, 10, 100, 1e3, 1e4};
    const std::vector<token> tokens = random_tokens(dice, n, dim, scales[dice.from_to(0, 4)]);
    const attention_state state = merge_at_random(dice, tokens, dim);
    CAPTURE(seed, i);
    check_close(state, tokens, dim, -inf, softmax_variant::standard());
    check_close(state, tokens, dim, 0.f, softmax_variant::softmax1());
    const float near = tokens.empty() ? 0.5f : tokens[0].logit2 * std::numbers::ln2_v<float> + dice.signed_unit();
    for (float sink : {-inf, -1e4f, -100.f, -1.f, 0.f, 1.5f, 100.f, 1e4f, near})
      check_close(state, tokens, dim, sink, softmax_variant::sink_logits(std::vector<float>{sink}));
  }
}

TEST_CASE("softmax: weights and the sink's mass sum to one") {
  effort::dice dice(1);
  for (double scale : {1.0, 1e2, 1e4})
    for (float sink : {-inf, -100.f, 0.f, 100.f})
      for (int i = 0; i < 20; ++i) {
        std::vector<token> tokens = random_tokens(dice, 30, 1, scale);
        for (token& t : tokens) t.value = {1.f};
        const attention_output found =
            merge_at_random(dice, tokens, 1).finish(softmax_variant::sink_logits(std::vector<float>{sink}), 0);
        const double mass = std::exp(static_cast<double>(sink) - static_cast<double>(found.lse));
        REQUIRE(std::isfinite(found.out(0, 0)));
        // lse is a float, so its distance to the sink is no more exact than that.
        REQUIRE(std::abs(static_cast<double>(found.out(0, 0)) + mass - 1) <=
                100 * u + mass * u * std::abs(static_cast<double>(found.lse)));
      }
}

TEST_CASE("softmax: softmax1 is a sink logit of 0, standard one of -inf, to the bit") {
  effort::dice dice(2);
  const std::vector<float> zero{0.f}, none{-inf};
  for (int i = 0; i < 50; ++i) {
    const attention_state state = merge_at_random(dice, random_tokens(dice, 9, 5, 10), 5);
    const attention_output a = state.finish(softmax_variant::softmax1(), 0),
                           b = state.finish(softmax_variant::standard(), 0);
    const attention_output c = state.finish(softmax_variant::sink_logits(zero), 0),
                           d = state.finish(softmax_variant::sink_logits(none), 0);
    REQUIRE((a.out == c.out && a.lse == c.lse));
    REQUIRE((b.out == d.out && b.lse == d.lse));
  }
}

TEST_CASE("softmax: nothing visible") {
  const attention_state nothing(1, 5);
  const attention_output standard = nothing.finish(softmax_variant::standard(), 0);
  CHECK((standard.out == matrix::Zero(1, 5) && standard.lse == -inf));
  const attention_output softmax1 = nothing.finish(softmax_variant::softmax1(), 0);
  CHECK((softmax1.out == matrix::Zero(1, 5) && softmax1.lse == 0.f));
  for (float sink : {-100.f, 2.5f, 100.f}) {
    const attention_output out = nothing.finish(softmax_variant::sink_logits(std::vector<float>{sink}), 0);
    CHECK(out.out == matrix::Zero(1, 5));
    CHECK(std::abs(out.lse - sink) <= 2e-7f * std::abs(sink));
  }
}

TEST_CASE("softmax: a token alone") {
  const attention_state state = state_of({3.f, {1.f, -2.f, 0.1f}});
  const attention_output out = state.finish(softmax_variant::standard(), 0);
  CHECK((out.out(0, 0) == 1.f && out.out(0, 1) == -2.f && out.out(0, 2) == 0.1f));
  CHECK(out.lse == static_cast<float>(3 * std::numbers::ln2));
}

// The monoid.

bool same(const attention_state& a, const attention_state& b) {
  return std::equal(a.data().begin(), a.data().end(), b.data().begin(), b.data().end());
}

// As far apart as `ulps` roundings of the largest numbers in d and in o; m never differs.
bool close(const attention_state& a, const attention_state& b, double ulps) {
  const auto x = a.data(), y = b.data();
  if (x[0] != y[0]) return false;
  double size = static_cast<double>(x[1]);
  for (std::size_t i = 1; i < x.size(); ++i)
    if (!(std::abs(static_cast<double>(x[i]) - static_cast<double>(y[i])) <= 2 * ulps * u * size)) return false;
  return true;
}

attention_state merged(attention_state a, const attention_state& b) {
  a.merge(b);
  return a;
}

TEST_CASE("softmax: states are a commutative monoid, to a few roundings") {
  effort::dice dice(3);
  const attention_state identity(1, 6);
  for (int i = effort::cases(2000); i > 0; --i) {
    const double scale = dice.one_in(2) ? 3 : 1e4;
    const auto some = [&] {
      return merge_at_random(dice, random_tokens(dice, static_cast<std::size_t>(dice.from_to(0, 3)), 6, scale), 6);
    };
    const attention_state a = some(), b = some(), c = some();
    REQUIRE(same(merged(a, identity), a));
    REQUIRE(same(merged(identity, a), a));
    REQUIRE(close(merged(a, b), merged(b, a), 2));
    REQUIRE(close(merged(merged(a, b), c), merged(a, merged(b, c)), 8));
  }
  CHECK(same(merged(identity, identity), identity));
}

TEST_CASE("softmax: a state merged with itself counts every token twice") {
  attention_state state = state_of({3.f, {1.f, -2.f}});
  state.merge(state);
  const attention_output out = state.finish(softmax_variant::standard(), 0);
  CHECK((out.out(0, 0) == 1.f && out.out(0, 1) == -2.f));
  CHECK(out.lse == static_cast<float>(4 * std::numbers::ln2));
}

TEST_CASE("softmax: heads stay apart; a NaN stays in its head, and for good") {
  const softmax_variant variants[] = {softmax_variant::standard(), softmax_variant::softmax1(),
                                      softmax_variant::sink_logits(std::vector<float>{100.f, 100.f, 100.f})};
  constexpr std::size_t stride = 4;
  for (std::size_t poisoned : {std::size_t{0}, std::size_t{1}, std::size_t{2}})  // m, d, or one number of o
    for (bool first : {false, true})
      for (float other_m : {-inf, -5.f, 5.f}) {
        attention_state with(3, 2), without(3, 2);
        for (std::size_t head = 0; head < 3; ++head) {
          float* const at = with.data().data() + head * stride;
          at[0] = 1, at[1] = 2, at[2] = 3, at[3] = 4;
          float* const other = without.data().data() + head * stride;
          other[0] = other_m, other[1] = other_m == -inf ? 0.f : 1.f, other[2] = other[3] = other[1];
        }
        with.data()[stride + poisoned] = nan;
        const attention_state state = first ? merged(with, without) : merged(without, with);
        for (const softmax_variant& variant : variants) {
          CAPTURE(poisoned, first, other_m);
          for (index_t head : {0, 2}) {
            const attention_output out = state.finish(variant, head);
            REQUIRE((out.out.allFinite() && std::isfinite(out.lse)));
          }
          const attention_output out = state.finish(variant, 1);
          REQUIRE(std::isnan(out.out(0, 0)));
          REQUIRE(std::isnan(out.out(0, 1)) == (poisoned < 2));
          REQUIRE(std::isnan(out.lse) == (poisoned < 2));
        }
      }
}

// Attention_state as an object.

TEST_CASE("softmax: finish leaves the state as it is; data() is all of it") {
  effort::dice dice(4);
  attention_state state(3, 5);
  CHECK(state.num_heads() == 3);
  CHECK(state.v_head_dim() == 5);
  REQUIRE(state.data().size() == 3 * (5 + 2));
  for (std::size_t head = 0; head < 3; ++head) {
    CHECK(state.data()[head * 7] == -inf);
    for (std::size_t i = 1; i < 7; ++i) CHECK(state.data()[head * 7 + i] == 0.f);
  }
  for (float& x : state.data()) x = 1 + dice.signed_unit();
  const std::vector<float> before(state.data().begin(), state.data().end());

  attention_state received(3, 5);
  std::copy(before.begin(), before.end(), received.data().begin());
  const std::vector<float> sinks = {-1.f, 0.f, 1.f};
  const softmax_variant variant = softmax_variant::sink_logits(sinks);
  for (index_t head = 0; head < 3; ++head) {
    std::vector<float> out(7, 42.f);  // finish writes v_head_dim floats and no more
    const float lse = state.finish(variant, head, std::span(out).subspan(1, 5));
    CHECK((out.front() == 42.f && out.back() == 42.f));
    const attention_output again = state.finish(variant, head), elsewhere = received.finish(variant, head);
    CHECK((again.out.rows() == 1 && again.out.cols() == 5));
    CHECK(std::memcmp(out.data() + 1, again.out.data(), 5 * sizeof(float)) == 0);
    CHECK((lse == again.lse && lse == elsewhere.lse && again.out == elsewhere.out));

    // A head of several is a head alone.
    attention_state alone(1, 5);
    std::copy_n(before.begin() + head * 7, 7, alone.data().begin());
    const float sink = sinks[static_cast<std::size_t>(head)];
    CHECK(alone.finish(softmax_variant::sink_logits(std::span(&sink, 1)), 0).out == again.out);
  }
  CHECK(std::equal(before.begin(), before.end(), state.data().begin()));

  const attention_state& constant = state;
  CHECK(constant.data().data() == state.data().data());
  state.clear();
  CHECK(same(state, attention_state(3, 5)));
}

TEST_CASE("softmax: variants copy their logits") {
  std::vector<float> logits = {1.f, -inf, 3.f};
  const softmax_variant variant = softmax_variant::sink_logits(logits);
  logits.assign(3, 9.f);
  CHECK(variant.num_sink_logits() == 3);
  CHECK((variant.sink(0) == 1.f && variant.sink(1) == -inf && variant.sink(2) == 3.f));
  CHECK(softmax_variant::standard().num_sink_logits() == 0);
  CHECK((softmax_variant::standard().sink(0) == -inf && softmax_variant::standard().sink(7) == -inf));
  CHECK((softmax_variant::softmax1().sink(0) == 0.f && softmax_variant::softmax1().sink(7) == 0.f));
}

TEST_CASE("softmax: states merge where their sums alone do not fit") {
  constexpr float large = 3e38f;
  attention_state sum = state_of({0.f, {large, -large, 1.f}});
  for (int others = 1; others < 40; ++others) sum.merge(state_of({0.f, {large, -large, 1.f}}));
  const attention_output result = sum.finish(softmax_variant::standard(), 0);
  CHECK(static_cast<double>(result.out(0, 0)) == Approx(3e38));
  CHECK(static_cast<double>(result.out(0, 1)) == Approx(-3e38));
  CHECK(static_cast<double>(result.out(0, 2)) == Approx(1));
  CHECK(static_cast<double>(result.lse) == Approx(std::log(40.)));
}

TEST_CASE("softmax: errors name the argument, its value and what it had to be") {
  CHECK_THROWS_WITH(softmax_variant::sink_logits({}),
                    "sinkcache: sink_logits.size() was 0, had to be one per query head");
  CHECK_THROWS_WITH(softmax_variant::sink_logits(std::vector<float>{0.f, inf}),
                    "sinkcache: a sink logit was inf, had to be below infinity");
  CHECK_THROWS_WITH(softmax_variant::sink_logits(std::vector<float>{nan}),
                    "sinkcache: a sink logit was nan, had to be below infinity");

  CHECK_THROWS_WITH(attention_state(0, 4), "sinkcache: num_heads was 0, had to be at least 1");
  CHECK_THROWS_WITH(attention_state(-3, 4), "sinkcache: num_heads was -3, had to be at least 1");
  CHECK_THROWS_WITH(attention_state(1, 0), "sinkcache: v_head_dim was 0, had to be from 1 to 576");
  CHECK_THROWS_WITH(attention_state(1, 577), "sinkcache: v_head_dim was 577, had to be from 1 to 576");
  CHECK_NOTHROW(attention_state(1, 576));
  CHECK_THROWS_AS(attention_state(std::numeric_limits<index_t>::max(), 4), std::invalid_argument);
  CHECK_THROWS_AS(attention_state(index_t{1} << 60, 4), std::invalid_argument);

  attention_state state(2, 4);
  state.data()[1] = 5.f;
  const attention_state before = state;
  CHECK_THROWS_WITH(state.merge(attention_state(3, 4)), "sinkcache: other.num_heads() was 3, had to be exactly 2");
  CHECK_THROWS_WITH(state.merge(attention_state(2, 5)), "sinkcache: other.v_head_dim() was 5, had to be exactly 4");
  CHECK_THROWS_WITH(state.finish(softmax_variant::standard(), 2), "sinkcache: head was 2, had to be from 0 to below 2");
  CHECK_THROWS_WITH(state.finish(softmax_variant::standard(), -1),
                    "sinkcache: head was -1, had to be from 0 to below 2");
  CHECK_THROWS_WITH(state.finish(softmax_variant::sink_logits(std::vector<float>(3)), 0),
                    "sinkcache: sink_logits.size() was 3, had to be exactly 2");
  CHECK(state.try_merge(attention_state(3, 4)).message() == "sinkcache: other.num_heads() was 3, had to be exactly 2");
  std::vector<float> out(5, 7.f);
  float lse = 7;
  CHECK(state.try_finish(softmax_variant::standard(), 0, out, lse).message() ==
        "sinkcache: out.size() was 5, had to be exactly 4");
  CHECK((lse == 7 && out[0] == 7));
  CHECK(same(state, before));
  CHECK(state.try_merge(attention_state(2, 4)).ok());
  out.pop_back();
  CHECK(state.try_finish(softmax_variant::softmax1(), 1, out, lse).ok());
  CHECK((lse == 0 && out[0] == 0));
}

}  // namespace
