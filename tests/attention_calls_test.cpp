// Calls as hosts make them: batches of sequences, parts of a call on threads of the host's own, attend over tokens that
// are stored already, and any executor. All of it is the same bits.

#include <fmt/format.h>

#include <sinkcache/attention.hpp>
#include <sinkcache/host_threads.hpp>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sinkcache/thread_pool.hpp>
#include "catch.hpp"
#include "effort.hpp"
#include "random_matrix.hpp"

using namespace sinkcache;
using proof::as_size, proof::random_matrix;

namespace {

constexpr float canary = 77.f;
constexpr index_t largest_index = std::numeric_limits<index_t>::max();

std::span<const float> row_of(const matrix& m) { return {m.data(), as_size(m.size())}; }
std::span<float> row_of(matrix& m) { return {m.data(), as_size(m.size())}; }

// Outputs and lse of a call of so many rows, full of canaries before.
struct result {
  matrix out;
  std::vector<float> lse;

  result(const attention& attention, const kv_source& keys, index_t rows)
      : out(matrix::Constant(rows, attention.params().num_qo_heads * keys.geometry().v_head_dim, canary)),
        lse(as_size(rows * attention.params().num_qo_heads), canary) {}

  bool operator==(const result& other) const {
    return out.size() == other.out.size() &&
           std::memcmp(out.data(), other.out.data(), as_size(out.size()) * sizeof(float)) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
  bool untouched() const {
    return (out.array() == canary).all() && std::all_of(lse.begin(), lse.end(), [](float x) { return x == canary; });
  }
};

// Executors.

// Notes how many items each run had.
struct counting {
  std::vector<index_t> runs = {};

  index_t concurrency() const { return 1; }
  void run(index_t n, const work_ref& work) {
    runs.push_back(n);
    for (index_t item = 0; item < n; ++item) work(item, 0);
  }
};

struct reversing {
  index_t concurrency() const { return 2; }
  void run(index_t n, const work_ref& work) const {
    for (index_t item = n; item-- > 0;) work(item, item % 2);
  }
};

// Items in any order, on workers at random.
struct shuffling {
  effort::dice dice;

  index_t concurrency() const { return 5; }
  void run(index_t n, const work_ref& work) {
    std::vector<index_t> order;
    for (index_t item = 0; item < n; ++item) order.push_back(item);
    for (index_t i = n - 1; i > 0; --i) std::swap(order[as_size(i)], order[as_size(dice.from_to(0, i))]);
    for (const index_t item : order) work(item, dice.from_to(0, 4));
  }
};

// The pool of some engine: calls f(thread index, number of threads) on all of its threads.
struct engine_pool {
  index_t size;

  index_t num_threads() const { return size; }
  template <class F>
  void run(const F& f) const {
    std::vector<std::thread> team;
    for (index_t i = 0; i < size; ++i) team.emplace_back([&f, i, this] { f(i, size); });
    for (std::thread& thread : team) thread.join();
  }
};

// Calls f(name, executor) for executors of every kind.
template <class F>
void for_executors(const F& f) {
  for (const index_t size : {1, 2, 3, 7}) {
    sinkcache::thread_pool pool(size);
    f("pool of " + std::to_string(size), pool);
    engine_pool engine{size};
    pool_executor on_engine(engine);
    f("engine's pool of " + std::to_string(size), on_engine);
  }
  reversing reversed;
  f("reversing", reversed);
  for (std::uint64_t seed = 0; seed < 2; ++seed) {
    shuffling shuffled{effort::dice(seed)};
    f("shuffling", shuffled);
  }
}

// Batches.

// Sequences of one layer whose caches have nothing in common but that its heads are a multiple of theirs.
struct batch {
  effort::dice dice;
  sinkcache::attention attention{{.num_qo_heads = 12,
                                  .softmax = softmax_variant::softmax1(),
                                  .logits_soft_cap = 30,
                                  .alibi_slopes = std::vector<float>(12, 0.01f),
                                  .sink_bias = std::vector<float>(12, 0.5f)}};
  std::vector<std::unique_ptr<any_kv_cache>> caches;
  std::vector<matrix> queries;

  explicit batch(std::uint64_t seed) : dice(seed) {}

  template <kv_format K, kv_format V = K>
  void add(const cache_config& config, index_t tokens) {
    auto cache = std::make_unique<kv_cache<K, V>>(config);
    const cache_config& c = cache->config();
    for (index_t left = tokens, n; left > 0; left -= n) {
      n = std::min<index_t>(left, 1000);
      cache->append(random_matrix(dice, n, c.num_kv_heads * c.head_dim),
                    random_matrix(dice, n, c.num_kv_heads * c.v_head_dim));
    }
    queries.push_back(random_matrix(dice, 1, 12 * c.head_dim));
    caches.push_back(std::move(cache));
  }
  // One token, a slice, a few slices, longer slices; each of its own shape.
  void add_all() {
    const rope turns = rope::plain(16, 1e4);
    add<f32>({.num_kv_heads = 3, .head_dim = 16, .window = 50, .rope = turns}, 1);
    add<bf16>({.num_kv_heads = 2, .head_dim = 33, .num_sink_tokens = 4, .window = 9000, .rope = turns}, 12000);
    add<f16>({.num_kv_heads = 12, .head_dim = 16, .v_head_dim = 40, .window = 600, .rope = turns}, 1);
    add<f32>({.num_kv_heads = 1, .head_dim = 64, .num_sink_tokens = 2, .window = 510, .rope = turns}, 700);
    add<f32, bf16>({.num_kv_heads = 4,
                    .head_dim = 24,
                    .v_head_dim = 7,
                    .num_sink_tokens = 3,
                    .window = 1200,
                    .positions = positions::absolute,
                    .inputs = inputs::rotated},
                   1500);
    add<f32>({.num_kv_heads = 3, .head_dim = 16, .window = 50, .rope = turns}, 1);
    add<bf16, f16>({.num_kv_heads = 6,
                    .head_dim = 20,
                    .num_sink_tokens = 1,
                    .window = 40,
                    .inputs = inputs::rotated,
                    .rope = turns,
                    .first_position = 1 << 20,
                    .rollback = 9},
                   513);
    add<f32>({.num_kv_heads = 3, .head_dim = 16, .window = 8200, .rope = turns}, 8193);
  }

  std::vector<result> alone(workspace& scratch) const {
    std::vector<result> results;
    for (std::size_t i = 0; i < caches.size(); ++i) {
      result& one = results.emplace_back(attention, *caches[i], 1);
      attention.decode(queries[i], *caches[i], one.out, scratch, {.lse = one.lse});
    }
    return results;
  }
  // Through items [first, last) at once.
  std::vector<decode_item> items(std::vector<result>& results, std::size_t first, std::size_t last) const {
    std::vector<decode_item> list;
    for (std::size_t i = first; i < last; ++i)
      list.push_back(
          {.q = row_of(queries[i]), .keys = caches[i].get(), .out = row_of(results[i].out), .lse = results[i].lse});
    return list;
  }
  std::vector<result> blank() const {
    std::vector<result> results;
    for (const auto& cache : caches) results.emplace_back(attention, *cache, 1);
    return results;
  }
};

TEST_CASE("calls: a batch is one run, and every sequence gets its own bits") {
  batch b(1);
  b.add_all();
  counting executor;
  workspace alone, scratch(executor);
  const std::vector<result> expected = b.alone(alone);
  const std::size_t n = b.caches.size();
  for (int round = 0; round < 3; ++round) {  // the same workspace, full of the last round's numbers
    std::vector<result> together = b.blank(), tried = b.blank();
    executor.runs.clear();
    b.attention.decode(b.items(together, 0, n), scratch);
    REQUIRE(executor.runs.size() == 1);
    // KV heads times slices: of 512 tokens, or a sixteenth of them all in whole 64.
    CHECK(executor.runs[0] == 3 + 2 * 16 + 12 + 1 + 4 * 3 + 3 + 6 + 3 * 15);
    CHECK(together == expected);
    executor.runs.clear();
    CHECK(b.attention.try_decode(b.items(tried, 0, n), scratch).ok());
    CHECK(executor.runs.size() == 1);
    CHECK(tried == expected);
  }
  // Parts of the batch, and each alone; what is not in it stays untouched.
  for (std::size_t first = 0; first < n; ++first)
    for (const std::size_t last : {first + 1, std::min(n, first + 3)}) {
      CAPTURE(first, last);
      std::vector<result> some = b.blank();
      b.attention.decode(b.items(some, first, last), scratch);
      for (std::size_t i = 0; i < n; ++i)
        CHECK((first <= i && i < last ? some[i] == expected[i] : some[i].untouched()));
    }
}

TEST_CASE("calls: a batch may ask one cache twice, and no lse") {
  batch b(2);
  b.add_all();
  workspace scratch;
  const std::vector<result> expected = b.alone(scratch);
  std::vector<result> first = b.blank(), second = b.blank();
  std::vector<decode_item> items;
  for (std::size_t i = 0; i < b.caches.size(); ++i)
    for (std::vector<result>* results : {&first, &second})
      items.push_back({.q = row_of(b.queries[i]), .keys = b.caches[i].get(), .out = row_of((*results)[i].out)});
  b.attention.decode(items, scratch);
  for (std::size_t i = 0; i < b.caches.size(); ++i)
    for (const std::vector<result>* results : {&first, &second}) {
      CHECK((*results)[i].out == expected[i].out);
      CHECK((*results)[i].lse == std::vector<float>(12, canary));
    }
}

TEST_CASE("calls: a batch of hundreds, on every executor", "[threads]") {
  batch b(3);
  for (int i = 0; i < 300; ++i) {
    const cache_config config{.num_kv_heads = i % 3 + 1, .head_dim = i % 20 + 1, .window = 600, .rope = rope::none()};
    if (i % 2 == 0)
      b.add<bf16>(config, i % 7 == 0 ? 700 : i % 50 + 1);
    else
      b.add<f32>(config, i % 11 == 0 ? 700 : i % 50 + 1);
  }
  workspace alone;
  const std::vector<result> expected = b.alone(alone);
  for_executors([&](const std::string& name, auto& executor) {
    INFO(name);
    workspace scratch(executor);
    std::vector<result> together = b.blank();
    b.attention.decode(b.items(together, 0, b.caches.size()), scratch);
    CHECK(together == expected);
  });
}

TEST_CASE("calls: an empty batch runs nothing") {
  counting executor;
  workspace scratch(executor);
  const attention attention({.num_qo_heads = 4});
  attention.decode(std::span<const decode_item>(), scratch);
  CHECK(attention.try_decode(std::span<const decode_item>(), scratch).ok());
  CHECK(executor.runs.empty());
}

TEST_CASE("calls: a batch takes memory only where the workspace is too small, and then once") {
  batch b(4);
  for (int i = 0; i < 4; ++i) b.add_all();
  workspace scratch;
  const index_t bytes = scratch.nbytes();
  std::vector<result> together = b.blank();
  b.attention.decode(b.items(together, 0, 3), scratch);
  CHECK(scratch.nbytes() == bytes);
  b.attention.decode(b.items(together, 0, b.caches.size()), scratch);
  const index_t grown = scratch.nbytes();
  b.attention.decode(b.items(together, 0, b.caches.size()), scratch);
  b.attention.decode(b.items(together, 1, 9), scratch);
  CHECK(scratch.nbytes() == grown);
}

TEST_CASE("calls: a bad item refuses the whole batch, and nothing is written") {
  batch b(5);
  b.add_all();
  counting executor;
  workspace scratch(executor);
  std::vector<result> results = b.blank();
  kv_cache<f32> five({.num_kv_heads = 5, .head_dim = 16, .window = 5, .rope = rope::none()});
  const matrix row = matrix::Zero(1, 5 * 16);
  five.append(row, row);
  const auto refused = [&](const auto& spoil, const char* message) {
    for (const std::size_t at : {std::size_t{0}, b.caches.size() / 2, b.caches.size() - 1}) {
      std::vector<decode_item> items = b.items(results, 0, b.caches.size());
      spoil(items[at]);
      CHECK(b.attention.try_decode(items, scratch).message() == std::string("sinkcache: ") + message);
      CHECK_THROWS_WITH(b.attention.decode(items, scratch), std::string("sinkcache: ") + message);
    }
  };
  refused(
      [](decode_item& i) {
        i.q = {static_cast<const float*>(nullptr), i.q.size()};
      },
      "a batch's q was null, had to be a row");
  const std::string of_q = std::to_string(12 * b.caches[0]->geometry().head_dim),
                    of_out = std::to_string(12 * b.caches[0]->geometry().v_head_dim);
  const auto first_refused = [&](const auto& spoil, const std::string& message) {
    std::vector<decode_item> items = b.items(results, 0, b.caches.size());
    spoil(items[0]);
    CHECK(b.attention.try_decode(items, scratch).message() == "sinkcache: " + message);
  };
  first_refused([](decode_item& i) { i.q = i.q.first(3); }, "a batch's q was 3, had to be of size " + of_q);
  first_refused([](decode_item& i) { i.out = i.out.first(5); }, "a batch's out was 5, had to be of size " + of_out);
  refused([](decode_item& i) { i.lse = i.lse.first(11); }, "lse.size() was 11, had to be 0 or 12");
  std::vector<float> longer(13, canary);
  refused([&](decode_item& i) { i.lse = longer; }, "lse.size() was 13, had to be 0 or 12");
  refused([](decode_item& i) { i.keys = nullptr; }, "a batch's keys was null, had to be a cache or view");
  refused(
      [](decode_item& i) {
        i.out = {static_cast<float*>(nullptr), i.out.size()};
      },
      "a batch's out was null, had to be a row");
  refused([&](decode_item& i) { i.keys = &five; },
          "num_qo_heads was 12, had to be a multiple of the cache's num_kv_heads, 5");
  CHECK(executor.runs.empty());
  for (const result& r : results) CHECK(r.untouched());
}

// Parts of a call.

// A layer, and a cache in which its newest `rows` tokens can be attended to again.
struct rows_case {
  std::uint64_t seed;
  cache_config config;
  attention_params params;
  index_t tokens, rows;
  matrix q, k, v;

  rows_case(std::uint64_t from, index_t most_rows) : seed(from) {
    effort::dice dice(seed);
    const index_t group = dice.one_in(2) ? dice.from_to(1, 4) : dice.from_to(1, dice.one_in(3) ? 71 : 16);
    rows = dice.from_to(1, std::max<index_t>(2, most_rows / group));
    config = {.num_kv_heads = dice.from_to(1, 4),
              .head_dim = dice.from_to(1, 40),
              .v_head_dim = dice.from_to(1, 40),
              .num_sink_tokens = dice.from_to(0, 5),
              .window = dice.from_to(1, dice.one_in(2) ? 400 : 30),
              .positions = dice.one_in(3) ? positions::absolute : positions::in_cache,
              .inputs = dice.one_in(3) ? inputs::rotated : inputs::raw,
              .rope = rope::none(),
              .first_position = dice.from_to(0, 1 << 20),
              .rollback = rows - 1};
    if (config.head_dim > 1 && !dice.one_in(3)) config.rope = rope::plain(config.head_dim / 2 * 2, 1e3);
    params.num_qo_heads = config.num_kv_heads * group;
    if (dice.one_in(3)) params.softmax = softmax_variant::softmax1();
    if (dice.one_in(4)) params.logits_soft_cap = 20;
    if (dice.one_in(4)) params.alibi_slopes.assign(as_size(params.num_qo_heads), 0.01f);
    if (dice.one_in(4)) params.sink_bias.assign(as_size(params.num_qo_heads), 0.3f);
    tokens = rows + (dice.one_in(4) ? 0 : dice.from_to(0, 900));
    q = random_matrix(dice, rows, params.num_qo_heads * config.head_dim);
    k = random_matrix(dice, tokens, config.num_kv_heads * config.head_dim);
    v = random_matrix(dice, tokens, config.num_kv_heads * config.v_head_dim);
  }
  std::string name() const {
    return fmt::format("seed {}: {} + {} heads of {} and {}, {} sink tokens, window {}, {} of {} tokens", seed,
                       params.num_qo_heads, config.num_kv_heads, config.head_dim, config.v_head_dim,
                       config.num_sink_tokens, config.window, rows, tokens);
  }
};

// Draws a partition of [0, n) into runs; now and then it is the finest.
std::vector<std::pair<index_t, index_t>> partition(effort::dice& dice, index_t n) {
  std::vector<std::pair<index_t, index_t>> parts;
  const index_t longest = dice.one_in(3) ? 1 : n;
  for (index_t first = 0, size = 0; first < n; first += size) {
    size = dice.from_to(1, std::min(longest, n - first));
    parts.emplace_back(first, size);
  }
  return parts;
}

TEST_CASE("calls: any partition over KV heads and rows gives the bits of the whole") {
  for (int i = 0; i < effort::cases(150); ++i) {
    rows_case c(static_cast<std::uint64_t>(i), i % 2 == 0 ? 30 : 300);
    INFO(c.name());
    effort::dice dice(c.seed + 1);
    kv_cache<f32, bf16> cache(c.config);
    cache.append(c.k, c.v);
    const attention attention(c.params);
    workspace scratch;
    result whole(attention, cache, c.rows);
    attention.attend(c.q, cache, whole.out, scratch, {.lse = whole.lse});
    for (int round = 0; round < 4; ++round) {
      result parts(attention, cache, c.rows);
      for (const auto& [first_head, heads] : partition(dice, c.config.num_kv_heads))
        for (const auto& [first_row, rows] : partition(dice, c.rows)) {
          call_part part{first_head, heads, first_row, rows};
          if (first_head + heads == c.config.num_kv_heads && dice.one_in(2)) part.num_kv_heads = call_part::rest;
          if (first_row + rows == c.rows && dice.one_in(2)) part.num_rows = call_part::rest;
          attention.attend(c.q, cache, parts.out, scratch, {.lse = parts.lse}, part);
        }
      CHECK(parts == whole);
    }
  }
}

TEST_CASE("calls: a part writes what is its own, and nothing else") {
  for (int i = 0; i < effort::cases(60); ++i) {
    rows_case c(1000 + static_cast<std::uint64_t>(i), 100);
    INFO(c.name());
    effort::dice dice(c.seed + 1);
    kv_cache<bf16> cache(c.config);
    cache.append(c.k, c.v);
    const attention attention(c.params);
    workspace scratch;
    result whole(attention, cache, c.rows), part(attention, cache, c.rows);
    attention.attend(c.q, cache, whole.out, scratch, {.lse = whole.lse});
    // Up to and including the end: there, nothing is left.
    const index_t first_head = dice.from_to(0, c.config.num_kv_heads), first_row = dice.from_to(0, c.rows);
    const call_part of{first_head, dice.from_to(0, c.config.num_kv_heads - first_head), first_row,
                       dice.from_to(0, c.rows - first_row)};
    CAPTURE(of.first_kv_head, of.num_kv_heads, of.first_row, of.num_rows);
    attention.attend(c.q, cache, part.out, scratch, {.lse = part.lse}, of);
    const index_t heads = of.num_kv_heads, rows = of.num_rows;
    const index_t group = c.params.num_qo_heads / c.config.num_kv_heads;
    bool right = true;
    for (index_t row = 0; row < c.rows; ++row)
      for (index_t head = 0; head < c.params.num_qo_heads; ++head) {
        const bool inside = row >= first_row && row < first_row + rows && head / group >= first_head &&
                            head / group < first_head + heads;
        const std::size_t at = as_size(row * c.params.num_qo_heads + head);
        right &= part.lse[at] == (inside ? whole.lse[at] : canary);
        for (index_t d = head * c.config.v_head_dim; d < (head + 1) * c.config.v_head_dim; ++d)
          right &= part.out(row, d) == (inside ? whole.out(row, d) : canary);
      }
    CHECK(right);
  }
}

TEST_CASE("calls: parts of one token may be slices of a long cache") {
  batch b(6);
  b.add_all();
  workspace scratch;
  const std::vector<result> expected = b.alone(scratch);
  for (std::size_t i = 0; i < b.caches.size(); ++i) {
    CAPTURE(i);
    result whole(b.attention, *b.caches[i], 1), parts = whole, past_the_end = whole;
    b.attention.attend(b.queries[i], *b.caches[i], whole.out, scratch, {.lse = whole.lse});
    CHECK(whole == expected[i]);  // attend of one row is decode
    const index_t kv_heads = b.caches[i]->geometry().num_kv_heads;
    for (const auto& [first, size] : partition(b.dice, kv_heads))
      b.attention.attend(b.queries[i], *b.caches[i], parts.out, scratch, {.lse = parts.lse}, {first, size, 0, 1});
    CHECK(parts == expected[i]);
    for (const call_part& empty :
         {call_part{kv_heads, 0, 0, 1}, {0, kv_heads, 1, 0}, {0, 0}, {.num_rows = 0}, {kv_heads}})
      b.attention.attend(b.queries[i], *b.caches[i], past_the_end.out, scratch, {.lse = past_the_end.lse}, empty);
    CHECK(past_the_end.untouched());
  }
}

TEST_CASE("calls: decode before anything was stored is refused, and changes nothing") {
  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 4, .window = 3, .rope = rope::none()});
  const attention attention({.num_qo_heads = 1});
  workspace scratch;
  const matrix q = matrix::Ones(1, 4);
  result one(attention, cache, 1);
  const char* const message =
      "sinkcache: keys.seen() was 0, had to be at least 1: its newest token is the one that attends";
  CHECK(attention.try_decode(q, cache, one.out, scratch, {.lse = one.lse}).message() == message);
  CHECK_THROWS_WITH(attention.decode(q, cache, one.out, scratch), message);
  const std::vector<decode_item> batch = {{.q = row_of(q), .keys = &cache, .out = row_of(one.out), .lse = one.lse}};
  CHECK(attention.try_decode(batch, scratch).message() == message);
  CHECK(one.untouched());
  // A state takes what there is, of a rank that has no tokens too.
  attention_state state(1, 4);
  attention.attend(q, cache, state, scratch);
  CHECK(state.data()[1] == 0);
}

TEST_CASE("calls: bad parts are refused in exact words") {
  rows_case c(7, 30);
  c.config.num_kv_heads = 3;
  c.params = {.num_qo_heads = 6};
  effort::dice dice(7);
  kv_cache<f32> cache(c.config);
  const index_t dim = c.config.head_dim;
  const matrix k = random_matrix(dice, 20, 3 * dim), v = random_matrix(dice, 20, 3 * cache.config().v_head_dim);
  cache.append(k, v);
  const attention attention(c.params);
  counting executor;
  workspace scratch(executor);
  struct bad {
    call_part part;
    const char *one_row, *two_rows;
  };
  const bad table[] = {
      {{-1, 0, 0, 0}, "first_kv_head was -1, had to be from 0 to 3", nullptr},
      {{4, 0, 0, 0}, "first_kv_head was 4, had to be from 0 to 3", nullptr},
      {{largest_index, 0, 0, 0}, "first_kv_head was 9223372036854775807, had to be from 0 to 3", nullptr},
      {{0, -2, 0, 0}, "num_kv_heads was -2, had to be from 0 to 3", nullptr},
      {{0, 4, 0, 0}, "num_kv_heads was 4, had to be from 0 to 3", nullptr},
      {{2, 2, 0, 0}, "num_kv_heads was 2, had to be from 0 to 1", nullptr},
      {{1, largest_index, 0, 0}, "num_kv_heads was 9223372036854775807, had to be from 0 to 2", nullptr},
      {{3, 1, 0, 0}, "num_kv_heads was 1, had to be from 0 to 0", nullptr},
      {{0, 0, -1, 0}, "first_row was -1, had to be from 0 to 1", "first_row was -1, had to be from 0 to 2"},
      {{0, 0, 3, 0}, "first_row was 3, had to be from 0 to 1", "first_row was 3, had to be from 0 to 2"},
      {{0, 0, 0, -5}, "num_rows was -5, had to be from 0 to 1", "num_rows was -5, had to be from 0 to 2"},
      {{0, 0, 0, 3}, "num_rows was 3, had to be from 0 to 1", "num_rows was 3, had to be from 0 to 2"},
      {{0, 0, 1, largest_index},
       "num_rows was 9223372036854775807, had to be from 0 to 0",
       "num_rows was 9223372036854775807, had to be from 0 to 1"},
      {{-largest_index - 1, -largest_index - 1, -largest_index - 1, -largest_index - 1},
       "first_kv_head was -9223372036854775808, had to be from 0 to 3",
       nullptr},
  };
  c.rows = std::min<index_t>(2, c.config.rollback + 1);
  REQUIRE(c.rows == 2);
  for (const index_t rows : {1, 2})
    for (const bad& row : table) {
      const matrix q = random_matrix(dice, rows, 6 * dim);
      result r(attention, cache, rows);
      const std::string message =
          std::string("sinkcache: ") + (rows == 2 && row.two_rows != nullptr ? row.two_rows : row.one_row);
      CHECK(attention.try_attend(q, cache, r.out, scratch, {.lse = r.lse}, row.part).message() == message);
      CHECK_THROWS_WITH(attention.attend(q, cache, r.out, scratch, {.lse = r.lse}, row.part), message);
      CHECK(r.untouched());
    }
  CHECK(executor.runs.empty());
}

TEST_CASE("calls: threads of the host share a call, each with its workspace", "[threads]") {
  for (int i = 0; i < effort::cases(20); ++i) {
    rows_case c(2000 + static_cast<std::uint64_t>(i), 200);
    INFO(c.name());
    kv_cache<f16> cache(c.config);
    cache.append(c.k, c.v);
    const attention attention(c.params);
    workspace scratch;
    result whole(attention, cache, c.rows), newest(attention, cache, 1);
    attention.attend(c.q, cache, whole.out, scratch, {.lse = whole.lse});
    attention.decode(c.q.bottomRows(1), cache, newest.out, scratch, {.lse = newest.lse});
    for (const index_t number : {1, 2, 3, 7}) {
      std::vector<workspace> workspaces(as_size(number));
      result by_heads(attention, cache, c.rows), by_rows(attention, cache, c.rows), one(attention, cache, 1);
      engine_pool{number}.run([&](index_t ith, index_t nth) {
        workspace& own = workspaces[as_size(ith)];
        attention.attend(c.q, cache, by_heads.out, own, {.lse = by_heads.lse},
                         part_of_thread(ith, nth, c.config.num_kv_heads, c.rows));
        attention.attend(c.q.bottomRows(1), cache, one.out, own, {.lse = one.lse},
                         part_of_thread(ith, nth, c.config.num_kv_heads, 1));
        const index_t rows = (c.rows + nth - 1) / nth, first = std::min(c.rows, ith * rows);
        attention.attend(c.q, cache, by_rows.out, own, {.lse = by_rows.lse},
                         {0, call_part::rest, first, std::min(rows, c.rows - first)});
      });
      CHECK(by_heads == whole);
      CHECK(by_rows == whole);
      CHECK(one == newest);
    }
  }
}

// Tokens that are stored already.

TEST_CASE("calls: attend to the newest tokens is what prefill gave") {
  for (int i = 0; i < effort::cases(100); ++i) {
    rows_case c(3000 + static_cast<std::uint64_t>(i), i % 2 == 0 ? 30 : 300);
    c.config.rollback = std::max<index_t>(c.rows, 1);
    INFO(c.name());
    effort::dice dice(c.seed + 1);
    kv_cache<bf16, f32> cache(c.config), decoded(c.config);
    const attention attention(c.params);
    workspace scratch;
    const index_t before = c.tokens - c.rows;
    cache.append(c.k.topRows(before), c.v.topRows(before));
    decoded.append(c.k.topRows(before), c.v.topRows(before));
    result prefilled(attention, cache, c.rows), again = prefilled, one_by_one = prefilled;
    attention.prefill(c.q, c.k.bottomRows(c.rows), c.v.bottomRows(c.rows), cache, prefilled.out, scratch,
                      {.lse = prefilled.lse});
    attention.attend(c.q, cache, again.out, scratch, {.lse = again.lse});
    for (index_t row = 0; row < c.rows; ++row) {
      decoded.append(c.k.row(before + row), c.v.row(before + row));
      attention.decode(c.q.row(row), decoded, one_by_one.out.row(row), scratch,
                       {.lse = std::span(one_by_one.lse)
                                   .subspan(static_cast<std::size_t>(row * c.params.num_qo_heads),
                                            static_cast<std::size_t>(c.params.num_qo_heads))});
    }
    const float largest = c.v.cwiseAbs().maxCoeff();
    // Twice the bound of the design, for one query row against the other; |q| |k| sm_scale is below 4 sqrt(40).
    const float bound = 2 * 16 * 0x1p-24f * (1 + 26) * largest;
    CHECK((again.out - prefilled.out).cwiseAbs().maxCoeff() <= bound);
    CHECK((again.out - one_by_one.out).cwiseAbs().maxCoeff() <= bound);
    // The newest few of them.
    const index_t few = dice.from_to(1, c.rows);
    result some(attention, cache, few);
    attention.attend(c.q.bottomRows(few), cache, some.out, scratch, {.lse = some.lse});
    CHECK((some.out - prefilled.out.bottomRows(few)).cwiseAbs().maxCoeff() <= bound);
    if (few == 1) CHECK(some.out == one_by_one.out.bottomRows(1));
  }
}

TEST_CASE("calls: attend refuses more tokens than are stored, or than still see what they saw") {
  effort::dice dice(8);
  const cache_config config{
      .num_kv_heads = 2, .head_dim = 6, .num_sink_tokens = 2, .window = 10, .rope = rope::none(), .rollback = 3};
  kv_cache<f32> cache(config);
  const attention attention({.num_qo_heads = 4});
  workspace scratch;
  const auto refusal = [&](index_t rows) {
    const matrix q = random_matrix(dice, rows, 4 * 6);
    result r(attention, cache, rows);
    const status found = attention.try_attend(q, cache, r.out, scratch, {.lse = r.lse});
    if (!found) CHECK(r.untouched());
    if (!found) CHECK_THROWS_WITH(attention.attend(q, cache, r.out, scratch), std::string(found.message()));
    return std::string(found.message());
  };
  CHECK(refusal(0).empty());
  CHECK(refusal(1) == "sinkcache: q.rows() was 1, had to be at most what was stored, 0");
  const auto append = [&](index_t n) { cache.append(random_matrix(dice, n, 12), random_matrix(dice, n, 12)); };
  append(9);
  CHECK(refusal(9).empty());
  CHECK(refusal(10) == "sinkcache: q.rows() was 10, had to be at most what was stored, 9");
  append(6);  // 15 = sink tokens, window, rollback: nothing is overwritten yet
  CHECK(refusal(15).empty());
  append(1);
  CHECK(refusal(4).empty());
  CHECK(refusal(5) == "sinkcache: q.rows() was 5, had to be at most 4: what older tokens saw is overwritten");
  append(100);
  CHECK(refusal(4).empty());
  CHECK(refusal(5) == "sinkcache: q.rows() was 5, had to be at most 4: what older tokens saw is overwritten");
  cache.truncate(cache.seen() - 2);
  CHECK(refusal(2).empty());
  CHECK(refusal(3) == "sinkcache: q.rows() was 3, had to be at most 2: what older tokens saw is overwritten");
}

// Executors.

TEST_CASE("calls: the same bits on any executor, in any order", "[threads]") {
  effort::dice dice(9);
  const cache_config config{.num_kv_heads = 2,
                            .head_dim = 24,
                            .v_head_dim = 20,
                            .num_sink_tokens = 4,
                            .window = 19996,
                            .rope = rope::plain(24, 1e4),
                            .rollback = 149};
  kv_cache<bf16> cache(config);
  for (int i = 0; i < 21; ++i) cache.append(random_matrix(dice, 1000, 2 * 24), random_matrix(dice, 1000, 2 * 20));
  REQUIRE(cache.size() == 20000);
  const attention attention({.num_qo_heads = 6, .softmax = softmax_variant::softmax1()});
  const matrix q = random_matrix(dice, 400, 6 * 24), k = random_matrix(dice, 400, 2 * 24),
               v = random_matrix(dice, 400, 2 * 20);
  kv_cache<bf16> prompt({.num_kv_heads = 2,
                         .head_dim = 24,
                         .v_head_dim = 20,
                         .window = 300,
                         .rope = rope::plain(24, 1e4),
                         .rollback = 149});
  const auto run = [&](workspace& scratch) {
    std::vector<float> all;
    result one(attention, cache, 1), many(attention, cache, 400);
    const auto keep = [&](const result& r) {
      all.insert(all.end(), r.out.data(), r.out.data() + r.out.size());
      all.insert(all.end(), r.lse.begin(), r.lse.end());
    };
    attention.decode(q.topRows(1), cache, one.out, scratch, {.lse = one.lse});
    keep(one);
    attention_state state(6, 20);
    attention.attend(q.topRows(1), cache, state, scratch);
    all.insert(all.end(), state.data().begin(), state.data().end());
    prompt.clear();
    attention.prefill(q, k, v, prompt, many.out, scratch, {.lse = many.lse});
    keep(many);
    prompt.clear();
    prompt.append(k.topRows(290), v.topRows(290));
    result some(attention, prompt, 200);
    attention.attend(q.topRows(200), prompt, some.out, scratch, {.lse = some.lse});
    keep(some);
    return all;
  };
  workspace alone;
  const std::vector<float> expected = run(alone);
  for_executors([&](const std::string& name, auto& executor) {
    INFO(name);
    workspace scratch(executor);
    CHECK(run(scratch) == expected);
  });
}

TEST_CASE("calls: a pool that is used over and over", "[threads]") {
  sinkcache::thread_pool pool(3);
  CHECK(pool.concurrency() == 3);
  for (const index_t n : {0, 1, 2, 3, 4, 100})
    for (int round = 0; round < 200; ++round) {
      std::vector<int> done(as_size(n));
      auto work = [&](index_t item, index_t worker) { done[as_size(item)] += worker >= 0 && worker < 3 ? 1 : 100; };
      pool.run(n, work_ref(work));
      REQUIRE(done == std::vector<int>(as_size(n), 1));
    }
  { sinkcache::thread_pool unused(5); }
}

TEST_CASE("calls: concurrent calls on one cache and layer", "[threads]") {
  batch b(10);
  b.add_all();
  workspace scratch;
  const std::vector<result> expected = b.alone(scratch);
  std::vector<int> wrong(4);
  engine_pool{4}.run([&](index_t ith, index_t) {
    sinkcache::thread_pool pool(ith % 2 + 1);
    workspace own(pool);
    for (int round = 0; round < 3; ++round) {
      std::vector<result> together = b.blank(), single = b.alone(own);
      b.attention.decode(b.items(together, 0, b.caches.size()), own);
      wrong[as_size(ith)] += (together == expected ? 0 : 1) + (single == expected ? 0 : 1);
      attention_state state(12, 33);
      b.attention.attend(b.queries[1], *b.caches[1], state, own);
      std::vector<float> out(33);
      for (index_t head = 0; head < 12; ++head) {
        state.finish(b.attention.params().softmax, head, out);
        wrong[as_size(ith)] += std::equal(out.begin(), out.end(), expected[1].out.data() + head * 33) ? 0 : 1;
      }
    }
  });
  CHECK(wrong == std::vector<int>(4, 0));
}

}  // namespace
