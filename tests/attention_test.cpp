// Decode, prefill and attend: what each parameter does, what is refused, and that nothing else is touched. Random
// shapes are left to attention_property_test.cpp.

#include <sinkcache/attention.hpp>
#include <sinkcache/kv_view.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "counting_resource.hpp"
#include "effort.hpp"
#include "oracle.hpp"

using namespace sinkcache;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();

static_assert(!std::is_convertible_v<attention_params, attention>);
static_assert(std::is_copy_constructible_v<attention>);

matrix random_matrix(effort::dice& dice, index_t rows, index_t cols) {
  matrix m(rows, cols);
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = dice.signed_unit();
  return m;
}

// Two KV heads, keys of 5 and values of 3, without positions.
cache_config small_config() {
  return {.num_kv_heads = 2,
          .head_dim = 5,
          .v_head_dim = 3,
          .num_sink_tokens = 2,
          .window = 6,
          .positions = positions::absolute,
          .inputs = inputs::rotated,
          .rollback = 6};
}

// Tokens of a stream for that cache and `heads` query heads.
struct stream {
  matrix q, k, v;

  stream(effort::dice& dice, index_t tokens, const cache_config& config, index_t heads)
      : q(random_matrix(dice, tokens, heads * config.head_dim)),
        k(random_matrix(dice, tokens, config.num_kv_heads * config.head_dim)),
        v(random_matrix(dice, tokens, config.num_kv_heads * config.v_head_dim)) {}
};

// What it computes, one parameter at a time.

struct expected {
  std::vector<double> out, lse;
};

// Attention of token `seen - 1` over the tokens that a sink window keeps, by the definition, without positions.
expected plain_attention(const stream& s, const cache_config& config, const attention_params& params, index_t seen,
                         float sink) {
  expected result;
  const index_t group = params.num_qo_heads / config.num_kv_heads, dim = config.head_dim;
  const double scale = static_cast<double>(params.sm_scale.value_or(1.f / std::sqrt(static_cast<float>(dim)))),
               cap = static_cast<double>(params.logits_soft_cap);
  for (index_t head = 0; head < params.num_qo_heads; ++head) {
    const index_t kv_head = head / group;
    const auto h = static_cast<std::size_t>(head);
    std::vector<double> out(static_cast<std::size_t>(config.v_head_dim));
    double sum = std::exp(static_cast<double>(sink));
    for (index_t token = 0; token < seen; ++token) {
      const bool pinned = token < config.num_sink_tokens;
      if (!pinned && token < seen - config.window) continue;
      double logit = 0;
      for (index_t i = 0; i < dim; ++i)
        logit +=
            static_cast<double>(s.q(seen - 1, head * dim + i)) * static_cast<double>(s.k(token, kv_head * dim + i));
      logit *= scale;
      if (cap > 0) logit = cap * std::tanh(logit / cap);
      if (!params.alibi_slopes.empty())
        logit += static_cast<double>(params.alibi_slopes[h]) * static_cast<double>(token - (seen - 1));
      if (!params.sink_bias.empty() && pinned) logit += static_cast<double>(params.sink_bias[h]);
      const double weight = std::exp(logit);
      sum += weight;
      for (index_t i = 0; i < config.v_head_dim; ++i)
        out[static_cast<std::size_t>(i)] += weight * static_cast<double>(s.v(token, kv_head * config.v_head_dim + i));
    }
    for (double x : out) result.out.push_back(sum > 0 ? x / sum : 0);
    result.lse.push_back(std::log(sum));
  }
  return result;
}

void check_close(const expected& exact, const float* out, const float* lse) {
  for (std::size_t i = 0; i < exact.out.size(); ++i)
    if (!(std::abs(static_cast<double>(out[i]) - exact.out[i]) <= 5e-6)) {
      CAPTURE(i, out[i], exact.out[i]);
      FAIL();
    }
  for (std::size_t i = 0; i < exact.lse.size(); ++i)
    if (!(std::abs(static_cast<double>(lse[i]) - exact.lse[i]) <= 5e-6)) {
      CAPTURE(i, lse[i], exact.lse[i]);
      FAIL();
    }
}

// Decodes a stream token by token, prefills it in chunks, and compares both with the definition.
void check_against_definition(const attention_params& params, const cache_config& config, float sink = -inf) {
  effort::dice dice(11);
  constexpr index_t tokens = 30;
  const stream s(dice, tokens, config, params.num_qo_heads);
  const attention attention(params);
  workspace scratch;
  kv_cache<f32> decoded(config), prefilled(config);
  const auto heads = static_cast<std::size_t>(params.num_qo_heads);

  matrix all(tokens, params.num_qo_heads * config.v_head_dim);
  std::vector<float> all_lse(heads * tokens);
  for (index_t first = 0, n = 0; first < tokens; first += n) {
    n = std::min(tokens - first, static_cast<index_t>(dice.from_to(1, 12)));
    attention.prefill(s.q.middleRows(first, n), s.k.middleRows(first, n), s.v.middleRows(first, n), prefilled,
                      all.middleRows(first, n), scratch,
                      {.lse = std::span(all_lse).subspan(static_cast<std::size_t>(first) * heads,
                                                         static_cast<std::size_t>(n) * heads)});
  }
  for (index_t i = 0; i < tokens; ++i) {
    CAPTURE(i);
    const expected exact = plain_attention(s, config, params, i + 1, sink);
    decoded.append(s.k.row(i), s.v.row(i));
    matrix out(1, all.cols());
    std::vector<float> lse(heads);
    attention.decode(s.q.row(i), decoded, out, scratch, {.lse = lse});
    check_close(exact, out.data(), lse.data());
    check_close(exact, all.row(i).data(), all_lse.data() + static_cast<std::size_t>(i) * heads);
  }
}

TEST_CASE("attention: heads, groups, scale") {
  const cache_config config = small_config();
  for (index_t heads : {2, 4, 6, 8, 10}) {
    CAPTURE(heads);
    check_against_definition({.num_qo_heads = heads}, config);
    check_against_definition({.num_qo_heads = heads, .sm_scale = 1.75f}, config);
  }
  check_against_definition({.num_qo_heads = 4, .sm_scale = 0.f}, config);
  check_against_definition({.num_qo_heads = 4, .sm_scale = -1.f}, config);
}

TEST_CASE("attention: softmax variants") {
  const cache_config config = small_config();
  check_against_definition({.num_qo_heads = 4, .softmax = softmax_variant::softmax1()}, config, 0.f);
  for (float sink : {-inf, -100.f, -1.f, 0.f, 2.f, 10.f})
    check_against_definition({.num_qo_heads = 4, .softmax = softmax_variant::sink_logits(std::vector<float>(4, sink))},
                             config, sink);
}

TEST_CASE("attention: each head has its own sink logit, slope and bias") {
  effort::dice dice(4);
  const cache_config config = small_config();
  const stream s(dice, 20, config, 4);
  kv_cache<f32> cache(config);
  cache.append(s.k, s.v);
  workspace scratch;
  const std::vector<float> sinks = {-1.f, 0.f, 1.f, 2.f}, slopes = {0.1f, 0.2f, 0.3f, 0.4f},
                           biases = {1.f, 2.f, 3.f, 4.f};
  const attention together(
      {.num_qo_heads = 4, .softmax = softmax_variant::sink_logits(sinks), .alibi_slopes = slopes, .sink_bias = biases});
  matrix out(1, 4 * 3), alone(1, 4 * 3);
  together.decode(s.q.row(3), cache, out, scratch);
  for (std::size_t head = 0; head < 4; ++head) {
    attention({.num_qo_heads = 4,
               .softmax = softmax_variant::sink_logits(std::vector<float>(4, sinks[head])),
               .alibi_slopes = std::vector<float>(4, slopes[head]),
               .sink_bias = std::vector<float>(4, biases[head])})
        .decode(s.q.row(3), cache, alone, scratch);
    const auto column = static_cast<index_t>(head) * 3;
    CHECK(out.middleCols(column, 3) == alone.middleCols(column, 3));
  }
}

TEST_CASE("attention: soft cap, ALiBi, sink bias, alone and together") {
  const cache_config config = small_config();
  const std::vector<float> slopes = {0.5f, 0.f, -0.25f, 2.f}, biases = {1.f, -2.f, 0.f, 3.f};
  check_against_definition({.num_qo_heads = 4, .logits_soft_cap = 0.7f}, config);
  check_against_definition({.num_qo_heads = 4, .logits_soft_cap = 50.f}, config);
  check_against_definition({.num_qo_heads = 4, .alibi_slopes = slopes}, config);
  check_against_definition({.num_qo_heads = 4, .sink_bias = biases}, config);
  check_against_definition({.num_qo_heads = 4,
                            .softmax = softmax_variant::softmax1(),
                            .sm_scale = 2.f,
                            .logits_soft_cap = 0.7f,
                            .alibi_slopes = slopes,
                            .sink_bias = biases},
                           config, 0.f);
}

TEST_CASE("attention: a soft cap whose inverse is infinite makes all logits alike") {
  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 1, .num_sink_tokens = 0, .window = 4, .rope = rope::none()});
  matrix k(4, 1), v(4, 1);
  k << 0, 1, -2, 0;
  v << 1, 2, 3, 4;
  cache.append(k, v);
  workspace scratch;
  matrix out(1, 1);
  attention({.num_qo_heads = 1, .logits_soft_cap = 1e-40f}).decode(k.row(1), cache, out, scratch);
  CHECK(std::abs(out(0, 0) - 2.5f) < 1e-6f);
}

TEST_CASE("attention: ALiBi counts cache distances in_cache, true ones under absolute") {
  // One key of logit 0 before a gap of 4, and one token of the window: the slope alone decides.
  workspace scratch;
  for (const bool in_cache : {true, false}) {
    kv_cache<f32> cache({.num_kv_heads = 1,
                         .head_dim = 1,
                         .num_sink_tokens = 1,
                         .window = 1,
                         .positions = in_cache ? positions::in_cache : positions::absolute,
                         .rope = rope::none()});
    const matrix k = matrix::Zero(6, 1);
    matrix v(6, 1);
    v << 1, 0, 0, 0, 0, 0;
    cache.append(k, v);
    matrix out(1, 1);
    attention({.num_qo_heads = 1, .alibi_slopes = {0.5f}}).decode(k.row(0), cache, out, scratch);
    const double bias = in_cache ? -0.5 : -2.5;
    CHECK(std::abs(static_cast<double>(out(0, 0)) - std::exp(bias) / (1 + std::exp(bias))) < 1e-7);
  }
}

TEST_CASE("attention: in_cache turns the query, not the keys") {
  // A key before the gap looks as if nothing had been evicted between.
  effort::dice dice(5);
  const cache_config wide{.num_kv_heads = 1,
                          .head_dim = 8,
                          .v_head_dim = 8,
                          .num_sink_tokens = 2,
                          .window = 3,
                          .rope = rope::plain(8, 100.0)};
  const stream s(dice, 40, wide, 2);
  workspace scratch;
  const attention attention({.num_qo_heads = 2});
  kv_cache<f32> cache(wide), dense(wide);
  cache.append(s.k, s.v);
  dense.append(s.k.topRows(2), s.v.topRows(2));
  dense.append(s.k.bottomRows(3), s.v.bottomRows(3));
  matrix a(1, 16), b(1, 16);
  attention.decode(s.q.row(39), cache, a, scratch);
  attention.decode(s.q.row(39), dense, b, scratch);
  CHECK((a - b).cwiseAbs().maxCoeff() < 2e-6f);
}

TEST_CASE("attention: queries meet keys at their places, wherever the stream starts, with YaRN's factor on both") {
  // What a query sees is said by the oracle on rows that nobody has rotated: it knows neither first_position nor gaps.
  constexpr index_t tokens = 30, dim = 7;
  oracle::layer layer;
  layer.num_qo_heads = 4;
  layer.num_kv_heads = 2;
  layer.head_dim = layer.v_head_dim = dim;
  layer.inv_freq = {0.9f, 0.2f, 0.01f};
  layer.k_rotated = false;
  layer.sm_scale = 1 / std::sqrt(static_cast<double>(dim));
  for (const positions kept : {positions::in_cache, positions::absolute})
    for (const inputs given : {inputs::raw, inputs::rotated})
      for (const position_t first_position : {0, 1001})
        for (const float factor : {1.f, 1.5f}) {
          CAPTURE(kept == positions::in_cache, given == inputs::raw, first_position, factor);
          effort::dice dice(17);
          layer.in_cache = kept == positions::in_cache;
          layer.attention_factor = factor;
          const cache_config config{.num_kv_heads = 2,
                                    .head_dim = dim,
                                    .v_head_dim = dim,
                                    .num_sink_tokens = 2,
                                    .window = 6,
                                    .positions = kept,
                                    .inputs = given,
                                    .rope = rope(layer.inv_freq, rope_pairing::half_split, factor),
                                    .first_position = first_position,
                                    .rollback = 11};
          const stream raw(dice, tokens, config, 4);
          stream s = raw;
          if (given == inputs::rotated)
            for (matrix* rows : {&s.q, &s.k})
              for (index_t i = 0; i < tokens; ++i)
                for (index_t first = 0; first < rows->cols(); first += dim) {
                  std::vector<double> row(rows->row(i).data() + first, rows->row(i).data() + first + dim);
                  for (std::size_t d = 0; d < 6; ++d) row[d] *= static_cast<double>(factor);
                  oracle::rotate(layer, first_position + i, row.data());
                  for (index_t d = 0; d < dim; ++d)
                    (*rows)(i, first + d) = static_cast<float>(row[static_cast<std::size_t>(d)]);
                }
          kv_cache<f32> decoded(config), prefilled(config);
          const attention attention({.num_qo_heads = 4});
          workspace scratch;
          matrix all(tokens, 4 * dim), one(1, 4 * dim);
          std::vector<float> all_lse(4 * tokens), lse(4);
          attention.prefill(s.q, s.k, s.v, prefilled, all, scratch, {.lse = all_lse});
          for (index_t i = 0; i < tokens; ++i) {
            CAPTURE(i);
            decoded.append(s.k.row(i), s.v.row(i));
            attention.decode(s.q.row(i), decoded, one, scratch, {.lse = lse});
            std::vector<oracle::position> visible;
            for (index_t p = 0; p <= i; ++p)
              if (p < 2 || p > i - 6) visible.push_back(p);
            expected exact;
            for (const oracle::answer& head :
                 oracle::attend(layer, raw.q.row(i).data(), i, visible, raw.k.data(), raw.v.data())) {
              exact.out.insert(exact.out.end(), head.out.begin(), head.out.end());
              exact.lse.push_back(head.lse);
            }
            check_close(exact, one.data(), lse.data());
            check_close(exact, all.row(i).data(), all_lse.data() + 4 * i);
          }
        }
}

TEST_CASE("attention: head_dim from 1 to 512, and more heads in a group than a block has rows") {
  cache_config config = small_config();
  for (const auto& [k_dim, v_dim] : {std::pair<index_t, index_t>{1, 1}, {1, 512}, {512, 1}, {17, 16}, {64, 65}}) {
    CAPTURE(k_dim, v_dim);
    config.head_dim = k_dim;
    config.v_head_dim = v_dim;
    check_against_definition({.num_qo_heads = 4}, config);
  }
  config = small_config();
  for (index_t group : {63, 64, 65, 70, 130}) {
    CAPTURE(group);
    check_against_definition({.num_qo_heads = 2 * group}, config);
  }
  config.num_kv_heads = 1;
  check_against_definition({.num_qo_heads = 70}, config);
}

TEST_CASE("attention: a window of one, no sink tokens, blocks of one") {
  cache_config config = small_config();
  for (index_t sinks : {0, 1, 3})
    for (index_t window : {1, 2, 40})
      for (index_t block : {1, 3, 512}) {
        CAPTURE(sinks, window, block);
        config.num_sink_tokens = sinks, config.window = window, config.rollback = block - 1;
        check_against_definition({.num_qo_heads = 4}, config);
      }
}

TEST_CASE("attention: prefill gives what decode gives, with every way to keep positions") {
  effort::dice dice(15);
  for (index_t group : {1, 3, 5, 70})  // blocks of rows begin in the midst of a group
    for (const positions kept : {positions::in_cache, positions::absolute})
      for (const inputs given : {inputs::raw, inputs::rotated}) {
        CAPTURE(group, kept == positions::in_cache, given == inputs::raw);
        const cache_config config{.num_kv_heads = 2,
                                  .head_dim = 10,
                                  .v_head_dim = 10,
                                  .num_sink_tokens = 3,
                                  .window = 20,
                                  .positions = kept,
                                  .inputs = given,
                                  .rope = rope::plain(8, 30.0),
                                  .first_position = 1'000'000,
                                  .rollback = 99};
        const stream s(dice, 130, config, 2 * group);
        const attention attention({.num_qo_heads = 2 * group});
        workspace scratch;
        kv_cache<f32> decoded(config), prefilled(config);
        matrix all(130, 2 * group * 10), one(1, 2 * group * 10);
        attention.prefill(s.q, s.k, s.v, prefilled, all, scratch);
        for (index_t i = 0; i < 130; ++i) {
          decoded.append(s.k.row(i), s.v.row(i));
          attention.decode(s.q.row(i), decoded, one, scratch);
          REQUIRE((one - all.row(i)).cwiseAbs().maxCoeff() < 2e-6f);
        }
      }
}

// Edges.

TEST_CASE("attention: a decode long enough to be cut into slices") {
  effort::dice dice(16);
  cache_config config = small_config();
  // Slices of 512 tokens each, then sixteen longer ones.
  for (index_t window : {509, 510, 511, 1022, 1023, 8189, 8190, 8300}) {
    CAPTURE(window);
    config.window = window;
    const index_t tokens = window + 20;
    const stream s(dice, tokens, config, 4);
    const attention_params params{.num_qo_heads = 4, .softmax = softmax_variant::softmax1()};
    kv_cache<f32> cache(config);
    cache.append(s.k, s.v);
    workspace scratch;
    matrix out(1, 12);
    std::vector<float> lse(4);
    attention(params).decode(s.q.row(tokens - 1), cache, out, scratch, {.lse = lse});
    check_close(plain_attention(s, config, params, tokens, 0.f), out.data(), lse.data());
  }
}

TEST_CASE("attention: a cache of which all was dropped gives zeros, and the sink's lse") {
  kv_cache<f32> cache(small_config());
  const matrix k = matrix::Ones(1, 2 * 5), v = matrix::Ones(1, 2 * 3);
  cache.append(k, v);
  cache.erase(0, 1);
  workspace scratch;
  const matrix q = matrix::Ones(1, 4 * 5);
  const auto lse_of = [&](const softmax_variant& variant) {
    matrix out = matrix::Constant(1, 4 * 3, 9.f);
    std::vector<float> lse(4, 9.f);
    attention({.num_qo_heads = 4, .softmax = variant}).decode(q, cache, out, scratch, {.lse = lse});
    CHECK(out == matrix::Zero(1, 4 * 3));
    return lse;
  };
  CHECK(lse_of(softmax_variant::standard()) == std::vector<float>(4, -inf));
  CHECK(lse_of(softmax_variant::softmax1()) == std::vector<float>(4, 0.f));
  const std::vector<float> sinks = {-inf, -1.f, 0.f, 1.f};
  CHECK(lse_of(softmax_variant::sink_logits(sinks)) == sinks);
}

TEST_CASE("attention: a logit of -inf is a weight of 0, also where there is no other") {
  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 1, .window = 400, .rope = rope::none()});
  workspace scratch;
  const attention attention({.num_qo_heads = 1});
  const auto append = [&](index_t tokens, float key) {
    const matrix k = matrix::Constant(tokens, 1, key), v = matrix::Constant(tokens, 1, 3.f);
    cache.append(k, v);
  };
  const auto decode = [&] {
    const matrix q = matrix::Ones(1, 1);
    matrix out(1, 1);
    float lse = 0;
    attention.decode(q, cache, out, scratch, {.lse = {&lse, 1}});
    return std::pair(out(0, 0), lse);
  };
  append(300, -inf);  // more than a tile
  CHECK(decode() == std::pair(0.f, -inf));
  append(1, 2.f);
  CHECK(std::abs(decode().first - 3.f) < 1e-6f);
  CHECK(std::abs(decode().second - 2.f) < 1e-6f);
  append(1, inf);
  CHECK(std::isnan(decode().first));
}

TEST_CASE("attention: lse is optional") {
  effort::dice dice(6);
  const cache_config config = small_config();
  const stream s(dice, 12, config, 4);
  workspace scratch;
  const attention attention({.num_qo_heads = 4});
  matrix with(12, 12), without(12, 12);
  std::vector<float> lse(12 * 4);
  kv_cache<f32> a(config), b(config);
  attention.prefill(s.q, s.k, s.v, a, with, scratch, {.lse = lse});
  attention.prefill(s.q, s.k, s.v, b, without, scratch);
  CHECK(with == without);
  attention.decode(s.q.row(0), a, with.topRows(1), scratch, {.lse = std::span(lse).first(4)});
  attention.decode(s.q.row(0), b, without.topRows(1), scratch);
  CHECK(with == without);
}

TEST_CASE("attention: prefill of no tokens does nothing") {
  effort::dice dice(7);
  const cache_config config = small_config();
  const stream s(dice, 12, config, 4), none(dice, 0, config, 4);
  workspace scratch;
  const attention attention({.num_qo_heads = 4});
  counting_resource resource;
  kv_cache<f32> cache(config, &resource);
  matrix out(0, 12);
  for (int i = 0; i < 2; ++i) {
    const auto* const memory = static_cast<const std::byte*>(resource.last);
    const std::vector<std::byte> before(memory, memory + resource.last_bytes);
    const position_t seen = cache.seen();
    attention.prefill(none.q, none.k, none.v, cache, out, scratch);
    CHECK(cache.seen() == seen);
    CHECK(std::equal(before.begin(), before.end(), memory));
    cache.append(s.k, s.v);
  }
}

TEST_CASE("attention: prefill leaves the cache as append does") {
  effort::dice dice(8);
  cache_config config = small_config();
  config.positions = positions::in_cache;
  config.inputs = inputs::raw;
  config.rope = rope::plain(4, 100.0);
  for (int round = effort::cases(100); round > 0; --round) {
    config.num_sink_tokens = static_cast<index_t>(dice.from_to(0, 4));
    config.window = static_cast<index_t>(dice.from_to(1, 12));
    config.rollback = static_cast<index_t>(dice.from_to(0, 19));
    counting_resource by_append, by_prefill;
    kv_cache<f16, bf16> a(config, &by_append), b(config, &by_prefill);
    workspace scratch;
    for (int chunk = 0; chunk < 5; ++chunk) {
      const stream s(dice, static_cast<index_t>(dice.from_to(0, 40)), config, 4);
      matrix out(s.q.rows(), 12);
      a.append(s.k, s.v);
      attention({.num_qo_heads = 4}).prefill(s.q, s.k, s.v, b, out, scratch);
      REQUIRE(a.seen() == b.seen());
      REQUIRE(a.min_truncate() == b.min_truncate());
      REQUIRE(std::memcmp(by_append.last, by_prefill.last, a.nbytes()) == 0);
    }
  }
}

TEST_CASE("attention: decode and attend change no byte of the cache") {
  effort::dice dice(9);
  const cache_config config = small_config();
  const stream s(dice, 25, config, 4);
  counting_resource resource;
  kv_cache<bf16> cache(config, &resource);
  cache.append(s.k, s.v);
  const auto* const memory = static_cast<const std::byte*>(resource.last);
  const std::vector<std::byte> before(memory, memory + resource.last_bytes);
  workspace scratch;
  matrix out(1, 12);
  attention_state state(4, 3);
  const attention attention({.num_qo_heads = 4});
  attention.decode(s.q.row(0), cache, out, scratch);
  attention.attend(s.q.row(0), cache, state, scratch);
  CHECK(std::equal(before.begin(), before.end(), memory));
}

// Memory of others.

// A block of a larger matrix of canaries.
struct framed {
  matrix canvas;
  index_t rows, cols;

  framed(index_t r, index_t c) : canvas(matrix::Constant(r + 2, c + 7, 77.f)), rows(r), cols(c) {}
  explicit framed(const matrix& m) : framed(m.rows(), m.cols()) { block() = m; }

  Eigen::Block<matrix::Matrix> block() { return canvas.block(1, 3, rows, cols); }
  bool frame_is_untouched() const {
    matrix erased = canvas;
    erased.block(1, 3, rows, cols).setConstant(77.f);
    return (erased.array() == 77.f).all();
  }
};

TEST_CASE("attention: inputs and outputs may be strided, and nothing around them is touched") {
  effort::dice dice(10);
  for (index_t v_dim : {3, 16, 33}) {
    cache_config config = small_config();
    config.v_head_dim = v_dim;
    const stream s(dice, 23, config, 4);
    workspace scratch;
    const attention attention({.num_qo_heads = 4});
    kv_cache<f32> dense_cache(config), strided_cache(config);
    framed q(s.q), k(s.k), v(s.v), out(23, 4 * v_dim), one(1, 4 * v_dim);
    matrix dense(23, 4 * v_dim), dense_one(1, 4 * v_dim);
    std::vector<float> lse(23 * 4 + 2, 77.f), lse_one(4 + 2, 77.f), dense_lse(23 * 4);

    attention.prefill(s.q, s.k, s.v, dense_cache, dense, scratch, {.lse = dense_lse});
    attention.prefill(q.block(), k.block(), v.block(), strided_cache, out.block(), scratch,
                      {.lse = std::span(lse).subspan(1, 92)});
    CHECK(out.block() == dense);
    CHECK(std::equal(dense_lse.begin(), dense_lse.end(), lse.begin() + 1));
    CHECK((lse.front() == 77.f && lse.back() == 77.f));

    dense_cache.append(s.k.topRows(3), s.v.topRows(3));
    strided_cache.append(k.block().topRows(3), v.block().topRows(3));
    attention.decode(s.q.row(5), dense_cache, dense_one, scratch, {.lse = std::span(dense_lse).first(4)});
    attention.decode(q.block().row(5), strided_cache, one.block(), scratch, {.lse = std::span(lse_one).subspan(1, 4)});
    CHECK(one.block() == dense_one);
    CHECK(std::equal(dense_lse.begin(), dense_lse.begin() + 4, lse_one.begin() + 1));
    CHECK((lse_one.front() == 77.f && lse_one.back() == 77.f));

    // Through a Map with an outer stride, as an engine's own buffers would come.
    using map = Eigen::Map<const matrix, 0, Eigen::OuterStride<>>;
    const map q_map(&q.canvas(1, 3), 23, 4 * 5, Eigen::OuterStride<>(q.canvas.cols()));
    attention.decode(q_map.row(5), strided_cache, one.block(), scratch);
    CHECK(one.block() == dense_one);

    for (const framed* m : {&q, &k, &v, &out, &one}) CHECK(m->frame_is_untouched());
    CHECK((q.block() == s.q && k.block() == s.k && v.block() == s.v));
  }
}

TEST_CASE("attention: caches of every format behind any_kv_cache") {
  effort::dice dice(12);
  const cache_config config = small_config();
  const stream s(dice, 40, config, 4);
  std::vector<std::unique_ptr<any_kv_cache>> caches;
  caches.push_back(std::make_unique<kv_cache<f32>>(config));
  caches.push_back(std::make_unique<kv_cache<f16>>(config));
  caches.push_back(std::make_unique<kv_cache<bf16, f16>>(config));
  workspace scratch;
  const attention attention({.num_qo_heads = 4});
  std::vector<matrix> outs;
  for (const auto& cache : caches) {
    matrix& out = outs.emplace_back(40, 12);
    attention.prefill(s.q, s.k, s.v, *cache, out, scratch);
    CHECK((cache->seen() == 40 && cache->size() == 8 && cache->capacity() == 8));
    matrix again(1, 12);
    attention.decode(s.q.row(39), *cache, again, scratch);
    CHECK((again - out.row(39)).cwiseAbs().maxCoeff() < 1e-6f);
  }
  CHECK((outs[1] - outs[0]).cwiseAbs().maxCoeff() < 2e-3f);
  CHECK((outs[2] - outs[0]).cwiseAbs().maxCoeff() < 1e-2f);
}

TEST_CASE("attention: tokens split over caches, merged, finished once") {
  effort::dice dice(13);
  cache_config config = small_config();
  config.window = 100;
  const stream s(dice, 30, config, 4);
  workspace scratch;
  const std::vector<float> sinks = {0.5f, -inf, 1.f, 0.f};
  const softmax_variant variant = softmax_variant::sink_logits(sinks);
  const attention attention({.num_qo_heads = 4, .softmax = variant});
  kv_cache<f32> all(config), head(config), tail(config);
  all.append(s.k, s.v);
  head.append(s.k.topRows(11), s.v.topRows(11));
  tail.append(s.k.bottomRows(19), s.v.bottomRows(19));
  matrix out(1, 12);
  std::vector<float> lse(4);
  attention.decode(s.q.row(29), all, out, scratch, {.lse = lse});

  attention_state state(4, 3), other(4, 3);
  attention.attend(s.q.row(29), tail, state, scratch);
  attention.attend(s.q.row(29), head, other, scratch);
  attention_state merged = state;
  merged.merge(other);
  attention.attend(s.q.row(29), head, state, scratch);                   // attend merges by itself
  attention.attend(s.q.row(29), kv_cache<f32>(config), state, scratch);  // nothing
  for (const attention_state* parts : {&merged, &state})
    for (index_t h = 0; h < 4; ++h) {
      const attention_output part = parts->finish(variant, h);
      CHECK((part.out - out.middleCols(h * 3, 3)).cwiseAbs().maxCoeff() < 1e-6f);
      CHECK(std::abs(part.lse - lse[static_cast<std::size_t>(h)]) < 1e-6f);
    }
}

// Errors.

TEST_CASE("attention: bad parameters are refused in exact words") {
  struct bad {
    std::function<void(attention_params&)> set;
    const char* message;
  };
  const bad table[] = {
      {[](auto& p) { p.num_qo_heads = 0; }, "num_qo_heads was 0, had to be at least 1"},
      {[](auto& p) { p.num_qo_heads = -4; }, "num_qo_heads was -4, had to be at least 1"},
      {[](auto& p) { p.softmax = softmax_variant::sink_logits(std::vector<float>(3)); },
       "sink_logits.size() was 3, had to be one per query head, 4"},
      {[](auto& p) { p.sm_scale = inf; }, "sm_scale was inf, had to be finite"},
      {[](auto& p) { p.sm_scale = nan; }, "sm_scale was nan, had to be finite"},
      {[](auto& p) { p.logits_soft_cap = -1; }, "logits_soft_cap was -1, had to be finite and at least 0"},
      {[](auto& p) { p.logits_soft_cap = inf; }, "logits_soft_cap was inf, had to be finite and at least 0"},
      {[](auto& p) { p.logits_soft_cap = nan; }, "logits_soft_cap was nan, had to be finite and at least 0"},
      {[](auto& p) {
         p.alibi_slopes = {1, 2};
       },
       "alibi_slopes.size() was 2, had to be one per query head, 4"},
      {[](auto& p) {
         p.alibi_slopes = {1, 2, 3, inf};
       },
       "an alibi slope was inf, had to be finite"},
      {[](auto& p) {
         p.sink_bias = {1, 2, 3, 4, 5};
       },
       "sink_bias.size() was 5, had to be one per query head, 4"},
      {[](auto& p) {
         p.sink_bias = {1, nan, 3, 4};
       },
       "a sink bias was nan, had to be finite"},
  };
  for (const bad& row : table) {
    attention_params params{.num_qo_heads = 4};
    row.set(params);
    CHECK_THROWS_WITH(attention(params), std::string("sinkcache: ") + row.message);
    CHECK(validate(params).message() == std::string("sinkcache: ") + row.message);
  }
}

TEST_CASE("attention: bad shapes are refused in exact words, and change nothing") {
  struct shape {
    index_t rows, cols;
  };
  struct call {
    shape q{3, 20}, k{3, 10}, v{3, 6}, out{3, 12};
    const char* message = "";
  };
  effort::dice dice(14);
  const cache_config config = small_config();
  const stream s(dice, 12, config, 4);
  counting_resource resource;
  kv_cache<f32> cache(config, &resource);
  cache.append(s.k, s.v);
  const auto* const memory = static_cast<const std::byte*>(resource.last);
  const std::vector<std::byte> before(memory, memory + resource.last_bytes);
  workspace scratch;
  const attention attention({.num_qo_heads = 4});

  const call prefills[] = {
      {.q = {3, 19}, .message = "q.cols() was 19, had to be exactly 20"},
      {.q = {2, 20}, .message = "k.rows() was 3, had to be exactly 2"},
      {.k = {4, 10}, .message = "k.rows() was 4, had to be exactly 3"},
      {.k = {3, 11}, .message = "k.cols() was 11, had to be exactly 10"},
      {.v = {0, 6}, .message = "v.rows() was 0, had to be exactly 3"},
      {.v = {3, 10}, .message = "v.cols() was 10, had to be exactly 6"},
      {.out = {2, 12}, .message = "out.rows() was 2, had to be exactly 3"},
      {.out = {3, 20}, .message = "out.cols() was 20, had to be exactly 12"},
  };
  for (const call& c : prefills) {
    const matrix q = matrix::Ones(c.q.rows, c.q.cols), k = matrix::Ones(c.k.rows, c.k.cols),
                 v = matrix::Ones(c.v.rows, c.v.cols);
    matrix out = matrix::Constant(c.out.rows, c.out.cols, 5.f);
    std::vector<float> lse(12, 5.f);
    CHECK_THROWS_WITH(attention.prefill(q, k, v, cache, out, scratch, {.lse = lse}),
                      std::string("sinkcache: ") + c.message);
    CHECK(attention.try_prefill(q, k, v, cache, out, scratch, {.lse = lse}).message() ==
          std::string("sinkcache: ") + c.message);
    CHECK((out.array() == 5.f).all());
    CHECK(lse == std::vector<float>(12, 5.f));
  }

  const call decodes[] = {
      {.q = {1, 21}, .out = {1, 12}, .message = "q.cols() was 21, had to be exactly 20"},
      {.q = {2, 20}, .out = {1, 12}, .message = "q.rows() was 2, had to be exactly 1"},
      {.q = {0, 20}, .out = {1, 12}, .message = "q.rows() was 0, had to be exactly 1"},
      {.q = {1, 20}, .out = {2, 12}, .message = "out.rows() was 2, had to be exactly 1"},
      {.q = {1, 20}, .out = {1, 0}, .message = "out.cols() was 0, had to be exactly 12"},
  };
  for (const call& c : decodes) {
    const matrix q = matrix::Ones(c.q.rows, c.q.cols);
    matrix out = matrix::Constant(c.out.rows, c.out.cols, 5.f);
    CHECK_THROWS_WITH(attention.decode(q, cache, out, scratch), std::string("sinkcache: ") + c.message);
    CHECK(attention.try_decode(q, cache, out, scratch).message() == std::string("sinkcache: ") + c.message);
    CHECK((out.array() == 5.f).all());
  }

  const matrix q = matrix::Ones(1, 20);
  const auto attend_into = [&](index_t heads, index_t v_dim, const matrix& queries) {
    attention_state state(heads, v_dim);
    const status found = attention.try_attend(queries, cache, state, scratch);
    for (const float x : state.data()) CHECK((x == 0 || x == -inf));
    CHECK_THROWS_WITH(attention.attend(queries, cache, state, scratch), std::string(found.message()));
    found.or_fail();
  };
  CHECK_THROWS_WITH(attend_into(3, 3, q), "sinkcache: state.num_heads() was 3, had to be exactly 4");
  CHECK_THROWS_WITH(attend_into(4, 5, q), "sinkcache: state.v_head_dim() was 5, had to be exactly 3");
  CHECK_THROWS_WITH(attend_into(4, 3, s.q), "sinkcache: q.rows() was 12, had to be exactly 1");

  // Three query heads do not share two KV heads.
  matrix out(1, 9);
  CHECK_THROWS_WITH(sinkcache::attention({.num_qo_heads = 3}).decode(matrix(1, 15), cache, out, scratch),
                    "sinkcache: num_qo_heads was 3, had to be a multiple of the cache's num_kv_heads, 2");
  CHECK_THROWS_AS(
      sinkcache::attention({.num_qo_heads = std::numeric_limits<index_t>::max() - 1}).decode(q, cache, out, scratch),
      std::invalid_argument);
  const sinkcache::attention three({.num_qo_heads = 3}),
      many({.num_qo_heads = std::numeric_limits<index_t>::max() - 1});
  CHECK(three.try_decode(matrix(1, 15), cache, out, scratch).message() ==
        "sinkcache: num_qo_heads was 3, had to be a multiple of the cache's num_kv_heads, 2");
  CHECK(many.try_decode(q, cache, out, scratch).message() ==
        "sinkcache: num_qo_heads * head_dim was 9223372036854775806 * 5, had to fit 63 bits");

  // As they come over a C interface.
  float floats[20] = {};
  CHECK(attention.try_prefill({floats, -2, 20}, {floats, -2, 10}, {floats, -2, 6}, cache, {floats, -2, 12}, scratch)
            .message() == "sinkcache: k.rows() was -2, had to be at least 0");
  CHECK(attention.try_decode({nullptr, 1, 20}, cache, {floats, 1, 12}, scratch).message() ==
        "sinkcache: q's data was null, had to be 1 x 20 floats");
  CHECK(attention.try_decode(q, cache, {nullptr, 1, 12}, scratch).message() ==
        "sinkcache: out's data was null, had to be 1 x 12 floats");
  CHECK(attention.try_attend({floats, 2, 20, 3}, cache, {floats, 2, 12}, scratch).message() ==
        "sinkcache: q's stride was 3, had to be at least 20");
  CHECK(attention.try_attend({floats, 2, 20}, cache, {floats, 2, 12, 0}, scratch).message() ==
        "sinkcache: out's stride was 0, had to be at least 12");
  CHECK(cache.seen() == 12);
  CHECK(std::equal(before.begin(), before.end(), memory));
}

static_assert(noexcept(validate(std::declval<const attention_params&>())));

TEST_CASE("attention: try_ calls give the same bits") {
  effort::dice dice(15);
  const cache_config config = small_config();
  const stream s(dice, 40, config, 4);
  const attention attention({.num_qo_heads = 4, .softmax = softmax_variant::softmax1()});
  kv_cache<bf16> thrown(config), tried(config);
  workspace scratch;
  matrix a = matrix::Zero(40, 12), b = a;
  std::vector<float> lse_a(160), lse_b(160);
  const auto first = [](auto& m) { return m.topRows(30); };
  attention.prefill(first(s.q), first(s.k), first(s.v), thrown, first(a), scratch,
                    {.lse = std::span(lse_a).first(120)});
  CHECK(attention
            .try_prefill(first(s.q), first(s.k), first(s.v), tried, first(b), scratch,
                         {.lse = std::span(lse_b).first(120)})
            .ok());
  for (index_t i = 30; i < 40; ++i) {
    thrown.append(s.k.row(i), s.v.row(i));
    CHECK(tried.try_append(s.k.row(i), s.v.row(i)).ok());
    attention.decode(s.q.row(i), thrown, a.row(i), scratch,
                     {.lse = std::span(lse_a).subspan(static_cast<std::size_t>(4 * i), 4)});
    CHECK(attention
              .try_decode(s.q.row(i), tried, b.row(i), scratch,
                          {.lse = std::span(lse_b).subspan(static_cast<std::size_t>(4 * i), 4)})
              .ok());
    attention_state state_a(4, 3), state_b(4, 3);
    attention.attend(s.q.row(i), thrown, state_a, scratch);
    CHECK(attention.try_attend(s.q.row(i), tried, state_b, scratch).ok());
    CHECK(std::equal(state_a.data().begin(), state_a.data().end(), state_b.data().begin()));
  }
  CHECK(a == b);
  CHECK(lse_a == lse_b);
}

struct every_query final : weight_reader {
  bool wants(position_t) const noexcept override { return true; }
  void read(const weight_tile&) noexcept override { ++tiles; }

  int tiles = 0;
};

TEST_CASE("attention: a workspace that cannot grow is a status, and changes nothing") {
  const attention attention({.num_qo_heads = 4});
  const cache_config config{
      .num_kv_heads = 1, .head_dim = 8, .positions = positions::absolute, .inputs = inputs::rotated};
  // Of memory that is not there; nothing of it is read.
  float element = 0;
  const kv_view<f32> view(config, {{.token = 8}, {.token = 8}}, kv_piece{0, index_t{1} << 45, &element, &element},
                          position_t{1} << 45);
  workspace scratch;
  const index_t bytes = scratch.nbytes();
  const matrix q = matrix::Ones(1, 32);
  matrix out = matrix::Constant(1, 32, 7.f);
  every_query reader;
  const status found = attention.try_decode(q, view, out, scratch, {.weights = &reader});
  INFO(found.message());
  CHECK(found.message().find("sinkcache: bytes of the workspace was ") == 0);
  CHECK((scratch.nbytes() == bytes && reader.tiles == 0 && (out.array() == 7.f).all()));

  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 8, .window = 5, .rope = rope::none()});
  const matrix ones = matrix::Ones(1, 8);
  cache.append(ones, ones);
  CHECK(attention.try_decode(q, cache, out, scratch, {.weights = &reader}).ok());
  CHECK(reader.tiles == 1);
}

}  // namespace
