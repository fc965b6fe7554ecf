// Caches that evict by score in formats of few bits: which token lies where, byte by byte; attention against the oracle
// on what is stored; chunks, rollback, pins, sizes.

#include <fmt/format.h>
#include <sinkcache/fmt.hpp>
#include <sinkcache/named_policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "catch.hpp"
#include "counting_resource.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "plain_quantized.hpp"
#include "random_case.hpp"

namespace proof {
namespace {

using scorer = std::shared_ptr<const token_scorer>;
using bytes = std::vector<std::byte>;

const char* const names[] = {"random",  "h2o",   "tova", "snapkv", "knorm",
                             "keydiff", "lagkv", "gkv",  "rkv",    "expected_attention"};
scorer policy(const std::string& name) {
  status found;
  std::vector<policy_parameter> given;
  if (name == "expected_attention") given = {{"T", "40"}};
  scorer made = make_policy(name, given, found);
  found.or_fail();
  return made;
}

// What of the cache a test asks that its base does not tell.
class open_scored {
 public:
  virtual ~open_scored() = default;
  virtual any_kv_cache& get() = 0;
  virtual std::span<const position_t> kept(index_t head) const = 0;
  virtual status pin(position_t position, bool& pinned) = 0;
  virtual void watch(eviction_reader* reader) = 0;
  virtual std::unique_ptr<open_scored> clone() const = 0;

  std::shared_ptr<counting_resource> memory = std::make_shared<counting_resource>();
};
template <class K, class V>
class open_scored_of final : public open_scored {
 public:
  open_scored_of(const cache_config& config, const eviction& rules, const scorer& of)
      : cache_(config, rules, of, memory.get()) {}
  open_scored_of(scored_kv_cache<K, V>&& cache, std::shared_ptr<counting_resource> of) : cache_(std::move(cache)) {
    memory = std::move(of);
  }
  any_kv_cache& get() override { return cache_; }
  std::span<const position_t> kept(index_t head) const override { return cache_.kept(head); }
  status pin(position_t position, bool& pinned) override { return cache_.try_pin(position, pinned); }
  void watch(eviction_reader* reader) override { cache_.watch(reader); }
  std::unique_ptr<open_scored> clone() const override {
    return std::make_unique<open_scored_of>(cache_.clone(), memory);
  }

 private:
  scored_kv_cache<K, V> cache_;
};

struct pair {
  const char *few, *whole;  // as a printed row has them
};
const pair pairs[] = {{"q8/q4", "bf16/bf16"}, {"q4/q2", "bf16/bf16"}, {"f16/q6", "f16/bf16"}, {"q8/f32", "f32/f32"}};
std::unique_ptr<open_scored> make(index_t pair, const cache_config& config, const eviction& rules, const scorer& of) {
  if (pair == 0) return std::make_unique<open_scored_of<q8, q4>>(config, rules, of);
  if (pair == 1) return std::make_unique<open_scored_of<q4, q2>>(config, rules, of);
  if (pair == 2) return std::make_unique<open_scored_of<f16, q6>>(config, rules, of);
  return std::make_unique<open_scored_of<tiered<q8, f32>, f32>>(config, rules, of);
}

// What a query reads, in the order of the plan.
struct read_row {
  std::string formats;
  bytes k, v;

  bool operator==(const read_row&) const = default;
};
std::map<position_t, read_row> read(const kv_source& source, position_t query, index_t head, float* keys,
                                    float* values) {
  const kv_geometry& of = source.geometry();
  std::vector<kv_part> memory(as_size(source.max_parts()));
  part_list parts(memory.data(), source.max_parts());
  source.plan(head, query, query, parts);
  std::map<position_t, read_row> rows;
  for (const kv_part& part : parts)
    for (index_t i = 0; i < part.rows; ++i) {
      const position_t p = part.position(i);
      if (query - p < part.seen_from || query - p >= part.seen_until) continue;
      if (!rows.empty() && rows.rbegin()->first >= p) FAIL("oldest first");
      const auto stored = [&](const kv_rows& from, index_t dim, const row_transform* transform, float* to) {
        index_t row = part.row + i;
        kv_rows page = from;
        if (!part.pages.empty()) page.base += part.pages[as_size(row)] * from.page, row = 0;
        if (to != nullptr) {
          std::vector<float> decoded(as_size(dim + 16));
          from.reader->load(page, row, 1, dim, dim + 16, decoded.data());
          if (transform != nullptr) transform->undo(decoded.data(), dim);
          std::copy_n(decoded.data(), dim, to + (p * of.num_kv_heads + head) * dim);
        }
        const std::byte* const at = page.base + row * from.block;
        return bytes(at, at + from.reader->block_bytes(dim));
      };
      read_row& row = rows[p];
      row.formats = fmt::format("{}/{}", part.k.reader->name, part.v.reader->name);
      row.k = stored(part.k, of.head_dim, of.k_transform, keys);
      row.v = stored(part.v, of.v_head_dim, of.v_transform, values);
    }
  return rows;
}

// What events did.
struct event_log final : eviction_reader {
  std::map<std::pair<position_t, index_t>, std::vector<position_t>> kept;

  void read(const eviction_event& e) noexcept override {
    auto& of_head = kept[{e.seen, e.kv_head}];
    of_head.clear();
    for (std::size_t i = 0; i < e.at.size(); ++i)
      if (e.leaves[i] == 0) of_head.push_back(e.at[i]);
  }
};

// 16 u (1 + A) max|v| and 16 u (1 + A), four times that, for transforms round too; and integers
// (tiered_cache_test.cpp).
std::string far_from(const oracle::answer& e, const float* out, float lse, double head_dim) {
  const double of_logits = 4 * 16 * u * (1 + e.a) + std::sqrt(head_dim) / 65278 * e.a;
  const double bound = 4 * 16 * u * (1 + e.a) * std::sqrt(static_cast<double>(e.out.size())) + 2 * of_logits + 3e-4;
  for (const double x : e.out) {
    const double error = std::abs(static_cast<double>(*out++) - x);
    if (!(error <= bound * e.v_max))
      return fmt::format("output {} instead of {}, {} times the bound", out[-1], x, error / (bound * e.v_max));
  }
  const double error = static_cast<double>(lse) == e.lse ? 0 : std::abs(static_cast<double>(lse) - e.lse);
  return error <= of_logits ? "" : fmt::format("lse {} instead of {}", lse, e.lse);
}

// A chunk, as decode or prefill has it.
void feed(const attention& a, const tokens& t, index_t first, index_t n, any_kv_cache& cache, matrix& out,
          std::vector<float>& lse, workspace& w) {
  const matrix q = t.q.middleRows(first, n), k = t.k.middleRows(first, n), v = t.v.middleRows(first, n);
  if (n > 1) return a.prefill(q, k, v, cache, out, w, {.lse = lse});
  cache.append(k, v);
  a.decode(q, cache, out, w, {.lse = lse});
}

TEST_CASE("scored tiers: attention against the oracle on what is stored") {
  for (int i = 0; i < effort::cases(60); ++i) {
    const auto seed = static_cast<std::uint64_t>(90000 + i);
    random_case c = draw_case(
        seed,
        {.max_head_dim = 130, .max_group = i % 4 == 0 ? 40 : 6, .max_sinks = 5, .max_window = 90, .max_tokens = 300});
    effort::dice dice(seed);
    c.config.window = 0;
    c.config.recent = one_of<index_t>(dice, {0, 1, 5, 20, 64});
    c.config.rollback = one_of<index_t>(dice, {0, 3, 20, 63});
    c.params.sm_scale = static_cast<float>(c.layer.sm_scale);
    c.layer.sm_scale = static_cast<double>(*c.params.sm_scale);
    c.layer.k_rotated = !(c.layer.in_cache && c.config.rope && c.config.rope->width() > 0);
    c.logit_scale = std::min(c.logit_scale, 100.);
    const std::string name = names[dice.from_to(0, std::size(names) - 1)];
    const scorer of = policy(name);
    eviction rules{.recent = one_of<index_t>(dice, {0, 4, 30}),
                   .interval = one_of<index_t>(dice, {1, 5, 16, 33}),
                   .num_qo_heads = c.params.num_qo_heads};
    rules.budget = c.config.num_sink_tokens + std::max(rules.recent, of->needs().window) + dice.from_to(12, 60);
    const index_t pair = dice.from_to(0, std::size(pairs) - 1), tokens = dice.from_to(40, 260);
    INFO(c.name() << ", recent " << c.config.recent << ", " << name << ", budget " << rules.budget << ", interval "
                  << rules.interval << ", " << rules.recent << " kept, " << pairs[pair].few);
    const std::unique_ptr<open_scored> cache = make(pair, c.config, rules, of);
    const attention attention(c.params);
    workspace w;
    const proof::tokens t = draw_tokens(c, dice, 0, tokens);
    const index_t heads = c.params.num_qo_heads, kv_heads = c.config.num_kv_heads, group = heads / kv_heads;
    const index_t dim = c.config.head_dim, v_dim = c.config.v_head_dim;
    std::map<position_t, bool> spared;  // pinned in time
    for (index_t first = 0, n; first < tokens; first += n) {
      if (dice.one_in(8)) {
        const position_t at = std::max<position_t>(0, first + dice.from_to(-80, 10));
        bool pinned;
        REQUIRE(cache->pin(at, pinned));
        if (pinned) spared.emplace(at, first <= at + c.config.recent);
      }
      n = std::min<index_t>(tokens - first, dice.one_in(2) ? 1 : dice.from_to(2, 90));
      matrix out(n, heads * v_dim);
      std::vector<float> lse(as_size(n * heads));
      feed(attention, t, first, n, cache->get(), out, lse, w);
      for (position_t query = first + n - 1; query >= std::max<position_t>(first, cache->get().oldest_query());
           query -= dice.from_to(1, 30)) {
        std::vector<float> keys(as_size((query + 1) * kv_heads * dim)), values(as_size((query + 1) * kv_heads * v_dim));
        for (index_t h = 0; h < kv_heads; ++h) {
          INFO("query " << query << ", KV head " << h);
          const auto rows = read(cache->get(), query, h, keys.data(), values.data());
          std::vector<position_t> expected, found;
          for (const position_t p : cache->kept(h))
            if (p <= query) expected.push_back(p);
          for (const auto& [p, row] : rows) {
            const auto pin = spared.find(p);
            const bool whole =
                p < c.config.num_sink_tokens || query - p < c.config.recent || (pin != spared.end() && pin->second);
            if (row.formats != (whole ? pairs[pair].whole : pairs[pair].few))
              FAIL("position " << p << ": " << row.formats);
            found.push_back(p);
          }
          REQUIRE(found == expected);
          const auto answers =
              oracle::attend(c.layer, t.q.row(query).data(), query, expected, keys.data(), values.data());
          for (index_t head = h * group; head < (h + 1) * group; ++head) {
            INFO("head " << head);
            const std::string wrong = far_from(answers[as_size(head)], &out(query - first, head * v_dim),
                                               lse[as_size((query - first) * heads + head)], static_cast<double>(dim));
            if (!wrong.empty()) FAIL(wrong);
          }
        }
        if (!dice.one_in(3)) break;
      }
    }
  }
}

cache_config plain_config(index_t heads, index_t dim, index_t recent, index_t rollback) {
  return {.num_kv_heads = heads,
          .head_dim = dim,
          .num_sink_tokens = 3,
          .rope = rope::none(),
          .rollback = rollback,
          .recent = recent};
}

// A row after its way through bf16, unless it was encoded at once.
bytes plain_few(int bits, const float* row, index_t dim, bool spared_before) {
  std::vector<float> y(row, row + dim);
  hadamard.apply(y.data(), dim);
  if (spared_before)
    for (float& x : y) x = static_cast<float>(plain::rounded<bf16>(x));
  return plain::quantized_row(bits, y).bytes();
}
bytes plain_whole(const float* row, index_t dim) {
  std::vector<float> y(row, row + dim);
  hadamard.apply(y.data(), dim);
  bytes to(as_size(bf16::block_bytes(dim)));
  bf16::encode(y.data(), dim, to.data());
  return to;
}

tokens random_tokens(std::uint64_t seed, index_t n, index_t heads, index_t group, index_t dim) {
  effort::dice dice(seed);
  tokens t;
  for (auto [m, columns] : {std::pair(&t.q, heads * group * dim), {&t.k, heads * dim}, {&t.v, heads * dim}}) {
    m->resize(n, columns);
    for (index_t i = 0; i < m->size(); ++i) m->data()[i] = static_cast<float>(normal(dice));
  }
  return t;
}

TEST_CASE("scored tiers: the same sets and the same bytes in whatever chunks tokens come") {
  constexpr index_t heads = 2, group = 3, n = 230;
  for (const std::string name : names)
    for (const index_t dim : {33, 80})
      for (const index_t recent : {0, 9, 40}) {
        if (dim == 80 && recent != 9) continue;
        const tokens t = random_tokens(name.size(), n, heads, group, dim);
        const attention a({.num_qo_heads = heads * group});
        workspace w;
        matrix out(n, heads * group * dim);
        std::vector<float> lse(as_size(n * heads * group));
        const eviction rules{.budget = 50, .recent = 6, .interval = 16, .num_qo_heads = heads * group};
        event_log first_log;
        bytes first_arena;
        matrix first_out(n, out.cols());
        for (const index_t chunk : {index_t{1}, index_t{3}, recent - 1, recent + 1, index_t{1000}}) {
          if (chunk < 1) continue;
          INFO(name << ", head_dim " << dim << ", recent " << recent << ", chunks of " << chunk);
          event_log log;
          // Blocks of prefill end where a row would be written over that their first query sees, and at events.
          open_scored_of<q6, q4> cache(plain_config(heads, dim, recent, 2), rules, policy(name));
          cache.watch(&log);
          bool pinned = false;
          REQUIRE(cache.pin(60, pinned));  // yet to come
          REQUIRE(pinned);
          for (index_t i = 0, some; i < n; i += some) {
            some = std::min(chunk, n - i);
            matrix o(some, out.cols());
            std::vector<float> l(as_size(some * heads * group));
            feed(a, t, i, some, cache.get(), o, l, w);
            if (chunk == 1) first_out.row(i) = o;
            REQUIRE((first_out.middleRows(i, some) - o).cwiseAbs().maxCoeff() < 2e-4f);
            position_t wrong = -1;
            if (i % 7 != 0 && i + some < n) continue;
            for (index_t h = 0; h < heads; ++h)
              for (const auto& [p, row] : read(cache.get(), i + some - 1, h, nullptr, nullptr)) {
                const bool whole = p < 3 || p == 60 || i + some - 1 - p < recent;
                const float *key = t.k.row(p).data() + h * dim, *value = t.v.row(p).data() + h * dim;
                if (row.formats != (whole ? "bf16/bf16" : "q6/q4") ||
                    row.k != (whole ? plain_whole(key, dim) : plain_few(6, key, dim, recent > 0)) ||
                    row.v != (whole ? plain_whole(value, dim) : plain_few(4, value, dim, recent > 0)))
                  wrong = p;
              }
            CAPTURE(i);
            REQUIRE(wrong == -1);
          }
          // A policy that learns nothing has nothing that could be another in its last bits.
          const bytes arena(static_cast<const std::byte*>(cache.memory->last),
                            static_cast<const std::byte*>(cache.memory->last) + cache.memory->bytes);
          if (chunk == 1) first_log = log, first_arena = arena;
          REQUIRE(log.kept == first_log.kept);
          REQUIRE(static_cast<index_t>(log.kept.size()) == heads * 11);  // at 64, 80, to 224
          if (cache.get().learner() == nullptr) REQUIRE((arena == first_arena));
        }
      }
}

// A scorer that is told nothing of what it carried.
struct forgetful final : token_scorer {
  scorer_needs needs() const noexcept override { return of.needs(); }
  index_t scratch_floats(const scored_sizes& sizes) const noexcept override { return of.scratch_floats(sizes); }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    std::fill(head.carried.begin(), head.carried.end(), std::numeric_limits<float>::quiet_NaN());
    of.score(head, scores);
  }
  policies::rkv of{4, 3, 0.01f};
};
struct score_log final : eviction_reader {
  std::map<std::pair<position_t, index_t>, std::vector<float>> scores;

  void read(const eviction_event& e) noexcept override {
    scores[{e.seen, e.kv_head}].assign(e.scores.begin(), e.scores.end());
  }
};

TEST_CASE("scored tiers: the copies that rkv remembers are those it would find") {
  constexpr index_t heads = 2, group = 2, n = 400, dim = 12;
  for (int i = 0; i < effort::cases(40); ++i) {
    effort::dice dice(static_cast<std::uint64_t>(7100 + i));
    tokens t = random_tokens(static_cast<std::uint64_t>(7200 + i), n, heads, group, dim);
    // Keys around a few directions: cosines on both sides of one half, that codes of 2 bits move over it.
    const matrix directions = random_tokens(7300, 6, heads, group, dim).k;
    for (index_t row = 0; row < n; ++row)
      t.k.row(row) += directions.row(dice.from_to(0, 5)) * static_cast<float>(dice.from_to(0, 2)) / 2;
    cache_config config = plain_config(heads, dim, one_of<index_t>(dice, {0, 5, 20, 70}), 40);
    config.num_sink_tokens = one_of<index_t>(dice, {0, 3});
    const eviction rules{.budget = dice.from_to(20, 80),
                         .recent = 6,
                         .interval = one_of<index_t>(dice, {1, 5, 16, 33}),
                         .num_qo_heads = heads * group};
    const index_t pair = dice.from_to(0, std::size(pairs) - 1);
    INFO("seed " << 7100 + i << ", budget " << rules.budget << ", interval " << rules.interval << ", newest "
                 << config.recent << ", " << pairs[pair].few);
    score_log logs[2];
    std::vector<position_t> kept[2];
    for (const bool forgets : {false, true}) {
      effort::dice same(static_cast<std::uint64_t>(7400 + i));
      const scorer of = forgets ? scorer(std::make_shared<forgetful>()) : std::make_shared<policies::rkv>(4, 3, 0.01f);
      const auto cache = make(pair, config, rules, of);
      const attention a({.num_qo_heads = heads * group});
      workspace w;
      cache->watch(&logs[forgets]);
      for (index_t first = 0, most = 0, some; first < n; first += some) {
        most = std::max(most, first);
        if (same.one_in(4)) {
          first = std::max({index_t{0}, most - config.rollback, first - same.from_to(1, 40)});
          cache->get().truncate(first);
        }
        some = std::min<index_t>(n - first, same.one_in(2) ? 1 : same.from_to(2, 90));
        matrix out(some, heads * group * dim);
        std::vector<float> lse(as_size(some * heads * group));
        feed(a, t, first, some, cache->get(), out, lse, w);
      }
      kept[forgets].assign(cache->kept(1).begin(), cache->kept(1).end());
    }
    REQUIRE(logs[0].scores == logs[1].scores);
    REQUIRE(kept[0] == kept[1]);
  }
}

TEST_CASE("scored tiers: what is taken back is undone over the border too") {
  constexpr index_t heads = 2, group = 2, n = 170, dim = 16;
  effort::dice dice(31);
  for (const std::string name : names)
    for (const index_t interval : {1, 7, 16}) {
      const index_t recent = one_of<index_t>(dice, {0, 5, 30}), rollback = one_of<index_t>(dice, {4, 20});
      INFO(name << ", interval " << interval << ", recent " << recent << ", rollback " << rollback);
      const tokens t = random_tokens(dice.bits(), n, heads, group, dim);
      const attention a({.num_qo_heads = heads * group});
      workspace w;
      eviction rules{.budget = 40, .recent = 6, .interval = interval, .num_qo_heads = heads * group};
      if (policy(name)->needs().compares_heads && dice.one_in(2)) rules.adaptive = 0.3;
      cache_config config = plain_config(heads, dim, recent, rollback);
      config.rope = rope::plain(dim, 1e4);
      event_log log, straight_log;
      open_scored_of<q4, q8> cache(config, rules, policy(name)), straight(config, rules, policy(name));
      cache.watch(&log), straight.watch(&straight_log);
      const auto to = [&](open_scored& c, index_t end, index_t most) {
        for (index_t i = c.get().seen(), some; i < end; i += some) {
          some = std::min(end - i, dice.from_to(1, most));
          matrix out(some, heads * group * dim);
          std::vector<float> lse(as_size(some * heads * group));
          feed(a, t, i, some, c.get(), out, lse, w);
        }
      };
      bool pinned;
      for (open_scored* c : {static_cast<open_scored*>(&cache), static_cast<open_scored*>(&straight)})
        REQUIRE(c->pin(50, pinned));
      while (cache.get().seen() < n) {
        to(cache, std::min<index_t>(n, cache.get().seen() + dice.from_to(1, 25)), 3);
        if (dice.one_in(2) && cache.get().seen() < n)
          cache.get().truncate(dice.from_to(cache.get().min_truncate(), cache.get().seen()));
      }
      to(straight, n, 9);
      REQUIRE(log.kept == straight_log.kept);
      const std::unique_ptr<open_scored> copy = cache.clone();
      for (index_t h = 0; h < heads; ++h) {
        const auto rows = read(straight.get(), n - 1, h, nullptr, nullptr);
        REQUIRE((read(cache.get(), n - 1, h, nullptr, nullptr) == rows));
        REQUIRE((read(copy->get(), n - 1, h, nullptr, nullptr) == rows));
      }
    }
}

// Counts what it encodes: the first elements of rows.
struct counted : q4 {
  static inline std::map<float, int> times;
  static void encode(const float* row, index_t dim, std::byte* to) {
    ++times[row[0]];
    q4::encode(row, dim, to);
  }
};

TEST_CASE("scored tiers: each token is encoded once, whatever is taken back") {
  counted::times.clear();
  constexpr index_t recent = 10;
  scored_kv_cache<counted, bf16> cache(plain_config(1, 16, recent, 9),
                                       {.budget = 60, .recent = 4, .interval = 7, .num_qo_heads = 1}, policy("random"));
  effort::dice dice(5);
  matrix row = matrix::Zero(1, 16);
  while (cache.seen() < 250) {
    row(0, 0) = static_cast<float>(cache.seen() + 1);  // that H makes a quarter of
    cache.append(row, row);
    if (dice.one_in(4)) cache.truncate(dice.from_to(cache.min_truncate(), cache.seen()));
  }
  for (const auto& [first, times] : counted::times) REQUIRE(times == 1);
  for (const position_t p : cache.kept(0)) {
    const bool few = p >= 3 && p < 250 - recent;
    REQUIRE(counted::times.count(static_cast<float>(p + 1) / 4) == (few ? 1 : 0));
  }
}

TEST_CASE("scored tiers: a scorer reads rows where the last query reads them") {
  struct spy final : token_scorer {
    std::vector<float>* read;

    explicit spy(std::vector<float>* to) : read(to) {}
    scorer_needs needs() const noexcept override { return {}; }
    void score(const scored_head& head, std::span<float> scores) const noexcept override {
      read->resize(as_size(head.rows * 48));
      for (index_t i = 0; i < head.rows; ++i) {
        head.key(i, read->data() + i * 48);
        head.value(i, read->data() + i * 48 + 16);
        scores[as_size(i)] = static_cast<float>(head.at[as_size(i)] * 7 % 11);
      }
    }
  };
  std::vector<float> told;
  cache_config config = plain_config(1, 16, 9, 5);
  config.v_head_dim = 32;
  open_scored_of<q4, q2> cache(config, {.budget = 30, .recent = 2, .interval = 4}, std::make_shared<spy>(&told));
  const tokens t = random_tokens(50, 100, 1, 1, 16), of_values = random_tokens(51, 100, 1, 1, 32);
  for (index_t i = 0; i < 100; i += 4) {
    cache.get().append(t.k.middleRows(i, 4), of_values.v.middleRows(i, 4));
    std::vector<float> keys(as_size((i + 4) * 16)), values(as_size((i + 4) * 32)), expected;
    for (const auto& [p, row] : read(cache.get(), i + 3, 0, keys.data(), values.data())) {
      expected.insert(expected.end(), keys.begin() + p * 16, keys.begin() + (p + 1) * 16);
      expected.insert(expected.end(), values.begin() + p * 32, values.begin() + (p + 1) * 32);
    }
    told.clear();
    cache.get().prepare();
    REQUIRE(told.empty() == (i + 4 <= 30));
    if (!told.empty()) REQUIRE(told == expected);
  }
}

TEST_CASE("scored tiers: what is asked of the resource is what is told") {
  effort::dice dice(17);
  for (int i = 0; i < 60; ++i) {
    cache_config config =
        plain_config(dice.from_to(1, 3), dice.from_to(1, 200), dice.from_to(0, 90), dice.from_to(0, 70));
    config.v_head_dim = dice.from_to(1, 200);
    eviction rules{.budget = 50 + dice.from_to(0, 200), .recent = 6, .interval = dice.from_to(1, 70)};
    rules.num_qo_heads = 2 * config.num_kv_heads;
    rules.spared_pins = dice.from_to(0, 20);
    const scorer of = policy(names[as_size(i) % std::size(names)]);
    counting_resource memory;
    {
      const scored_kv_cache<q4, q8> cache(config, rules, of, &memory);
      REQUIRE(memory.allocations == 1);
      REQUIRE(memory.bytes == cache.nbytes());
      REQUIRE(decltype(cache)::required_bytes(config, rules, *of) == cache.nbytes());
      const auto copy = cache.clone();
      REQUIRE(memory.bytes == 2 * cache.nbytes());
    }
    REQUIRE(memory.all_returned());
  }
  cache_config config = plain_config(8, 128, 64, 0);
  const eviction rules{.budget = 1984, .interval = 64};
  const auto knorm = policy("knorm");
  CHECK(scored_kv_cache<q4>::required_bytes(config, rules, *knorm) <
        scored_kv_cache<bf16>::required_bytes(config, rules, *knorm) / 20 * 7);
}

TEST_CASE("scored tiers: what is refused, and printed") {
  const scorer knorm = policy("knorm");
  cache_config config = plain_config(1, 64, 10, 5);
  const eviction rules{.budget = 40, .recent = 4, .interval = 8, .spared_pins = 2};
  scored_kv_cache<q8, q4> cache(config, rules, knorm);
  CHECK(fmt::format("{}", cache) == "kv_cache<q8, q4>{empty, 0.0 MB}");
  matrix rows(105, 64);
  for (index_t i = 0; i < 105; ++i)
    rows.row(i).setConstant(static_cast<float>(i % 2 == 0 ? 200 - i : 999));  // the newest even ones stay
  cache.append(rows, rows);
  CHECK(fmt::format("{}", cache) ==
        "kv_cache<q8, q4>{sinks 0-2 bf16 | 31 of 34-94 q8 and q4 | 7 of 96-104 bf16, 0.0 MB}");
  CHECK(cache.pin(50));  // is encoded already: stays as it is
  CHECK(cache.pin(110));
  CHECK_THROWS_WITH(cache.pin(111), "sinkcache: pinned positions beside the sinks was 3, had to be at most 2");
  config.recent = -1;
  CHECK(decltype(cache)::validate(config, rules, knorm.get()).message() ==
        "sinkcache: the configuration's recent was -1, had to be at least 0");
  config.recent = index_t{1} << 40;
  CHECK(decltype(cache)::validate(config, rules, knorm.get()).message().find("whole rows of the cache was") == 11);
  config.recent = std::numeric_limits<index_t>::max();
  CHECK(decltype(cache)::validate(config, rules, knorm.get()).message() ==
        "sinkcache: the configuration's recent was 9223372036854775807, had to be at most 1099511627776");
}

TEST_CASE("scored tiers: behind a prefix, in a batch, and beside a cache of floats") {
  constexpr index_t heads = 2, group = 2, dim = 64, n = 160;
  const tokens t = random_tokens(40, n, heads, group, dim);
  const attention a({.num_qo_heads = heads * group, .softmax = softmax_variant::softmax1()});
  workspace w;
  for (const positions p : {positions::in_cache, positions::absolute})
    for (const inputs in : {inputs::raw, inputs::rotated}) {
      cache_config config = plain_config(heads, dim, 12, 63), of_prefix = config;
      config.rope = of_prefix.rope = rope::plain(dim, 1e4);
      config.positions = of_prefix.positions = p;
      config.inputs = of_prefix.inputs = in;
      config.num_sink_tokens = of_prefix.num_sink_tokens = 0;
      of_prefix.window = 20;
      config.first_position = 20;
      const eviction rules{.budget = 48, .recent = 4, .interval = 16};
      const auto outputs = [&](auto format) {
        using F = decltype(format);
        kv_cache<F> prefix(of_prefix);
        prefix.append(t.k.topRows(20), t.v.topRows(20));
        // The norm of a key as given: the same sets whatever the format.
        scored_kv_cache<F> own(config, rules, policy("knorm"));
        const joined_source all({&prefix, &own});
        matrix out(n - 20, heads * group * dim), last(1, heads * group * dim);
        a.prefill(t.q.middleRows(20, 100), t.k.middleRows(20, 100), t.v.middleRows(20, 100), own, all, out.topRows(100),
                  w);
        for (index_t i = 120; i < n; ++i) {
          own.append(t.k.middleRows(i, 1), t.v.middleRows(i, 1));
          a.decode(t.q.middleRows(i, 1), all, out.middleRows(i - 20, 1), w);
        }
        const std::vector<decode_item> batch{{.q = {t.q.row(n - 1).data(), as_size(t.q.cols())},
                                              .keys = &all,
                                              .out = {last.data(), as_size(last.cols())}}};
        a.decode(batch, w);
        CHECK((last - out.bottomRows(1)).isZero(0));
        return out;
      };
      const matrix few = outputs(q8()), floats = outputs(f32());
      CHECK((few - floats).cwiseAbs().maxCoeff() < 0.03f);
    }
}

// A token's row: from its position alone.
void fill_row(position_t p, matrix& block, index_t i) {
  effort::dice dice(static_cast<std::uint64_t>(p) + 1);
  for (index_t d = 0; d < block.cols(); ++d) block(i, d) = dice.signed_unit();
}

// So many tokens; now and then what is stored is compared: with the plain encoder, and encoded rows with what they
// were.
template <class Cache>
void run_stream(Cache& cache, position_t tokens, index_t pinned, index_t recent) {
  constexpr index_t dim = 16;
  effort::dice dice(60);
  std::map<position_t, read_row> before;
  while (cache.seen() < tokens) {
    matrix rows(dice.from_to(1, 200), dim);
    for (index_t i = 0; i < rows.rows(); ++i) fill_row(cache.seen() + i, rows, i);
    cache.append(rows, rows);
    if (!dice.one_in(20)) continue;
    const position_t query = cache.seen() - 1;
    const auto stored = read(cache, query, 0, nullptr, nullptr);
    matrix row(1, dim);
    for (const auto& [p, read] : stored) {
      fill_row(p, row, 0);
      const bool whole = p < pinned || query - p < recent;
      if (read.k != (whole ? plain_whole(row.data(), dim) : plain_few(8, row.data(), dim, true)) ||
          read.v != (whole ? plain_whole(row.data(), dim) : plain_few(4, row.data(), dim, true)))
        FAIL("position " << p << " after " << cache.seen());
      const auto then = before.find(p);
      if (then != before.end() && then->second.formats == read.formats && then->second != read)
        FAIL("position " << p << " has changed after " << cache.seen());
    }
    before = stored;
  }
  CHECK(cache.seen() >= tokens);
}
void run_streams(position_t tokens) {
  cache_config config = plain_config(1, 16, 24, 63);
  scored_kv_cache<q8, q4> scored(config, {.budget = 80, .recent = 8, .interval = 64}, policy("random"));
  run_stream(scored, tokens, 3, 24);
  config.window = 90;
  kv_cache<q8, q4> window(config);
  run_stream(window, tokens, 3, 24);
}

TEST_CASE("tiers hold the right bytes along a stream") { run_streams(20'000); }
TEST_CASE("tiers hold the right bytes along ten million tokens", "[.long]") { run_streams(10'000'000); }

}  // namespace
}  // namespace proof
