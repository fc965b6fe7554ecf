// Threads of a host's own: how a call is cut, a prefill that threads make together, OpenMP's threads. The same bits.

#include <sinkcache/host_threads.hpp>
#include <sinkcache/sinkcache.hpp>
#include <sinkcache/thread_pool.hpp>
#if defined(_OPENMP)
#include <sinkcache/openmp.hpp>
#endif

#include <barrier>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "random_matrix.hpp"

using namespace sinkcache;
using proof::as_size, proof::random_matrix;

namespace {

// Calls f(thread) on so many threads at once.
template <class F>
void on_threads(index_t number, const F& f) {
  std::vector<std::thread> team;
  for (index_t thread = 1; thread < number; ++thread) team.emplace_back([&f, thread] { f(thread); });
  f(0);
  for (std::thread& thread : team) thread.join();
}

TEST_CASE("host_threads: the parts of all threads are the whole call, each head and row once") {
  for (int i = 0; i < effort::cases(300); ++i) {
    effort::dice dice(static_cast<std::uint64_t>(i));
    const index_t number = dice.from_to(1, 20), heads = dice.from_to(1, 20), tokens = dice.from_to(0, 40);
    CAPTURE(i, number, heads, tokens);
    std::vector<int> times(as_size(heads * tokens));
    index_t idle = 0, most = 0;
    for (index_t thread = 0; thread < number; ++thread) {
      const call_part part = part_of_thread(thread, number, heads, tokens);
      REQUIRE(part.first_kv_head + part.num_kv_heads <= heads);
      REQUIRE(part.first_row + part.num_rows <= tokens);
      for (index_t head = 0; head < part.num_kv_heads; ++head)
        for (index_t row = 0; row < part.num_rows; ++row)
          ++times[as_size((part.first_kv_head + head) * tokens + part.first_row + row)];
      idle += part.num_kv_heads * part.num_rows == 0;
      most = std::max(most, part.num_kv_heads * part.num_rows);
    }
    CHECK(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }));
    if (tokens >= number) CHECK(idle == 0);  // a prompt keeps all busy
    if (tokens == 1) CHECK(idle == std::max<index_t>(0, number - heads));
  }
  CHECK_THROWS_WITH(part_of_thread(0, 0, 1, 1), "sinkcache: num_threads was 0, had to be at least 1");
  CHECK_THROWS_WITH(part_of_thread(3, 3, 1, 1),
                    "sinkcache: thread was 3, had to be at least 0 and below num_threads, 3");
  // By KV heads first: what a thread reads is then the fewest keys.
  const call_part by_heads = part_of_thread(1, 4, 2, 8);
  CHECK((by_heads.first_kv_head == 1 && by_heads.num_kv_heads == 1));
  CHECK((by_heads.first_row == 0 && by_heads.num_rows == 4));
  status found;
  const call_part none = try_part_of_thread(0, 1, 0, 1, found);
  CHECK((none.num_kv_heads == 0 && none.num_rows == 0));
  CHECK(found.message() == "sinkcache: num_kv_heads was 0, had to be at least 1");
  CHECK(try_part_of_thread(1, 2, 4, 1, found).first_kv_head == 2);
  CHECK(found.ok());
}

TEST_CASE("host_threads: a pool of threads is made, or says why not") {
  status found;
  for (const index_t workers : {0, 1025}) {
    CHECK(thread_pool::try_create(workers, found) == nullptr);
    CHECK(found.message() == "sinkcache: workers was " + std::to_string(workers) + ", had to be from 1 to 1024");
  }
  CHECK(thread_pool::validate(1024).ok());
  const std::unique_ptr<thread_pool> pool = thread_pool::try_create(2, found);
  REQUIRE(pool != nullptr);
  CHECK((found.ok() && pool->concurrency() == 2));
}

TEST_CASE("host_threads: a batch in parts is the batch", "[threads]") {
  effort::dice dice(2);
  constexpr index_t sequences = 5, kv_heads = 4, heads = 8, dim = 24;
  const attention attention({.num_qo_heads = heads});
  const cache_config config{.num_kv_heads = kv_heads, .head_dim = dim, .window = 600, .rope = rope::plain(dim, 1e4)};
  std::vector<kv_cache<f16>> caches;
  for (index_t i = 0; i < sequences; ++i) {
    const index_t tokens = dice.from_to(1, 700);
    caches.emplace_back(config).append(random_matrix(dice, tokens, kv_heads * dim),
                                       random_matrix(dice, tokens, kv_heads * dim));
  }
  const matrix q = random_matrix(dice, sequences, heads * dim);
  const auto batch_to = [&](matrix& out) {
    std::vector<decode_item> batch;
    for (index_t i = 0; i < sequences; ++i)
      batch.push_back({.q = {q.data() + i * heads * dim, as_size(heads * dim)},
                       .keys = &caches[as_size(i)],
                       .out = {out.data() + i * heads * dim, as_size(heads * dim)}});
    return batch;
  };
  workspace scratch;
  matrix whole(sequences, heads * dim);
  attention.decode(batch_to(whole), scratch);
  for (const index_t number : {1, 2, 3, 4, 6, 9, 40}) {
    CAPTURE(number);
    matrix out = matrix::Zero(sequences, heads * dim);
    const std::vector<decode_item> batch = batch_to(out);
    std::vector<workspace> workspaces(as_size(number));
    on_threads(number, [&](index_t thread) {
      attention.decode(batch, workspaces[as_size(thread)], part_of_thread(thread, number, kv_heads, sequences));
    });
    CHECK(out == whole);
  }
  // A part by heads is of one count of heads; a part by sequences is of any.
  kv_cache<f16> two({.num_kv_heads = 2, .head_dim = dim, .window = 9, .rope = rope::plain(dim, 1e4)});
  two.append(random_matrix(dice, 1, 2 * dim), random_matrix(dice, 1, 2 * dim));
  matrix out = matrix::Zero(sequences, heads * dim);
  std::vector<decode_item> batch = batch_to(out);
  batch[1].keys = &two;
  CHECK(attention.try_decode(batch, scratch, {0, 1}).message() ==
        "sinkcache: a batch's num_kv_heads was 2, had to be that of the first, in a part by KV heads, 4");
  CHECK(attention.try_decode(batch, scratch, {.first_row = 4, .num_rows = 2}).message() ==
        "sinkcache: num_rows was 2, had to be from 0 to 1");
  CHECK(out.isZero(0));
  attention.decode(batch, scratch, {.first_row = 1, .num_rows = 2});
  CHECK(out.row(2) == whole.row(2));
  CHECK(!out.row(1).isZero(0));
  CHECK((out.row(0).isZero(0) && out.bottomRows(2).isZero(0)));
}

template <class Cache>
void check_prefill_parts(std::uint64_t seed) {
  effort::dice dice(seed);
  const index_t kv_heads = dice.from_to(1, 4), group = dice.from_to(1, 6), dim = dice.from_to(1, 3) * 16;
  const cache_config config{.num_kv_heads = kv_heads,
                            .head_dim = dim,
                            .num_sink_tokens = dice.from_to(0, 4),
                            .window = dice.from_to(1, 100),
                            .rope = rope::plain(dim, 1e4),
                            .rollback = dice.from_to(0, 40),
                            .recent = 8};
  const attention attention({.num_qo_heads = kv_heads * group});
  const index_t before = dice.from_to(0, 150), tokens = dice.from_to(0, 150), number = dice.from_to(1, 5);
  CAPTURE(seed, kv_heads, group, dim, config.window, config.rollback, before, tokens, number);
  const matrix q = random_matrix(dice, tokens, kv_heads * group * dim), k = random_matrix(dice, before, kv_heads * dim),
               k_new = random_matrix(dice, tokens, kv_heads * dim), v_new = random_matrix(dice, tokens, kv_heads * dim);
  Cache cache(config), together(config);
  cache.append(k, k), together.append(k, k);
  workspace scratch;
  matrix out(tokens, q.cols()), expected(tokens, q.cols());
  attention.prefill(q, k_new, v_new, cache, expected, scratch);
  std::vector<workspace> workspaces(as_size(number));
  std::barrier<> barrier(number);
  on_threads(number, [&](index_t thread) {
    try_prefill_part(attention, q, k_new, v_new, together, out, workspaces[as_size(thread)], thread, number, [&] {
      barrier.arrive_and_wait();
    }).or_fail();
  });
  CHECK(out == expected);
  REQUIRE(together.seen() == cache.seen());
  const matrix one = random_matrix(dice, 1, kv_heads * group * dim);
  matrix next(1, q.cols()), expected_next(1, q.cols());
  if (cache.seen() == 0) return;
  attention.decode(one, cache, expected_next, scratch);
  attention.decode(one, together, next, scratch);
  CHECK(next == expected_next);
}

TEST_CASE("host_threads: a prefill that threads make together is the prefill", "[threads]") {
  for (int i = 0; i < effort::cases(6); ++i) {
    check_prefill_parts<kv_cache<bf16>>(static_cast<std::uint64_t>(i));
    check_prefill_parts<kv_cache<q8>>(1000 + static_cast<std::uint64_t>(i));
  }
  kv_cache<f32> cache({.num_kv_heads = 1, .head_dim = 4, .window = 3, .rope = rope::none()});
  const attention attention({.num_qo_heads = 1});
  workspace scratch;
  matrix rows = matrix::Zero(2, 4), out = rows;
  CHECK(try_prefill_part(attention, rows, rows, rows, cache, out, scratch, 2, 2, [] {}).message() ==
        "sinkcache: thread was 2, had to be at least 0 and below num_threads, 2");
  CHECK(try_prefill_part(attention, rows, rows.topRows(1), rows, cache, out, scratch, 0, 1, [] {}).message() ==
        "sinkcache: k.rows() was 1, had to be exactly 2");
  CHECK(cache.seen() == 0);
}

#if defined(_OPENMP)
TEST_CASE("host_threads: OpenMP's threads", "[threads]") {
  effort::dice dice(3);
  constexpr index_t tokens = 900;
  kv_cache<f32> cache({.num_kv_heads = 3, .head_dim = 32, .window = 800, .rope = rope::plain(32, 1e4)}),
      other = cache.clone();
  const attention attention({.num_qo_heads = 6});
  const matrix q = random_matrix(dice, tokens, 6 * 32), k = random_matrix(dice, tokens, 3 * 32);
  workspace alone;
  openmp_executor threads(3);
  workspace scratch(threads);
  CHECK(scratch.concurrency() == 3);
  matrix out(tokens, 6 * 32), expected = out;
  attention.prefill(q, k, k, cache, expected, alone);
  attention.prefill(q, k, k, other, out, scratch);
  CHECK(out == expected);
  std::vector<int> workers(64, -1);
  auto note = [&](index_t item, index_t worker) { workers[as_size(item)] = static_cast<int>(worker); };
  threads.run(64, work_ref(note));
  for (const int worker : workers) CHECK((worker >= 0 && worker < 3));
  status found;
  CHECK(openmp_executor::validate(65536).ok());
  CHECK_FALSE(openmp_executor::validate(65537).ok());
  CHECK_FALSE(openmp_executor::try_create(0, found));
  CHECK(found.message() == "sinkcache: num_threads was 0, had to be from 1 to 65536");
  CHECK(openmp_executor::try_create(2, found)->concurrency() == 2);
  CHECK_THROWS_WITH(openmp_executor(0), "sinkcache: num_threads was 0, had to be from 1 to 65536");
}
#endif

}  // namespace
