// Ranges dropped from the middle of a cache, in any history of calls: what is seen, to the oracle's bound, in both
// modes of positions.

#include <sinkcache/key_policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <sinkcache/sinkcache.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "random_matrix.hpp"

using namespace sinkcache;
using proof::as_size, proof::random_matrix;

namespace {

// Which positions the first KV head's queries give weight.
struct seen_positions final : weight_reader {
  std::vector<position_t> positions;

  bool wants(position_t) const noexcept override { return true; }
  void read(const weight_tile& tile) noexcept override {
    if (tile.kv_head != 0) return;
    for (index_t j = 0; j < tile.n; ++j)
      if (tile.weight(j, 0) > 0) positions.push_back(tile.position(j));
  }
};

// A cache and, beside it, the stream in plain arrays: every token's key as it is stored, its value, whether it is
// there.
template <class Cache>
struct session {
  effort::dice dice;
  cache_config config;
  attention_params params;
  Cache cache;
  oracle::layer layer;
  std::vector<float> keys, values;
  std::vector<bool> there;
  workspace scratch;

  static cache_config random_config(effort::dice& dice) {
    const index_t width = 2 * dice.from_to(1, 8);
    return {.num_kv_heads = dice.from_to(1, 2),
            .head_dim = width + dice.from_to(0, 3),
            .v_head_dim = dice.from_to(1, 12),
            .num_sink_tokens = dice.from_to(0, 4),
            .window = dice.one_in(3) ? 400 : dice.from_to(1, 40),
            .positions = dice.one_in(2) ? positions::in_cache : positions::absolute,
            .inputs = dice.one_in(2) ? inputs::raw : inputs::rotated,
            .rope = rope::linear(width, 100, 1),
            .first_position = dice.one_in(2) ? 0 : dice.from_to(0, 1 << 20),
            .rollback = dice.from_to(0, 30),
            .recent = dice.from_to(0, 12)};
  }

  explicit session(std::uint64_t seed) : dice(seed), config(random_config(dice)), cache(config) {
    params.num_qo_heads = config.num_kv_heads * dice.from_to(1, 3);
    if (dice.one_in(3)) params.sink_bias.assign(as_size(params.num_qo_heads), 0.5f);
    layer.num_qo_heads = as_size(params.num_qo_heads);
    layer.num_kv_heads = as_size(config.num_kv_heads);
    layer.head_dim = as_size(config.head_dim);
    layer.v_head_dim = as_size(config.v_head_dim);
    layer.in_cache = config.positions == positions::in_cache;
    layer.q_rotated = config.inputs == inputs::rotated;
    layer.first_position = config.first_position;
    layer.sm_scale = 1 / std::sqrt(static_cast<double>(config.head_dim));
    layer.sink_bias = params.sink_bias;
    layer.num_sink_tokens = config.num_sink_tokens;
    for (index_t i = 0; i < config.rope->width(); i += 2)
      layer.inv_freq.push_back(
          1 / static_cast<float>(std::pow(100.f, static_cast<float>(i) / static_cast<float>(config.rope->width()))));
  }

  void note(const matrix& k, const matrix& v) {
    const index_t dim = config.head_dim;
    for (index_t i = 0; i < k.rows(); ++i) {
      rope::angles at;
      config.rope->angles_at(config.first_position + static_cast<position_t>(there.size()), true, at);
      for (index_t head = 0; head < config.num_kv_heads; ++head) {
        std::vector<float> key(k.row(i).data() + head * dim, k.row(i).data() + (head + 1) * dim);
        if (config.inputs == inputs::raw) config.rope->rotate(at, key.data(), dim, key.data());
        keys.insert(keys.end(), key.begin(), key.end());
      }
      values.insert(values.end(), v.row(i).data(), v.row(i).data() + v.cols());
      there.push_back(true);
    }
  }

  std::vector<position_t> visible(position_t query) const {
    std::vector<position_t> result;
    for (position_t p = 0; p <= query; ++p)
      if (there[as_size(p)] && (p < config.num_sink_tokens || p > query - config.window)) result.push_back(p);
    return result;
  }

  // Empty where all is well.
  std::string far_from(const float* q, position_t query, const float* out, const float* lse) const {
    for (const oracle::answer& e : oracle::attend(layer, q, query, visible(query), keys.data(), values.data())) {
      const double bound = 16 * 0x1p-24 * (1 + e.a);
      for (double x : e.out)
        if (!(std::abs(static_cast<double>(*out++) - x) <= bound * e.v_max))
          return "an output is " + std::to_string(out[-1]) + ", had to be " + std::to_string(x);
      if (!(static_cast<double>(*lse) == e.lse || std::abs(static_cast<double>(*lse) - e.lse) <= bound))
        return "an lse is " + std::to_string(*lse) + ", had to be " + std::to_string(e.lse);
      ++lse;
    }
    return "";
  }

  std::string check() {
    const position_t newest = cache.seen() - 1;
    const matrix q = random_matrix(dice, 1, params.num_qo_heads * config.head_dim);
    matrix out(1, params.num_qo_heads * config.v_head_dim);
    std::vector<float> lse(as_size(params.num_qo_heads));
    const attention attention(params);
    const index_t enough = std::max(scratch.nbytes(), attention.workspace_bytes(cache, 1));
    scratch.reserve(enough);
    attention.decode(q, cache, out, scratch, {.lse = lse});
    if (scratch.nbytes() != enough) return "workspace_bytes was too little";
    seen_positions reader;
    matrix again = out;
    attention.decode(q, cache, again, scratch, {.weights = &reader});
    if (reader.positions != visible(newest)) return "other tokens are seen";
    if (static_cast<std::size_t>(cache.size()) != reader.positions.size()) return "size() is another";
    return far_from(q.data(), newest, out.data(), lse.data());
  }

  std::string prefill(index_t tokens) {
    const matrix q = random_matrix(dice, tokens, params.num_qo_heads * config.head_dim),
                 k = random_matrix(dice, tokens, config.num_kv_heads * config.head_dim),
                 v = random_matrix(dice, tokens, config.num_kv_heads * config.v_head_dim);
    matrix out(tokens, params.num_qo_heads * config.v_head_dim);
    std::vector<float> lse(as_size(tokens * params.num_qo_heads));
    attention(params).prefill(q, k, v, cache, out, scratch, {.lse = lse});
    note(k, v);
    for (index_t i = 0; i < tokens; ++i) {
      const std::string wrong =
          far_from(q.row(i).data(), cache.seen() - tokens + i, out.row(i).data(), lse.data() + i * params.num_qo_heads);
      if (!wrong.empty()) return "prefill: " + wrong;
    }
    return "";
  }

  void erase(position_t first, position_t last) {
    cache.erase(first, last);
    for (position_t p = first; p < last; ++p) there[as_size(p)] = false;
  }

  void truncate(position_t seen) {
    cache.truncate(seen);
    there.resize(as_size(seen));
    keys.resize(as_size(seen * config.num_kv_heads * config.head_dim));
    values.resize(as_size(seen * config.num_kv_heads * config.v_head_dim));
  }

  // A history of calls.
  std::string run(int steps) {
    for (int step = 0; step < steps; ++step) {
      const position_t seen = cache.seen();
      switch (seen == 0 ? 0 : dice.from_to(0, 5)) {
        case 0: {
          const index_t n = dice.from_to(1, dice.one_in(3) ? 60 : 6);
          const matrix k = random_matrix(dice, n, config.num_kv_heads * config.head_dim),
                       v = random_matrix(dice, n, config.num_kv_heads * config.v_head_dim);
          cache.append(k, v);
          note(k, v);
          break;
        }
        case 1: {
          const std::string wrong = prefill(dice.from_to(1, 30));
          if (!wrong.empty()) return wrong;
          break;
        }
        case 2: {
          const position_t smallest = cache.min_truncate();
          truncate(dice.from_to(dice.one_in(2) ? std::max(smallest, seen - 10) : smallest, seen));
          break;
        }
        case 3:
          if (dice.one_in(4)) {
            Cache copy = cache.clone();
            cache = std::move(copy);
          }
          break;
        default: {
          const position_t first = dice.from_to(std::max<position_t>(0, seen - 60), seen);
          erase(first, std::min<position_t>(seen, first + dice.from_to(0, dice.one_in(3) ? 20 : 3)));
        }
      }
      if (cache.seen() == 0) continue;
      const std::string wrong = check();
      if (!wrong.empty()) return "step " + std::to_string(step) + ": " + wrong;
    }
    return "";
  }
};

// Tiers that lose nothing.
using whole_tiers = tiered<f32, f32>;

TEST_CASE("erase: any history of calls, against the oracle") {
  for (int i = 0; i < effort::cases(60); ++i) {
    CAPTURE(i);
    CHECK(session<kv_cache<f32>>(static_cast<std::uint64_t>(i)).run(60) == "");
    CHECK(session<kv_cache<whole_tiers>>(static_cast<std::uint64_t>(i)).run(60) == "");
  }
}

TEST_CASE("erase: few bits") {
  kv_cache<q8> cache({.num_kv_heads = 1,
                      .head_dim = 16,
                      .num_sink_tokens = 2,
                      .window = 20,
                      .rope = rope::none(),
                      .rollback = 2,
                      .recent = 5});
  effort::dice dice(3);
  const matrix rows = random_matrix(dice, 40, 16);
  cache.append(rows, rows);
  cache.erase(1, 24);   // a pinned token, and codes
  cache.erase(33, 37);  // codes and newest ones
  CHECK(cache.size() == 1 + 16 - 4);
  const auto seen = [](const kv_source& source) {
    seen_positions reader;
    matrix q = matrix::Ones(1, 16), out(1, 16);
    workspace scratch;
    attention({.num_qo_heads = 1}).decode(q, source, out, scratch, {.weights = &reader});
    return reader.positions;
  };
  const std::vector<position_t> left = {0, 24, 25, 26, 27, 28, 29, 30, 31, 32, 37, 38, 39};
  CHECK(seen(cache) == left);
  CHECK(seen(cache.clone()) == left);
  kv_cache<q8> moved = std::move(cache);
  CHECK(seen(moved) == left);
  moved.truncate(38);
  moved.clear();
  moved.append(rows, rows);
  CHECK(moved.size() == 22);
}

// The n-th of so many turns leaves a hole of 8 tokens.
TEST_CASE("erase: a hole a turn") {
  session<kv_cache<f32>> s(7);
  for (int turn = 0; turn < 40; ++turn) {
    REQUIRE(s.prefill(20) == "");
    s.erase(s.cache.seen() - 12, s.cache.seen() - 4);
    REQUIRE(s.check() == "");
  }
  // Holes that nobody can see again take no room: of tokens 20 apart a window of w has w / 20 and a few.
  CHECK(s.cache.max_parts() <= 3 + (s.config.window + s.config.rollback) / 20 + 3);
}

TEST_CASE("erase: ranges that touch are one, and one that is taken back is none") {
  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 2, .window = 50, .rope = rope::none()});
  const matrix rows = matrix::Random(12, 2);
  cache.append(rows, rows);
  const index_t without = cache.max_parts();
  cache.erase(4, 6);
  cache.erase(6, 8);
  CHECK(cache.max_parts() == without + 1);
  cache.erase(2, 4);
  CHECK(cache.max_parts() == without + 1);
  cache.erase(9, 10);
  CHECK(cache.max_parts() == without + 2);
  cache.truncate(9);
  CHECK(cache.max_parts() == without + 1);
  cache.truncate(2);
  CHECK(cache.max_parts() == without);
}

TEST_CASE("erase: at most one range for every two rows, however long the stream") {
  kv_cache<f32> cache(
      {.num_kv_heads = 1, .head_dim = 2, .num_sink_tokens = 4, .window = 10, .rope = rope::none(), .rollback = 6});
  const matrix row = matrix::Ones(1, 2);
  for (position_t p = 0; p < 200; ++p) {
    cache.append(row, row);
    if (p % 2 == 1) cache.erase(p - 1, p);
    REQUIRE(cache.max_parts() - 3 <= (4 + 10 + 6) / 2 + 1);
  }
}

TEST_CASE("erase: a range is forgotten as soon as the window has passed it, and no sooner") {
  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 2, .window = 4, .rope = rope::none(), .rollback = 0});
  const matrix rows = matrix::Ones(20, 2);
  cache.append(rows.topRows(17), rows.topRows(17));
  cache.erase(14, 16);
  cache.append(rows.topRows(2), rows.topRows(2));
  kv_cache<f32> sooner = cache.clone();
  sooner.erase(17, 18);  // the newest query is at 18, and sees from 15 on
  CHECK(sooner.max_parts() == 3 + 2);
  CHECK(sooner.size() == 2);
  cache.append(rows.topRows(1), rows.topRows(1));
  cache.erase(17, 18);
  CHECK(cache.max_parts() == 3 + 1);
  CHECK(cache.size() == 3);
}

TEST_CASE("erase: what was dropped stays dropped when tokens are taken back, and a new token is a new one") {
  const cache_config config{.num_kv_heads = 1, .head_dim = 2, .window = 50, .rope = rope::none()};
  kv_cache<f32> cache(config);
  const matrix rows = matrix::Random(10, 2);
  cache.append(rows, rows);
  cache.erase(2, 4);
  cache.erase(6, 9);
  CHECK(cache.size() == 5);
  cache.truncate(8);
  CHECK(cache.size() == 4);  // 0, 1, 4, 5
  cache.append(rows.topRows(2), rows.topRows(2));
  CHECK(cache.size() == 6);
  cache.erase(0, 10);
  CHECK(cache.size() == 0);
  matrix out = matrix::Constant(1, 2, 3.f);
  float lse = 0;
  workspace scratch;
  attention({.num_qo_heads = 1}).decode(rows.topRows(1), cache, out, scratch, {.lse = {&lse, 1}});
  CHECK(out.isZero(0));
  CHECK(lse == -std::numeric_limits<float>::infinity());
  cache.clear();
  cache.append(rows, rows);
  CHECK(cache.size() == 10);
}

TEST_CASE("erase: bad ranges are refused in exact words, and change nothing") {
  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 2, .window = 50, .rope = rope::none()});
  const matrix rows = matrix::Random(10, 2);
  cache.append(rows, rows);
  CHECK_THROWS_WITH(cache.erase(-1, 3), "sinkcache: first was -1, had to be from 0 to last, 3");
  CHECK_THROWS_WITH(cache.erase(4, 3), "sinkcache: first was 4, had to be from 0 to last, 3");
  CHECK(cache.try_erase(0, 11).message() == "sinkcache: last was 11, had to be at most what was seen, 10");
  CHECK(cache.size() == 10);
  // All layers, or none.
  std::vector<std::unique_ptr<any_kv_cache>> layers;
  for (const index_t tokens : {10, 8}) {
    layers.push_back(cache.clone_any());
    layers.back()->truncate(tokens);
  }
  layer_caches all(std::move(layers));
  CHECK(all.try_erase(3, 9).message() == "sinkcache: last was 9, had to be at most what was seen, 8");
  CHECK((all[0].size() == 10 && all[1].size() == 8));
  all.erase(3, 7);
  CHECK((all[0].size() == 6 && all[1].size() == 4));
  layer_caches none;
  CHECK(none.try_erase(0, 1).message() == "sinkcache: last was 1, had to be at most what was seen, 0");
  CHECK(none.try_erase(2, 1).message() == "sinkcache: first was 2, had to be from 0 to last, 1");
  // Another kind of cache.
  scored_kv_cache<f32> scored({.num_kv_heads = 1, .head_dim = 2, .rope = rope::none()},
                              {.budget = 8, .recent = 2, .num_qo_heads = 1}, policies::knorm());
  scored.append(rows, rows);
  CHECK(scored.try_erase(1, 2).message() ==
        "sinkcache: this cache evicts by scores that were given while it held these tokens, had to be a kv_cache to "
        "drop a range: clear it and prefill the tokens that stay");
  CHECK(scored.size() == 10);
  kv_cache<f32> other = std::move(cache);
  CHECK(cache.try_erase(0, 0).message() == "sinkcache: the cache was moved from, had to be one that holds memory");
  CHECK(other.size() == 10);
}

}  // namespace
