// Sources and a cache as a user writes them against docs/architecture.md, outside the library's namespace: kept sets
// that differ by head in any order of rows, two tiers, a shared prefix, groups of tokens with a scale per channel,
// tokens without positions, shuffled pages, and a cache that evicts by the weights it is told. Each goes through
// decode, batches, attend, prefill, both position modes and all softmax variants, against the oracle at the core's
// bound.

#include <fmt/format.h>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "random_case.hpp"
#include "scaled_row.hpp"

namespace {

using proof::scaled_row;
using sinkcache::index_t;
using sinkcache::kv_part;
using sinkcache::kv_rows;
using sinkcache::plan_end;
using sinkcache::position_t;
using sinkcache::status;

constexpr double u = 0x1p-24;

std::size_t as_size(index_t n) { return static_cast<std::size_t>(n); }

// What a user's own source needs: rows of a format, and keys rotated before they are stored.

template <class F>
class rows_of {
 public:
  rows_of(index_t heads, index_t rows, index_t dim)
      : rows_(rows), dim_(dim), bytes_(as_size(heads * blocks() * F::block_bytes(dim)), std::byte{0xff}) {}

  // A block of a format that holds several rows is written at once.
  void put(index_t head, index_t first_row, const float* rows) {
    F::encode(rows, dim_, bytes_.data() + (head * blocks() + first_row / F::block_rows) * F::block_bytes(dim_));
  }
  void get(index_t head, index_t row, float* out) const {
    F::decode(bytes_.data() + (head * blocks() + row / F::block_rows) * F::block_bytes(dim_), row % F::block_rows, dim_,
              out);
  }
  void move(index_t head, index_t to, index_t from) {
    float row[sinkcache::max_head_dim];
    get(head, from, row);
    put(head, to, row);
  }
  kv_rows of_head(index_t head) const {
    const index_t block = F::block_bytes(dim_);
    return {&sinkcache::reader_of<F>, bytes_.data() + head * blocks() * block, block, 0, blocks() * block};
  }

 private:
  index_t blocks() const { return (rows_ + F::block_rows - 1) / F::block_rows; }

  index_t rows_, dim_;
  std::vector<std::byte> bytes_;
};

// The key of one head as it is stored: raw ones are rotated to their position.
std::vector<float> stored_key(const sinkcache::kv_geometry& of, position_t position, const float* key) {
  std::vector<float> row(key, key + of.head_dim);
  if (of.inputs == sinkcache::inputs::raw && of.rotates()) {
    sinkcache::rope::angles angles;
    of.rope->angles_at(of.first_position + position, true, angles);
    of.rope->turn(angles, key, of.head_dim, row.data());
  }
  return row;
}

// A source under test, and what is true of it.
class subject {
 public:
  explicit subject(const proof::random_case& c)
      : c_(c), keys_(as_size(c.config.num_kv_heads)), values_(as_size(c.config.num_kv_heads)) {}
  virtual ~subject() = default;

  virtual const sinkcache::kv_source& source() const = 0;
  virtual sinkcache::any_kv_cache* cache() { return nullptr; }  // to prefill with, if it is one
  virtual void store(const proof::tokens& t, index_t row) = 0;  // the next token
  virtual index_t num_placeless() const { return 0; }           // so many rows before those of token 0
  virtual index_t num_stored() const { return 0; }              // tokens that are there before the first is stored

  // Positions that a query sees in a KV head, oldest first.
  virtual std::vector<position_t> visible(index_t kv_head, position_t query) const = 0;
  // Rows as they are stored, decoded, of one head: [tokens, dim].
  virtual const std::vector<float>& keys(index_t kv_head) const { return keys_[as_size(kv_head)]; }
  virtual const std::vector<float>& values(index_t kv_head) const { return values_[as_size(kv_head)]; }

 protected:
  const proof::random_case& c_;
  std::vector<std::vector<float>> keys_, values_;
};

// Notes every weight that it is told.
class weight_notes final : public sinkcache::weight_reader {
 public:
  explicit weight_notes(std::uint64_t seed = 0) : seed_(seed) {}

  bool wants(position_t query) const noexcept override { return seed_ == 0 || (seed_ >> (query % 60) & 1u) != 0; }
  void read(const sinkcache::weight_tile& tile) noexcept override {
    for (index_t i = 0; i < tile.num_qo_heads; ++i)
      for (index_t j = 0; j < tile.n; ++j) {
        const position_t at = tile.part->placeless ? -1 - (tile.first + j) : tile.position(j);
        if (const float w = tile.weight(j, i); w != 0) notes_[{tile.query, tile.first_qo_head + i}][at] = w;
      }
  }
  // Of a query and query head, by position; tokens without one have negative numbers.
  const std::map<position_t, float>& of(position_t query, index_t head) { return notes_[{query, head}]; }

 private:
  std::uint64_t seed_;
  std::map<std::pair<position_t, index_t>, std::map<position_t, float>> notes_;
};

// Two answers over different tokens as one, and the sink at last.
oracle::answer joined(const oracle::answer& a, const oracle::answer& b, double sink) {
  const double largest = std::max({a.lse, b.lse, sink});
  const double lse =
      largest + std::log(std::exp(a.lse - largest) + std::exp(b.lse - largest) + std::exp(sink - largest));
  oracle::answer both;
  both.out.assign(std::max(a.out.size(), b.out.size()), 0);
  both.lse = lse;
  both.a = std::max(a.a, b.a);
  both.v_max = std::max(a.v_max, b.v_max);
  for (const oracle::answer* part : {&a, &b}) {
    const double share = std::exp(part->lse - lse);
    for (std::size_t i = 0; i < part->out.size(); ++i) both.out[i] += share * part->out[i];
    for (double w : part->weights) both.weights.push_back(share * w);
  }
  return both;
}

// What the oracle gives one query token, all heads.
std::vector<oracle::answer> expected(const proof::random_case& c, const subject& s, const float* q, const float* raw_q,
                                     position_t query) {
  const index_t heads = c.config.num_kv_heads, dim = c.config.head_dim;
  const index_t group = static_cast<index_t>(c.layer.num_qo_heads) / heads, placeless = s.num_placeless();
  std::vector<oracle::answer> all;
  for (index_t head = 0; head < heads; ++head) {
    oracle::layer layer = c.layer;
    layer.num_kv_heads = 1;
    layer.num_qo_heads = as_size(group);
    const auto of_group = [&](std::vector<float>& per_head) {
      if (!per_head.empty()) per_head = {per_head.begin() + head * group, per_head.begin() + (head + 1) * group};
    };
    of_group(layer.alibi_slopes), of_group(layer.sink_bias), of_group(layer.sink_logits);
    const std::vector<float> sinks = layer.sink_logits;
    if (placeless > 0) layer.sink_logits.clear();
    const std::size_t k_at = as_size(placeless * dim), v_at = as_size(placeless * c.config.v_head_dim);
    const std::vector<position_t> visible = s.visible(head, query);  // before keys and values, which may depend on it
    std::vector<oracle::answer> placed = oracle::attend(layer, q + head * group * dim, query, visible,
                                                        s.keys(head).data() + k_at, s.values(head).data() + v_at);
    if (placeless > 0) {
      oracle::layer still = layer;
      still.inv_freq.clear(), still.alibi_slopes.clear(), still.sink_bias.clear();
      std::vector<position_t> list(as_size(placeless));
      std::iota(list.begin(), list.end(), position_t{0});
      const std::vector<oracle::answer> first = oracle::attend(still, raw_q + head * group * dim, placeless, list,
                                                               s.keys(head).data(), s.values(head).data());
      for (std::size_t i = 0; i < placed.size(); ++i)
        placed[i] = joined(first[i], placed[i],
                           sinks.empty() ? -std::numeric_limits<double>::infinity() : static_cast<double>(sinks[i]));
    }
    all.insert(all.end(), placed.begin(), placed.end());
  }
  return all;
}

// Feeds a stream into a source in random pieces, asks for queries in every way there is, and tells what is wrong.
class source_run {
 public:
  source_run(const proof::random_case& c, subject& s) : c_(c), s_(s), dice_(c.seed + 9), attention_(c.params) {}

  std::string run() {
    const index_t total = c_.tokens;
    all_ = proof::draw_tokens(c_, dice_, 0, total);
    for (index_t fed = s_.num_stored(); fed < total;) {
      const index_t n = std::min(total - fed, dice_.from_to(1, dice_.one_in(3) ? 130 : 12));
      const std::string wrong = s_.cache() != nullptr && dice_.one_in(2) ? prefill(fed, n) : append(fed, n);
      if (!wrong.empty()) return fmt::format("{}; tokens {} to {}", wrong, fed, fed + n - 1);
      fed += n;
    }
    return "";
  }

 private:
  index_t q_cols() const { return all_.q.cols(); }
  index_t heads() const { return c_.params.num_qo_heads; }

  std::string append(index_t first, index_t n) {
    for (index_t i = 0; i < n; ++i) s_.store(all_, first + i);
    const sinkcache::kv_source& keys = s_.source();
    const index_t far =
        static_cast<index_t>(std::min<position_t>(n, keys.seen() - std::max<position_t>(1, keys.min_truncate()) + 1));
    const index_t rows = dice_.one_in(3) || far < 2 ? 1 : dice_.from_to(2, far);
    const index_t from = first + n - rows;
    sinkcache::matrix out = sinkcache::matrix::Constant(rows, heads() * c_.config.v_head_dim, 77.f);
    std::vector<float> lse(as_size(rows * heads()), 77.f);
    weight_notes notes(dice_.one_in(2) ? dice_.bits() | 1u : 0);
    const bool noted = dice_.one_in(2);
    sinkcache::weight_reader* const reader = noted ? &notes : nullptr;
    const auto q = all_.q.middleRows(from, rows);
    if (rows > 1) {
      attention_.attend(q, keys, out, workspace_, {.lse = lse, .weights = reader});
    } else if (dice_.one_in(3)) {
      attention_.decode(q, keys, out, workspace_, {.lse = lse, .weights = reader});
    } else if (dice_.one_in(2)) {
      sinkcache::matrix other = out;
      const sinkcache::decode_item item{.q = {q.data(), as_size(q_cols())},
                                        .keys = &keys,
                                        .out = {out.data(), as_size(out.cols())},
                                        .lse = lse,
                                        .weights = reader};
      sinkcache::decode_item twin = item;
      twin.out = {other.data(), as_size(out.cols())};
      twin.lse = {};
      twin.weights = nullptr;
      attention_.decode(std::vector<sinkcache::decode_item>{item, twin}, workspace_);
      if (reader == nullptr && out != other) return "a batch gives one item other bits than another";
    } else {
      sinkcache::attention_state state(heads(), c_.config.v_head_dim);
      attention_.attend(q, keys, state, workspace_);
      for (index_t h = 0; h < heads(); ++h)
        lse[as_size(h)] =
            state.finish(c_.params.softmax, h, {out.data() + h * c_.config.v_head_dim, as_size(c_.config.v_head_dim)});
      return compare(from, 1, out, lse, nullptr);
    }
    return compare(from, rows, out, lse, reader == nullptr ? nullptr : &notes);
  }

  std::string prefill(index_t first, index_t n) {
    sinkcache::matrix out = sinkcache::matrix::Constant(n, heads() * c_.config.v_head_dim, 77.f);
    std::vector<float> lse(as_size(n * heads()), 77.f);
    weight_notes notes(dice_.bits() | 1u);
    const bool noted = dice_.one_in(2);
    attention_.prefill(all_.q.middleRows(first, n), all_.k.middleRows(first, n), all_.v.middleRows(first, n),
                       *s_.cache(), s_.source(), out, workspace_, {.lse = lse, .weights = noted ? &notes : nullptr});
    for (index_t i = 0; i < n; ++i) s_.store(all_, first + i);  // what is true of them; they are stored already
    return compare(first, n, out, lse, noted ? &notes : nullptr);
  }

  std::string compare(index_t first, index_t rows, const sinkcache::matrix& out, const std::vector<float>& lse,
                      weight_notes* notes) {
    for (index_t i = 0; i < rows; ++i) {
      if (rows > 4 && dice_.one_in(2)) continue;
      const position_t query = first + i;
      const std::vector<oracle::answer> right =
          expected(c_, s_, all_.q.row(query).data(), all_.raw_q.row(query).data(), query);
      std::string wrong = proof::far_from(right, out.row(i).data(), lse.data() + i * heads());
      if (wrong.empty() && notes != nullptr && notes->wants(query))
        wrong = check_weights(right, query, lse.data() + i * heads(), *notes);
      if (!wrong.empty()) return fmt::format("query {} of {} rows: {}", query, rows, wrong);
    }
    return "";
  }

  std::string check_weights(const std::vector<oracle::answer>& right, position_t query, const float* lse,
                            weight_notes& notes) {
    const index_t group = heads() / c_.config.num_kv_heads;
    for (index_t head = 0; head < heads(); ++head) {
      const std::map<position_t, float>& told = notes.of(query, head);
      std::vector<position_t> seen;
      for (index_t i = 0; i < s_.num_placeless(); ++i) seen.push_back(-1 - i);
      const std::vector<position_t> placed = s_.visible(head / group, query);
      seen.insert(seen.end(), placed.begin(), placed.end());
      const oracle::answer& e = right[as_size(head)];
      double sum =
          c_.layer.sink_logits.empty() || !std::isfinite(lse[head])
              ? 0
              : std::exp(static_cast<double>(c_.layer.sink_logits[as_size(head)]) - static_cast<double>(lse[head]));
      std::size_t found = 0;
      for (std::size_t i = 0; i < seen.size(); ++i) {
        const auto w = told.find(seen[i]);
        const double weight = w == told.end() ? 0 : static_cast<double>(w->second);
        found += w != told.end();
        sum += weight;
        if (!(std::abs(weight - e.weights[i]) <= 16 * u * (1 + e.a)))
          return fmt::format("head {}: token {} got {} instead of {}", head, seen[i], weight, e.weights[i]);
      }
      if (found != told.size()) return fmt::format("head {}: a weight for a token that it does not see", head);
      // lse is a float: the sink's share of a large one is known as well as that.
      if (!seen.empty() && !(std::abs(sum - 1) <= 1e-6 + 2 * u * std::abs(static_cast<double>(lse[head]))))
        return fmt::format("head {}: weights and sink sum to {}", head, sum);
    }
    return "";
  }

  const proof::random_case& c_;
  subject& s_;
  effort::dice dice_;
  sinkcache::attention attention_;
  sinkcache::workspace workspace_;
  proof::tokens all_;
};

proof::random_case draw(int seed, index_t tokens = 160) {
  proof::random_case c = proof::draw_case(
      static_cast<std::uint64_t>(seed),
      {.max_head_dim = seed % 5 == 0 ? 128 : 40, .max_group = seed % 4 == 0 ? 40 : 6, .max_window = 70});
  c.rewinds = false;
  c.tokens = std::max<index_t>(c.tokens, tokens);
  // A rope has to be there where tokens without positions are.
  using enum sinkcache::rope_pairing;
  c.config.rope.emplace(c.layer.inv_freq, c.layer.interleaved ? interleaved : half_split, c.layer.attention_factor);
  return c;
}

// (a) Heads keep different tokens, in rows in any order.

class scattered final : public subject, public sinkcache::kv_source {
 public:
  // Of the tokens before `border` each head keeps some, in runs of about `run`; of the others all.
  scattered(const proof::random_case& c, position_t border, double run, bool in_order)
      : subject(c),
        kv_source(sinkcache::detail::geometry_of(c.config)),
        border_(border),
        in_order_(in_order),
        k_(geometry_.num_kv_heads, c.tokens, geometry_.head_dim),
        v_(geometry_.num_kv_heads, c.tokens, geometry_.v_head_dim),
        heads_(as_size(geometry_.num_kv_heads)) {
    effort::dice dice(c.seed + 17);
    for (kept& head : heads_) {
      bool keeps = false;
      for (position_t p = 0; p < border; ++p) {
        if (dice.uniform() < 1 / run) keeps = !keeps;
        head.keeps.push_back(keeps);
      }
      head.keeps.resize(as_size(c.tokens), true);
      std::vector<position_t> order;
      for (position_t p = 0; p < c.tokens; ++p)
        if (head.keeps[as_size(p)]) order.push_back(p);
      // Rows of new tokens take any free place, too.
      head.row.assign(as_size(c.tokens), -1);
      std::vector<index_t> rows(order.size());
      std::iota(rows.begin(), rows.end(), index_t{0});
      if (!in_order)
        for (std::size_t i = rows.size(); i > 1; --i)
          std::swap(rows[i - 1], rows[as_size(dice.from_to(0, static_cast<index_t>(i) - 1))]);
      for (std::size_t i = 0; i < order.size(); ++i) head.row[as_size(order[i])] = rows[i];
    }
  }

  const sinkcache::kv_source& source() const override { return *this; }
  void store(const proof::tokens& t, index_t token) override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    for (index_t h = 0; h < geometry_.num_kv_heads; ++h) {
      kept& head = heads_[as_size(h)];
      std::vector<float>&keys = keys_[as_size(h)], &values = values_[as_size(h)];
      keys.resize(keys.size() + as_size(dim)), values.resize(values.size() + as_size(v_dim));
      if (!head.keeps[as_size(token)]) continue;
      // The part has to be rows that are stored: they are brought together, whatever is still to come between them.
      const auto place =
          std::lower_bound(head.stored.begin(), head.stored.end(), head.row[as_size(token)]) - head.stored.begin();
      head.stored.insert(head.stored.begin() + place, head.row[as_size(token)]);
      for (index_t row = static_cast<index_t>(head.at.size()); row > place; --row)
        k_.move(h, row, row - 1), v_.move(h, row, row - 1);
      head.at.insert(head.at.begin() + place, token);
      const std::vector<float> key = stored_key(geometry_, token, t.k.row(token).data() + h * dim);
      k_.put(h, place, key.data());
      v_.put(h, place, t.v.row(token).data() + h * v_dim);
      k_.get(h, place, keys.data() + keys.size() - as_size(dim));
      v_.get(h, place, values.data() + values.size() - as_size(v_dim));
      head.rank.assign(head.at.size(), 0);
      for (std::size_t i = 0; i < head.at.size(); ++i)
        head.rank[i] = static_cast<std::int32_t>(
            std::count_if(head.at.begin(), head.at.end(), [&](position_t p) { return p < head.at[i]; }));
    }
    seen_ = token + 1;
  }
  std::vector<position_t> visible(index_t h, position_t query) const override {
    std::vector<position_t> list;
    for (position_t p = 0; p <= query; ++p)
      if (heads_[as_size(h)].keeps[as_size(p)]) list.push_back(p);
    return list;
  }

  index_t capacity() const noexcept override { return c_.tokens; }
  position_t min_truncate() const noexcept override { return std::min(border_, seen_); }
  index_t max_parts() const noexcept override { return 1; }
  plan_end plan(index_t h, position_t first, position_t last, sinkcache::part_list& parts) const noexcept override {
    const kept& head = heads_[as_size(h)];
    kv_part part;
    part.k = k_.of_head(h);
    part.v = v_.of_head(h);
    part.rows = static_cast<index_t>(head.at.size());
    part.at = head.at;
    if (!in_order_) part.rank = head.rank;
    if (part.rows > 0) {
      part.first = *std::min_element(head.at.begin(), head.at.end());
      part.last = *std::max_element(head.at.begin(), head.at.end()) + 1;
    }
    parts.push_back(part);
    return {1, static_cast<index_t>(last - first + 1)};
  }

 private:
  struct kept {
    std::vector<bool> keeps;
    std::vector<index_t> row, stored;  // where a token goes, and what is there already
    std::vector<position_t> at;
    std::vector<std::int32_t> rank;
  };

  position_t border_;
  bool in_order_;
  rows_of<sinkcache::f16> k_;
  rows_of<sinkcache::f32> v_;
  std::vector<kept> heads_;
};

TEST_CASE("user's source: heads keep different tokens, in rows in any order") {
  for (int i = 0; i < effort::cases(60); ++i) {
    proof::random_case c = draw(500 + i);
    INFO(c.name());
    c.layer.num_sink_tokens = 0;  // none is pinned
    effort::dice dice(c.seed + 1);
    const double runs[] = {1, 1.5, 4, 30};
    scattered s(c, dice.from_to(0, 150), runs[dice.from_to(0, 3)], dice.one_in(2));
    CHECK(source_run(c, s).run() == "");
  }
}

TEST_CASE("user's source: 300 runs of kept tokens") {
  for (int i = 0; i < 2; ++i) {
    proof::random_case c = draw(560 + i, 640);
    c.layer.num_sink_tokens = 0;
    INFO(c.name());
    scattered s(c, 620, 1.05, i == 0);
    CHECK(source_run(c, s).run() == "");
  }
}

// (b) Two tiers of two formats: the newest tokens in one, older ones in another, by the query's own position.

class tiers final : public subject, public sinkcache::kv_source {
 public:
  tiers(const proof::random_case& c, index_t recent)
      : subject(c),
        kv_source(sinkcache::detail::geometry_of(c.config)),
        pinned_(c.config.num_sink_tokens),
        recent_(std::min(recent, c.config.window)),
        near_k_(geometry_.num_kv_heads, c.tokens, geometry_.head_dim),
        near_v_(geometry_.num_kv_heads, c.tokens, geometry_.v_head_dim),
        far_k_(geometry_.num_kv_heads, c.tokens, geometry_.head_dim),
        far_v_(geometry_.num_kv_heads, c.tokens, geometry_.v_head_dim) {}

  const sinkcache::kv_source& source() const override { return *this; }
  void store(const proof::tokens& t, index_t token) override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    for (index_t h = 0; h < geometry_.num_kv_heads; ++h) {
      const std::vector<float> key = stored_key(geometry_, token, t.k.row(token).data() + h * dim);
      near_k_.put(h, token, key.data()), far_k_.put(h, token, key.data());
      near_v_.put(h, token, t.v.row(token).data() + h * v_dim);
      far_v_.put(h, token, t.v.row(token).data() + h * v_dim);
    }
    seen_ = token + 1;
  }
  std::vector<position_t> visible(index_t, position_t query) const override {
    asked_ = query;
    return proof::plain_sink_window(pinned_, c_.config.window).visible(query + 1);
  }
  // Which row is read depends on the query that was asked for last.
  const std::vector<float>& keys(index_t h) const override {
    return read(near_k_, far_k_, h, geometry_.head_dim, k_read_);
  }
  const std::vector<float>& values(index_t h) const override {
    return read(near_v_, far_v_, h, geometry_.v_head_dim, v_read_);
  }

  index_t capacity() const noexcept override { return pinned_ + c_.config.window; }
  position_t min_truncate() const noexcept override { return 0; }
  index_t max_parts() const noexcept override { return 3; }
  plan_end plan(index_t h, position_t first, position_t last, sinkcache::part_list& parts) const noexcept override {
    const position_t pinned = std::min<position_t>(pinned_, seen_);
    const auto part = [&](const auto& k, const auto& v, position_t from, position_t to) {
      kv_part p;
      p.k = k.of_head(h), p.v = v.of_head(h);
      p.row = static_cast<index_t>(from), p.rows = static_cast<index_t>(to - from);
      p.first = from;
      return p;
    };
    kv_part sinks = part(near_k_, near_v_, 0, pinned);
    sinks.pinned = sinks.rows;
    parts.push_back(sinks);
    kv_part middle = part(far_k_, far_v_, std::max(pinned, first + 1 - c_.config.window), last + 1 - recent_);
    middle.seen_from = recent_, middle.seen_until = c_.config.window;
    parts.push_back(middle);
    kv_part newest = part(near_k_, near_v_, std::max(pinned, first + 1 - recent_), last + 1);
    newest.seen_until = recent_;
    parts.push_back(newest);
    return {geometry_.num_kv_heads - h, static_cast<index_t>(last - first + 1)};
  }

 private:
  template <class Near, class Far>
  const std::vector<float>& read(const Near& near, const Far& far, index_t h, index_t dim,
                                 std::vector<float>& to) const {
    to.resize(as_size(seen_ * dim));
    for (position_t p = 0; p < seen_; ++p) {
      float* const row = to.data() + p * dim;
      if (p < pinned_ || asked_ - p < recent_)
        near.get(h, static_cast<index_t>(p), row);
      else
        far.get(h, static_cast<index_t>(p), row);
    }
    return to;
  }

  index_t pinned_, recent_;
  rows_of<sinkcache::f32> near_k_, near_v_;
  rows_of<sinkcache::bf16> far_k_;
  rows_of<sinkcache::f16> far_v_;
  mutable position_t asked_ = 0;
  mutable std::vector<float> k_read_, v_read_;
};

TEST_CASE("user's source: two tiers of two formats, by the query's position") {
  for (int i = 0; i < effort::cases(60); ++i) {
    const proof::random_case c = draw(600 + i);
    INFO(c.name());
    tiers s(c, effort::dice(c.seed).from_to(0, 40));
    CHECK(source_run(c, s).run() == "");
  }
}

// (c) A prefix that many sequences share, in front of a cache of one's own, and (e) tokens without positions.

class joined_subject final : public subject {
 public:
  joined_subject(const proof::random_case& c, index_t prefix, index_t placeless, const proof::tokens& t)
      : subject(c), placeless_(placeless) {
    sinkcache::cache_config of_prefix = c.config, own = c.config;
    of_prefix.window = std::max<index_t>(1, prefix), of_prefix.num_sink_tokens = 0;
    own.first_position = c.config.first_position + prefix;
    prefix_ = std::make_unique<sinkcache::kv_cache<sinkcache::bf16>>(of_prefix);
    own_ = std::make_unique<sinkcache::kv_cache<sinkcache::f32, sinkcache::f16>>(own);
    beside_ = std::make_unique<sinkcache::kv_cache<sinkcache::f32, sinkcache::f16>>(own);
    std::vector<const sinkcache::kv_source*> list;
    if (placeless > 0) {
      const sinkcache::matrix k = t.raw_k.topRows(placeless), v = t.v.topRows(placeless);
      first_ = std::make_unique<sinkcache::static_tokens<sinkcache::f16, sinkcache::f32>>(c.config, k, v);
      note(*first_, placeless);
      list.push_back(first_.get());
    }
    prefix_->append(t.k.topRows(prefix), t.v.topRows(prefix));
    note(*prefix_, prefix);
    list.push_back(prefix_.get());
    list.push_back(own_.get());
    joined_ = std::make_unique<sinkcache::joined_source>(std::move(list));
  }

  const sinkcache::kv_source& source() const override { return *joined_; }
  sinkcache::any_kv_cache* cache() override { return own_.get(); }
  index_t num_placeless() const override { return placeless_; }
  index_t num_stored() const override { return static_cast<index_t>(prefix_->seen()); }
  void store(const proof::tokens& t, index_t token) override {
    const sinkcache::matrix k = t.k.row(token), v = t.v.row(token);
    if (own_->seen() + prefix_->seen() <= token) own_->append(k, v);
    beside_->append(k, v);
    note(*beside_, 1);
  }
  std::vector<position_t> visible(index_t, position_t query) const override {
    std::vector<position_t> list;
    const position_t before = prefix_->seen();
    for (position_t p = 0; p < before; ++p) list.push_back(p);
    for (position_t p :
         proof::plain_sink_window(c_.config.num_sink_tokens, c_.config.window).visible(query - before + 1))
      list.push_back(before + p);
    return list;
  }

 private:
  // Reads the newest n rows of a source back.
  template <class Source>
  void note(const Source& s, index_t n) {
    const sinkcache::kv_geometry& of = s.geometry();
    for (index_t h = 0; h < of.num_kv_heads; ++h) {
      kv_part memory[3];
      sinkcache::part_list parts(memory, 3);
      s.plan(h, s.seen() - 1, s.seen() - 1, parts);
      std::vector<float>&keys = keys_[as_size(h)], &values = values_[as_size(h)];
      for (position_t p = s.seen() == 0 ? 0 : s.seen() - n, end = p + n; p < end; ++p)
        for (const kv_part& part : parts)
          if (part.first <= p && p < part.end()) {
            const index_t row = part.row + static_cast<index_t>(p - part.first);
            std::vector<float> k(as_size((of.head_dim + 15) / 16 * 16)), v(as_size((of.v_head_dim + 15) / 16 * 16));
            part.k.reader->load(part.k, row, 1, of.head_dim, static_cast<index_t>(k.size()), k.data());
            part.v.reader->load(part.v, row, 1, of.v_head_dim, static_cast<index_t>(v.size()), v.data());
            keys.insert(keys.end(), k.begin(), k.begin() + of.head_dim);
            values.insert(values.end(), v.begin(), v.begin() + of.v_head_dim);
            break;
          }
    }
  }

  index_t placeless_;
  std::unique_ptr<sinkcache::static_tokens<sinkcache::f16, sinkcache::f32>> first_;
  std::unique_ptr<sinkcache::kv_cache<sinkcache::bf16>> prefix_;
  std::unique_ptr<sinkcache::kv_cache<sinkcache::f32, sinkcache::f16>> own_, beside_;
  std::unique_ptr<sinkcache::joined_source> joined_;
};

// The stream begins after the prefix.
class joined_run {
 public:
  static std::string run(proof::random_case c, index_t prefix, index_t placeless) {
    c.tokens += prefix;
    c.config.first_position = std::min(c.config.first_position, sinkcache::max_position - prefix);
    c.layer.first_position = c.config.first_position;
    // The ring's pinned tokens take the bias, not the prefix's, and the oracle knows first tokens only.
    c.layer.sink_bias.clear();
    proof::set_params(c);
    effort::dice dice(c.seed + 9);
    const proof::tokens t = proof::draw_tokens(c, dice, 0, c.tokens);
    joined_subject s(c, prefix, placeless, t);
    return source_run(c, s).run();
  }
};

TEST_CASE("user's source: a shared prefix in front of a ring") {
  for (int i = 0; i < effort::cases(50); ++i) {
    const proof::random_case c = draw(700 + i);
    INFO(c.name());
    CHECK(joined_run::run(c, effort::dice(c.seed).from_to(1, 50), 0) == "");
  }
}

TEST_CASE("user's source: tokens without positions, before a prefix and a ring") {
  for (int i = 0; i < effort::cases(50); ++i) {
    const proof::random_case c = draw(760 + i);
    INFO(c.name());
    effort::dice dice(c.seed);
    CHECK(joined_run::run(c, dice.one_in(2) ? 0 : dice.from_to(1, 30), dice.from_to(1, 20)) == "");
  }
}

TEST_CASE("joined_source: sources that do not fit are refused by name") {
  using sinkcache::f32;
  sinkcache::cache_config config{.num_kv_heads = 2, .head_dim = 8, .window = 20, .rope = sinkcache::rope::none()};
  const sinkcache::matrix rows = sinkcache::matrix::Ones(5, 16);
  sinkcache::kv_cache<f32> prefix(config);
  prefix.append(rows, rows);
  const auto refusal = [&](const sinkcache::cache_config& other) {
    const sinkcache::kv_cache<f32> own(other);
    const sinkcache::kv_source* list[] = {&prefix, &own};
    const status found = sinkcache::joined_source::validate(list);
    return std::string(found.message());
  };
  CHECK(refusal(config) == "sinkcache: a source's first_position was 0, had to be where the sources before it end, 5");
  config.first_position = 5;
  CHECK(refusal(config) == "");
  config.head_dim = 4;
  CHECK(refusal(config) == "sinkcache: a source's head_dim was 8, had to be that of the last, 4");
  const sinkcache::kv_source* null[] = {nullptr};
  CHECK(!sinkcache::joined_source::validate(null));
  CHECK(!sinkcache::joined_source::validate({}));
  CHECK_THROWS_AS(sinkcache::joined_source({&prefix, nullptr}), std::invalid_argument);
  config = {.num_kv_heads = 2,
            .head_dim = 8,
            .positions = sinkcache::positions::absolute,
            .inputs = sinkcache::inputs::rotated};
  CHECK(sinkcache::static_tokens<f32>::validate(config, rows, rows).message() ==
        "sinkcache: rope was absent, had to be given, say .rope = rope::plain(head_dim, theta), or rope::none()");
}

// (d) Keys in groups of 32 tokens with a scale for each channel, newer tokens as floats.

struct channel_groups {
  static constexpr index_t block_rows = 32;
  static constexpr index_t block_bytes(index_t dim) { return (dim * 4 + dim * block_rows + 63) / 64 * 64; }

  static void encode(const float* rows, index_t dim, std::byte* to) noexcept {
    std::memset(to, 0, static_cast<std::size_t>(block_bytes(dim)));
    for (index_t d = 0; d < dim; ++d) {
      float largest = 0;
      for (index_t i = 0; i < block_rows; ++i) largest = std::max(largest, std::abs(rows[i * dim + d]));
      const float step = largest / 127;
      std::memcpy(to + 4 * d, &step, sizeof step);
      for (index_t i = 0; i < block_rows; ++i)
        to[4 * dim + i * dim + d] =
            static_cast<std::byte>(static_cast<std::int8_t>(step > 0 ? std::lrint(rows[i * dim + d] / step) : 0));
    }
  }
  static void decode(const std::byte* from, index_t row, index_t dim, float* out) noexcept {
    for (index_t d = 0; d < dim; ++d) {
      float step;
      std::memcpy(&step, from + 4 * d, sizeof step);
      out[d] = step * static_cast<float>(static_cast<std::int8_t>(from[4 * dim + row * dim + d]));
    }
  }
};
static_assert(sinkcache::kv_format<channel_groups>);

static_assert(sinkcache::kv_format<scaled_row>);

class grouped final : public subject, public sinkcache::kv_source {
 public:
  grouped(const proof::random_case& c, index_t recent)
      : subject(c),
        kv_source(sinkcache::detail::geometry_of(c.config)),
        recent_(recent),
        groups_(geometry_.num_kv_heads, c.tokens, geometry_.head_dim),
        k_(geometry_.num_kv_heads, c.tokens, geometry_.head_dim),
        v_(geometry_.num_kv_heads, c.tokens, geometry_.v_head_dim),
        raw_(as_size(geometry_.num_kv_heads)) {}

  const sinkcache::kv_source& source() const override { return *this; }
  void store(const proof::tokens& t, index_t token) override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    for (index_t h = 0; h < geometry_.num_kv_heads; ++h) {
      const std::vector<float> key = stored_key(geometry_, token, t.k.row(token).data() + h * dim);
      std::vector<float>& raw = raw_[as_size(h)];
      raw.insert(raw.end(), key.begin(), key.end());
      k_.put(h, token, key.data());
      if (token % 32 == 31) groups_.put(h, token - 31, raw.data() + (token - 31) * dim);
      v_.put(h, token, t.v.row(token).data() + h * v_dim);
      std::vector<float>& values = values_[as_size(h)];
      values.resize(values.size() + as_size(v_dim));
      v_.get(h, token, values.data() + token * v_dim);
    }
    seen_ = token + 1;
  }
  std::vector<position_t> visible(index_t, position_t query) const override {
    asked_ = query;
    std::vector<position_t> list(as_size(query + 1));
    std::iota(list.begin(), list.end(), position_t{0});
    return list;
  }
  const std::vector<float>& keys(index_t h) const override {
    const index_t dim = geometry_.head_dim;
    read_.resize(as_size(seen_ * dim));
    for (index_t p = 0; p < seen_; ++p)
      if (p < border(asked_))
        groups_.get(h, p, read_.data() + p * dim);
      else
        k_.get(h, p, read_.data() + p * dim);
    return read_;
  }

  index_t capacity() const noexcept override { return c_.tokens; }
  position_t min_truncate() const noexcept override { return 0; }
  index_t max_parts() const noexcept override { return 2; }
  plan_end plan(index_t h, position_t first, position_t last, sinkcache::part_list& parts) const noexcept override {
    kv_part whole;
    whole.k = groups_.of_head(h), whole.v = v_.of_head(h);
    whole.rows = border(first);
    parts.push_back(whole);
    kv_part rest;
    rest.k = k_.of_head(h), rest.v = v_.of_head(h);
    rest.row = border(first), rest.first = rest.row;
    rest.rows = static_cast<index_t>(std::min(last + 1, seen_)) - rest.row;
    parts.push_back(rest);
    // Until the next group goes over.
    const position_t until = border(first) + 32 + recent_ - 1;
    return {geometry_.num_kv_heads - h, static_cast<index_t>(std::min(last + 1, until) - first)};
  }

 private:
  // The query reads what is older than this from groups: whole ones that it is `recent_` tokens past.
  index_t border(position_t query) const {
    return static_cast<index_t>(std::max<position_t>(0, query + 1 - recent_) / 32 * 32);
  }

  index_t recent_;
  rows_of<channel_groups> groups_;
  rows_of<sinkcache::f32> k_;
  rows_of<scaled_row> v_;
  std::vector<std::vector<float>> raw_;
  mutable position_t asked_ = 0;
  mutable std::vector<float> read_;
};

TEST_CASE("user's source: groups of tokens with a scale per channel, rows with a scale of their own") {
  for (int i = 0; i < effort::cases(50); ++i) {
    proof::random_case c = draw(800 + i);
    c.layer.num_sink_tokens = 0;
    INFO(c.name());
    grouped s(c, effort::dice(c.seed).from_to(0, 40));
    CHECK(source_run(c, s).run() == "");
  }
}

// (f) Pages of a pool, in any order.

class paged final : public subject, public sinkcache::kv_source {
 public:
  paged(const proof::random_case& c, index_t page_rows)
      : subject(c),
        kv_source(sinkcache::detail::geometry_of(c.config)),
        page_rows_(page_rows),
        pages_((c.tokens + page_rows - 1) / page_rows),
        k_(geometry_.num_kv_heads, pages_ * page_rows, geometry_.head_dim),
        v_(geometry_.num_kv_heads, pages_ * page_rows, geometry_.v_head_dim) {
    table_.resize(as_size(pages_));
    std::iota(table_.begin(), table_.end(), std::int32_t{0});
    effort::dice dice(c.seed + 3);
    for (std::size_t i = table_.size(); i > 1; --i)
      std::swap(table_[i - 1], table_[as_size(dice.from_to(0, static_cast<index_t>(i) - 1))]);
  }

  const sinkcache::kv_source& source() const override { return *this; }
  void store(const proof::tokens& t, index_t token) override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    const index_t row = table_[as_size(token / page_rows_)] * page_rows_ + token % page_rows_;
    for (index_t h = 0; h < geometry_.num_kv_heads; ++h) {
      const std::vector<float> key = stored_key(geometry_, token, t.k.row(token).data() + h * dim);
      std::vector<float>&keys = keys_[as_size(h)], &values = values_[as_size(h)];
      keys.resize(keys.size() + as_size(dim)), values.resize(values.size() + as_size(v_dim));
      k_.put(h, row, key.data());
      v_.put(h, row, t.v.row(token).data() + h * v_dim);
      k_.get(h, row, keys.data() + token * dim);
      v_.get(h, row, values.data() + token * v_dim);
    }
    seen_ = token + 1;
  }
  std::vector<position_t> visible(index_t, position_t query) const override {
    std::vector<position_t> list;
    for (position_t p = std::max<position_t>(0, query + 1 - c_.config.window); p <= query; ++p) list.push_back(p);
    return list;
  }

  index_t capacity() const noexcept override { return c_.config.window; }
  position_t min_truncate() const noexcept override { return 0; }
  index_t max_parts() const noexcept override { return 1; }
  plan_end plan(index_t h, position_t first, position_t last, sinkcache::part_list& parts) const noexcept override {
    kv_part part;
    part.k = k_.of_head(h), part.v = v_.of_head(h);
    part.k.page = part.k.block * page_rows_, part.v.page = part.v.block * page_rows_;
    part.rows = static_cast<index_t>(seen_);
    part.pages = table_;
    part.page_rows = page_rows_;
    part.seen_until = c_.config.window;
    parts.push_back(part);
    return {geometry_.num_kv_heads - h, static_cast<index_t>(last - first + 1)};
  }

 private:
  index_t page_rows_, pages_;
  rows_of<sinkcache::bf16> k_;
  rows_of<scaled_row> v_;
  std::vector<std::int32_t> table_;
};

TEST_CASE("user's source: shuffled pages") {
  for (int i = 0; i < effort::cases(50); ++i) {
    proof::random_case c = draw(900 + i);
    c.layer.num_sink_tokens = 0;
    INFO(c.name());
    paged s(c, effort::dice(c.seed).from_to(1, 40));
    CHECK(source_run(c, s).run() == "");
  }
}

// (g) The smallest TOVA: every `interval` tokens the ones that the newest query gave least leave, one set per head.

class smallest_tova final : public sinkcache::any_kv_cache, public sinkcache::weight_reader {
 public:
  smallest_tova(const sinkcache::cache_config& config, index_t budget, index_t interval)
      : any_kv_cache(sinkcache::detail::geometry_of(config)),
        budget_(budget),
        interval_(interval),
        k_(geometry_.num_kv_heads, capacity(), geometry_.head_dim),
        v_(geometry_.num_kv_heads, capacity(), geometry_.v_head_dim),
        heads_(as_size(geometry_.num_kv_heads)) {}

  // What it keeps.
  const std::vector<position_t>& kept(index_t h) const { return heads_[as_size(h)].at; }

  std::size_t nbytes() const noexcept override { return as_size(capacity()); }
  sinkcache::cache_kind kind() const noexcept override { return {"bf16", "f32"}; }
  index_t capacity() const noexcept override { return budget_ + interval_; }
  position_t min_truncate() const noexcept override { return evicted_at_; }
  index_t max_parts() const noexcept override { return 1; }
  void clear() noexcept override {
    seen_ = evicted_at_ = 0;
    for (head& one : heads_) one = head();
  }
  status try_truncate(position_t seen) noexcept override {
    status found;
    found.require(seen == seen_, "seen", seen, "what was seen,", seen_);
    return found;
  }

  // Evicts when the newest query was the last of its interval.
  void prepare() noexcept override {
    if (seen_ % interval_ != 0 || seen_ == evicted_at_) return;
    evicted_at_ = seen_;
    for (index_t h = 0; h < geometry_.num_kv_heads; ++h) {
      head& one = heads_[as_size(h)];
      while (static_cast<index_t>(one.at.size()) > budget_) {
        const auto least = std::min_element(one.weight.begin(), one.weight.end()) - one.weight.begin();
        for (index_t row = least + 1; row < static_cast<index_t>(one.at.size()); ++row)
          k_.move(h, row - 1, row), v_.move(h, row - 1, row);
        one.at.erase(one.at.begin() + least);
        one.weight.erase(one.weight.begin() + least);
      }
    }
  }
  index_t room() const noexcept override { return interval_ - static_cast<index_t>(seen_ % interval_); }
  void write(index_t first_head, index_t num_heads, sinkcache::const_matrix_view k, sinkcache::const_matrix_view v,
             index_t first_row, index_t n) noexcept override {
    for (index_t h = first_head; h < first_head + num_heads; ++h)
      for (index_t i = 0; i < n; ++i) {
        head& one = heads_[as_size(h)];
        const auto row = static_cast<index_t>(one.at.size());
        k_.put(h, row, stored_key(geometry_, seen_ + i, k.row(first_row + i) + h * geometry_.head_dim).data());
        v_.put(h, row, v.row(first_row + i) + h * geometry_.v_head_dim);
        one.at.push_back(seen_ + i);
        one.weight.push_back(0);
      }
  }
  void advance(index_t n) noexcept override { seen_ += n; }

  sinkcache::weight_reader* learner() noexcept override { return this; }
  bool wants(position_t query) const noexcept override { return (query + 1) % interval_ == 0; }
  void read(const sinkcache::weight_tile& tile) noexcept override {
    head& one = heads_[as_size(tile.kv_head)];
    for (index_t j = 0; j < tile.n; ++j) {
      if (tile.first_qo_head % (tile.num_qo_heads) == 0) one.weight[as_size(tile.first + j)] = 0;
      for (index_t i = 0; i < tile.num_qo_heads; ++i) one.weight[as_size(tile.first + j)] += tile.weight(j, i);
    }
  }

  plan_end plan(index_t h, position_t first, position_t last, sinkcache::part_list& parts) const noexcept override {
    const head& one = heads_[as_size(h)];
    kv_part part;
    part.k = k_.of_head(h), part.v = v_.of_head(h);
    part.rows = static_cast<index_t>(one.at.size());
    part.at = one.at;
    if (part.rows > 0) part.first = one.at.front(), part.last = one.at.back() + 1;
    parts.push_back(part);
    return {1, static_cast<index_t>(last - first + 1)};
  }

 private:
  struct head {
    std::vector<position_t> at;
    std::vector<float> weight;
  };

  index_t budget_, interval_;
  position_t evicted_at_ = 0;
  rows_of<sinkcache::bf16> k_;
  rows_of<sinkcache::f32> v_;
  std::vector<head> heads_;
};

// The same by its formula: a list of every token, and the oracle's weights.
TEST_CASE("user's cache: the smallest TOVA keeps what its formula keeps, in any chunking") {
  for (int i = 0; i < effort::cases(40); ++i) {
    proof::random_case c = draw(1000 + i, 120);
    c.layer.num_sink_tokens = 0;
    INFO(c.name());
    effort::dice dice(c.seed);
    const index_t interval = dice.from_to(1, 30), budget = dice.from_to(1, 60), heads = c.config.num_kv_heads;
    const index_t dim = c.config.head_dim, v_dim = c.config.v_head_dim, qo_heads = c.params.num_qo_heads;
    const proof::tokens t = proof::draw_tokens(c, dice, 0, c.tokens);

    // Token by token, with a full list of tokens for each head.
    std::vector<std::vector<position_t>> kept(as_size(heads));
    std::vector<std::vector<float>> keys(as_size(heads)), values(as_size(heads));
    std::vector<std::vector<oracle::answer>> right;
    std::vector<bool> sure(as_size(c.tokens), true);  // that the margin of every eviction so far exceeds rounding
    bool is_sure = true;
    for (index_t p = 0; p < c.tokens; ++p) {
      right.emplace_back();
      for (index_t h = 0; h < heads; ++h) {
        rows_of<sinkcache::bf16> k(1, 1, dim);
        const std::vector<float> key =
            stored_key(sinkcache::detail::geometry_of(c.config), p, t.k.row(p).data() + h * dim);
        k.put(0, 0, key.data());
        keys[as_size(h)].resize(as_size((p + 1) * dim));
        k.get(0, 0, keys[as_size(h)].data() + p * dim);
        values[as_size(h)].insert(values[as_size(h)].end(), t.v.row(p).data() + h * v_dim,
                                  t.v.row(p).data() + (h + 1) * v_dim);
        kept[as_size(h)].push_back(p);
        oracle::layer layer = c.layer;
        const index_t group = qo_heads / heads;
        layer.num_kv_heads = 1, layer.num_qo_heads = as_size(group);
        for (std::vector<float>* per_head : {&layer.alibi_slopes, &layer.sink_bias, &layer.sink_logits})
          if (!per_head->empty()) *per_head = {per_head->begin() + h * group, per_head->begin() + (h + 1) * group};
        const std::vector<oracle::answer> answers =
            oracle::attend(layer, t.q.row(p).data() + h * group * dim, p, kept[as_size(h)], keys[as_size(h)].data(),
                           values[as_size(h)].data());
        right.back().insert(right.back().end(), answers.begin(), answers.end());
        if ((p + 1) % interval != 0) continue;
        std::vector<double> weight(kept[as_size(h)].size());
        double a = 0;
        for (const oracle::answer& answer : answers) {
          a = std::max(a, answer.a);
          for (std::size_t j = 0; j < weight.size(); ++j) weight[j] += answer.weights[j];
        }
        while (static_cast<index_t>(weight.size()) > budget) {
          const auto least = std::min_element(weight.begin(), weight.end()) - weight.begin();
          for (std::ptrdiff_t j = 0; j < static_cast<std::ptrdiff_t>(weight.size()); ++j)
            if (j != least && weight[static_cast<std::size_t>(j)] - weight[static_cast<std::size_t>(least)] <=
                                  static_cast<double>(group) * 32 * u * (1 + a))
              is_sure = false;
          weight.erase(weight.begin() + least);
          kept[as_size(h)].erase(kept[as_size(h)].begin() + least);
        }
      }
      sure[as_size(p)] = is_sure;
    }

    const sinkcache::attention attention(c.params);
    for (const index_t chunk : {index_t{1}, index_t{3}, index_t{63}, index_t{65}, index_t{1000}}) {
      CAPTURE(chunk, interval, budget);
      smallest_tova cache(c.config, budget, interval);
      sinkcache::workspace workspace;
      for (index_t first = 0, n; first < c.tokens; first += n) {
        n = std::min(chunk, c.tokens - first);
        sinkcache::matrix out(n, qo_heads * v_dim);
        std::vector<float> lse(as_size(n * qo_heads));
        const sinkcache::matrix q = t.q.middleRows(first, n), k = t.k.middleRows(first, n),
                                v = t.v.middleRows(first, n);
        if (n == 1) {
          cache.append(k, v);
          attention.decode(q, cache, out, workspace, {.lse = lse});
        } else {
          attention.prefill(q, k, v, cache, out, workspace, {.lse = lse});
        }
        for (index_t j = 0; j < n && sure[as_size(std::max<index_t>(0, first + j - 1))]; ++j)
          REQUIRE(proof::far_from(right[as_size(first + j)], out.row(j).data(), lse.data() + j * qo_heads) == "");
      }
      cache.prepare();
      if (is_sure)
        for (index_t h = 0; h < heads; ++h) CHECK(cache.kept(h) == kept[as_size(h)]);
    }
  }
}

}  // namespace
