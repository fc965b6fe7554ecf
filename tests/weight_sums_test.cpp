// Sums of weights over many queries, against the weights that the same queries are told one by one: of windows shorter
// than a chunk, tiers, scattered rows, tokens without positions and joined sources.

#include <fmt/format.h>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "random_case.hpp"

namespace {

using proof::as_size;
using sinkcache::index_t;
using sinkcache::kv_part;
using sinkcache::matrix;
using sinkcache::position_t;

// Adds up what it is told, by KV head, mark of the part, and number of the row.
class notes final : public sinkcache::weight_reader {
 public:
  explicit notes(bool summed) : summed_(summed) {}

  bool wants(position_t) const noexcept override { return !summed_; }
  bool wants_sums(position_t, position_t) const noexcept override { return summed_; }
  void read(const sinkcache::weight_tile& tile) noexcept override {
    for (index_t j = 0; j < tile.n; ++j)
      for (index_t i = 0; i < tile.num_qo_heads; ++i) add(tile.kv_head, *tile.part, tile.first + j, tile.weight(j, i));
  }
  void read_sums(const sinkcache::weight_sums& sums) noexcept override {
    for (index_t j = 0; j < sums.n; ++j) add(sums.kv_head, *sums.part, sums.first + j, sums.sums[as_size(j)]);
    most_queries = std::max(most_queries, sums.num_queries);
  }
  std::string differs_from(const notes& other) const {
    for (const auto& [key, sum] : sums_) {
      const auto twin = other.sums_.find(key);
      const double expected = twin == other.sums_.end() ? 0 : twin->second;
      if (!(std::abs(sum - expected) <= 1e-6 + 2e-5 * expected))
        return fmt::format("KV head {}, mark {}, token {}: {} instead of {}", std::get<0>(key), std::get<1>(key),
                           std::get<2>(key), sum, expected);
    }
    for (const auto& [key, sum] : other.sums_)
      if (sum > 1e-6 && sums_.count(key) == 0) return fmt::format("no sum of token {}", std::get<2>(key));
    return "";
  }
  double total() const {
    double all = 0;
    for (const auto& entry : sums_) all += entry.second;
    return all;
  }

  index_t most_queries = 0;

 private:
  void add(index_t kv_head, const kv_part& part, index_t row, float w) {
    const position_t token = part.placeless ? row : part.position(row);
    sums_[{kv_head, part.mark + (part.placeless ? 100 : 0), token}] += static_cast<double>(w);
  }

  bool summed_;
  std::map<std::tuple<index_t, std::int32_t, position_t>, double> sums_;
};

sinkcache::kv_geometry geometry_of(bool in_cache) {
  using sinkcache::positions;
  return {.num_kv_heads = 2,
          .head_dim = 24,
          .v_head_dim = 20,
          .positions = in_cache ? positions::in_cache : positions::absolute,
          .rope = sinkcache::rope::plain(24, 10000)};
}

// Pinned tokens, older tokens in one store, the newest in another; or a scattered kept set. All tokens are there.
class lists final : public sinkcache::kv_source {
 public:
  enum kind { tiers, scattered };

  lists(kind how, bool in_cache, index_t tokens, index_t window, index_t recent, unsigned seed)
      : kv_source(geometry_of(in_cache)), how_(how), window_(window), recent_(recent) {
    const index_t dims[] = {geometry_.head_dim, geometry_.v_head_dim};
    effort::dice dice(seed);
    for (int i = 0; i < 2; ++i) {
      rows_[i].resize(as_size(geometry_.num_kv_heads * tokens * sinkcache::f32::block_bytes(dims[i])));
      std::vector<float> row(as_size(dims[i]));
      for (index_t j = 0; j < geometry_.num_kv_heads * tokens; ++j) {
        for (float& x : row) x = static_cast<float>(proof::normal(dice));
        sinkcache::f32::encode(row.data(), dims[i], rows_[i].data() + j * sinkcache::f32::block_bytes(dims[i]));
      }
    }
    for (position_t p = 0, at = 0; p < tokens; ++p, ++at) {
      at_.push_back(at);
      if (p < tokens / 2 && dice.one_in(2)) ++at;
    }
    tokens_ = tokens;
    seen_ = how == tiers ? tokens : at_.back() + 1;
  }

  // Values are not there any more.
  void forget_values() { has_values_ = false; }

  index_t capacity() const noexcept override { return how_ == tiers ? 3 + window_ : tokens_; }
  position_t min_truncate() const noexcept override { return how_ == tiers ? 0 : seen_ - tokens_ / 3; }
  index_t max_parts() const noexcept override { return 3; }
  sinkcache::plan_end plan(index_t h, position_t first, position_t last,
                           sinkcache::part_list& parts) const noexcept override {
    kv_part part;
    const index_t k = sinkcache::f32::block_bytes(geometry_.head_dim);
    const index_t v = sinkcache::f32::block_bytes(geometry_.v_head_dim);
    part.k = {&sinkcache::reader_of<sinkcache::f32>, rows_[0].data() + h * tokens_ * k, k};
    part.v = {&sinkcache::reader_of<sinkcache::f32>, rows_[1].data() + h * tokens_ * v, v};
    if (!has_values_) part.v.base = nullptr;
    if (how_ == scattered) {
      part.rows = tokens_, part.at = at_, part.last = seen_, part.pinned = 2;
      parts.push_back(part);
      return {1, static_cast<index_t>(last - first + 1)};
    }
    const auto list = [&](position_t from, position_t to, position_t near, position_t far, std::int32_t mark) {
      part.row = static_cast<index_t>(from), part.first = from, part.rows = static_cast<index_t>(to - from);
      part.seen_from = near, part.seen_until = far, part.mark = mark;
      parts.push_back(part);
    };
    const position_t pinned = std::min<position_t>(3, last + 1);
    list(0, pinned, 0, kv_part::always, 0);
    list(std::max(pinned, first + 1 - window_), last + 1 - recent_, recent_, window_, 1);
    list(std::max(pinned, first + 1 - recent_), last + 1, 0, recent_, 2);
    return {1, static_cast<index_t>(last - first + 1)};
  }

 private:
  kind how_;
  bool has_values_ = true;
  index_t tokens_ = 0, window_, recent_;
  std::vector<std::byte> rows_[2];
  std::vector<position_t> at_;
};

sinkcache::attention_params params(effort::dice& dice) {
  sinkcache::attention_params of{.num_qo_heads = 2 * dice.from_to(1, 9)};
  std::vector<float> per_head(as_size(of.num_qo_heads));
  for (float& x : per_head) x = static_cast<float>(0.2 * dice.uniform());
  if (dice.one_in(3)) of.alibi_slopes = per_head;
  if (dice.one_in(3)) of.sink_bias = per_head;
  if (dice.one_in(3)) of.logits_soft_cap = 5;
  if (dice.one_in(2)) of.softmax = sinkcache::softmax_variant::sink_logits(per_head);
  return of;
}

matrix normal(index_t rows, index_t cols, effort::dice& dice) {
  matrix result(rows, cols);
  for (index_t i = 0; i < result.size(); ++i) result.data()[i] = static_cast<float>(proof::normal(dice));
  return result;
}

// The newest `rows` queries of a source, summed and one by one.
std::string compare(lists&& keys, index_t rows, effort::dice& dice, const sinkcache::attention_params& of) {
  const sinkcache::attention attention(of);
  const index_t heads = attention.params().num_qo_heads;
  const matrix q = normal(rows, heads * keys.geometry().head_dim, dice);
  matrix plain(rows, heads * keys.geometry().v_head_dim), out = plain;
  std::vector<float> lse(as_size(rows * heads)), plain_lse = lse;
  sinkcache::workspace workspace;
  notes summed(true), one_by_one(false);
  attention.attend(q, keys, plain, workspace, {.lse = plain_lse});
  attention.attend(q, keys, out, workspace, {.lse = lse, .weights = &summed});
  const bool in_panels = rows > 1 && rows * heads / 2 >= sinkcache::detail::query_rows::panel;
  if (in_panels && (out != plain || lse != plain_lse)) return "the output is another";
  if (in_panels && rows <= 512 && summed.most_queries != rows) return "queries did not stay together";
  attention.attend(q, keys, out, workspace, {.weights = &one_by_one});
  keys.forget_values();
  for (const notes* told : {&summed, &one_by_one}) {
    notes again(told == &summed);
    std::vector<float> alone(lse.size());
    matrix none;
    attention.attend(q, keys, none, workspace, {.lse = alone, .weights = &again, .out = false});
    if (told == &summed && alone != lse) return "without an output lse is another";
    if (again.total() != told->total() || again.differs_from(*told) != "")
      return "without an output weights are others";
  }
  double sinks = 0;
  for (std::size_t i = 0; i < lse.size(); ++i) {
    const float sink = attention.params().softmax.sink(static_cast<index_t>(i) % heads);
    sinks += std::exp(static_cast<double>(sink) - static_cast<double>(lse[i]));
  }
  const double all = static_cast<double>(rows * heads);
  if (!(std::abs(summed.total() + sinks - all) <= 1e-5 * all))
    return fmt::format("sums and sinks are {} instead of {}", summed.total() + sinks, all);
  return summed.differs_from(one_by_one);
}
std::string compare(lists&& keys, index_t rows, effort::dice& dice) {
  return compare(std::move(keys), rows, dice, params(dice));
}

}  // namespace

TEST_CASE("sums of weights: tiers, of a window longer and shorter than the chunk") {
  for (int i = 0; i < effort::cases(60); ++i) {
    effort::dice dice(static_cast<std::uint64_t>(i) + 1);
    const index_t window = dice.from_to(1, 200), recent = dice.from_to(0, window), rows = dice.from_to(1, 250);
    CAPTURE(i, window, recent, rows);
    CHECK(compare(lists(lists::tiers, dice.one_in(2), 300, window, recent, static_cast<unsigned>(i)), rows, dice) ==
          "");
  }
}

TEST_CASE("sums of weights: more queries than are summed at a time") {
  effort::dice dice(7);
  CHECK(compare(lists(lists::tiers, true, 700, 30, 10, 7), 650, dice) == "");
}

// So few queries stay together where many heads share a KV head.
TEST_CASE("sums of weights: two and three queries") {
  effort::dice dice(8);
  for (const index_t rows : {2, 3}) {
    CAPTURE(rows);
    CHECK(compare(lists(lists::tiers, true, 100, 30, 10, 8), rows, dice, {.num_qo_heads = 2 * 40}) == "");
  }
}

TEST_CASE("sums of weights: scattered rows") {
  for (int i = 0; i < effort::cases(40); ++i) {
    effort::dice dice(static_cast<std::uint64_t>(i) + 100);
    const index_t tokens = dice.from_to(6, 300), rows = dice.from_to(1, tokens / 3);
    CAPTURE(i, tokens, rows);
    CHECK(compare(lists(lists::scattered, dice.one_in(2), tokens, 0, 0, static_cast<unsigned>(i)), rows, dice) == "");
  }
}

TEST_CASE("sums of weights: prefill of a ring behind a prefix and tokens without positions") {
  for (int i = 0; i < effort::cases(30); ++i) {
    effort::dice dice(static_cast<std::uint64_t>(i) + 200);
    sinkcache::cache_config config{.num_kv_heads = 2,
                                   .head_dim = 24,
                                   .v_head_dim = 20,
                                   .num_sink_tokens = dice.from_to(0, 4),
                                   .window = dice.from_to(1, 150),
                                   .rope = sinkcache::rope::plain(24, 10000)};
    config.rollback = dice.from_to(0, 100);
    const sinkcache::static_tokens<sinkcache::f16> front(config, normal(5, 48, dice), normal(5, 40, dice));
    sinkcache::kv_cache<sinkcache::bf16> prefix(config);
    const index_t n = dice.from_to(1, 40);
    prefix.append(normal(n, 48, dice), normal(n, 40, dice));
    config.first_position = n;
    const sinkcache::attention attention(params(dice));
    const index_t heads = attention.params().num_qo_heads, tokens = dice.from_to(1, 300);
    const matrix q = normal(tokens, heads * 24, dice), k = normal(tokens, 48, dice), v = normal(tokens, 40, dice);
    notes told[] = {notes(true), notes(false)};
    sinkcache::workspace workspace;
    for (notes& reader : told) {
      sinkcache::kv_cache<sinkcache::f32> cache(config);
      const sinkcache::joined_source all({&front, &prefix, &cache});
      matrix out(tokens, heads * 20);
      attention.prefill(q, k, v, cache, all, out, workspace, {.weights = &reader});
    }
    CAPTURE(i, tokens, config.window, config.rollback);
    CHECK(told[0].differs_from(told[1]) == "");
  }
}
