#pragma once

// Caches, views and ropes of any configuration, and histories of calls on them, against the oracle: what a
// configuration may not be is refused, what it may be keeps what it promises. tests/fuzz_caches_test.cpp replays the
// corpus; it compiles without the examples, which the other targets need.

#include <sinkcache/key_policies.hpp>
#include <sinkcache/policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../counting_resource.hpp"
#include "../effort.hpp"
#include "../oracle.hpp"

namespace fuzz {

using namespace sinkcache;

inline void require(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

// What to do next, byte by byte; zeros after the last.
class script {
 public:
  explicit script(std::span<const std::byte> from) : from_(from) {}

  bool done() const { return at_ >= from_.size(); }
  int byte() { return done() ? 0 : static_cast<int>(from_[at_++]); }
  index_t up_to(index_t most) { return byte() % (most + 1); }
  bool one_in(int n) { return byte() % n == 1; }

  // A number as people pass them by mistake; most often one that is fine.
  index_t size(index_t usual) {
    constexpr index_t most = std::numeric_limits<index_t>::max();
    const index_t odd[] = {0, -1, -1000, 1, usual + 1, most, -most - 1, most / 2 + 1, most / 2, index_t{1} << 40};
    const int which = byte();
    return which < 200 ? usual : odd[static_cast<std::size_t>(which) % std::size(odd)];
  }
  float number(float usual) {
    const float odd[] = {
        0, -1, 1e38f, -1e38f, 1e-42f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
    const int which = byte();
    return which < 200 ? usual : odd[static_cast<std::size_t>(which) % std::size(odd)];
  }

 private:
  std::span<const std::byte> from_;
  std::size_t at_ = 0;
};

constexpr index_t heads_per_kv = 2;

// The newest query of the stream [tokens of all time], and what the library said it gets.
struct stream {
  oracle::layer layer;
  std::vector<float> keys, values;  // of every token, as they were given
  effort::dice dice{0};
  bool alike = false;  // all keys the same, so that scores tie

  index_t seen() const { return static_cast<index_t>(keys.size() / row()); }
  std::size_t row() const { return layer.num_kv_heads * layer.head_dim; }

  matrix tokens(index_t n, index_t rows_heads) {
    matrix m(n, rows_heads * static_cast<index_t>(layer.head_dim));
    for (index_t i = 0; i < m.size(); ++i) m.data()[i] = alike ? 0.5f : dice.signed_unit();
    return m;
  }
  void note(const matrix& k, const matrix& v) {
    keys.insert(keys.end(), k.data(), k.data() + k.size());
    values.insert(values.end(), v.data(), v.data() + v.size());
  }
  void cut(index_t seen) { keys.resize(static_cast<std::size_t>(seen) * row()), values.resize(keys.size()); }

  // One query's outputs of the query heads of a KV head, which sees these.
  void check(const matrix& q, index_t i, position_t query, index_t kv_head, const std::vector<position_t>& visible,
             const matrix& out, double loose) const {
    const auto exact = oracle::attend(layer, q.row(i).data(), query, visible, keys.data(), values.data());
    for (index_t head = kv_head * heads_per_kv; head < (kv_head + 1) * heads_per_kv; ++head) {
      const oracle::answer& e = exact[static_cast<std::size_t>(head)];
      const double bound = 16 * 0x1p-24 * (1 + e.a) * e.v_max + loose;
      for (std::size_t d = 0; d < layer.head_dim; ++d) {
        const auto found =
            static_cast<double>(out(i, head * static_cast<index_t>(layer.head_dim) + static_cast<index_t>(d)));
        require(std::abs(found - e.out[d]) <= bound, "an output is not what the oracle says");
      }
    }
  }
};

// What each kind of cache keeps.
template <class Cache>
std::vector<position_t> visible(const Cache& cache, index_t kv_head, position_t query) {
  std::vector<position_t> list;
  if constexpr (requires { cache.kept(kv_head); }) {
    for (const position_t p : cache.kept(kv_head))
      if (p <= query) list.push_back(p);
  } else {
    const cache_config of = cache.config();
    for (position_t p = 0; p <= query; ++p)
      if (p < of.num_sink_tokens || p > query - of.window) list.push_back(p);
  }
  return list;
}

// A history of calls on one cache; `others` are fed the same token by token, and keep the same sets.
template <class Cache>
class history {
 public:
  history(script& next, stream& s, Cache cache, std::vector<Cache> others, counting_resource& resource, double loose)
      : next_(next), s_(s), cache_(std::move(cache)), others_(std::move(others)), resource_(resource), loose_(loose) {}

  void run() {
    for (int calls = 0; calls < 60 && !next_.done() && s_.seen() < 400; ++calls) {
      const std::vector<std::vector<position_t>> before = sets();
      const position_t seen = cache_.seen();
      bool returns = false;
      const int call = next_.byte();
      switch (call % 10) {
        case 0:
          feed(next_.up_to(40) + 1, 0);
          break;
        case 1:
        case 2:
          feed(next_.up_to(90) + 1, 1);
          break;
        case 3:
        case 4:
          feed(next_.up_to(20) + 1, call / 10 % 3 == 1 ? 3 : 2);
          break;
        case 5:
          returns = true, truncate();
          break;
        case 6:
          cache_ = cache_.clone();
          break;
        case 7: {
          Cache moved(std::move(cache_));
          require(cache_.seen() == 0 && cache_.nbytes() == 0, "what was moved from holds tokens");
          cache_ = std::move(moved);
          break;
        }
        case 8:
          pin();
          break;
        default:
          if (!next_.one_in(4)) break;
          returns = true;
          clear();
      }
      check(before, seen, returns);
    }
  }

 private:
  static constexpr bool scored = requires(Cache & c) { c.kept(index_t{0}); };

  index_t kv_heads() const { return static_cast<index_t>(s_.layer.num_kv_heads); }
  std::vector<std::vector<position_t>> sets() const {
    std::vector<std::vector<position_t>> all;
    for (index_t h = 0; h < kv_heads(); ++h) all.push_back(visible(cache_, h, cache_.seen() - 1));
    return all;
  }
  bool learns() { return cache_.learner() != nullptr; }

  // Appends (0), prefills (1), or decodes one by one, each query by itself (2) or in a batch with the others (3).
  void feed(index_t n, int how) {
    const matrix k = s_.tokens(n, kv_heads()), v = s_.tokens(n, kv_heads());
    const matrix q = s_.tokens(n, kv_heads() * heads_per_kv);
    matrix out(n, q.cols()), other(1, q.cols());
    const position_t first = s_.seen();
    if (how == 0 && learns()) how = 1;
    if (how == 0) cache_.append(k, v);
    if (how == 1) attention_.prefill(q, k, v, cache_, out, workspace_);
    for (index_t i = 0; i < n; ++i) {
      s_.note(k.row(i), v.row(i));
      if (how >= 2) cache_.append(k.middleRows(i, 1), v.middleRows(i, 1));
      if (how == 2) attention_.decode(q.middleRows(i, 1), cache_, out.middleRows(i, 1), workspace_);
      for (Cache& each : others_) {
        each.append(k.middleRows(i, 1), v.middleRows(i, 1));
        if (how != 3 && each.learner() != nullptr) attention_.decode(q.middleRows(i, 1), each, other, workspace_);
      }
      if (how == 3) batch(q, i, out);
      if (how >= 2 && i + 1 < n)
        for (index_t h = 0; h < kv_heads(); ++h)
          s_.check(q, i, first + i, h, visible(cache_, h, first + i), out, loose_);
    }
    // Of a scored cache only those queries that saw what is there now.
    const index_t from = how == 0 ? n : how == 1 && !scored ? 0 : n - 1;
    for (index_t i = from; i < n; i += std::max<index_t>(1, n / 4))
      for (index_t h = 0; h < kv_heads(); ++h) s_.check(q, i, first + i, h, visible(cache_, h, first + i), out, loose_);
  }

  void batch(const matrix& q, index_t i, matrix& out) {
    const std::span<const float> query(q.row(i).data(), static_cast<std::size_t>(q.cols()));
    std::vector<decode_item> items{{query, &cache_, {out.row(i).data(), query.size()}, {}, cache_.learner()}};
    std::vector<std::vector<float>> unread(others_.size(), std::vector<float>(query.size()));
    for (std::size_t j = 0; j < others_.size(); ++j)
      items.push_back({query, &others_[j], unread[j], {}, others_[j].learner()});
    attention_.decode(items, workspace_);
  }

  void truncate() {
    const position_t seen = cache_.seen(), to = std::max<position_t>(0, seen - next_.up_to(80));
    const bool allowed = to >= cache_.min_truncate();
    if (allowed) {
      cache_.truncate(to);
      for (Cache& each : others_) {
        require(to >= each.min_truncate(), "a chunking allows a rollback that another does not");
        each.truncate(to);
      }
      s_.cut(to);
    } else if (scored || to > pinned_by_config()) {
      require(!cache_.try_truncate(to).ok() && cache_.seen() == seen, "a refused truncate changed something");
    }
  }
  position_t pinned_by_config() const {
    if constexpr (scored)
      return cache_.num_sink_tokens();
    else
      return cache_.config().num_sink_tokens;
  }
  void clear() {
    cache_.clear();
    for (Cache& each : others_) each.clear();
    s_.cut(0);
    pins_.clear();
  }
  void pin() {
    if constexpr (scored) {
      const position_t at = cache_.seen() + next_.up_to(60) - 40;
      bool pinned = false, of_other = false;
      const status found = cache_.try_pin(at, pinned);
      for (Cache& each : others_)
        require(each.try_pin(at, of_other).ok() == found.ok() && of_other == pinned, "pin depends on the chunking");
      if (pinned) pins_.push_back(at);
    }
  }

  void check(const std::vector<std::vector<position_t>>& before, position_t seen, bool returns) {
    require(cache_.seen() == s_.seen(), "seen() is off");
    std::size_t bytes = cache_.nbytes();
    for (const Cache& each : others_) bytes += each.nbytes();
    require(resource_.bytes == bytes, "nbytes() is not what is held");
    const std::vector<std::vector<position_t>> now = sets();
    for (index_t h = 0; h < kv_heads(); ++h) {
      const std::vector<position_t>& set = now[static_cast<std::size_t>(h)];
      const std::vector<position_t>& old = before[static_cast<std::size_t>(h)];
      const auto holds = [&](position_t p) { return std::binary_search(set.begin(), set.end(), p); };
      require(std::is_sorted(set.begin(), set.end()), "rows are not in the order of the stream");
      require(static_cast<index_t>(set.size()) <= cache_.capacity(), "more rows than capacity()");
      for (position_t p = 0; p < std::min(pinned_by_config(), cache_.seen()); ++p)
        require(holds(p), "a pinned token is gone");
      for (const position_t p : set)
        require(returns || p >= seen || std::binary_search(old.begin(), old.end(), p), "an evicted token is back");
      if constexpr (scored) {
        const eviction& rules = cache_.rules();
        if (!rules.adaptive)
          require(cache_.seen() == 0 || static_cast<index_t>(set.size()) <= most_left(h) + since_event(),
                  "more rows than budget after an event");
        const bool is_short = !rules.short_heads.empty() && rules.short_heads[static_cast<std::size_t>(h)];
        const position_t newest =
            is_short ? most_left(h) - cache_.num_sink_tokens() - index_t(pins_.size()) : rules.recent;
        for (position_t p = std::max<position_t>(0, cache_.seen() - newest); p < cache_.seen(); ++p)
          require(holds(p), is_short ? "a short head lacks a token of its window" : "a recent token is gone");
        for (const position_t p : pins_)
          if (p < cache_.seen() && !returns) require(holds(p) || p >= seen, "a token that was pinned is gone");
        for (const Cache& each : others_) {
          const auto of_other = each.kept(h);
          require(std::equal(set.begin(), set.end(), of_other.begin(), of_other.end()),
                  "another chunking, or the other positions, kept another set");
        }
      }
    }
    if constexpr (scored) {
      std::size_t rows = 0;
      for (const std::vector<position_t>& set : now) rows += set.size();
      require(cache_.seen() == 0 || !cache_.rules().adaptive ||
                  static_cast<index_t>(rows) <= kv_heads() * (most_left(0) + since_event()),
              "heads that share a budget have more rows than it");
    }
    if (returns) std::erase_if(pins_, [&](position_t p) { return p >= cache_.seen(); });
  }

  // Rows that an event leaves in a head, at most.
  index_t most_left(index_t kv_head) const {
    const eviction& rules = cache_.rules();
    if (rules.bound) return rules.hard_budget;
    return rules.head_budgets.empty() ? rules.budget : rules.head_budgets[static_cast<std::size_t>(kv_head)];
  }
  index_t since_event() const { return static_cast<index_t>((cache_.seen() - 1) % cache_.rules().interval + 1); }

  script& next_;
  stream& s_;
  Cache cache_;
  std::vector<Cache> others_;
  counting_resource& resource_;
  double loose_;
  attention attention_{{.num_qo_heads = static_cast<index_t>(s_.layer.num_qo_heads),
                        .softmax = softmax_variant::softmax1(),
                        .sm_scale = 1.f}};
  workspace workspace_;
  std::vector<position_t> pins_;
};

inline std::optional<rope> some_rope(script& next, index_t dim) {
  try {
    switch (next.byte() % 6) {
      case 0:
        return rope::none();
      case 1:
        return rope::plain(next.size(dim), static_cast<double>(next.number(1e4f)));
      case 2:
        return rope::linear(next.size(dim), 1e4, static_cast<double>(next.number(4)));
      case 3:
        return rope::llama3(next.size(dim), 1e4,
                            {static_cast<double>(next.number(8)), static_cast<double>(next.number(1)),
                             static_cast<double>(next.number(4)), static_cast<double>(next.number(8192))});
      case 4:
        return rope::yarn(next.size(dim), 1e4,
                          {.factor = static_cast<double>(next.number(4)),
                           .original_max_position_embeddings = static_cast<double>(next.number(4096)),
                           .beta_fast = static_cast<double>(next.number(32)),
                           .beta_slow = static_cast<double>(next.number(1))});
      default: {
        std::vector<float> inv_freq(static_cast<std::size_t>(next.up_to(dim / 2)));
        for (float& f : inv_freq) f = next.number(0.1f);
        return rope(inv_freq, next.one_in(2) ? rope_pairing::interleaved : rope_pairing::half_split,
                    next.number(1.25f));
      }
    }
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
}

inline void view(script& next, const cache_config& config) {
  const kv_layout layout{{next.size(8), next.size(16), next.size(1)}, {next.size(8), next.size(16), next.size(1)}};
  status found;
  auto made = kv_view<f32>::try_create(config, layout, found);
  require(made.has_value() == found.ok(), "try_create says other than its status");
  if (!made) return;
  static const std::vector<float> memory(4096, 0.5f);
  std::vector<kv_piece> pieces(static_cast<std::size_t>(next.up_to(5)));
  for (kv_piece& piece : pieces)
    piece = {next.size(next.byte()), next.size(next.up_to(9)), memory.data(), memory.data()};
  std::vector<std::int32_t> table(static_cast<std::size_t>(next.up_to(4)));
  for (std::int32_t& page : table) page = next.byte() % 6 - 1;
  const kv_pages pages{memory.data(), memory.data(), next.size(64), next.size(64),
                       next.size(4),  next.size(4),  table,         next.size(0)};
  const position_t seen = next.size(40);
  found = next.one_in(2) ? made->try_assign(pages, seen) : made->try_assign(pieces, seen);
  if (!found) return;
  // Nothing is read: strides and pages may lead anywhere. What is listed has to follow from what was given.
  require(made->num_visible(made->seen() - 1) <= made->capacity(), "more is visible than capacity()");
  require(made->min_truncate() >= 0 && made->min_truncate() <= made->seen(), "min_truncate() is out of range");
  std::vector<kv_part> parts(static_cast<std::size_t>(made->max_parts()));
  part_list list(parts.data(), made->max_parts());
  const position_t query = made->seen() - 1;
  const plan_end end = made->plan(0, query, query, list);
  require(end.queries == 1 && end.kv_heads >= 1, "a plan ends before it begins");
  for (const kv_part& part : list)
    require(part.rows > 0 && part.first >= 0 && part.first + part.rows <= max_position, "a part is out of range");
}

// How budgets are shared out: alike, by head, between heads as scores have it, or as long as a bound allows.
inline void share_out(script& next, int how, index_t kv_heads, eviction& rules) {
  const auto by_head = [&](auto& of_heads, const auto& some) {
    for (index_t h = 0; h < kv_heads; ++h) of_heads.push_back(some());
    if (next.byte() >= 240) of_heads.pop_back();
  };
  if (how == 1) {
    by_head(rules.head_budgets, [&, least = rules.budget] { return next.size(least + next.up_to(9)); });
    rules.budget = next.size(0);
  }
  if (how == 2) by_head(rules.short_heads, [&] { return next.one_in(2); });
  if (how == 3) rules.adaptive = static_cast<double>(next.number(0.2f));
  if (how == 4) {
    rules.bound = static_cast<double>(next.number(0.01f * static_cast<float>(next.up_to(100))));
    rules.hard_budget = next.size(rules.budget + next.up_to(30));
  }
}

inline void scored(script& next, const cache_config& given, int sharing, stream& s) {
  cache_config config = given;
  config.window = next.size(0);
  eviction rules{.budget = next.size(12 + next.up_to(20)),
                 .recent = next.size(next.up_to(6)),
                 .interval = next.size(1 + next.up_to(11)),
                 .num_qo_heads = next.size(given.num_kv_heads * heads_per_kv)};
  int which = next.byte() % 8;
  if (sharing == 3 && which < 4) which = 5 + which % 2;  // of those whose scores can be compared
  share_out(next, sharing, given.num_kv_heads, rules);
  const auto scorer = [&]() -> std::shared_ptr<const token_scorer> {
    switch (which) {
      case 0:
        return std::make_shared<policies::random>();
      case 1:
        return std::make_shared<policies::knorm>();
      case 2:
        return std::make_shared<policies::keydiff>();
      case 3:
        return std::make_shared<policies::lagkv>();
      case 4:
        return std::make_shared<policies::tova>();
      case 5:
        return std::make_shared<policies::snapkv>();
      case 6:
        return std::make_shared<policies::h2o>();
      default:
        return std::make_shared<policies::mean_key>();
    }
  }();
  // Those read keys as they are stored: sets are equal under both positions to the bit where nothing turns.
  if (which == 2 || which == 3 || which == 7) config.rope = rope::none(), s.layer.inv_freq.clear();
  status found = scored_kv_cache<f32>::validate(config, rules, scorer.get());
  if (!found || scored_kv_cache<f32>::required_bytes(config, rules, *scorer) > 1 << 24) return;
  counting_resource resource;
  const auto make = [&](const cache_config& of) { return scored_kv_cache<f32>(of, rules, scorer, &resource); };
  // In prefill H2O adds up in another order: its sets are decode's as far as logits are.
  std::vector<scored_kv_cache<f32>> others;
  if (which != 6) others.push_back(make(config));
  cache_config other = config;
  other.positions = config.positions == positions::in_cache ? positions::absolute : positions::in_cache;
  if ((which <= 3 || which == 7) && !rules.bound) others.push_back(make(other));  // a bound asks for weights
  history<scored_kv_cache<f32>>(next, s, make(config), std::move(others), resource, 0).run();
}

inline void caches(std::span<const std::byte> input) {
  script next(input);
  const int first = next.byte(), kind = first % 6;
  const index_t dim = 2 * (1 + next.up_to(3)), kv_heads = 1 + next.up_to(1);
  cache_config config{.num_kv_heads = next.size(kv_heads),
                      .head_dim = next.size(dim),
                      .num_sink_tokens = next.size(next.up_to(4)),
                      .window = next.size(1 + next.up_to(40)),
                      .positions = next.one_in(2) ? positions::absolute : positions::in_cache,
                      .rope = rope::plain(dim, 100.0),
                      .first_position = next.size(next.up_to(200)),
                      .rollback = next.size(next.up_to(30)),
                      .recent = next.size(next.up_to(9))};
  if (kind == 5) {
    if (const std::optional<rope> given = some_rope(next, dim)) config.rope = given;
    validate(config).or_fail();
    return;
  }
  if (kind == 4) return view(next, config);
  stream s;
  s.layer.num_kv_heads = static_cast<std::size_t>(kv_heads);
  s.layer.num_qo_heads = static_cast<std::size_t>(kv_heads * heads_per_kv);
  s.layer.head_dim = s.layer.v_head_dim = static_cast<std::size_t>(dim);
  for (index_t i = 0; i < dim / 2; ++i)
    s.layer.inv_freq.push_back(
        static_cast<float>(std::pow(100.0, -2.0 * static_cast<double>(i) / static_cast<double>(dim))));
  s.layer.in_cache = config.positions == positions::in_cache;
  s.layer.k_rotated = false;
  s.layer.first_position = config.first_position;
  s.layer.sink_logits.assign(s.layer.num_qo_heads, 0.f);
  s.dice = effort::dice(static_cast<std::uint64_t>(next.byte()));
  s.alike = next.one_in(8);
  if (config.num_kv_heads != kv_heads || config.head_dim != dim || config.first_position > 1 << 20) {
    validate(config).or_fail();  // not one that the oracle could follow
    return;
  }
  if (kind >= 2) return scored(next, config, first / 6 % 5, s);
  counting_resource resource;
  const auto run = [&]<class Cache>(std::type_identity<Cache>, double loose) {
    if (!Cache::validate(config)) return;
    if (Cache::required_bytes(config) > 1 << 24) return;
    history<Cache>(next, s, Cache(config, &resource), {}, resource, loose).run();
  };
  if (kind == 0) run(std::type_identity<kv_cache<f32>>(), 0);
  if (kind == 1) run(std::type_identity<kv_cache<q8>>(), 0.1);
}

// Refusals are fine.
inline void cache_target(std::span<const std::byte> input) {
  try {
    caches(input);
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace fuzz
