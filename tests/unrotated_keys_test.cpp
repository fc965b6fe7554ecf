// Keys that a source stores as they were before rope, rotated to their places as attention loads them: kept rows at
// scattered positions, the newest rows one after the other, both, or one list of all, with or without other sources in
// front, against the oracle at the core's bound.

#include <fmt/format.h>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "random_case.hpp"
#include "scaled_row.hpp"

namespace {

using proof::as_size;
using proof::scaled_row;
using proof::u;
using sinkcache::index_t;
using sinkcache::kv_part;
using sinkcache::position_t;

// How a source lists what it has.
enum class listing {
  kept_and_newest,  // kept rows with positions of their own, then the newest, one after the other
  one_list,         // all rows with positions of their own: a chunk's queries see it in part
  window            // consecutive rows alone, as far as a window goes
};

class unrotated : public sinkcache::kv_source {
 public:
  virtual ~unrotated() = default;
  virtual void store(const proof::tokens& t, index_t row) = 0;
  virtual std::vector<position_t> visible(index_t kv_head, position_t query) const = 0;
  virtual const std::vector<float>& keys(index_t kv_head) const = 0;  // as they are stored, of all tokens
  virtual const std::vector<float>& values(index_t kv_head) const = 0;

 protected:
  using kv_source::kv_source;
};

template <class K, class V>
class unrotated_of final : public unrotated {
 public:
  // Of the tokens before `border` each head keeps some, in runs of about `run`.
  unrotated_of(const proof::random_case& c, listing how, position_t border, double run)
      : unrotated(sinkcache::detail::geometry_of(c.config)),
        how_(how),
        border_(how == listing::window ? 0 : border),
        tokens_(c.tokens),
        window_(c.config.window),
        pinned_(static_cast<index_t>(c.layer.num_sink_tokens)),
        heads_(as_size(geometry_.num_kv_heads)) {
    if (geometry_.rotates()) {
      table_.resize(as_size(geometry_.rope->rank_angles_size()));
      geometry_.rope->rank_angles(table_);
    }
    effort::dice dice(c.seed + 17);
    const index_t k_bytes = K::block_bytes(geometry_.head_dim), v_bytes = V::block_bytes(geometry_.v_head_dim);
    for (head& one : heads_) {
      bool keeps = false;
      for (position_t p = 0; p < border_; ++p) {
        if (dice.uniform() < 1 / run) keeps = !keeps;
        one.keeps.push_back(keeps || p < pinned_);
      }
      one.keeps.resize(as_size(tokens_), true);
      one.k.assign(as_size(tokens_ * k_bytes), std::byte{0xff});
      one.v.assign(as_size(tokens_ * v_bytes), std::byte{0xff});
    }
  }

  void store(const proof::tokens& t, index_t token) override {
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    for (index_t h = 0; h < geometry_.num_kv_heads; ++h) {
      head& one = heads_[as_size(h)];
      one.keys.resize(one.keys.size() + as_size(dim)), one.values.resize(one.values.size() + as_size(v_dim));
      if (!one.keeps[as_size(token)]) continue;
      const auto row = static_cast<index_t>(one.at.size());
      std::byte* const k = one.k.data() + row * K::block_bytes(dim);
      std::byte* const v = one.v.data() + row * V::block_bytes(v_dim);
      K::encode(t.raw_k.row(token).data() + h * dim, dim, k);
      V::encode(t.v.row(token).data() + h * v_dim, v_dim, v);
      K::decode(k, 0, dim, one.keys.data() + token * dim);
      V::decode(v, 0, v_dim, one.values.data() + token * v_dim);
      one.at.push_back(token);
    }
    seen_ = token + 1;
  }
  std::vector<position_t> visible(index_t h, position_t query) const override {
    std::vector<position_t> list;
    for (position_t p = 0; p <= query; ++p)
      if (heads_[as_size(h)].keeps[as_size(p)] && (how_ != listing::window || query - p < window_)) list.push_back(p);
    return list;
  }
  const std::vector<float>& keys(index_t h) const override { return heads_[as_size(h)].keys; }
  const std::vector<float>& values(index_t h) const override { return heads_[as_size(h)].values; }

  index_t capacity() const noexcept override { return tokens_; }
  position_t min_truncate() const noexcept override { return std::min(border_, seen_); }
  index_t max_parts() const noexcept override { return 2; }
  sinkcache::plan_end plan(index_t h, position_t first, position_t last,
                           sinkcache::part_list& parts) const noexcept override {
    const head& one = heads_[as_size(h)];
    const auto stored = static_cast<index_t>(one.at.size());
    const auto kept = static_cast<index_t>(std::lower_bound(one.at.begin(), one.at.end(), border_) - one.at.begin());
    const auto pinned = static_cast<index_t>(std::lower_bound(one.at.begin(), one.at.end(), pinned_) - one.at.begin());
    kv_part part;
    part.k = {&sinkcache::reader_of<K>, one.k.data(), K::block_bytes(geometry_.head_dim)};
    part.v = {&sinkcache::reader_of<V>, one.v.data(), V::block_bytes(geometry_.v_head_dim)};
    part.rank_angles = table_;
    part.rows = how_ == listing::one_list ? stored : how_ == listing::window ? 0 : kept;
    part.at = one.at;
    if (part.rows > 0) part.first = one.at[0], part.last = one.at[as_size(part.rows - 1)] + 1;
    part.pinned = std::min(part.rows, pinned);
    parts.push_back(part);
    if (how_ == listing::one_list) return {1, static_cast<index_t>(last - first + 1)};
    part.pinned = pinned - part.pinned;
    part.at = {}, part.last = 0;
    part.first = border_;
    part.row = kept, part.rows = stored - kept;
    if (how_ == listing::window) part.seen_until = window_;
    parts.push_back(part);
    return {1, static_cast<index_t>(last - first + 1)};
  }

 private:
  struct head {
    std::vector<bool> keeps;
    std::vector<position_t> at;
    std::vector<std::byte> k, v;
    std::vector<float> keys, values;
  };

  listing how_;
  position_t border_;
  index_t tokens_, window_, pinned_;
  std::vector<float> table_;
  std::vector<head> heads_;
};

std::unique_ptr<unrotated> make_source(const proof::random_case& c, int formats, listing how, position_t border,
                                       double run) {
  using sinkcache::bf16, sinkcache::f16, sinkcache::f32;
  if (formats == 0) return std::make_unique<unrotated_of<f32, f32>>(c, how, border, run);
  if (formats == 1) return std::make_unique<unrotated_of<f16, f16>>(c, how, border, run);
  if (formats == 2) return std::make_unique<unrotated_of<bf16, f16>>(c, how, border, run);
  return std::make_unique<unrotated_of<scaled_row, scaled_row>>(c, how, border, run);
}

// Notes every weight that it is told, by query, query head and position.
class weight_notes final : public sinkcache::weight_reader {
 public:
  bool wants(position_t query) const noexcept override { return query % 3 != 0; }
  void read(const sinkcache::weight_tile& tile) noexcept override {
    for (index_t i = 0; i < tile.num_qo_heads; ++i)
      for (index_t j = 0; j < tile.n; ++j)
        notes_[{tile.query, tile.first_qo_head + i}][tile.position(j)] += tile.weight(j, i);
  }
  std::string wrong(position_t query, index_t head, const std::vector<position_t>& seen, const oracle::answer& right) {
    std::map<position_t, float>& told = notes_[{query, head}];
    for (std::size_t i = 0; i < seen.size(); ++i) {
      const double w = static_cast<double>(told[seen[i]]);
      if (!(std::abs(w - right.weights[i]) <= 16 * u * (1 + right.a)))
        return fmt::format("head {}: token {} got {} instead of {}", head, seen[i], w, right.weights[i]);
    }
    for (const auto& [position, w] : told)
      if (w != 0 && !std::binary_search(seen.begin(), seen.end(), position))
        return fmt::format("head {}: token {} got a weight, and is not seen", head, position);
    return "";
  }

 private:
  std::map<std::pair<position_t, index_t>, std::map<position_t, float>> notes_;
};

// Adds up sums that it is told, by KV head and position, and counts the queries that they are of.
class sum_notes final : public sinkcache::weight_reader {
 public:
  explicit sum_notes(index_t kv_heads) : sums_(as_size(kv_heads)), queries_(as_size(kv_heads)), seeing_(queries_) {}

  bool wants(position_t) const noexcept override { return false; }
  void read(const sinkcache::weight_tile&) noexcept override { std::abort(); }
  bool wants_sums(position_t, position_t) const noexcept override { return true; }
  void read_sums(const sinkcache::weight_sums& told) noexcept override {
    for (index_t j = 0; j < told.n; ++j)
      sums_[as_size(told.kv_head)][told.position(j)] += static_cast<double>(told.sums[as_size(j)]);
    for (index_t i = 0; i < told.num_queries; ++i) queries_[as_size(told.kv_head)].insert(told.query + i);
  }
  // Takes what a query gives away again.
  void take(position_t query, index_t kv_head, const std::vector<position_t>& seen, const oracle::answer& right) {
    std::map<position_t, double>& sums = sums_[as_size(kv_head)];
    for (std::size_t i = 0; i < seen.size(); ++i) sums[seen[i]] -= right.weights[i];
    if (!seen.empty()) seeing_[as_size(kv_head)].insert(query);
    a_ = std::max(a_, right.a);
    ++rows_;
  }
  bool same_as(const sum_notes& other) const { return sums_ == other.sums_; }
  // When all has been taken.
  std::string wrong() const {
    for (std::size_t h = 0; h < sums_.size(); ++h) {
      if (!std::includes(queries_[h].begin(), queries_[h].end(), seeing_[h].begin(), seeing_[h].end()))
        return "sums are not of all queries";
      for (const auto& [position, left] : sums_[h])
        if (!(std::abs(left) <= 16 * u * (1 + a_) * static_cast<double>(rows_) / static_cast<double>(sums_.size())))
          return fmt::format("KV head {}: the sum of token {} is {} off", h, position, left);
    }
    return "";
  }

 private:
  std::vector<std::map<position_t, double>> sums_;
  std::vector<std::set<position_t>> queries_, seeing_;
  double a_ = 0;
  index_t rows_ = 0;
};

// Runs items backwards, as several threads might.
struct backwards {
  index_t concurrency() const { return 3; }
  void run(index_t n, const sinkcache::work_ref& work) const {
    for (index_t item = n; item-- > 0;) work(item, item % 3);
  }
};

class run_of {
 public:
  run_of(const proof::random_case& c, int formats, listing how, position_t border, double run, index_t prefix = 0)
      : c_(c), prefix_(prefix), dice_(c.seed + 9), attention_(c.params) {
    all_ = proof::draw_tokens(c_, dice_, 0, c_.tokens);
    proof::random_case own = c_;
    own.config.first_position += prefix;
    own.tokens -= prefix;
    own.layer.num_sink_tokens = std::max<position_t>(0, own.layer.num_sink_tokens - prefix);
    source_ = make_source(own, formats, how, border, run);
    if (prefix == 0) return;
    sinkcache::cache_config config = c_.config;
    config.num_sink_tokens = static_cast<index_t>(std::min<position_t>(prefix, c_.layer.num_sink_tokens));
    config.window = prefix;
    front_ = std::make_unique<sinkcache::kv_cache<sinkcache::f32>>(config);
    front_->append(all_.k.topRows(prefix), all_.v.topRows(prefix));
    joined_ = std::make_unique<sinkcache::joined_source>(
        std::vector<const sinkcache::kv_source*>{front_.get(), source_.get()});
  }

  std::string run(index_t longest) {
    proof::tokens own = all_;
    own.raw_k = all_.raw_k.bottomRows(c_.tokens - prefix_);
    own.v = all_.v.bottomRows(c_.tokens - prefix_);
    for (index_t fed = 0, n; fed < c_.tokens - prefix_; fed += n) {
      n = std::min(c_.tokens - prefix_ - fed, dice_.from_to(1, dice_.one_in(2) ? longest : 12));
      for (index_t i = 0; i < n; ++i) source_->store(own, fed + i);
      const std::string wrong = ask(n);
      if (!wrong.empty()) return wrong;
    }
    return "";
  }

 private:
  const sinkcache::kv_source& keys() const {
    if (joined_ != nullptr) return *joined_;
    return *source_;
  }

  std::string ask(index_t fed) {
    const index_t askable = static_cast<index_t>(
        std::min<position_t>(fed, keys().seen() - std::max<position_t>(1, keys().min_truncate()) + 1));
    const index_t rows = askable < 2 || dice_.one_in(4) ? 1 : askable, heads = c_.params.num_qo_heads;
    const position_t first = keys().seen() - rows;
    const auto q = all_.q.middleRows(first, rows);
    sinkcache::matrix out = sinkcache::matrix::Constant(rows, heads * c_.config.v_head_dim, 77.f), again = out;
    std::vector<float> lse(as_size(rows * heads), 77.f);
    weight_notes notes;
    const bool noted = dice_.one_in(3), summed = !noted && dice_.one_in(3);
    sum_notes sums(c_.config.num_kv_heads);
    sinkcache::weight_reader* reader = nullptr;
    if (noted) reader = &notes;
    if (summed) reader = &sums;
    attention_.attend(q, keys(), out, workspace_, {.lse = lse, .weights = reader});
    const backwards executor;
    sinkcache::workspace other(executor);
    sum_notes others(c_.config.num_kv_heads);
    if (noted) reader = &notes_of_others_;
    if (summed) reader = &others;
    attention_.attend(q, keys(), again, other, {.lse = {}, .weights = reader});
    if (out != again) return "threads give other bits";
    if (summed && !sums.same_as(others)) return "threads give other sums";
    for (index_t i = 0; i < rows; ++i) {
      if (!summed && rows > 4 && !dice_.one_in(4)) continue;
      const std::string wrong = compare(first + i, out.row(i).data(), lse.data() + i * heads, noted ? &notes : nullptr,
                                        summed ? &sums : nullptr);
      if (!wrong.empty()) return fmt::format("query {} of {} rows: {}", first + i, rows, wrong);
    }
    return summed ? sums.wrong() : "";
  }

  std::string compare(position_t query, const float* out, const float* lse, weight_notes* notes, sum_notes* sums) {
    const index_t kv_heads = c_.config.num_kv_heads, dim = c_.config.head_dim, v_dim = c_.config.v_head_dim;
    const index_t group = c_.params.num_qo_heads / kv_heads;
    std::vector<oracle::answer> right;
    std::string wrong;
    for (index_t h = 0; h < kv_heads; ++h) {
      std::vector<float> keys, values;
      std::vector<position_t> seen;
      for (position_t p = 0; p < prefix_; ++p) {
        seen.push_back(p);
        keys.insert(keys.end(), all_.raw_k.row(p).data() + h * dim, all_.raw_k.row(p).data() + (h + 1) * dim);
        values.insert(values.end(), all_.v.row(p).data() + h * v_dim, all_.v.row(p).data() + (h + 1) * v_dim);
      }
      keys.insert(keys.end(), source_->keys(h).begin(), source_->keys(h).end());
      values.insert(values.end(), source_->values(h).begin(), source_->values(h).end());
      for (position_t p : source_->visible(h, query - prefix_)) seen.push_back(prefix_ + p);
      oracle::layer layer = c_.layer;
      layer.num_kv_heads = 1, layer.num_qo_heads = as_size(group), layer.k_rotated = false;
      for (std::vector<float>* per_head : {&layer.alibi_slopes, &layer.sink_bias, &layer.sink_logits})
        if (!per_head->empty()) *per_head = {per_head->begin() + h * group, per_head->begin() + (h + 1) * group};
      const std::vector<oracle::answer> answers =
          oracle::attend(layer, all_.q.row(query).data() + h * group * dim, query, seen, keys.data(), values.data());
      if (notes != nullptr && notes->wants(query))
        for (index_t i = 0; i < group && wrong.empty(); ++i)
          wrong = notes->wrong(query, h * group + i, seen, answers[as_size(i)]);
      for (std::size_t i = 0; i < answers.size() && sums != nullptr; ++i) sums->take(query, h, seen, answers[i]);
      right.insert(right.end(), answers.begin(), answers.end());
    }
    return wrong.empty() ? proof::far_from(right, out, lse) : wrong;
  }

  proof::random_case c_;
  index_t prefix_;
  effort::dice dice_;
  proof::tokens all_;
  std::unique_ptr<unrotated> source_;
  std::unique_ptr<sinkcache::kv_cache<sinkcache::f32>> front_;
  std::unique_ptr<sinkcache::joined_source> joined_;
  sinkcache::attention attention_;
  sinkcache::workspace workspace_;
  weight_notes notes_of_others_;
};

proof::random_case draw(int seed, index_t tokens) {
  proof::random_case c = proof::draw_case(static_cast<std::uint64_t>(seed), {.max_head_dim = seed % 3 == 0 ? 128 : 40,
                                                                             .max_group = seed % 4 == 0 ? 40 : 16});
  if (seed % 5 < 2) {  // whole heads that turn in vectors, which keys are multiplied in where they lie
    c.config.head_dim = seed % 2 == 0 ? 64 : 128;
    c.layer.head_dim = as_size(c.config.head_dim);
    c.layer.inv_freq.clear();
    for (index_t i = 0, pairs = seed % 5 == 0 ? c.config.head_dim / 2 : 32; i < pairs; ++i)
      c.layer.inv_freq.push_back(
          static_cast<float>(std::pow(10000., -static_cast<double>(i) / static_cast<double>(pairs))));
    c.layer.sm_scale = 1 / std::sqrt(static_cast<double>(c.config.head_dim));
    c.params.sm_scale.reset();
  }
  c.config.positions = sinkcache::positions::in_cache;
  c.layer.in_cache = true;
  c.config.rollback = 0;
  c.tokens = tokens;
  using enum sinkcache::rope_pairing;
  c.config.rope.emplace(c.layer.inv_freq, c.layer.interleaved ? interleaved : half_split, c.layer.attention_factor);
  return c;
}

}  // namespace

TEST_CASE("keys before rope: kept rows and the newest ones") {
  for (int i = 0; i < effort::cases(120); ++i) {
    const proof::random_case c = draw(3000 + i, 190);
    INFO(c.name());
    effort::dice dice(c.seed + 1);
    const double runs[] = {1, 1.5, 4, 30};
    const int formats = static_cast<int>(dice.from_to(0, 3));
    CAPTURE(formats);
    CHECK(run_of(c, formats, listing::kept_and_newest, dice.from_to(0, 150), runs[dice.from_to(0, 3)]).run(130) == "");
  }
}

TEST_CASE("keys before rope: one list, of which a chunk's queries see a part") {
  for (int i = 0; i < effort::cases(80); ++i) {
    const proof::random_case c = draw(3200 + i, 190);
    INFO(c.name());
    effort::dice dice(c.seed + 1);
    const int formats = static_cast<int>(dice.from_to(0, 3));
    CAPTURE(formats);
    CHECK(run_of(c, formats, listing::one_list, dice.from_to(0, 100), 2).run(130) == "");
  }
}

TEST_CASE("keys before rope: a window") {
  for (int i = 0; i < effort::cases(60); ++i) {
    proof::random_case c = draw(3400 + i, 230);
    c.layer.num_sink_tokens = 0;
    INFO(c.name());
    CHECK(run_of(c, i % 4, listing::window, 0, 1).run(130) == "");
  }
}

TEST_CASE("keys before rope: behind a shared prefix of rotated ones") {
  for (int i = 0; i < effort::cases(60); ++i) {
    proof::random_case c = draw(3600 + i, 190);
    effort::dice dice(c.seed + 1);
    const index_t prefix = dice.from_to(1, 60);
    c.config.first_position = std::min(c.config.first_position, sinkcache::max_position - prefix);
    c.layer.first_position = c.config.first_position;
    c.layer.num_sink_tokens = std::min<position_t>(c.layer.num_sink_tokens, prefix);
    INFO(c.name());
    CHECK(run_of(c, i % 4, dice.one_in(2) ? listing::kept_and_newest : listing::one_list, dice.from_to(0, 90), 1.5,
                 prefix)
              .run(130) == "");
  }
}

TEST_CASE("keys before rope: 300 runs of kept rows, in slices") {
  for (int i = 0; i < effort::cases(8); ++i) {
    proof::random_case c = draw(3800 + i, 1700);
    c.config.num_kv_heads = 1, c.layer.num_kv_heads = 1;
    c.config.v_head_dim = std::min<index_t>(c.config.v_head_dim, 32);
    c.layer.v_head_dim = as_size(c.config.v_head_dim);
    c.layer.num_qo_heads = i % 2 == 0 ? 1 : 8;
    c.layer.alibi_slopes.clear(), c.layer.sink_bias.clear(), c.layer.sink_logits.clear();
    proof::set_params(c);
    INFO(c.name());
    CHECK(run_of(c, i % 4, listing::kept_and_newest, 1600, 2.5).run(800) == "");
  }
}

TEST_CASE("rope: the angles of the first 64 ranks") {
  const sinkcache::rope of = sinkcache::rope::plain(40, 10000);
  std::vector<float> table(as_size(of.rank_angles_size()));
  of.rank_angles(table);
  sinkcache::rope::angles at;
  for (index_t rank = 0; rank < sinkcache::rope::num_ranks; ++rank) {
    of.angles_at(rank, true, at);
    for (index_t i = 0; i < of.width() / 2; ++i) {
      const float* const pair = table.data() + rank * of.rank_floats() + i / 16 * 32 + i % 16;
      REQUIRE((pair[0] == at.cos[i] && pair[16] == at.sin[i]));
    }
  }
  CHECK_THROWS_AS(of.rank_angles(std::span(table).first(3)), std::invalid_argument);
}
