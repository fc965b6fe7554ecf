// Caches that evict by score: what they promise whatever the scorer. What each scorer keeps is eviction_test.cpp's.

#include <sinkcache/named_policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "catch.hpp"
#include "counting_resource.hpp"
#include "effort.hpp"

namespace {

using sinkcache::attention;
using sinkcache::bf16;
using sinkcache::cache_config;
using sinkcache::eviction;
using sinkcache::f32;
using sinkcache::index_t;
using sinkcache::matrix;
using sinkcache::position_t;
using sinkcache::positions;
using sinkcache::status;
using sinkcache::token_scorer;
using sinkcache::workspace;
using f32_cache = sinkcache::scored_kv_cache<f32>;
using scorer = std::shared_ptr<const token_scorer>;

constexpr index_t kv_heads = 2, qo_heads = 6, dim = 32;

// By name and parameters, "snapkv form=rkv".
scorer policy(const std::string& text) {
  std::vector<sinkcache::policy_parameter> given;
  const std::string_view all = text;
  const std::size_t end = std::min(all.find(' '), all.size());
  for (std::size_t at = end; at < all.size();) {
    const std::size_t from = at + 1, to = std::min(all.find(' ', from), all.size()), equals = all.find('=', from);
    given.emplace_back(all.substr(from, equals - from), all.substr(equals + 1, to - equals - 1));
    at = to;
  }
  status found;
  scorer made = sinkcache::make_policy(all.substr(0, end), given, found);
  INFO(found.message());
  REQUIRE(made != nullptr);
  return made;
}

const std::vector<std::string> all_policies = {"random",
                                               "random draw=once",
                                               "h2o",
                                               "h2o normalise=lifetime",
                                               "tova",
                                               "snapkv",
                                               "snapkv form=rkv",
                                               "knorm",
                                               "snapkv pool=avg window=3",
                                               "keydiff",
                                               "mean_key",
                                               "lagkv",
                                               "rkv",
                                               "lagkv mode=fifo",
                                               "expected_attention T=40",
                                               "gkv",
                                               "lagkv cross=1",
                                               "gkv kernel=5 redundancy=1 combine=sum"};

cache_config config_of(positions p, index_t rollback = 0) {
  return {.num_kv_heads = kv_heads,
          .head_dim = dim,
          .num_sink_tokens = 3,
          .positions = p,
          .rope = sinkcache::rope::plain(dim, 1e4),
          .rollback = rollback};
}
eviction rules_of(index_t interval = 8) {
  return {.budget = 40, .recent = 6, .interval = interval, .num_qo_heads = qo_heads};
}

struct stream {
  matrix q, k, v;

  stream(index_t tokens, std::uint64_t seed) : q(tokens, qo_heads * dim), k(tokens, kv_heads * dim), v(k) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (matrix* m : {&q, &k, &v})
      for (index_t i = 0; i < m->size(); ++i) m->data()[i] = normal(random);
  }
};

attention attention_of(int variant) {
  using sinkcache::softmax_variant;
  const std::vector<float> sinks = {0.5f, -1, 2, 0, 1, -2};
  return attention({.num_qo_heads = qo_heads,
                    .softmax = variant == 0   ? softmax_variant::standard()
                               : variant == 1 ? softmax_variant::softmax1()
                                              : softmax_variant::sink_logits(sinks)});
}

template <class Cache>
void feed(const attention& a, const stream& s, index_t first, index_t last, Cache& cache, matrix& out, workspace& w,
          index_t chunk) {
  for (index_t i = first, n; i < last; i += n) {
    n = std::min(chunk, last - i);
    const matrix q = s.q.middleRows(i, n), k = s.k.middleRows(i, n), v = s.v.middleRows(i, n);
    matrix o(n, qo_heads * dim);
    if (n == 1) {
      cache.append(k, v);
      a.decode(q, cache, o, w);
    } else {
      a.prefill(q, k, v, cache, o, w);
    }
    out.middleRows(i, n) = o;
  }
}

std::vector<std::vector<position_t>> kept_of(const f32_cache& cache) {
  std::vector<std::vector<position_t>> kept;
  for (index_t h = 0; h < kv_heads; ++h) kept.emplace_back(cache.kept(h).begin(), cache.kept(h).end());
  return kept;
}

// Every event's heads, in order.
struct event_log final : sinkcache::eviction_reader {
  struct head {
    position_t seen;
    index_t kv_head;
    std::vector<position_t> at;
    std::vector<float> scores;
    std::vector<std::uint8_t> leaves;
    double mass, bound;

    // What is summed over a block in prefill is summed in another order in decode.
    bool operator==(const head& other) const {
      if (seen != other.seen || kv_head != other.kv_head || at != other.at || leaves != other.leaves) return false;
      float largest = 0;
      for (const float score : scores)
        if (std::isfinite(score)) largest = std::max(largest, std::abs(score));
      return std::equal(scores.begin(), scores.end(), other.scores.begin(), other.scores.end(),
                        [&](float a, float b) { return a == b || std::abs(a - b) <= 1e-5f * largest; });
    }
  };
  std::map<std::pair<position_t, index_t>, head> heads;

  void read(const sinkcache::eviction_event& e) noexcept override {
    heads[{e.seen, e.kv_head}] = {e.seen,
                                  e.kv_head,
                                  {e.at.begin(), e.at.end()},
                                  {e.scores.begin(), e.scores.end()},
                                  {e.leaves.begin(), e.leaves.end()},
                                  e.mass,
                                  e.bound};
  }
};

class thread_executor {
 public:
  index_t concurrency() const { return 3; }
  void run(index_t n, const sinkcache::work_ref& work) const {
    std::vector<std::thread> threads;
    for (index_t t = 0; t < 3; ++t)
      threads.emplace_back([&, t] {
        for (index_t i = t; i < n; i += 3) work(i, t);
      });
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace

TEST_CASE("any chunking, executor, batch and division of heads gives the same events") {
  for (const std::string& name : all_policies)
    for (const positions p : {positions::in_cache, positions::absolute}) {
      const int variant = static_cast<int>(name.size()) % 3;
      const index_t interval = p == positions::in_cache ? 8 : 5, tokens = 150;
      CAPTURE(name, p == positions::in_cache, variant);
      const stream s(tokens, name.size());
      const attention a = attention_of(variant);
      workspace alone;
      matrix right(tokens, qo_heads * dim), out(right);
      event_log log;
      f32_cache one(config_of(p), rules_of(interval), policy(name));
      one.watch(&log);
      feed(a, s, 0, tokens, one, right, alone, 1);
      REQUIRE(static_cast<index_t>(log.heads.size()) >= (tokens - 48) / interval);  // of two heads
      for (const auto& [key, head] : log.heads) {
        const auto left = std::count(head.leaves.begin(), head.leaves.end(), 0);
        REQUIRE((name.find("fifo") != std::string::npos ? left <= 40 : left == 40));
        for (std::size_t i = 0; i < head.at.size(); ++i)
          if (head.at[i] < 3 || i + 6 >= head.at.size()) REQUIRE(head.leaves[i] == 0);
      }
      const auto check = [&](event_log& other, f32_cache& cache) {
        REQUIRE(kept_of(cache) == kept_of(one));
        REQUIRE(other.heads == log.heads);
        REQUIRE((out - right).cwiseAbs().maxCoeff() < 1e-5f);
        REQUIRE(cache.capacity() == 40 + interval);
      };
      for (const index_t chunk : {3, 63, 150}) {
        event_log other;
        f32_cache cache(config_of(p, 11), rules_of(interval), policy(name));
        cache.watch(&other);
        if (name.rfind("expected", 0) == 0) cache = f32_cache(config_of(p), rules_of(interval), policy(name));
        cache.watch(&other);
        feed(a, s, 0, tokens, cache, out, alone, chunk);
        check(other, cache);
      }
      thread_executor threads;
      workspace shared(threads);
      event_log of_threads, of_batch, of_parts;
      f32_cache threaded(config_of(p), rules_of(interval), policy(name));
      threaded.watch(&of_threads);
      feed(a, s, 0, tokens, threaded, out, shared, 7);
      check(of_threads, threaded);

      f32_cache batched(config_of(p), rules_of(interval), policy(name)),
          parts(config_of(p), rules_of(interval), policy(name));
      batched.watch(&of_batch), parts.watch(&of_parts);
      matrix of_part(out);
      for (index_t i = 0; i < tokens; ++i) {
        batched.append(s.k.middleRows(i, 1), s.v.middleRows(i, 1));
        const std::vector<sinkcache::decode_item> batch{
            {.q = {s.q.row(i).data(), static_cast<std::size_t>(qo_heads * dim)},
             .keys = &batched,
             .out = {out.row(i).data(), static_cast<std::size_t>(qo_heads * dim)},
             .weights = batched.learner()}};
        a.decode(batch, alone);
        parts.append(s.k.middleRows(i, 1), s.v.middleRows(i, 1));
        for (index_t h = kv_heads; h-- > 0;)
          a.attend(s.q.middleRows(i, 1), parts, of_part.middleRows(i, 1), alone, {},
                   {.first_kv_head = h, .num_kv_heads = 1});
      }
      check(of_batch, batched);
      out = of_part;
      check(of_parts, parts);
    }
}

TEST_CASE("taking tokens back undoes events and what was learned") {
  const std::uint64_t seed = 0x5eed;
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  for (const std::string& name : all_policies)
    for (const index_t interval : {1, 7, 16}) {
      CAPTURE(name, interval);
      const index_t tokens = 130, rollback = 20;
      const positions p = random() % 2 == 0 ? positions::in_cache : positions::absolute;
      const bool drops = name.find("fifo") != std::string::npos;
      eviction rules = rules_of(interval);
      if (policy(name)->needs().compares_heads && random() % 2 == 0) rules.adaptive = 0.3;
      if (name == "h2o" || drops) rules.accounts = true;
      const stream s(tokens, random());
      const attention a = attention_of(static_cast<int>(random() % 3));
      workspace w;
      matrix right(tokens, qo_heads * dim), out(right);
      event_log log, other;
      f32_cache straight(config_of(p, rollback), rules, policy(name)),
          back(config_of(p, rollback), rules, policy(name));
      straight.watch(&log), back.watch(&other);
      feed(a, s, 0, tokens, straight, right, w, 1);
      position_t reached = 0;
      while (back.seen() < tokens) {
        const index_t n = std::min<index_t>(tokens - back.seen(), 1 + static_cast<index_t>(random() % 25));
        feed(a, s, back.seen(), back.seen() + n, back, out, w, 1 + static_cast<index_t>(random() % 3));
        reached = std::max(reached, back.seen());
        REQUIRE(back.min_truncate() == std::max<position_t>(0, reached - rollback));
        if (back.min_truncate() > 0) REQUIRE_FALSE(back.try_truncate(back.min_truncate() - 1).ok());
        if (random() % 2 == 0 && back.seen() < tokens)
          back.truncate(
              back.min_truncate() +
              static_cast<position_t>(random() % static_cast<std::uint64_t>(back.seen() - back.min_truncate() + 1)));
      }
      REQUIRE(kept_of(back) == kept_of(straight));
      REQUIRE(other.heads == log.heads);
      REQUIRE((out - right).cwiseAbs().maxCoeff() < 1e-5f);
      for (index_t h = 0; h < kv_heads; ++h) REQUIRE(back.evicted_mass(h) == Approx(straight.evicted_mass(h)));
    }
}

TEST_CASE("all memory is what was asked for, in one piece") {
  std::mt19937_64 random(7);
  for (int i = 0; i < 60; ++i) {
    counting_resource memory;
    {
      cache_config config = config_of(positions::absolute, static_cast<index_t>(random() % 70));
      config.head_dim = 1 + static_cast<index_t>(random() % 80);
      config.rope = sinkcache::rope::none();
      eviction rules = rules_of(1 + static_cast<index_t>(random() % 40));
      if (i % 3 == 0) rules.budget = 0, rules.head_budgets = {30, 90};
      const scorer of = policy(i % 3 == 0 ? "snapkv" : all_policies[static_cast<std::size_t>(i) % all_policies.size()]);
      sinkcache::scored_kv_cache<bf16, f32> cache(config, rules, of, &memory);
      const std::size_t bytes = cache.nbytes();
      REQUIRE(memory.allocations == 1);
      REQUIRE(memory.bytes == bytes);
      REQUIRE(decltype(cache)::required_bytes(config, rules, *of) == bytes);
      auto copy = cache.clone();
      REQUIRE(memory.bytes == 2 * bytes);
    }
    REQUIRE(memory.all_returned());
  }
}

TEST_CASE("budgets by head") {
  const stream s(200, 3);
  const attention a = attention_of(0);
  workspace w;
  matrix out(200, qo_heads * dim);
  eviction rules = rules_of(8);
  rules.budget = 0, rules.head_budgets = {24, 56};
  f32_cache uneven(config_of(positions::in_cache), rules, policy("snapkv")),
      even(config_of(positions::in_cache), rules_of(8), policy("snapkv"));
  CHECK(uneven.nbytes() == Approx(even.nbytes()).epsilon(0.01));  // the same rows
  feed(a, s, 0, 200, uneven, out, w, 200);
  uneven.prepare();
  CHECK(uneven.kept(0).size() == 24);
  CHECK(uneven.kept(1).size() == 56);

  rules = rules_of(8);
  rules.adaptive = 0.2;
  f32_cache adaptive(config_of(positions::in_cache), rules, policy("snapkv"));
  feed(a, s, 0, 200, adaptive, out, w, 200);
  adaptive.prepare();
  CHECK(adaptive.kept(0).size() + adaptive.kept(1).size() == 80);
  for (index_t h = 0; h < kv_heads; ++h) CHECK(static_cast<index_t>(adaptive.kept(h).size()) >= 11 + 29 / 5);

  rules = rules_of(8);
  rules.budget = 0;
  rules.short_heads = {true, false};
  rules.head_budgets = sinkcache::duo_budgets(rules.short_heads, 40, 3, 5);
  f32_cache duo(config_of(positions::in_cache), rules, policy("snapkv"));
  CHECK(duo.nbytes() < even.nbytes());
  feed(a, s, 0, 200, duo, out, w, 50);
  duo.prepare();
  CHECK(kept_of(duo)[0] == std::vector<position_t>{0, 1, 2, 195, 196, 197, 198, 199});

  const std::vector<index_t> layers = sinkcache::pyramid_budgets(30, 64, 36);
  index_t sum = 0;
  for (const index_t budget : layers) sum += budget;
  CHECK(sum == 30 * 64);
  CHECK(std::is_sorted(layers.rbegin(), layers.rend()));
  CHECK(layers.back() > 36);
}

TEST_CASE("pinned tokens stay under every policy") {
  const stream s(200, 4);
  const attention a = attention_of(1);
  workspace w;
  matrix out(200, qo_heads * dim);
  for (const std::string& name : all_policies) {
    CAPTURE(name);
    f32_cache cache(config_of(positions::in_cache), rules_of(8), policy(name));
    CHECK(cache.pin(77));  // that is yet to come
    feed(a, s, 0, 30, cache, out, w, 30);
    CHECK(cache.pin(11));
    CHECK(cache.pin(1));  // a sink
    feed(a, s, 30, 150, cache, out, w, 9);
    bool all = true;
    for (const position_t at : {30, 31, 32, 33, 34}) all = cache.pin(at) && all;
    CHECK_FALSE(all);
    feed(a, s, 150, 200, cache, out, w, 1);
    for (index_t h = 0; h < kv_heads; ++h)
      for (const position_t at : {0, 1, 2, 11, 77})
        CHECK(std::binary_search(cache.kept(h).begin(), cache.kept(h).end(), at));
    bool pinned = true;
    status found;
    for (position_t at = 1000; found.ok(); ++at) found = cache.try_pin(at, pinned);
    CHECK_FALSE(pinned);
    CHECK(found.message().find("pinned positions beside the sinks was") != std::string_view::npos);
    feed(a, s, 150, 200, cache, out, w, 1);
  }
}

TEST_CASE("a pin that is granted holds, be there an event that waits to be applied again") {
  const stream s(80, 8);
  const attention a = attention_of(0);
  workspace w;
  matrix out(80, qo_heads * dim);
  for (const std::string& name : all_policies) {
    CAPTURE(name);
    f32_cache cache(config_of(positions::absolute, 12), rules_of(8), policy(name));
    feed(a, s, 0, 48, cache, out, w, 48);
    feed(a, s, 48, 57, cache, out, w, 1);  // the event at 48, and the one at 56
    cache.truncate(48);
    f32_cache after = cache.clone();
    after.prepare();
    std::vector<position_t> granted;
    for (position_t at = 1; at < 48; at += 2) {
      bool stays = true, pinned = false;
      for (index_t h = 0; h < kv_heads; ++h)
        stays = std::binary_search(after.kept(h).begin(), after.kept(h).end(), at) && stays;
      REQUIRE(cache.try_pin(at, pinned).ok());
      CAPTURE(at);
      CHECK(pinned == stays);
      if (pinned) granted.push_back(at);
    }
    REQUIRE(granted.size() < 24);
    feed(a, s, 48, 80, cache, out, w, 5);
    for (index_t h = 0; h < kv_heads; ++h)
      for (const position_t at : granted) CHECK(std::binary_search(cache.kept(h).begin(), cache.kept(h).end(), at));
  }
}

TEST_CASE("pins leave a row free, and of equal scores the younger stays") {
  struct all_alike final : token_scorer {
    sinkcache::scorer_needs needs() const noexcept override { return {}; }
    void score(const sinkcache::scored_head&, std::span<float> scores) const noexcept override {
      std::fill(scores.begin(), scores.end(), 1.f);
    }
  };
  // 10 rows: 3 sinks, 2 of the newest, 4 pins, and one to choose.
  f32_cache cache(config_of(positions::absolute), {.budget = 10, .recent = 2, .interval = 4}, all_alike());
  CHECK_THROWS_WITH(cache.pin(sinkcache::max_position),
                    "sinkcache: position was 4611686018427387904, had to be from 0 and below 4611686018427387904");
  for (const position_t at : {position_t{5}, position_t{6}, position_t{7}, sinkcache::max_position - 1})
    CHECK(cache.pin(at));
  CHECK_THROWS_WITH(cache.pin(8), "sinkcache: pinned positions beside the sinks was 5, had to be at most 4");
  const matrix rows = matrix::Random(17, kv_heads * dim);
  cache.append(rows, rows);
  const auto kept = cache.kept(0);
  CHECK(std::vector<position_t>(kept.begin(), kept.end()) ==
        std::vector<position_t>{0, 1, 2, 5, 6, 7, 12, 13, 14, 15, 16});
}

TEST_CASE("what was appended without attention is refused where a policy would need it") {
  const stream s(200, 5);
  workspace w;
  matrix out(200, qo_heads * dim);
  const attention a = attention_of(0);
  for (const std::string& name : all_policies) {
    CAPTURE(name);
    f32_cache cache(config_of(positions::absolute), rules_of(8), policy(name));
    const bool learns = cache.learner() != nullptr;
    CHECK(learns == (policy(name)->needs().window > 0 || policy(name)->needs().last_query ||
                     policy(name)->needs().sums || policy(name)->needs().query_statistics));
    cache.append(s.k.topRows(20), s.v.topRows(20));
    const status found = cache.try_append(s.k.middleRows(20, 60), s.v.middleRows(20, 60));
    CHECK(found.ok() != learns);
    if (!learns) continue;
    CHECK(found.message().find(name.substr(0, name.find(' '))) != std::string_view::npos);
    CHECK(cache.seen() == 20);
    // Nor may queries be left out.
    CHECK_FALSE(a.try_decode(s.q.middleRows(19, 1), cache, out.topRows(1), w).ok());
    CHECK_FALSE(
        a.try_prefill(s.q.middleRows(20, 5), s.k.middleRows(20, 5), s.v.middleRows(20, 5), cache, out.topRows(5), w)
            .ok());
    CHECK(cache.seen() == 20);
    a.attend(s.q.topRows(20), cache, out.topRows(20), w);
    CHECK_FALSE(cache.try_append(s.k.middleRows(20, 60), s.v.middleRows(20, 60)).ok());
    cache.append(s.k.middleRows(20, 28), s.v.middleRows(20, 28));  // up to the first event, which comes after these
    a.attend(s.q.middleRows(20, 28), cache, out.topRows(28), w);
    feed(a, s, 48, 200, cache, out, w, 20);
    // An attention of other heads cannot teach it.
    const attention other({.num_qo_heads = 2});
    matrix q(1, 2 * dim), o(q);
    q.setZero();
    CHECK(other.try_decode(q, cache, o, w).message().find("num_qo_heads was 2, had to be") != std::string_view::npos);
    // One that is only read learns nothing, and a query that comes again is not learned twice.
    const f32_cache& read_only = cache;
    event_log log, again;
    f32_cache copy = cache.clone();
    cache.watch(&log), copy.watch(&again);
    a.decode(s.q.bottomRows(1), read_only, out.topRows(1), w);
    a.decode(s.q.bottomRows(1), cache, out.topRows(1), w);
    const stream more(40, 6);
    feed(a, more, 0, 40, cache, out, w, 1);
    feed(a, more, 0, 40, copy, out, w, 1);
    CHECK(log.heads == again.heads);
    CHECK(log.heads.size() == 10);
  }
}

TEST_CASE("the change of an output stays within what accounts say") {
  // Under absolute positions, with what a head gives its evicted rows known exactly.
  std::mt19937_64 random(9);
  for (int variant = 0; variant < 3; ++variant) {
    const attention a = attention_of(variant);
    workspace w;
    eviction rules = rules_of(8);
    rules.accounts = true;
    f32_cache cache(config_of(positions::absolute), rules, policy("random"));
    event_log log;
    cache.watch(&log);
    const stream s(600, random());
    matrix before(1, qo_heads * dim), after(before), out(600, qo_heads * dim);
    std::vector<double> mass(kv_heads);
    for (index_t i = 0; i < 600; ++i) {
      feed(a, s, i, i + 1, cache, out, w, 1);
      before = out.middleRows(i, 1);
      log.heads.clear();
      cache.prepare();
      if (log.heads.empty()) continue;
      const f32_cache& read_only = cache;
      a.decode(s.q.middleRows(i, 1), read_only, after, w);
      for (const auto& [key, head] : log.heads) {
        mass[static_cast<std::size_t>(head.kv_head)] += head.mass;
        for (index_t g = 0; g < qo_heads / kv_heads; ++g) {
          const index_t at = (head.kv_head * (qo_heads / kv_heads) + g) * dim;
          const float moved = (after.middleCols(at, dim) - before.middleCols(at, dim)).norm();
          REQUIRE(head.mass > 0);
          REQUIRE(moved <= static_cast<float>(head.bound) * 1.0001f + 1e-5f);
        }
      }
    }
    for (index_t h = 0; h < kv_heads; ++h) CHECK(cache.evicted_mass(h) == Approx(mass[static_cast<std::size_t>(h)]));
  }
}

TEST_CASE("it evicts only while the bound allows, up to the hard budget") {
  const stream s(400, 10);
  const attention a = attention_of(0);
  workspace w;
  matrix out(400, qo_heads * dim);
  eviction rules = rules_of(8);
  rules.bound = 1e-3, rules.hard_budget = 96;
  f32_cache tight(config_of(positions::absolute), rules, policy("h2o"));
  rules.bound = 1e9;
  f32_cache loose(config_of(positions::absolute), rules, policy("h2o"));
  feed(a, s, 0, 400, tight, out, w, 1);
  feed(a, s, 0, 400, loose, out, w, 1);
  tight.prepare(), loose.prepare();
  CHECK(tight.kept(0).size() == 96);
  CHECK(loose.kept(0).size() == 40);
  CHECK(tight.nbytes() == loose.nbytes());
}

TEST_CASE("a shared prefix in front, and a user's own scorer") {
  struct oldest_odd final : token_scorer {
    sinkcache::scorer_needs needs() const noexcept override { return {}; }
    void score(const sinkcache::scored_head& head, std::span<float> scores) const noexcept override {
      for (std::size_t i = 0; i < scores.size(); ++i)
        scores[i] = static_cast<float>(head.at[i] % 2 == 0 ? 1000 : 0) + static_cast<float>(i);
    }
  };
  const stream s(200, 11);
  const attention a = attention_of(0);
  workspace w;
  matrix out(200, qo_heads * dim), right(out);
  cache_config config = config_of(positions::in_cache);
  config.num_sink_tokens = 0;
  f32_cache odd(config, {.budget = 40, .recent = 4, .interval = 8}, oldest_odd());
  feed(a, s, 0, 200, odd, out, w, 64);
  odd.prepare();
  std::vector<position_t> expected;
  for (position_t at = 124; at < 200; at += at < 196 ? 2 : 1) expected.push_back(at);
  CHECK(kept_of(odd)[0] == expected);

  // Sums of a cache behind a prefix are what its queries gave its own tokens.
  cache_config of_prefix = config_of(positions::in_cache);
  of_prefix.num_sink_tokens = 0, of_prefix.window = 16;
  sinkcache::kv_cache<f32> prefix(of_prefix);
  prefix.append(s.k.topRows(16), s.v.topRows(16));
  for (const std::string name : {"h2o", "tova", "snapkv", "gkv"}) {
    CAPTURE(name);
    config.first_position = 16;
    f32_cache chunked(config, rules_of(8), policy(name)), single(config, rules_of(8), policy(name));
    event_log log, other;
    chunked.watch(&log), single.watch(&other);
    const sinkcache::joined_source all({&prefix, &chunked}), joined({&prefix, &single});
    a.prefill(s.q.bottomRows(184), s.k.bottomRows(184), s.v.bottomRows(184), chunked, all, out.bottomRows(184), w);
    for (index_t i = 16; i < 200; ++i) {
      single.append(s.k.middleRows(i, 1), s.v.middleRows(i, 1));
      a.decode(s.q.middleRows(i, 1), joined, right.middleRows(i, 1), w, {.weights = single.learner()});
    }
    CHECK(log.heads == other.heads);
    CHECK(log.heads.size() == 2 * (176 - 40) / 8);  // at 48, 56, to 176
    CHECK((out.bottomRows(184) - right.bottomRows(184)).cwiseAbs().maxCoeff() < 1e-5f);
  }
}

TEST_CASE("what a scored cache refuses, and says") {
  const cache_config good = config_of(positions::in_cache);
  const auto error = [&](const cache_config& config, const eviction& rules, const std::string& name) {
    const scorer of = policy(name);
    status found = f32_cache::validate(config, rules, of.get());
    std::optional<f32_cache> none = f32_cache::try_create(config, rules, of, found);
    REQUIRE_FALSE(none);
    REQUIRE_THROWS_WITH(f32_cache(config, rules, of), std::string(found.message()));
    return std::string(found.message());
  };
  const auto changed = [](auto change) {
    eviction rules = rules_of(8);
    change(rules);
    return rules;
  };
  using e = eviction;
  CHECK(error(good, changed([](e& r) { r.budget = 9; }), "knorm") ==
        "sinkcache: budget was 9, had to be above num_sink_tokens and recent (or the scorer's window) together, 9");
  CHECK(error(good, changed([](e& r) { r.budget = 11, r.recent = 0; }), "snapkv").find("budget was 11") == 11);
  CHECK(error(good, changed([](e& r) { r.interval = 0; }), "knorm").find("interval was 0") == 11);
  CHECK(error(good, changed([](e& r) { r.recent = -1; }), "knorm").find("recent was -1") == 11);
  CHECK(error(good, changed([](e& r) { r.num_qo_heads = 0; }), "h2o").find("num_qo_heads was 0") == 11);
  CHECK(error(good, changed([](e& r) { r.num_qo_heads = 5; }), "h2o").find("num_qo_heads was 5") == 11);
  CHECK(error(good, changed([](e& r) { r.head_budgets = {40}; }), "h2o").find("head_budgets.size() was 1") == 11);
  CHECK(error(good, changed([](e& r) { r.head_budgets = {40, 50}; }), "h2o").find("budget was 40") == 11);
  CHECK(error(good, changed([](e& r) {
                r.budget = 0, r.head_budgets = {40, 50};
              }),
              "tova")
            .find("head_budgets was") == 11);
  CHECK(error(good, changed([](e& r) { r.adaptive = 0.5; }), "knorm").find("adaptive was given") == 11);
  CHECK(error(good, changed([](e& r) { r.adaptive = 1.5; }), "h2o").find("adaptive was 1.5") == 11);
  CHECK(error(good, changed([](e& r) { r.bound = 1, r.hard_budget = 39; }), "h2o").find("hard_budget was 39") == 11);
  CHECK(error(good, changed([](e& r) { r.hard_budget = 50; }), "h2o").find("hard_budget was 50") == 11);
  CHECK(error(good, changed([](e& r) { r.budget = index_t{1} << 62; }), "h2o") ==
        "sinkcache: budget was 4611686018427387904, had to be at most 1099511627776");
  CHECK(error(good, changed([](e& r) { r.interval = index_t{1} << 62; }), "knorm") ==
        "sinkcache: interval was 4611686018427387904, had to be at most 1099511627776");
  CHECK(error(good, rules_of(8), "lagkv lag=19")
            .find("budget was 40, had to be at least num_sink_tokens and two lags, 41") == 11);
  CHECK(error(good, rules_of(8), "snapkv kernel=4").find("kernel was 4, had to be odd") == 11);
  CHECK(error(good, rules_of(8), "lagkv v_ratio=inf") == "sinkcache: v_ratio was inf, had to be finite and at least 0");
  CHECK(error(good, rules_of(8), "expected_attention epsilon=inf") ==
        "sinkcache: epsilon was inf, had to be finite and at least 0");
  cache_config windowed = good;
  windowed.window = 8;
  CHECK(error(windowed, rules_of(8), "knorm").find("window was 8, had to be 0") == 11);
  cache_config negative = good;
  negative.num_sink_tokens = -1;
  CHECK(error(negative, rules_of(8), "knorm").find("num_sink_tokens was -1") == 11);
  CHECK_THROWS(f32_cache(good, rules_of(8), scorer()));
  status found;
  const std::vector<sinkcache::policy_parameter> twice{{"window", "3"}, {"window", "4"}}, unknown{{"windw", "3"}},
      empty{{"window", ""}}, no_flag{{"redundancy", "yes"}};
  CHECK(sinkcache::make_policy("snapkv", twice, found) == nullptr);
  CHECK(sinkcache::make_policy("snapkv", unknown, found) == nullptr);
  CHECK(found.message().find("'windw'") != std::string_view::npos);
  CHECK(sinkcache::make_policy("snapkv", empty, found) == nullptr);
  CHECK(sinkcache::make_policy("gkv", no_flag, found) == nullptr);
  CHECK(found.message() == "sinkcache: gkv's redundancy was 'yes', had to be 0 or 1");
  CHECK(sinkcache::make_policy("snap", {}, found) == nullptr);
  CHECK(sinkcache::make_policy("tova", unknown, found) == nullptr);

  // A cache that was moved from has nothing and takes nothing.
  f32_cache cache(good, rules_of(8), policy("knorm"));
  const stream s(60, 12);
  cache.append(s.k, s.v);
  f32_cache moved = std::move(cache);
  CHECK(moved.seen() == 60);
  CHECK(cache.seen() == 0);  // NOLINT(bugprone-use-after-move)
  CHECK(cache.nbytes() == 0);
  CHECK(cache.size() == 0);
  CHECK_FALSE(cache.try_append(s.k, s.v).ok());
  CHECK_FALSE(moved.try_truncate(61).ok());
  cache = std::move(moved);
  cache.append(s.k, s.v);
  CHECK(cache.seen() == 120);
  cache.clear();
  CHECK(cache.seen() == 0);
  cache.append(s.k, s.v);
  CHECK(cache.kept(0).size() == 44);
}

TEST_CASE("a scored cache that is empty, was moved from, or has no memory") {
  const stream s(100, 13);
  const attention a = attention_of(0);
  workspace w;
  matrix out(100, qo_heads * dim);
  for (const std::string& name : all_policies) {
    CAPTURE(name);
    // The newest token of an empty cache is none: decode is refused, and nothing is learned.
    f32_cache cache(config_of(positions::in_cache), rules_of(8), policy(name)),
        fresh(config_of(positions::in_cache), rules_of(8), policy(name));
    CHECK(!a.try_decode(s.q.topRows(1), cache, out.topRows(1), w));
    const status refused = fresh.try_append(s.k, s.v);
    CHECK(cache.try_append(s.k, s.v).message() == refused.message());
    f32_cache again(config_of(positions::in_cache), rules_of(8), policy(name));
    CHECK(!a.try_decode(s.q.topRows(1), again, out.topRows(1), w));
    f32_cache right(config_of(positions::in_cache), rules_of(8), policy(name));
    feed(a, s, 0, 100, again, out, w, 7);
    feed(a, s, 0, 100, right, out, w, 1);
    CHECK(kept_of(again) == kept_of(right));

    f32_cache moved = std::move(again);
    CHECK(again.kept(0).empty());  // NOLINT(bugprone-use-after-move)
    CHECK(again.budget(0) == 0);
    CHECK(again.evicted_mass(0) == 0);
    CHECK(again.rollback() == 0);
    CHECK(again.room() >= 1);
    again.advance(0);
    again.prepare();
    again.clear();
    status found;
    CHECK_FALSE(again.try_clone(found));
    CHECK_FALSE(found.ok());
    const std::optional<f32_cache> copy = moved.try_clone(found);
    REQUIRE(copy);
    CHECK(kept_of(*copy) == kept_of(moved));
  }
  counting_resource memory;
  f32_cache cache(config_of(positions::absolute), rules_of(8), policy("knorm"), &memory);
  memory.exhausted = true;
  status found;
  CHECK_FALSE(cache.try_clone(found));
  CHECK(found.message().find("bytes of the cache was ") == 11);
  CHECK(found.message().find(std::to_string(cache.nbytes())) != std::string_view::npos);
}

TEST_CASE("sizes that nobody has are refused at once") {
  constexpr index_t huge = index_t{1} << 62;
  const auto refused = [](cache_config config, eviction rules, const std::string& name) {
    const scorer of = policy(name);
    const status found = f32_cache::validate(config, rules, of.get());
    INFO(found.message());
    CHECK_FALSE(found.ok());
  };
  cache_config config = config_of(positions::in_cache);
  config.num_kv_heads = huge;
  eviction rules = rules_of(8);
  rules.num_qo_heads = huge;
  for (const std::string& name : all_policies) {
    CAPTURE(name);
    refused(config, rules, name);
    eviction many = rules_of(8);
    many.num_qo_heads = huge;
    if (policy(name)->needs().window > 0 || policy(name)->needs().query_statistics)
      refused(config_of(positions::in_cache), many, name);
    for (const index_t rollback : {huge, std::numeric_limits<index_t>::max()})
      refused(config_of(positions::in_cache, rollback), rules_of(8), name);
  }
  for (index_t eviction::*const member :
       {&eviction::budget, &eviction::recent, &eviction::interval, &eviction::hard_budget}) {
    for (const index_t size : {huge, std::numeric_limits<index_t>::max(), index_t{1} << 41})
      for (const bool bound : {false, true}) {
        eviction endless = rules_of(8);
        endless.*member = size;
        if (bound) endless.bound = 1;
        refused(config_of(positions::in_cache), endless, "knorm");
      }
  }
  for (const double adaptive : {0., 1.}) {
    eviction shared = rules_of(8);
    shared.adaptive = adaptive;
    config.num_kv_heads = std::numeric_limits<index_t>::max() / 2;
    refused(config, shared, "snapkv");
  }
  struct endless_window final : token_scorer {
    sinkcache::scorer_needs needs() const noexcept override { return {.window = std::numeric_limits<index_t>::max()}; }
    void score(const sinkcache::scored_head&, std::span<float>) const noexcept override {}
  };
  const endless_window scorer_of_all;
  CHECK_FALSE(f32_cache::validate(config_of(positions::in_cache), rules_of(8), &scorer_of_all).ok());
  CHECK_THROWS_AS(sinkcache::pyramid_budgets(1, huge, 0), std::invalid_argument);
  CHECK_THROWS_AS(sinkcache::pyramid_budgets(4, huge, 0), std::invalid_argument);
  CHECK_THROWS_AS(sinkcache::duo_budgets({true}, 9, huge, huge), std::invalid_argument);
  sinkcache::status found;
  CHECK_FALSE(sinkcache::try_pyramid_budgets(0, 64, 36, found));
  CHECK(found.message() == "sinkcache: num_layers was 0, had to be at least 1");
  CHECK_FALSE(sinkcache::try_pyramid_budgets(4, 36, 36, found));
  CHECK(found.message() == "sinkcache: budget was 36, had to be above the rows that never leave, 36");
  CHECK_FALSE(sinkcache::try_pyramid_budgets(4, 64, 36, found, 0.5));
  CHECK(sinkcache::try_pyramid_budgets(4, 64, 36, found) == sinkcache::pyramid_budgets(4, 64, 36));
  CHECK(found.ok());
  CHECK_FALSE(sinkcache::try_duo_budgets({true, false}, 4, 4, 2, found));
  CHECK(found.message() == "sinkcache: budget was 4, had to be above num_sink_tokens, 4");
  CHECK(sinkcache::try_duo_budgets({true, true}, 0, 4, 2, found) == std::vector<index_t>{6, 6});  // nobody's
  CHECK(sinkcache::try_duo_budgets({true, false}, 5, 4, 2, found) == std::vector<index_t>{6, 5});
  CHECK_FALSE(sinkcache::try_duo_budgets({true}, 9, -1, 2, found));
  CHECK_FALSE(sinkcache::try_duo_budgets({true}, 9, 1, 0, found));
  CHECK(found.message() == "sinkcache: newest was 0, had to be at least 1");
  CHECK(sinkcache::try_duo_budgets({true, false}, 9, 1, 2, found) == std::vector<index_t>{3, 9});
  const f32_cache cache(config_of(positions::in_cache), rules_of(8), policy("knorm"));
  for (const index_t head : {index_t{-1}, kv_heads, huge}) {
    CHECK_THROWS_AS(cache.kept(head), std::invalid_argument);
    CHECK_THROWS_AS(cache.budget(head), std::invalid_argument);
    CHECK_THROWS_AS(cache.evicted_mass(head), std::invalid_argument);
    CHECK_THROWS_AS(cache.largest_bound(head), std::invalid_argument);
  }
  refused(config_of(positions::in_cache), rules_of(8), "lagkv lag=4611686018427387904");
  refused(config_of(positions::in_cache), rules_of(8), "lagkv lag=41");
  refused(config_of(positions::in_cache), rules_of(8), "expected_attention T=9223372036854775807");
  struct negative final : token_scorer {
    sinkcache::scorer_needs needs() const noexcept override { return {}; }
    void score(const sinkcache::scored_head&, std::span<float>) const noexcept override {}
    index_t scratch_floats(const sinkcache::scored_sizes&) const noexcept override { return -1; }
  };
  const negative scorer_of_less;
  CHECK_FALSE(f32_cache::validate(config_of(positions::in_cache), rules_of(8), &scorer_of_less).ok());
}
