// Attention over caches against the oracle, and what has to hold whatever the numbers are.

#include <fmt/format.h>

#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "property_case.hpp"
#include "random_case.hpp"

namespace proof {
namespace {

TEST_CASE("attention: random layers, caches and chunks against the oracle") {
  nearness near;
  for (int i = 0; i < effort::cases(400); ++i) {
    const random_case c = draw_case(1000 + static_cast<std::uint64_t>(i));
    INFO(c.name());
    CHECK(run_library_case(c, &near) == "");
  }
  if (std::getenv("SINKCACHE_SHOW")) std::printf("nearest to the bound: out %.2f lse %.2f\n", near.out, near.lse);
}

TEST_CASE("attention: sums of many equal numbers do not drift") {
  // Rounding errors of a sum of equal terms point the same way; random ones cancel and hide it.
  const index_t dim = 32;
  for (const index_t n : {64, 512, 2048, 8192, 32768})
    for (int i = 0; i < effort::cases(10) + 25; ++i) {
      effort::dice dice(static_cast<std::uint64_t>(i));
      small_layer layer(dim, 0, n);
      matrix q = matrix::Zero(i % 2 == 0 ? 8 : 40, dim), k = matrix::Zero(n, dim), v(n, dim);
      for (index_t j = 0; j < dim; ++j) v.col(j).setConstant(1 - 0.5f * static_cast<float>(dice.uniform()));
      if (i % 5 > 0) q.col(0).setConstant(std::sqrt(static_cast<float>(dim)));
      const auto step = static_cast<float>(dice.uniform());
      if (i % 5 == 1) k(0, 0) = step;
      if (i % 5 == 2)
        for (index_t row = 0; row < n; row += 2) k(row, 0) = 0.5f * step;
      if (i % 5 >= 3) k.col(0).setConstant(0.5f * step);
      if (i % 5 == 4) k(n - 7, 0) = 20;  // what was left over is rescaled too
      INFO(n << " tokens, seed " << i);
      CHECK(layer.wrong(q, k, v, true) == "");
      if (q.rows() <= n) CHECK(layer.wrong(q, k, v, false) == "");
    }
}

TEST_CASE("attention: full caches of every small size") {
  // Sanitizers see here whether a tile reads rows after the last one.
  effort::dice dice(2);
  for (index_t n = 1; n <= 40; ++n) {
    small_layer layer(16, 0, n);
    matrix q(1, 16), k(n, 16), v(n, 16);
    for (matrix* m : {&q, &k, &v})
      for (index_t j = 0; j < m->size(); ++j) m->data()[j] = static_cast<float>(normal(dice));
    INFO(n << " tokens");
    CHECK(layer.wrong(q, k, v, true) == "");
    CHECK(layer.wrong(q, k, v, false) == "");
  }
}

TEST_CASE("attention: lse where a sink logit of any size meets small logits") {
  effort::dice dice(1);
  small_layer layer(4, 0, 64);
  for (int i = 0; i < effort::cases(5000); ++i) {
    const double size = dice.one_in(2) ? 100 : 20;
    layer.c.layer.sink_logits = {static_cast<float>(size * (2 * dice.uniform() - 1))};
    set_params(layer.c);
    matrix q(1, 4), k(40, 4), v(40, 4);
    const double spread = one_of(dice, {0.05, 1.});
    for (matrix* m : {&q, &k, &v})
      for (index_t j = 0; j < m->size(); ++j) m->data()[j] = static_cast<float>(spread * normal(dice));
    INFO("sink logit " << layer.c.layer.sink_logits[0]);
    CHECK(layer.wrong(q, k, v, true) == "");
  }
}

TEST_CASE("attention: a logit of -inf weighs nothing, wherever it lies") {
  // A key that overflowed its format. Tiles must not turn -inf - -inf into NaN where one softmax would not.
  for (const index_t sinks : {0, 1, 2, 4})
    for (const index_t at : {0, 1, 3, 9, 19}) {
      small_layer layer(4, sinks, 8);
      const matrix q = matrix::Ones(20, 4), v = matrix::Random(20, 4);
      matrix k = matrix::Ones(20, 4);
      k(at, 2) = -infinity;
      layer.c.layer.sm_scale = 0.5;
      INFO(sinks << " sink tokens, token " << at);
      for (index_t n = at + 2; n <= 20; ++n)
        for (const bool decode : {true, false}) {
          oracle::layer oracle = layer.c.layer;
          kv_cache<f32> cache(layer.c.config);
          const attention attention(layer.c.params);
          matrix out(n, 4);
          std::vector<float> lse(as_size(n));
          if (decode) {
            cache.append(k.topRows(n), v.topRows(n));
            attention.decode(q.topRows(1), cache, out.bottomRows(1), layer.w, {.lse = std::span(lse).last(1)});
          } else {
            attention.prefill(q.topRows(n), k.topRows(n), v.topRows(n), cache, out, layer.w, {.lse = lse});
          }
          auto expected =
              oracle::attend(oracle, q.data(), n - 1, plain_sink_window(sinks, 8).visible(n), k.data(), v.data());
          expected[0].a = 1;  // |k| is infinite
          CHECK(far_from(expected, out.row(n - 1).data(), &lse.back()) == "");
        }
    }
}

// Properties.

TEST_CASE("attention: softmax1 is a sink logit of 0, softmax one of -inf, to the bit") {
  for_property_cases(40, [](property_case& p) {
    const auto with = [&](const softmax_variant& variant) {
      p.c.params.softmax = variant;
      return feed(p.c, p.t);
    };
    const std::vector<float> zeros(p.c.layer.num_qo_heads, 0.f), none(p.c.layer.num_qo_heads, -infinity);
    const outputs one = with(softmax_variant::softmax1()), standard = with(softmax_variant::standard());
    CHECK(one == with(softmax_variant::sink_logits(zeros)));
    CHECK(standard == with(softmax_variant::sink_logits(none)));
    CHECK(!(one == standard));
  });
}

TEST_CASE("attention: query heads of a group are query heads with repeated keys and values") {
  // Decoded to the bit where the group is smaller than a panel; panels add in another order. Prefill makes panels of
  // several tokens, and more heads leave room for fewer: the same within the bound.
  for_property_cases(40, [](property_case& p) {
    property_case repeated = p;
    const index_t heads = p.c.params.num_qo_heads, kv_heads = p.c.config.num_kv_heads;
    const index_t dim = p.c.config.head_dim, v_dim = p.c.config.v_head_dim;
    repeated.c.config.num_kv_heads = heads;
    repeated.t.k.resize(p.c.tokens, heads * dim);
    repeated.t.v.resize(p.c.tokens, heads * v_dim);
    for (index_t head = 0; head < heads; ++head) {
      const index_t kv_head = head / (heads / kv_heads);
      repeated.t.k.middleCols(head * dim, dim) = p.t.k.middleCols(kv_head * dim, dim);
      repeated.t.v.middleCols(head * v_dim, v_dim) = p.t.v.middleCols(kv_head * v_dim, v_dim);
    }
    const outputs decoded = feed(p.c, p.t, decode_only), decoded_apart = feed(repeated.c, repeated.t, decode_only);
    if (heads / kv_heads < detail::query_rows::panel) CHECK(decoded == decoded_apart);
    CHECK(far_apart(p, decoded, decoded_apart, 7) == "");
    CHECK(far_apart(p, feed(p.c, p.t), feed(repeated.c, repeated.t), 7) == "");
  });
}

TEST_CASE("attention: a cache larger than the stream is full attention") {
  for_property_cases(40, [](property_case& p) {
    p.c.config.window = p.c.tokens;
    p.c.config.rollback = 0;
    const outputs full = feed(p.c, p.t);
    p.c.config.window += 77;
    CHECK(full == feed(p.c, p.t));
    p.c.config.num_sink_tokens += p.c.tokens;  // all pinned
    if (p.c.params.sink_bias.empty()) CHECK(full == feed(p.c, p.t));
    // Nothing was evicted, so places in the cache are true positions.
    if (p.c.config.rope) {
      p.c.config.num_sink_tokens -= p.c.tokens;
      p.c.config.positions = p.c.layer.in_cache ? positions::absolute : positions::in_cache;
      CHECK(full == feed(p.c, p.t));
    }
  });
}

TEST_CASE("attention: streams may start anywhere") {
  const position_t starts[] = {0, 1 << 24, position_t{1} << 40, max_position};
  for_property_cases(24, [&](property_case& p) {
    p.no_rope();
    p.c.config.first_position = 0;
    const outputs from_zero = feed(p.c, p.t);
    for (const position_t start : starts) {
      p.c.config.first_position = start;
      CHECK(from_zero == feed(p.c, p.t));
    }
  });
  for (int i = 0; i < effort::cases(20); ++i)
    for (const position_t start : starts) {
      random_case c = draw_case(60000 + static_cast<std::uint64_t>(i), {.max_head_dim = 64, .max_window = 50});
      c.config.first_position = c.layer.first_position = start;
      INFO(c.name());
      CHECK(run_library_case(c) == "");
    }
}

TEST_CASE("attention: a NaN or infinity reaches the outputs that see it, and nothing else") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  enum class what { key_nan, key_infinite, value_nan, value_infinite, query_nan };
  for_property_cases(80, [](property_case& p) {
    const random_case& c = p.c;
    const plain_policy policy = plain_sink_window(c.config.num_sink_tokens, c.config.window, c.config.rollback);
    const index_t heads = c.params.num_qo_heads, group = heads / c.config.num_kv_heads;
    const index_t dim = c.config.head_dim, v_dim = c.config.v_head_dim;
    const outputs clean = feed(c, p.t);
    REQUIRE(clean.out.allFinite());
    effort::dice dice(c.seed);
    for (const what kind :
         {what::key_nan, what::key_infinite, what::value_nan, what::value_infinite, what::query_nan}) {
      tokens t = p.t;
      const index_t j = dice.one_in(3) ? dice.from_to(0, std::min<index_t>(c.tokens - 1, c.config.num_sink_tokens))
                                       : dice.from_to(0, c.tokens - 1);
      const index_t kv_head = dice.from_to(0, c.config.num_kv_heads - 1), column = dice.from_to(0, v_dim - 1);
      const index_t q_head = dice.from_to(0, heads - 1);
      if (kind == what::key_nan) t.k(j, kv_head * dim + dice.from_to(0, dim - 1)) = nan;
      if (kind == what::key_infinite) t.k(j, kv_head * dim + dice.from_to(0, dim - 1)) = infinity;
      if (kind == what::value_nan) t.v(j, kv_head * v_dim + column) = nan;
      if (kind == what::value_infinite) t.v(j, kv_head * v_dim + column) = -infinity;
      if (kind == what::query_nan) t.q(j, q_head * dim + dice.from_to(0, dim - 1)) = nan;
      const outputs hit = feed(c, t);
      std::string wrong;
      for (index_t i = 0; i < c.tokens && wrong.empty(); ++i) {
        const std::vector<position_t> visible = policy.visible(i + 1);
        const bool sees = std::binary_search(visible.begin(), visible.end(), j);
        for (index_t head = 0; head < heads && wrong.empty(); ++head) {
          const auto is_nan = [&] {
            return hit.out.row(i).segment(head * v_dim, v_dim).array().isNaN().all() &&
                   std::isnan(hit.lse[as_size(i * heads + head)]);
          };
          bool right = false;
          if (kind == what::query_nan) {
            right = i == j && head == q_head ? is_nan() : hit.same_bits(i, head, clean);
          } else if (!sees || head / group != kv_head) {
            right = hit.same_bits(i, head, clean);
          } else if (kind == what::key_nan) {
            right = is_nan();
          } else if (kind == what::key_infinite) {
            right = true;  // a logit of inf, -inf or NaN: by the query's signs
          } else {
            outputs repaired = hit;  // but for one column, nothing changed
            repaired.out(i, head * v_dim + column) = clean.out(i, head * v_dim + column);
            right = !std::isfinite(hit.out(i, head * v_dim + column)) && repaired.same_bits(i, head, clean);
          }
          if (!right)
            wrong = fmt::format("kind {} in token {}, KV head {}: token {}, head {}", static_cast<int>(kind), j,
                                kv_head, i, head);
        }
      }
      CHECK(wrong == "");
    }
  });
}

TEST_CASE("attention: what lies in unused rows and scratch is never read") {
  for_property_cases(60, [](property_case& p) {
    random_case& c = p.c;
    c.config.rollback = 25;
    const index_t n = c.tokens, first = n / 2;
    const auto part = [&](index_t from, index_t count) {
      return tokens{
          p.t.q.middleRows(from, count), p.t.k.middleRows(from, count), p.t.v.middleRows(from, count), {}, {}};
    };
    tokens junk = part(0, std::min<index_t>(first, 20));
    for (matrix* m : {&junk.q, &junk.k, &junk.v}) m->setConstant(std::numeric_limits<float>::quiet_NaN());
    const attention attention(c.params);
    workspace clean_scratch, used_scratch;
    const auto clean = make_cache(c.k_format, c.v_format, c.config),
               used = make_cache(c.k_format, c.v_format, c.config);
    const tokens head = part(0, first), tail = part(first, n - first);
    CHECK(feed(*clean, attention, head, c.seed, clean_scratch) == feed(*used, attention, head, c.seed, used_scratch));
    // Tokens of NaN come and are taken back: their rows, and the scratch, are full of it.
    feed(*used, attention, junk, c.seed + 1, used_scratch);
    used->truncate(first);
    CHECK(feed(*clean, attention, tail, c.seed, clean_scratch) == feed(*used, attention, tail, c.seed, used_scratch));
  });
}

TEST_CASE("attention: any split of the visible tokens over caches, merged in any order, is decode") {
  for_property_cases(60, [](property_case& p) {
    random_case& c = p.c;
    // Caches of arbitrary tokens know no positions: the engine has rotated the rows, or nothing turns them.
    c.layer.alibi_slopes.clear();
    c.layer.sink_bias.clear();
    p.no_rope();
    set_params(c);
    const attention attention(c.params);
    workspace w;
    effort::dice dice(c.seed + 4);
    const auto all = make_cache(c.k_format, c.v_format, c.config);
    all->append(p.t.k, p.t.v);
    const matrix q = p.t.q.bottomRows(1);
    const index_t heads = c.params.num_qo_heads, v_dim = c.config.v_head_dim;
    matrix out(1, heads * v_dim);
    std::vector<float> lse(as_size(heads));
    attention.decode(q, all->get(), out, w, {.lse = lse});

    // Which part takes which token; parts may stay empty.
    const std::vector<position_t> visible =
        plain_sink_window(c.config.num_sink_tokens, c.config.window).visible(c.tokens);
    const int num_parts = static_cast<int>(dice.from_to(1, 6));
    random_case part_case = c;
    part_case.config.num_sink_tokens = dice.from_to(0, 3);
    part_case.config.window = c.tokens;
    std::vector<std::unique_ptr<open_cache>> parts;
    for (int i = 0; i < num_parts; ++i) parts.push_back(make_cache(c.k_format, c.v_format, part_case.config));
    const bool runs = dice.one_in(2);
    for (std::size_t i = 0; i < visible.size(); ++i) {
      const std::size_t part = runs ? i * static_cast<std::size_t>(num_parts) / visible.size()
                                    : static_cast<std::size_t>(dice.from_to(0, num_parts - 1));
      parts[part]->append(p.t.k.row(visible[i]), p.t.v.row(visible[i]));
    }
    std::vector<attention_state> states;
    for (const auto& part : parts) {
      states.emplace_back(heads, v_dim);
      if (states.size() > 1 && dice.one_in(3)) std::swap(states[0], states.back());  // attend merges by itself
      attention.attend(q, part->get(), states.back(), w);
      if (dice.one_in(3)) states.emplace_back(heads, v_dim);  // the identity
    }
    while (states.size() > 1) {
      std::swap(states[as_size(dice.from_to(0, static_cast<index_t>(states.size()) - 1))], states.back());
      const attention_state last = states.back();
      states.pop_back();
      states[as_size(dice.from_to(0, static_cast<index_t>(states.size()) - 1))].merge(last);
    }

    // The oracle on what is stored.
    matrix k(p.t.k.rows(), p.t.k.cols()), v(p.t.v.rows(), p.t.v.cols());
    const plain_policy policy = plain_sink_window(c.config.num_sink_tokens, c.config.window, c.config.rollback);
    for (const position_t at : visible)
      for (index_t head = 0; head < c.config.num_kv_heads; ++head) {
        all->key(head, policy.slot(at), &k(at, head * c.config.head_dim));
        all->value(head, policy.slot(at), &v(at, head * v_dim));
      }
    const auto exact = oracle::attend(c.layer, q.data(), c.tokens - 1, visible, k.data(), v.data());
    CHECK(far_from(exact, out.data(), lse.data()) == "");
    for (index_t head = 0; head < heads; ++head) {  // m is a whole number: merging rounds nothing but the sums
      const float m = states[0].data()[as_size(head * (v_dim + 2))];
      CHECK(m == std::ceil(m));
    }
    for (index_t head = 0; head < heads; ++head)
      lse[as_size(head)] = states[0].finish(c.params.softmax, head, {&out(0, head * v_dim), as_size(v_dim)});
    CHECK(far_from(exact, out.data(), lse.data()) == "");
  });
}

// Accuracy.

TEST_CASE("attention: within 1e-6 norm-wise for unit-normal rows") {
  double worst = 0;
  for (int i = 0; i < effort::cases(200); ++i) {
    effort::dice dice(static_cast<std::uint64_t>(i));
    const index_t dim = 2 * dice.from_to(16, 64), n = dice.one_in(4) ? 1024 : dice.from_to(1, 1024);
    normal_layer layer(static_cast<std::uint64_t>(i), dim, n, dice.one_in(2));
    const oracle::answer exact = layer.exact();
    const std::vector<double> zero(exact.out.size());
    const double error = distance(layer.decode().data(), exact.out) / distance(zero, exact.out);
    INFO("seed " << i << ": head_dim " << dim << ", " << n << " tokens");
    CHECK(error < 1e-6);
    worst = std::max(worst, error);
  }
  if (std::getenv("SINKCACHE_SHOW")) std::printf("norm-wise error %.3g\n", worst);
}

TEST_CASE("attention: never worse than twice the naive float32 computation") {
  // One row may be lucky: 16 rows together are not.
  double worst = 0;
  for (const index_t dim : {1, 8, 64, 128})
    for (const index_t n : {3, 20, 100, 1500}) {
      double ours = 0, naive = 0;
      for (int i = 0; i < 16; ++i) {
        normal_layer layer(static_cast<std::uint64_t>(i), dim, n, false);
        const oracle::answer exact = layer.exact();
        ours += distance(layer.decode().data(), exact.out);
        naive += distance(layer.naive().out, exact.out);
      }
      INFO("head_dim " << dim << ", " << n << " tokens");
      CHECK(ours <= 2 * naive);
      worst = std::max(worst, ours / naive);
    }
  if (std::getenv("SINKCACHE_SHOW")) std::printf("times the naive error %.3g\n", worst);
}

TEST_CASE("attention: head_dim 512, and 32k visible keys") {
  for (const index_t n : {700, 32768}) {
    normal_layer wide(5, 512, n == 700 ? 700 : 33, false), deep(6, 16, n, false);
    for (normal_layer* layer : {&wide, &deep}) {
      CHECK(layer->layer.wrong(layer->q, layer->k, layer->v, true) == "");
      CHECK(layer->layer.wrong(layer->q, layer->k, layer->v, false) == "");
    }
  }
}

}  // namespace
}  // namespace proof
