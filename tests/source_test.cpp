// The contract: what caches and views list for which queries, how far that holds, and the ways in which attention reads
// what it is given that no cache of the library needs yet.

#include <sinkcache/key_policies.hpp>
#include <sinkcache/not_finite.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "random_case.hpp"
#include "random_matrix.hpp"

using namespace sinkcache;
using proof::as_size, proof::random_matrix;

namespace {

// A plan, as text: "first-last@row near..far pinned" for each part, and for how many heads and queries it holds.
std::string plan_of(const kv_source& s, index_t kv_head, position_t first, position_t last) {
  std::vector<kv_part> memory(as_size(s.max_parts()));
  part_list parts(memory.data(), s.max_parts());
  const plan_end end = s.plan(kv_head, first, last, parts);
  std::string text;
  for (const kv_part& part : parts) {
    text += std::to_string(part.first) + "-" + std::to_string(part.end() - 1) + "@" + std::to_string(part.row);
    if (part.seen_until != kv_part::always) text += "<" + std::to_string(part.seen_until);
    if (part.pinned > 0) text += " " + std::to_string(part.pinned) + " pinned";
    text += ", ";
  }
  return text + std::to_string(end.kv_heads) + " heads, " + std::to_string(end.queries) + " queries";
}

TEST_CASE("source: what a window lists before and after evictions, and where its ring wraps") {
  kv_cache<f32> cache(
      {.num_kv_heads = 3, .head_dim = 2, .num_sink_tokens = 2, .window = 5, .rope = rope::none(), .rollback = 3});
  const matrix rows = matrix::Ones(1, 6);
  const auto append_until = [&](position_t seen) {
    while (cache.seen() < seen) cache.append(rows, rows);
  };
  append_until(1);
  CHECK(plan_of(cache, 0, 0, 0) == "0-0@0 1 pinned, 3 heads, 1 queries");
  append_until(7);
  CHECK(plan_of(cache, 1, 6, 6) == "0-6@0 2 pinned, 2 heads, 1 queries");
  CHECK(plan_of(cache, 1, 3, 6) == "0-6@0 2 pinned, 2 heads, 4 queries");
  append_until(9);  // tokens 7 and 8 no longer see all: a plan for those that do
  CHECK(plan_of(cache, 0, 5, 8) == "0-6@0 2 pinned, 3 heads, 2 queries");
  CHECK(plan_of(cache, 0, 7, 8) == "0-1@0 2 pinned, 3-8@3<5, 3 heads, 2 queries");
  append_until(12);  // position 10 lies in row 2 again
  CHECK(plan_of(cache, 2, 11, 11) == "0-1@0 2 pinned, 7-9@7<5, 10-11@2<5, 1 heads, 1 queries");
  CHECK(cache.room() == 4);
  cache.clear();
  CHECK(cache.room() == 10);
  CHECK(plan_of(cache, 0, -1, -1) == "3 heads, 1 queries");
}

TEST_CASE("source: a policy's plan holds while only the newest span grows") {
  struct pages {  // the newest two pages of three tokens
    index_t capacity() const { return 9; }
    span_list visible(position_t seen) const {
      span_list spans;
      spans.push_back({std::max<position_t>(0, (seen + 2) / 3 - 2) * 3, seen});
      return spans;
    }
    placed place(position_t p) const { return {static_cast<index_t>(p % 9), static_cast<index_t>(8 - p % 9)}; }
  };
  kv_cache<f32, f32, pages> cache({.num_kv_heads = 1, .head_dim = 2, .rope = rope::none()}, {});
  const matrix rows = matrix::Ones(12, 2);
  cache.append(rows, rows);
  CHECK(plan_of(cache, 0, 6, 11) == "3-8@3, 1 heads, 3 queries");
  CHECK(plan_of(cache, 0, 9, 11) == "6-8@6, 9-11@0, 1 heads, 3 queries");
  CHECK(cache.room() == 6);  // the next token sees from 9 on; so many free rows are left
}

TEST_CASE("source: views list pieces and pages as they are seen") {
  const float row[2] = {};
  const cache_config config{.num_kv_heads = 1,
                            .head_dim = 2,
                            .num_sink_tokens = 1,
                            .window = 4,
                            .positions = positions::absolute,
                            .inputs = inputs::rotated};
  const kv_piece pieces[] = {{0, 3, row, row}, {5, 10, row, row}};
  const kv_view<f32> view(config, {{.token = 2}, {.token = 2}}, pieces, 12);
  CHECK(plan_of(view, 0, 11, 11) == "0-0@0 1 pinned, 8-11@3<4, 1 heads, 1 queries");
  CHECK(plan_of(view, 0, 6, 8) == "0-0@0 1 pinned, 5-8@0<4, 1 heads, 3 queries");
  CHECK(plan_of(view, 0, 2, 6) == "0-2@0 1 pinned, 1 heads, 3 queries");
  CHECK(view.num_visible(11) == 5);
  CHECK(view.num_visible(6) == 3);
  const std::int32_t table[] = {1, 0, 2};
  const kv_view<f32> paged(config, {{.token = 2}, {.token = 2}}, kv_pages{row, row, 8, 8, 3, 4, table}, 12);
  CHECK(plan_of(paged, 0, 11, 11) == "0-0@0 1 pinned, 8-11@8<4, 1 heads, 1 queries");
}

TEST_CASE("source: parts know positions, and lists leave out what is empty") {
  const position_t at[] = {7, 3, 9};
  kv_part scattered;
  scattered.rows = 3, scattered.at = at, scattered.at_offset = 100, scattered.last = 110;
  CHECK((scattered.position(1) == 103 && scattered.end() == 110));
  kv_part straight;
  straight.rows = 4, straight.first = 20;
  CHECK((straight.position(3) == 23 && straight.end() == 24));
  kv_part memory[2];
  part_list parts(memory, 2);
  parts.push_back(kv_part());
  parts.push_back(straight);
  CHECK(parts.size() == 1);
  parts.clear();
  CHECK(parts.size() == 0);
}

// Rows that lie on two machines: each reads its own and counts the other's.
class half_of final : public kv_source {
 public:
  half_of(const kv_source& whole, bool older) : kv_source(whole.geometry()), whole_(whole), older_(older) {
    seen_ = whole.seen();
  }
  index_t capacity() const noexcept override { return whole_.capacity(); }
  position_t min_truncate() const noexcept override { return whole_.min_truncate(); }
  index_t max_parts() const noexcept override { return whole_.max_parts(); }
  plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept override {
    const plan_end end = whole_.plan(kv_head, first, last, parts);
    for (index_t i = 0; i < parts.size(); ++i)
      if ((i == 0) != older_) parts[i].k.reader = parts[i].v.reader = nullptr;
    return end;
  }

 private:
  const kv_source& whole_;
  bool older_;
};

TEST_CASE("source: parts that are elsewhere are counted, and partial states of both machines merge") {
  effort::dice dice(3);
  for (const positions kept : {positions::in_cache, positions::absolute}) {
    kv_cache<f32> cache({.num_kv_heads = 2,
                         .head_dim = 8,
                         .num_sink_tokens = 3,
                         .window = 20,
                         .positions = kept,
                         .rope = rope::plain(8, 100.0)});
    cache.append(random_matrix(dice, 200, 16), random_matrix(dice, 200, 16));
    const attention attention({.num_qo_heads = 4, .softmax = softmax_variant::softmax1()});
    const matrix q = random_matrix(dice, 1, 32);
    matrix whole(1, 32);
    workspace scratch;
    attention.decode(q, cache, whole, scratch);
    attention_state state(4, 8);
    for (const bool older : {true, false}) attention.attend(q, half_of(cache, older), state, scratch);
    for (index_t head = 0; head < 4; ++head)
      CHECK(
          (state.finish(softmax_variant::softmax1(), head).out - whole.middleCols(head * 8, 8)).cwiseAbs().maxCoeff() <
          1e-6f);
  }
}

// Stored rows may have gone through an orthogonal transform: here every second sign, and pairs rotated by 45 degrees.
void apply(float* row, index_t dim) noexcept {
  for (index_t i = 0; i + 1 < dim; i += 2) {
    const float a = row[i], b = row[i + 1];
    row[i] = (a + b) * std::sqrt(0.5f), row[i + 1] = (b - a) * std::sqrt(0.5f);
  }
  if (dim % 2 == 1) row[dim - 1] = -row[dim - 1];
}
void undo(float* row, index_t dim) noexcept {
  for (index_t i = 0; i + 1 < dim; i += 2) {
    const float a = row[i], b = row[i + 1];
    row[i] = (a - b) * std::sqrt(0.5f), row[i + 1] = (a + b) * std::sqrt(0.5f);
  }
  if (dim % 2 == 1) row[dim - 1] = -row[dim - 1];
}
constexpr row_transform eighth_turn{&apply, &undo};

// The rows of a cache, transformed.
class transformed final : public kv_source {
 public:
  explicit transformed(const kv_cache<f32>& from) : kv_source(from.geometry()), from_(from) {
    geometry_.k_transform = geometry_.v_transform = &eighth_turn;
    seen_ = from.seen();
    const index_t rows = from.policy().capacity();
    bytes_.resize(as_size(geometry_.num_kv_heads * rows * (k_block() + v_block())));
    for (index_t h = 0; h < geometry_.num_kv_heads; ++h) {
      std::vector<kv_part> memory(3);
      part_list parts(memory.data(), 3);
      from.plan(h, std::max<position_t>(0, seen_ - 4), seen_ - 1, parts);
      for (const kv_part& part : parts)
        for (index_t row = part.row; row < part.row + part.rows; ++row) {
          float k[64], v[64];
          f32::decode(part.k.base + row * part.k.block, 0, geometry_.head_dim, k);
          f32::decode(part.v.base + row * part.v.block, 0, geometry_.v_head_dim, v);
          apply(k, geometry_.head_dim), apply(v, geometry_.v_head_dim);
          f32::encode(k, geometry_.head_dim, bytes_.data() + k_at(h) + row * k_block());
          f32::encode(v, geometry_.v_head_dim, bytes_.data() + v_at(h) + row * v_block());
        }
    }
  }
  index_t capacity() const noexcept override { return from_.capacity(); }
  position_t min_truncate() const noexcept override { return seen_ - 3; }
  index_t max_parts() const noexcept override { return 3; }
  plan_end plan(index_t h, position_t first, position_t last, part_list& parts) const noexcept override {
    const plan_end end = from_.plan(h, first, last, parts);
    for (index_t i = 0; i < parts.size(); ++i) {
      parts[i].k = {&reader_of<f32>, bytes_.data() + k_at(h), k_block()};
      parts[i].v = {&reader_of<f32>, bytes_.data() + v_at(h), v_block()};
    }
    return {1, end.queries};
  }

 private:
  index_t k_block() const { return f32::block_bytes(geometry_.head_dim); }
  index_t v_block() const { return f32::block_bytes(geometry_.v_head_dim); }
  index_t k_at(index_t h) const { return h * from_.policy().capacity() * (k_block() + v_block()); }
  index_t v_at(index_t h) const { return k_at(h) + from_.policy().capacity() * k_block(); }

  const kv_cache<f32>& from_;
  std::vector<std::byte> bytes_;
};

TEST_CASE("source: transformed rows give what the rows themselves give") {
  effort::dice dice(4);
  for (const index_t group : {1, 3, 40})  // 40 go in panels
    for (const index_t dim : {7, 32}) {
      kv_cache<f32> cache({.num_kv_heads = 2,
                           .head_dim = dim,
                           .v_head_dim = 9,
                           .num_sink_tokens = 2,
                           .window = 30,
                           .rope = rope::plain(4, 100.0)});
      cache.append(random_matrix(dice, 100, 2 * dim), random_matrix(dice, 100, 2 * 9));
      const transformed other(cache);
      const attention attention({.num_qo_heads = 2 * group});
      workspace scratch;
      for (const index_t rows : {1, 3}) {
        const matrix q = random_matrix(dice, rows, 2 * group * dim);
        matrix a(rows, 2 * group * 9), b = a;
        attention.attend(q, cache, a, scratch);
        attention.attend(q, other, b, scratch);
        CHECK((a - b).cwiseAbs().maxCoeff() < 2e-5f);
      }
    }
}

TEST_CASE("source: static tokens hold what they were given, and say what does not fit") {
  const cache_config config{.num_kv_heads = 2, .head_dim = 8, .window = 5, .rope = rope::none()};
  effort::dice dice(5);
  const matrix k = random_matrix(dice, 3, 16), v = random_matrix(dice, 3, 16);
  const static_tokens<f16, bf16> tokens(config, k, v);
  CHECK((tokens.capacity() == 3 && tokens.seen() == 0 && tokens.nbytes() == 2 * 3 * 128));
  CHECK(static_tokens<f32>::validate(config, k.topRows(0), v.topRows(0)).message() ==
        "sinkcache: k.rows() was 0, had to be at least 1");
  CHECK(static_tokens<f32>::validate(config, k, v.topRows(2)).message() ==
        "sinkcache: v.rows() was 2, had to be exactly 3");
  CHECK_THROWS_AS((static_tokens<f32>(config, k.leftCols(8), v)), std::invalid_argument);
  cache_config many = config;
  many.num_kv_heads = index_t{1} << 61;
  CHECK(static_tokens<f32>::validate(many, k, v).message() ==
        "sinkcache: floats of a token was 2305843009213693952 * 8, had to fit 63 bits");
}

TEST_CASE("source: prefill over keys that do not end with the cache is refused, and changes nothing") {
  effort::dice dice(6);
  cache_config config{.num_kv_heads = 2, .head_dim = 8, .window = 20, .rope = rope::none()};
  kv_cache<f32> cache(config), other(config);
  config.num_kv_heads = 1;
  const kv_cache<f32> one_head(config);
  config.num_kv_heads = 2, config.first_position = 3;
  kv_cache<f32> after(config);
  const matrix q = random_matrix(dice, 3, 32), k = random_matrix(dice, 3, 16);
  matrix out = matrix::Constant(3, 32, 7.f);
  other.append(k, k);
  const joined_source in_front({&other, &after}), behind({&other});
  const attention attention({.num_qo_heads = 4});
  workspace scratch;
  const auto refusal = [&](kv_cache<f32>& to, const kv_source& keys) {
    return std::string(attention.try_prefill(q, k, k, to, keys, out, scratch).message());
  };
  CHECK(refusal(cache, one_head) == "sinkcache: keys' num_kv_heads was 1, had to be that of the cache, 2");
  CHECK(refusal(cache, other) == "sinkcache: keys was another source, had to be one that ends with the cache");
  CHECK(refusal(other, in_front) == "sinkcache: keys was another source, had to be one that ends with the cache");
  CHECK((cache.seen() == 0 && other.seen() == 3 && (out.array() == 7.f).all()));
  CHECK(refusal(after, in_front).empty());
  CHECK(refusal(other, behind).empty());
}

// Rows 0 to n - 1 of a cache, each with its position, seen while they are no further than `until` and no nearer than
// `from`.
class by_position final : public kv_source {
 public:
  by_position(const kv_cache<f32>& cache, position_t from, position_t until)
      : kv_source(cache.geometry()), cache_(cache), from_(from), until_(until) {
    seen_ = cache.seen();
    for (position_t p = 0; p < seen_; ++p) at_.push_back(p);
  }
  index_t capacity() const noexcept override { return static_cast<index_t>(at_.size()); }
  position_t min_truncate() const noexcept override { return 0; }
  index_t max_parts() const noexcept override { return cache_.max_parts(); }
  plan_end plan(index_t h, position_t first, position_t last, part_list& parts) const noexcept override {
    const index_t before = parts.size();
    const plan_end end = cache_.plan(h, first, last, parts);
    for (index_t i = before; i < parts.size(); ++i) {
      parts[i].at = at_, parts[i].last = seen_;
      parts[i].seen_from = from_, parts[i].seen_until = until_;
    }
    return end;
  }

 private:
  const kv_cache<f32>& cache_;
  position_t from_, until_;
  std::vector<position_t> at_;
};

// Tokens without rows, and a plan for one KV head at a time.
class by_head final : public kv_source {
 public:
  by_head(const kv_geometry& of, position_t seen) : kv_source(of) { seen_ = seen; }
  index_t capacity() const noexcept override { return 0; }
  position_t min_truncate() const noexcept override { return 0; }
  index_t max_parts() const noexcept override { return 0; }
  plan_end plan(index_t, position_t first, position_t last, part_list&) const noexcept override {
    return {1, static_cast<index_t>(last - first + 1)};
  }
};

class seen_tokens final : public weight_reader {
 public:
  bool wants(position_t) const noexcept override { return true; }
  void read(const weight_tile& tile) noexcept override {
    for (index_t j = 0; j < tile.n; ++j)
      if (tile.weight(j, 0) > 0) positions.push_back(tile.position(j));
  }
  std::vector<position_t> positions;
};

TEST_CASE("source: what a prefix saw of rows with positions of their own stays what is seen of it") {
  effort::dice dice(7);
  cache_config config{
      .num_kv_heads = 1, .head_dim = 8, .window = 40, .positions = positions::absolute, .rope = rope::none()};
  kv_cache<f32> prefix(config);
  prefix.append(random_matrix(dice, 30, 8), random_matrix(dice, 30, 8));
  config.first_position = 30;
  kv_cache<f32> own(config);
  own.append(random_matrix(dice, 5, 8), random_matrix(dice, 5, 8));
  const attention attention({.num_qo_heads = 1});
  const matrix q = random_matrix(dice, 1, 8);
  matrix out(1, 8);
  workspace scratch;
  CHECK(joined_source({&prefix, &own}).min_truncate() == 30);
  kv_cache<f32> rolled = own.clone();
  for (int i = 0; i < 30; ++i) rolled.append(random_matrix(dice, 5, 8), random_matrix(dice, 5, 8));
  CHECK(joined_source({&prefix, &rolled}).min_truncate() == 30 + 155 - 63);
  for (const auto& [from, until] : {std::pair<position_t, position_t>{0, 8}, {8, kv_part::always}, {4, 6}}) {
    const by_position front(prefix, from, until);
    const joined_source both({&front, &own});
    seen_tokens seen;
    attention.decode(q, both, out, scratch, {.weights = &seen});
    std::vector<position_t> expected;
    for (position_t p = 0; p < 30; ++p)
      if (from <= 29 - p && 29 - p < until) expected.push_back(p);
    for (position_t p = 30; p < 35; ++p) expected.push_back(p);
    CHECK(seen.positions == expected);
  }
}

TEST_CASE("source: a joined_source that was moved from sees nothing, one of other ropes is refused") {
  cache_config config{.num_kv_heads = 1, .head_dim = 8, .window = 40, .rope = rope::plain(8, 10000.0)};
  kv_cache<f32> prefix(config);
  const matrix rows = matrix::Ones(3, 8);
  prefix.append(rows, rows);
  joined_source from({&prefix});
  const joined_source to(std::move(from));
  CHECK((from.seen() == 0 && from.size() == 0 && from.capacity() == 0 && from.min_truncate() == 0));  // NOLINT
  CHECK(plan_of(from, 0, -1, -1) == "1 heads, 1 queries");                                            // NOLINT
  CHECK(to.seen() == 3);
  config.first_position = 3;
  config.rope = rope::plain(8, 500000.0);
  const kv_cache<f32> own(config);
  const kv_source* list[] = {&prefix, &own};
  CHECK(joined_source::validate(list).message() ==
        "sinkcache: a source's rope was another, had to be that of the last");
}

TEST_CASE("source: a prefix that changed after it was joined is refused") {
  cache_config config{.num_kv_heads = 1, .head_dim = 8, .window = 40, .rope = rope::plain(8, 10000.0)};
  kv_cache<f32> prefix(config);
  const matrix rows = matrix::Ones(3, 8);
  prefix.append(rows, rows);
  config.first_position = 3;
  kv_cache<f32> own(config);
  const joined_source joined({&prefix, &own});
  own.append(rows, rows);
  const sinkcache::attention attention({.num_qo_heads = 1});
  workspace scratch;
  matrix out(1, 8);
  CHECK(attention.try_decode(rows.topRows(1), joined, out, scratch).ok());
  prefix.append(rows.topRows(1), rows.topRows(1));
  CHECK(attention.try_decode(rows.topRows(1), joined, out, scratch).message() ==
        "sinkcache: tokens of the sources in front was 4, had to be as when they were joined, 3");
  prefix.truncate(3);
  CHECK(attention.try_decode(rows.topRows(1), joined, out, scratch).ok());
}

TEST_CASE("source: three in a row, or one and two in a row, are one stream") {
  effort::dice dice(9);
  for (const positions kept : {positions::in_cache, positions::absolute}) {
    cache_config config{
        .num_kv_heads = 1, .head_dim = 8, .window = 40, .positions = kept, .rope = rope::plain(8, 100.0)};
    const matrix k = random_matrix(dice, 12, 8), v = random_matrix(dice, 12, 8), q = random_matrix(dice, 1, 8);
    const auto cache_of = [&](index_t first, index_t n) {
      config.first_position = first;
      kv_cache<f32> cache(config);
      cache.append(k.middleRows(first, n), v.middleRows(first, n));
      return cache;
    };
    const kv_cache<f32> whole = cache_of(0, 12), first = cache_of(0, 5), second = cache_of(5, 4), own = cache_of(9, 3);
    const joined_source three({&first, &second, &own}), two({&second, &own}), nested({&first, &two});
    const attention attention({.num_qo_heads = 1});
    workspace scratch;
    matrix out(1, 8), expected(1, 8);
    attention.decode(q, whole, expected, scratch);
    for (const joined_source* joined : {&three, &nested}) {
      CHECK(joined->seen() == 12);
      attention.decode(q, *joined, out, scratch);
      CHECK((out - expected).cwiseAbs().maxCoeff() < 1e-6f);
    }
  }
}

TEST_CASE("source: a joined_source is asked for no more queries and KV heads at once than each of its sources allows") {
  effort::dice dice(10);
  cache_config config{.num_kv_heads = 2, .head_dim = 8, .window = 6, .rope = rope::none(), .rollback = 2};
  const auto rows = [&](index_t n) { return random_matrix(dice, n, 16); };
  kv_cache<f32> front(config);
  front.append(rows(5), rows(5));
  config.first_position = 5;
  kv_cache<f32> own(config);
  own.append(rows(20), rows(20));
  const joined_source joined({&front, &own});
  const attention attention({.num_qo_heads = 2});
  workspace scratch;
  matrix out(4, 16);
  CHECK(attention.try_attend(rows(3), joined, out.topRows(3), scratch).ok());
  CHECK(attention.try_attend(rows(4), joined, out, scratch).message() ==
        "sinkcache: q.rows() was 4, had to be at most 3: what older tokens saw is overwritten");

  // The first in front answers for each KV head by itself, the others for all.
  const by_head alone(front.geometry(), 5);
  config.first_position = 25;
  const kv_cache<f32> last(config);
  const joined_source three({&alone, &own, &last});
  std::vector<kv_part> memory(as_size(three.max_parts()));
  part_list parts(memory.data(), three.max_parts());
  CHECK(three.plan(0, three.seen() - 1, three.seen() - 1, parts).kv_heads == 1);
}

TEST_CASE("source: num_not_finite counts what the newest query sees, and not what else is listed") {
  kv_cache<f32> own({.num_kv_heads = 1, .head_dim = 8, .window = 40, .rope = rope::none()});
  matrix rows = matrix::Ones(6, 8);
  rows(1, 2) = rows(5, 0) = std::numeric_limits<float>::infinity();
  own.append(rows, rows);
  CHECK(num_not_finite(own) == 4);
  CHECK(num_not_finite(by_position(own, 1, kv_part::always)) == 2);
  CHECK(num_not_finite(by_position(own, 0, 4)) == 2);
}

TEST_CASE("source: rows with positions of their own behind a prefix are seen by their distance") {
  cache_config config{
      .num_kv_heads = 1, .head_dim = 8, .window = 40, .positions = positions::absolute, .rope = rope::plain(8, 100.0)};
  kv_cache<f32> prefix(config);
  const matrix rows = matrix::Ones(10, 8);
  prefix.append(rows.topRows(4), rows.topRows(4));
  config.first_position = 4;
  kv_cache<f32> own(config);
  own.append(rows, rows);
  const by_position older(own, 2, kv_part::always);  // not the newest two
  const attention attention({.num_qo_heads = 1});
  workspace scratch;
  matrix out(1, 8);
  seen_tokens seen;
  attention.decode(rows.topRows(1), joined_source({&prefix, &older}), out, scratch, {.weights = &seen});
  CHECK(seen.positions == std::vector<position_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
}

TEST_CASE("source: what follows a prefix ends where streams do") {
  cache_config config{.num_kv_heads = 1, .head_dim = 8, .window = 40, .rope = rope::none()};
  const kv_strides apart{.token = 8};
  const kv_view<f32> elsewhere(config, {apart, apart}, kv_memory(), max_position - 1);
  config.first_position = max_position - 1;
  kv_cache<f32> own(config);
  const joined_source joined({&elsewhere, &own});
  const attention attention({.num_qo_heads = 1});
  const matrix rows = matrix::Ones(2, 8);
  matrix out(2, 8);
  workspace scratch;
  CHECK(attention.try_prefill(rows, rows, rows, own, joined, out, scratch).message() ==
        "sinkcache: tokens seen and appended was 2, had to be at most 1");
  CHECK(own.seen() == 0);
  const auto last = rows.topRows(1);
  CHECK(attention.try_prefill(last, last, last, own, joined, out.topRows(1), scratch).ok());
  CHECK(joined.seen() == max_position);
}

TEST_CASE("source: a query that no stream has sees nothing, or what the last one does") {
  cache_config config{.num_kv_heads = 1, .head_dim = 8, .num_sink_tokens = 2, .window = 4, .rope = rope::none()};
  const matrix rows = matrix::Ones(9, 8);
  kv_cache<f32> window(config);
  window.append(rows, rows);
  kv_cache<q8> tiers(config);
  tiers.append(rows, rows);
  const kv_strides apart{.head = 8, .token = 8};
  const kv_view<f32> view(config, {apart, apart}, kv_piece{0, 9, rows.data(), rows.data()}, 9);
  config.window = 0;
  scored_kv_cache<f32> scored(config, {.budget = 40}, policies::keydiff());
  scored.append(rows, rows);
  config.first_position = 9, config.window = 4;
  kv_cache<f32> own(config);
  own.append(rows, rows);
  const joined_source joined({&window, &own});
  class counted final : public kv_source {
   public:
    explicit counted(const kv_geometry& of) : kv_source(of) { seen_ = 9; }
    index_t capacity() const noexcept override { return 9; }
    position_t min_truncate() const noexcept override { return 0; }
    index_t max_parts() const noexcept override { return 0; }
    plan_end plan(index_t, position_t first, position_t last, part_list&) const noexcept override {
      return {1, static_cast<index_t>(last - first + 1)};
    }
  } const plain(window.geometry());
  constexpr position_t smallest = std::numeric_limits<position_t>::min(), largest = ~smallest;
  for (const kv_source* source : {static_cast<const kv_source*>(&window), static_cast<const kv_source*>(&tiers),
                                  static_cast<const kv_source*>(&view), static_cast<const kv_source*>(&scored),
                                  static_cast<const kv_source*>(&joined), static_cast<const kv_source*>(&plain)}) {
    CHECK(source->num_visible(smallest) == source->num_visible(-1));
    CHECK(source->num_visible(smallest + 1) == source->num_visible(-1));
    CHECK(source->num_visible(largest) == source->num_visible(max_position - 1));
  }
  CHECK(window.num_visible(max_position - 1) == 6);
  CHECK(window.num_visible(-1) == 0);
  CHECK(view.num_visible(max_position) == 2);
  CHECK(plain.num_visible(largest) == 9);
}

}  // namespace
