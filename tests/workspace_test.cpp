// Executors of every kind give the same bits; scratch memory grows once and is then left alone.

#include <sinkcache/attention.hpp>
#include <sinkcache/host_threads.hpp>
#include <sinkcache/joined.hpp>
#include <sinkcache/policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <sinkcache/workspace.hpp>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"

using namespace sinkcache;

// Counting what is allocated.

// Sanitizers bring their own operator new, and their own checks with it.
#if defined(__SANITIZE_ADDRESS__)
#define COUNTS_ALLOCATIONS 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define COUNTS_ALLOCATIONS 0
#endif
#endif
#ifndef COUNTS_ALLOCATIONS
#define COUNTS_ALLOCATIONS 1
#endif

// Where a sanitizer's allocator would end the program, it returns null as others do: tests ask for too much.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace {

std::atomic<long> allocations{0}, allocations_left{-1};  // -1: as many as are asked for

[[maybe_unused]] bool may_allocate() {
  ++allocations;
  if (allocations_left == 0) return false;
  if (allocations_left > 0) --allocations_left;
  return true;
}

}  // namespace

#if COUNTS_ALLOCATIONS
// Never inlined, or g++ sees a `free` of what came from `new` and warns.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  if (!may_allocate()) throw std::bad_alloc();
  if (void* const memory = std::malloc(std::max<std::size_t>(bytes, 1))) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t alignment) {
  if (!may_allocate()) throw std::bad_alloc();
  const auto align = static_cast<std::size_t>(alignment);
  if (void* const memory = std::aligned_alloc(align, (std::max<std::size_t>(bytes, 1) + align - 1) / align * align))
    return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
#endif

namespace {

// Executors.

// Threads that take the next item when they are done with one.
struct thread_pool {
  index_t threads;

  index_t concurrency() const { return threads; }
  void run(index_t n, const work_ref& work) const {
    std::atomic<index_t> next{0};
    std::vector<std::thread> pool;
    for (index_t worker = 0; worker < threads; ++worker)
      pool.emplace_back([&, worker] {
        for (index_t item = next++; item < n; item = next++) work(item, worker);
      });
    for (std::thread& thread : pool) thread.join();
  }
};

// Items out of order, workers at random.
struct shuffling {
  effort::dice dice;
  index_t workers;

  int concurrency() const { return static_cast<int>(workers); }
  void run(index_t n, const work_ref& work) {
    std::vector<index_t> order;
    for (index_t item = 0; item < n; ++item) order.push_back(item);
    for (index_t i = n - 1; i > 0; --i)
      std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(dice.from_to(0, i))]);
    for (index_t item : order) work(item, static_cast<index_t>(dice.from_to(0, workers - 1)));
  }
};

struct cannot_run {
  index_t concurrency() const { return 1; }
};
struct cannot_tell {
  void run(index_t, const work_ref&) const {}
};
struct tells_nonsense {
  const char* concurrency() const { return ""; }
  void run(index_t, const work_ref&) const {}
};

static_assert(executor<sequential> && executor<thread_pool> && executor<shuffling>);
static_assert(!executor<cannot_run> && !executor<cannot_tell> && !executor<tells_nonsense> && !executor<int>);
static_assert(std::is_constructible_v<workspace, thread_pool&> && !std::is_constructible_v<workspace, cannot_run&>);
static_assert(!std::is_constructible_v<workspace, thread_pool>, "a temporary executor would be gone at once");
static_assert(!std::is_convertible_v<thread_pool&, workspace>);
static_assert(!std::is_copy_constructible_v<workspace> && !std::is_copy_assignable_v<workspace>);
static_assert(std::is_nothrow_move_constructible_v<workspace> && std::is_nothrow_move_assignable_v<workspace>);

TEST_CASE("work_ref: calls what it was made of") {
  std::vector<std::pair<index_t, index_t>> calls;
  auto work = [&](index_t item, index_t worker) { calls.emplace_back(item, worker); };
  const work_ref ref(work);
  const work_ref copy = ref;
  ref(3, 1);
  copy(5, 0);
  sequential().run(3, ref);
  CHECK(calls == std::vector<std::pair<index_t, index_t>>{{3, 1}, {5, 0}, {0, 0}, {1, 0}, {2, 0}});
  sequential().run(0, ref);
  CHECK(calls.size() == 5);
  static_assert(noexcept(ref(0, 0)));
}

// A layer to run.

matrix random_matrix(effort::dice& dice, index_t rows, index_t cols) {
  matrix m(rows, cols);
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = dice.signed_unit();
  return m;
}

struct layer {
  effort::dice dice{3};
  kv_cache<f32> cache{{.num_kv_heads = 2,
                       .head_dim = 20,
                       .v_head_dim = 12,
                       .num_sink_tokens = 4,
                       .window = 1300,
                       .rope = rope::plain(20, 1000.0)}};
  attention layer_attention{{.num_qo_heads = 6, .softmax = softmax_variant::softmax1()}};
  matrix q = random_matrix(dice, 90, 6 * 20), k = random_matrix(dice, 90, 2 * 20), v = random_matrix(dice, 90, 2 * 12);

  layer() { cache.append(random_matrix(dice, 1500, 2 * 20), random_matrix(dice, 1500, 2 * 12)); }

  // Outputs and lse of a decode, a partial state, and a prefill of 90 tokens into a clone.
  std::vector<float> run(workspace& workspace) const {
    std::vector<float> all;
    const auto keep = [&](const float* from, index_t n) { all.insert(all.end(), from, from + n); };
    matrix out(1, 6 * 12), outs(90, 6 * 12);
    std::vector<float> lse(90 * 6);
    layer_attention.decode(q.topRows(1), cache, out, workspace, {.lse = std::span(lse).first(6)});
    keep(out.data(), out.size());
    keep(lse.data(), 6);
    attention_state state(6, 12);
    layer_attention.attend(q.topRows(1), cache, state, workspace);
    keep(state.data().data(), static_cast<index_t>(state.data().size()));
    kv_cache<f32> copy = cache.clone();
    layer_attention.prefill(q, k, v, copy, outs, workspace, {.lse = lse});
    keep(outs.data(), outs.size());
    keep(lse.data(), 90 * 6);
    return all;
  }
};

TEST_CASE("workspace: the same bits on any executor") {
  const layer layer;
  workspace alone;
  const std::vector<float> expected = layer.run(alone);
  for (float x : expected) REQUIRE(std::isfinite(x));
  for (index_t threads : {1, 2, 3, 7}) {
    CAPTURE(threads);
    thread_pool pool{threads};
    workspace with_pool(pool);
    CHECK(with_pool.concurrency() == threads);
    CHECK(layer.run(with_pool) == expected);
    CHECK(layer.run(with_pool) == expected);
    shuffling shuffled{effort::dice(static_cast<std::uint64_t>(threads)), threads};
    workspace with_shuffled(shuffled);
    CHECK(layer.run(with_shuffled) == expected);
  }
}

// Runs in order, and notes what it was asked for.
struct recording {
  index_t workers = 3;
  std::vector<index_t> runs = {};

  index_t concurrency() const { return workers; }
  void run(index_t n, const work_ref& work) {
    runs.push_back(n);
    for (index_t item = 0; item < n; ++item) work(item, item % workers);
  }
};

TEST_CASE("workspace: work is cut by the shape alone") {
  const layer layer;
  recording one{1}, three{3};
  workspace with_one(one), with_three(three);
  const std::vector<float> expected = layer.run(with_one);
  CHECK(layer.run(with_three) == expected);
  CHECK(one.runs == three.runs);
  CHECK(*std::max_element(one.runs.begin(), one.runs.end()) >= 6);  // there is work for several
}

// Memory.

TEST_CASE("workspace: reserve takes memory, and never gives it back") {
  workspace scratch;
  CHECK(scratch.concurrency() == 1);
  const index_t initial = scratch.nbytes();
  CHECK(initial > 0);
  scratch.reserve(0);
  scratch.reserve(-1);
  scratch.reserve(initial);
  CHECK(scratch.nbytes() == initial);
  scratch.reserve(initial + 1);
  CHECK(scratch.nbytes() >= initial + 1);
  const index_t more = scratch.nbytes();
  scratch.reserve(1);
  CHECK(scratch.nbytes() == more);

  thread_pool pool{4};
  CHECK(workspace(pool).nbytes() > initial);
}

TEST_CASE("workspace: executors without workers are refused") {
  thread_pool none{0}, negative{-2}, endless{std::numeric_limits<index_t>::max()};
  CHECK_THROWS_WITH(workspace(none), "sinkcache: executor.concurrency() was 0, had to be at least 1");
  CHECK_THROWS_WITH(workspace(negative), "sinkcache: executor.concurrency() was -2, had to be at least 1");
  CHECK_THROWS_AS(workspace(endless), std::invalid_argument);
}

TEST_CASE("workspace: moves with its executor and its memory") {
  const layer layer;
  workspace alone;
  const std::vector<float> expected = layer.run(alone);

  recording executor;
  workspace a(executor);
  const index_t bytes = a.nbytes();
  workspace b(std::move(a));
  CHECK((b.nbytes() == bytes && b.concurrency() == 3));
  CHECK(layer.run(b) == expected);
  CHECK(!executor.runs.empty());

  workspace c;
  c = std::move(b);
  executor.runs.clear();
  CHECK(c.concurrency() == 3);
  CHECK(layer.run(c) == expected);
  CHECK(!executor.runs.empty());

  // What was moved from is empty, and grows again when it is used.
  CHECK(layer.run(a) == expected);  // NOLINT(bugprone-use-after-move)
  CHECK(layer.run(b) == expected);  // NOLINT(bugprone-use-after-move)
}

TEST_CASE("workspace: workspace_bytes is what calls need") {
  const layer layer;
  for (index_t workers : {1, 3}) {
    recording executor{workers};
    workspace scratch(executor);
    const index_t initial = scratch.nbytes();
    CHECK(layer.layer_attention.workspace_bytes(layer.cache, 1, workers) <= initial);
    matrix out(1, 6 * 12);
    layer.layer_attention.decode(layer.q.topRows(1), layer.cache, out, scratch);
    CHECK(scratch.nbytes() == initial);  // an ordinary decode fits from the start
  }
}

TEST_CASE("workspace: workspace_bytes counts the partial states of a decode in slices") {
  // 300 heads of 512 in 8 slices of 512 tokens: more than a workspace begins with.
  constexpr index_t heads = 300, dim = 512, tokens = 4096;
  kv_cache<bf16> cache({.num_kv_heads = 1, .head_dim = 1, .v_head_dim = dim, .window = tokens, .rope = rope::none()});
  const matrix k = matrix::Zero(tokens / 8, 1), v = matrix::Ones(tokens / 8, dim);
  for (int i = 0; i < 8; ++i) cache.append(k, v);
  const attention attention({.num_qo_heads = heads});
  const matrix q = matrix::Ones(1, heads);
  matrix out(1, heads * dim);
  for (index_t workers : {1, 3}) {
    CAPTURE(workers);
    recording executor{workers};
    workspace scratch(executor);
    const index_t bytes = attention.workspace_bytes(cache, 1, workers);
    REQUIRE(bytes > scratch.nbytes());
    scratch.reserve(bytes);
    attention.decode(q, cache, out, scratch);
    CHECK(executor.runs.front() > 1);  // there are slices
    CHECK(scratch.nbytes() == bytes);
    CHECK(out == matrix::Ones(1, heads * dim));
  }
}

struct wants_all final : weight_reader {
  bool wants(position_t) const noexcept override { return true; }
  void read(const weight_tile&) noexcept override {}
};

// Workers in turn, and no notes: those would be allocated.
struct in_turns {
  index_t workers;

  index_t concurrency() const { return workers; }
  void run(index_t n, const work_ref& work) const {
    for (index_t item = 0; item < n; ++item) work(item, item % workers);
  }
};

// A workspace that holds nothing yet: what was moved from.
workspace empty_workspace(in_turns& executor) {
  workspace from(executor);
  const workspace to(std::move(from));
  return from;  // NOLINT(bugprone-use-after-move)
}

// Calls with as much memory as was said to be enough; then, if it is exact, with none.
template <class Call>
void check_enough(index_t workers, index_t bytes, const Call& call, bool exact = true) {
  in_turns executor{workers};
  workspace said = empty_workspace(executor);
  REQUIRE(said.nbytes() == 0);
  said.reserve(bytes);
  const long before = allocations;
  call(said);
  CHECK((said.nbytes() == bytes && (!COUNTS_ALLOCATIONS || allocations == before)));
  if (!exact) return;
  workspace grows = empty_workspace(executor);
  call(grows);
  CHECK(grows.nbytes() == bytes);
}

TEST_CASE("workspace: what workspace_bytes says is what every call takes, to the byte") {
  effort::dice dice(31);
  for (int i = 0; i < effort::cases(60); ++i) {
    const index_t workers = dice.from_to(1, 4), dim = dice.from_to(1, 90), kv_heads = dice.from_to(1, 3);
    const index_t heads = kv_heads * (dice.one_in(4) ? dice.from_to(30, 70) : dice.from_to(1, 5));
    const index_t n = dice.one_in(3) ? 1100 : dice.from_to(1, 60), rows = dice.from_to(1, std::min<index_t>(n, 50));
    CAPTURE(i, workers, dim, kv_heads, heads, n, rows);
    const cache_config config{.num_kv_heads = kv_heads,
                              .head_dim = dim,
                              .v_head_dim = dice.from_to(1, 90),
                              .num_sink_tokens = dice.from_to(0, 4),
                              .window = n + 5,
                              .rope = rope::none()};
    kv_cache<f32> cache(config), other(config);
    const matrix k = random_matrix(dice, n, kv_heads * dim), v = random_matrix(dice, n, kv_heads * config.v_head_dim);
    const matrix q = random_matrix(dice, n, heads * dim);
    cache.append(k, v);
    other.append(k.topRows(1), v.topRows(1));
    const attention attention({.num_qo_heads = heads});
    matrix out(n, heads * config.v_head_dim);
    wants_all reader;
    const auto one_q = q.topRows(1);
    auto one_out = out.topRows(1);
    for (weight_reader* weights : {static_cast<weight_reader*>(nullptr), static_cast<weight_reader*>(&reader)}) {
      const index_t one = attention.workspace_bytes(cache, 1, workers, weights),
                    some = attention.workspace_bytes(cache, rows, workers, weights);
      check_enough(workers, one,
                   [&](workspace& w) { attention.decode(one_q, cache, one_out, w, {.weights = weights}); });
      const auto q_rows = q.topRows(rows);
      auto out_rows = out.topRows(rows);
      check_enough(workers, some,
                   [&](workspace& w) { attention.attend(q_rows, cache, out_rows, w, {.weights = weights}); });
      kv_cache<f32> grows = cache.clone();
      const auto k_rows = k.topRows(rows), v_rows = v.topRows(rows);
      check_enough(workers, some, [&](workspace& w) {
        attention.prefill(q_rows, k_rows, v_rows, grows, out_rows, w, {.weights = weights});
      });
      std::vector<decode_item> batch;
      for (index_t item = dice.from_to(1, 5); item > 0; --item)
        batch.push_back({{q.data(), static_cast<std::size_t>(q.cols())},
                         dice.one_in(2) ? &cache : &other,
                         {out.data(), static_cast<std::size_t>(out.cols())},
                         {},
                         dice.one_in(2) ? weights : nullptr});
      check_enough(workers, attention.workspace_bytes(batch, workers),
                   [&](workspace& w) { attention.decode(batch, w); });
    }
    attention_state state(heads, config.v_head_dim);
    check_enough(workers, attention.workspace_bytes(cache, 1, workers),
                 [&](workspace& w) { attention.attend(one_q, cache, state, w); });
    cache_config behind = config;
    behind.first_position = n;
    kv_cache<f32> own(behind);
    const joined_source joined({&cache, &own});
    const auto k_rows = k.topRows(rows), v_rows = v.topRows(rows), q_rows = q.topRows(rows);
    auto out_rows = out.topRows(rows);
    check_enough(workers, attention.workspace_bytes(joined, rows, workers),
                 [&](workspace& w) { attention.prefill(q_rows, k_rows, v_rows, own, joined, out_rows, w); });
  }
}

TEST_CASE("workspace: caches that learn say what they need, those that look back too") {
  effort::dice dice(32);
  constexpr index_t dim = 16, kv_heads = 2, heads = 6, n = 400;
  const matrix q = random_matrix(dice, n, heads * dim), k = random_matrix(dice, n, kv_heads * dim);
  matrix out(n, heads * dim);
  const attention attention({.num_qo_heads = heads});
  const std::shared_ptr<const token_scorer> scorers[] = {
      std::make_shared<policies::random>(), std::make_shared<policies::h2o>(), std::make_shared<policies::tova>(),
      std::make_shared<policies::snapkv>()};
  for (const auto& scorer : scorers)
    for (const index_t workers : {1, 3}) {
      INFO(scorer->name() << ", " << workers << " workers");
      const auto make = [&] {
        return scored_kv_cache<f32>(
            {.num_kv_heads = kv_heads, .head_dim = dim, .num_sink_tokens = 1, .rope = rope::plain(dim, 100.0)},
            {.budget = 90, .recent = 16, .interval = 8, .num_qo_heads = heads}, scorer);
      };
      const auto decode_all = [&](scored_kv_cache<f32>& cache, workspace& w, bool as_batch) {
        for (index_t i = 0; i < 200; ++i) {
          cache.append(k.middleRows(i, 1), k.middleRows(i, 1));
          if (as_batch) {
            const decode_item item{
                {q.row(i).data(), heads * dim}, &cache, {out.data(), heads * dim}, {}, cache.learner()};
            attention.decode({&item, 1}, w);
          } else {
            attention.decode(q.middleRows(i, 1), cache, out.topRows(1), w);
          }
        }
      };
      for (const bool as_batch : {false, true}) {
        scored_kv_cache<f32> cache = make();
        const decode_item item{{}, &cache, {}, {}, cache.learner()};
        const index_t bytes =
            as_batch ? attention.workspace_bytes({&item, 1}, workers) : attention.workspace_bytes(cache, 1, workers);
        check_enough(workers, bytes, [&](workspace& w) { cache.clear(), decode_all(cache, w, as_batch); });
      }
      scored_kv_cache<f32> cache = make();
      check_enough(workers, attention.workspace_bytes(cache, n, workers),
                   [&](workspace& w) { cache.clear(), attention.prefill(q, k, k, cache, out, w); });
    }
}

// Whatever allocation fails, a try_ call says that memory is missing.
TEST_CASE("workspace: whoever finds no memory says so in a status") {
  if (!COUNTS_ALLOCATIONS) return;
  const auto check = [](const auto& make) {
    bool made = false;
    for (long n = 0; !made; ++n) {
      REQUIRE(n < 50);
      status found;
      allocations_left = n;
      made = make(found);
      allocations_left = -1;
      INFO("after " << n << " allocations: " << found.message());
      REQUIRE(made == found.ok());
      REQUIRE(found.lacks_memory() == !made);
    }
  };
  const cache_config config{.num_kv_heads = 2, .head_dim = 8, .window = 4, .rope = rope::none()};
  const matrix rows = matrix::Ones(6, 16);
  kv_cache<f32> cache(config);
  cache.append(rows, rows);
  cache.erase(3, 4);
  check([&](status& found) { return kv_cache<f32>::try_create(config, found).has_value(); });
  check([&](status& found) { return cache.try_clone_any(found) != nullptr; });
  check([&](status& found) {
    kv_cache<f32> copy = std::move(cache);
    const bool erased = (found = copy.try_erase(5, 6)).ok();
    cache = std::move(copy);
    return erased;
  });
  check([&](status& found) { return static_tokens<f32>::try_create(config, rows, rows, found).has_value(); });
  const std::vector<const kv_source*> sources = {&cache};
  check([&](status& found) { return joined_source::try_create(sources, found).has_value(); });
  check([&](status& found) { return attention_state::try_create(4, 8, found).has_value(); });
  check([&](status& found) { return workspace::try_create(found).has_value(); });
  check([&](status& found) { return try_pyramid_budgets(4, 64, 36, found).has_value(); });
  cache_config of_scored = config;
  of_scored.window = 0;
  const eviction rules{.recent = 1, .interval = 2, .head_budgets = {4, 5}, .short_heads = {true, false}};
  const std::shared_ptr<const token_scorer> scorer = std::make_shared<policies::random>();
  const auto make_scored = [&](status& found) {
    return scored_kv_cache<f32>::try_create(of_scored, rules, scorer, found);
  };
  check([&](status& found) { return make_scored(found).has_value(); });
  status made;
  const auto scored = make_scored(made);
  check([&](status& found) { return scored->try_clone_any(found) != nullptr; });
}

// Or the others would wait for it for ever.
TEST_CASE("workspace: a thread that finds no memory for its part of a prefill comes to every barrier all the same") {
  if (!COUNTS_ALLOCATIONS) return;
  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 8, .window = 3, .rope = rope::none(), .rollback = 4});
  const attention attention({.num_qo_heads = 1});
  const matrix rows = matrix::Ones(40, 8);
  matrix out(40, 8);
  int barriers[2] = {};
  for (const bool has_memory : {true, false}) {
    workspace scratch, without(std::move(scratch));
    cache.clear();
    allocations_left = has_memory ? -1 : 0;
    const status found = try_prefill_part(attention, rows, rows, rows, cache, out, scratch,  // NOLINT: moved from
                                          0, 1, [&] { ++barriers[has_memory]; });
    allocations_left = -1;
    CHECK(found.ok() == has_memory);
    CHECK(found.lacks_memory() == !has_memory);
    CHECK(cache.seen() == 40);
  }
  CHECK(barriers[0] == barriers[1]);
  CHECK(barriers[1] > 8);
}

TEST_CASE("workspace: sizes that cannot be are refused by name") {
  const layer layer;
  const attention& a = layer.layer_attention;
  constexpr index_t huge = index_t{1} << 62;
  CHECK_THROWS_WITH(a.workspace_bytes(layer.cache, -1000),
                    "sinkcache: tokens was -1000, had to be from 0 to 4611686018427387904");
  CHECK_THROWS_WITH(a.workspace_bytes(layer.cache, huge + 1),
                    "sinkcache: tokens was 4611686018427387905, had to be from 0 to 4611686018427387904");
  CHECK_THROWS_WITH(a.workspace_bytes(layer.cache, 1, -5), "sinkcache: concurrency was -5, had to be at least 1");
  CHECK_THROWS_WITH(a.workspace_bytes(layer.cache, 1, 0), "sinkcache: concurrency was 0, had to be at least 1");
  CHECK_THROWS_AS(a.workspace_bytes(layer.cache, 1, huge), std::invalid_argument);
  CHECK(a.workspace_bytes(layer.cache, huge) >= a.workspace_bytes(layer.cache, 1000));
  wants_all reader;
  CHECK(a.workspace_bytes(std::as_const(layer.cache), huge, 1, &reader) > 0);
  const kv_cache<f32> one_head({.num_kv_heads = 1, .head_dim = 8, .window = 4, .rope = rope::none()});
  for (const index_t heads : {huge, huge / 2 + 1, huge / 4})
    CHECK_THROWS_AS(attention({.num_qo_heads = heads}).workspace_bytes(one_head, 1), std::invalid_argument);
  CHECK_THROWS_AS(attention({.num_qo_heads = huge}).workspace_bytes(layer.cache, 1), std::invalid_argument);
  const decode_item none{};
  CHECK_THROWS_WITH(a.workspace_bytes({&none, 1}), "sinkcache: a batch's keys was null, had to be a cache or view");
  const decode_item one{{}, &layer.cache, {}};
  CHECK_THROWS_WITH(a.workspace_bytes({&one, 1}, -5), "sinkcache: concurrency was -5, had to be at least 1");
  CHECK(a.workspace_bytes(std::span<const decode_item>()) == 0);
  status found;
  CHECK(a.try_workspace_bytes(layer.cache, -1, found) == 0);
  CHECK(found.message() == "sinkcache: tokens was -1, had to be from 0 to 4611686018427387904");
  CHECK(a.try_workspace_bytes({&none, 1}, found) == 0);
  CHECK(found.message() == "sinkcache: a batch's keys was null, had to be a cache or view");
  CHECK(a.try_workspace_bytes({&one, 1}, found) == a.workspace_bytes({&one, 1}));
  CHECK(a.try_workspace_bytes(layer.cache, 5, found) == a.workspace_bytes(layer.cache, 5));
  CHECK(found.ok());
}

TEST_CASE("workspace: decode never allocates, batches and prefill not after as large a one, append never") {
  if (!COUNTS_ALLOCATIONS) return;
  layer layer;
  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 256, .window = 4000, .rope = rope::plain(256, 1e4)});
  const attention attention({.num_qo_heads = 512});  // their partial states are what does not fit
  const matrix k = matrix::Ones(40, 256), q = matrix::Ones(40, 512 * 256);
  matrix out(40, 512 * 256);

  workspace scratch;
  const auto allocated_by = [&](auto&& call) {
    const long before = allocations;
    call();
    return allocations - before;
  };
  matrix small_out(1, 6 * 12);
  CHECK(allocated_by([&] {
          layer.cache.append(layer.k.topRows(3), layer.v.topRows(3));
          layer.layer_attention.decode(layer.q.topRows(1), layer.cache, small_out, scratch);
        }) == 0);

  const decode_item item{.q = {layer.q.data(), static_cast<std::size_t>(layer.q.cols())},
                         .keys = &layer.cache,
                         .out = {small_out.data(), static_cast<std::size_t>(small_out.cols())}};
  const std::vector<decode_item> few(5, item);
  CHECK(allocated_by([&] { layer.layer_attention.decode(few, scratch); }) == 0);
  CHECK(allocated_by([&] { layer.layer_attention.attend(layer.q.topRows(1), layer.cache, small_out, scratch); }) == 0);
  const std::vector<decode_item> many(4000, item);
  workspace for_many;
  CHECK(allocated_by([&] { layer.layer_attention.decode(many, for_many); }) == 1);
  CHECK(allocated_by([&] { layer.layer_attention.decode(many, for_many); }) == 0);

  REQUIRE(attention.workspace_bytes(cache, 40) > scratch.nbytes());
  CHECK(allocated_by([&] { attention.prefill(q, k, k, cache, out, scratch); }) == 1);
  CHECK(scratch.nbytes() == attention.workspace_bytes(cache, 40));
  for (index_t tokens : {40, 40, 17})
    CHECK(allocated_by([&] {
            attention.prefill(q.topRows(tokens), k.topRows(tokens), k.topRows(tokens), cache, out.topRows(tokens),
                              scratch);
          }) == 0);
  CHECK(allocated_by([&] { attention.decode(q.topRows(1), cache, out.topRows(1), scratch); }) == 0);
  CHECK(allocated_by([&] {
          cache.append(k, k);
          cache.truncate(cache.seen());
          cache.clear();
        }) == 0);
}

TEST_CASE("workspace: memory that cannot be had is a status, and leaves what was there") {
  const layer layer;
  workspace scratch;
  const index_t bytes = scratch.nbytes();
  CHECK((scratch.try_reserve(0) && scratch.try_reserve(-1) && scratch.try_reserve(bytes)));
  CHECK(scratch.nbytes() == bytes);
  const std::vector<float> expected = layer.run(scratch);
  const index_t grown = scratch.nbytes();
  const status refused = scratch.try_reserve(index_t{1} << 60);
  CHECK(refused.message() ==
        "sinkcache: bytes of the workspace was 1152921504606846976, had to be at most what the system has");
  CHECK(scratch.nbytes() == grown);
  CHECK(layer.run(scratch) == expected);
  CHECK((scratch.try_reserve(grown + 1) && scratch.nbytes() == grown + 1));
  CHECK(layer.run(scratch) == expected);
}

TEST_CASE("workspace: try_create gives what the constructor makes, or says why not") {
  const layer layer;
  workspace alone;
  const std::vector<float> expected = layer.run(alone);
  status found;
  std::optional<workspace> plain = workspace::try_create(found);
  REQUIRE((plain && found));
  CHECK((plain->nbytes() == workspace().nbytes() && plain->concurrency() == 1));
  CHECK(layer.run(*plain) == expected);

  thread_pool four{4}, none{0}, endless{std::numeric_limits<index_t>::max()}, many{index_t{1} << 42};
  std::optional<workspace> threads = workspace::try_create(four, found);
  REQUIRE((threads && found));
  CHECK(threads->concurrency() == 4);
  CHECK(layer.run(*threads) == expected);
  CHECK(!workspace::try_create(none, found));
  CHECK(found.message() == "sinkcache: executor.concurrency() was 0, had to be at least 1");
  CHECK(!workspace::try_create(endless, found));
  CHECK(found.message() == "sinkcache: bytes of scratch was 9223372036854775807 * 786432, had to fit 63 bits");
  CHECK(!workspace::try_create(many, found));
  CHECK(!found);
  CHECK((workspace::try_create(four, found) && found));
}

static_assert(executor<const sequential> && std::is_constructible_v<workspace, const sequential&>);
static_assert(!std::is_constructible_v<workspace, sequential> && !std::is_constructible_v<workspace, const sequential>);

TEST_CASE("workspace: a const executor runs") {
  struct counts_runs {
    mutable int runs = 0;
    index_t concurrency() const { return 2; }
    void run(index_t n, const work_ref& work) const {
      ++runs;
      for (index_t item = n; item-- > 0;) work(item, item % 2);
    }
  };
  const layer layer;
  workspace alone;
  const counts_runs executor;
  workspace scratch(executor);
  CHECK(layer.run(scratch) == layer.run(alone));
  CHECK(executor.runs > 0);
}

}  // namespace
