// Policies are integers only, so small ones are tested whole: every shape, every count of tokens.

#include <sinkcache/policy.hpp>

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"

using namespace sinkcache;

namespace {

// What is known when compiling.

constexpr position_t far = position_t{1} << 62;

constexpr span_list spans(std::initializer_list<position_span> list) {
  span_list result;
  for (const position_span& span : list) result.push_back(span);
  return result;
}
constexpr bool same(const span_list& a, const span_list& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

static_assert(eviction_policy<sink_window>);
static_assert(!eviction_policy<int>);
static_assert(sink_window{}.capacity() == 1);
static_assert(sink_window{4, 8}.capacity() == 12);
static_assert(sink_window{4, 8, 3}.capacity() == 15);

static_assert(same(sink_window{4, 8}.visible(0), spans({})));
static_assert(same(sink_window{4, 8}.visible(3), spans({{0, 3}})));
static_assert(same(sink_window{4, 8}.visible(12), spans({{0, 12}})));
static_assert(same(sink_window{4, 8}.visible(13), spans({{0, 4}, {5, 13}})));
static_assert(same(sink_window{4, 8, 3}.visible(13), spans({{0, 4}, {5, 13}})), "rollback changes nothing visible");
static_assert(same(sink_window{0, 8}.visible(13), spans({{5, 13}})));
static_assert(same(sink_window{4, 8}.visible(far), spans({{0, 4}, {far - 8, far}})));

static_assert(sink_window{4, 8}.place(2).slot == 2 && sink_window{4, 8}.place(2).following == 9);
static_assert(sink_window{4, 8}.place(11).slot == 11 && sink_window{4, 8}.place(11).following == 0);
static_assert(sink_window{4, 8}.place(12).slot == 4 && sink_window{4, 8}.place(12).following == 7);
static_assert(sink_window{0, 1}.place(far).slot == 0);

static_assert(sink_window{4, 8}.visible(100).gap(0, 100) == 88, "88 tokens lie between the pinned and the window");
static_assert(sink_window{4, 8}.visible(100).gap(1, 100) == 0);
static_assert(sink_window{4, 8}.visible(12).gap(0, 12) == 0);
static_assert(spans({{0, 2}, {5, 6}, {8, 10}}).gap(0, 12) == 12 - 2 - 1 - 2);
static_assert(spans({{0, 2}, {5, 6}, {8, 10}}).gap(1, 12) == 12 - 6 - 2);

static_assert(spans({{0, 2}, {2, 5}}).size() == 1 && spans({{0, 2}, {2, 5}})[0] == position_span{0, 5});
static_assert(spans({{0, 2}, {3, 3}, {4, 3}, {5, 6}}).size() == 2, "empty spans are left out");
static_assert(spans({{0, 2}, {5, 6}, {8, 10}}).num_tokens() == 5);
static_assert(spans({}).num_tokens() == 0);
static_assert(spans({{0, 2}, {5, 9}}).end_of_span_at(0) == 2 && spans({{0, 2}, {5, 9}}).end_of_span_at(1) == 2);
static_assert(spans({{0, 2}, {5, 9}}).end_of_span_at(2) == 2 && spans({{0, 2}, {5, 9}}).end_of_span_at(9) == 9);
static_assert(spans({{0, 2}, {5, 9}}).end_of_span_at(5) == 9);

static_assert(detail::can_go_back(sink_window{4, 8}, 12, 12, 12));
static_assert(!detail::can_go_back(sink_window{4, 8}, 12, 13, 13), "token 12 lies where token 4 was");
static_assert(detail::can_go_back(sink_window{4, 8, 1}, 12, 13, 13));
static_assert(detail::can_go_back(sink_window{4, 8}, 4, 1000, 1000), "pinned tokens alone");
static_assert(detail::min_truncate(sink_window{4, 8, 3}, 1000, 1000) == 997);
static_assert(detail::min_truncate(sink_window{4, 8, 3}, 12, 12) == 0);
static_assert(detail::min_truncate(sink_window{4, 8, 3}, 998, 1000) == 997);

// What a policy promises.

std::set<position_t> positions_in(const span_list& list) {
  std::set<position_t> set;
  for (const position_span& span : list)
    for (position_t p = span.first; p < span.last; ++p) set.insert(p);
  return set;
}

// What is wrong with the answers of `policy` after `seen` tokens; empty if nothing is.
template <eviction_policy P>
std::string broken_promise(const P& policy, position_t seen) {
  const span_list list = policy.visible(seen);
  position_t behind = -1;
  for (const position_span& span : list) {
    if (span.first >= span.last) return "an empty span";
    if (span.first <= behind) return "spans that touch, or are out of order";
    behind = span.last;
  }
  if (behind > seen) return "a token visible that was not seen yet";
  const std::set<position_t> visible = positions_in(list);
  if (seen > 0 && !visible.count(seen - 1)) return "the newest token is not visible";
  if (list.num_tokens() != static_cast<index_t>(visible.size())) return "num_tokens() is off";

  std::set<index_t> slots;
  for (position_t p : visible) {
    const placed at = policy.place(p);
    if (at.slot < 0 || at.slot >= policy.capacity()) return "a slot that is not there";
    if (!slots.insert(at.slot).second) return "two visible tokens in one slot";
    for (index_t i = 0; i <= at.following; ++i)
      if (policy.place(p + i).slot != at.slot + i) return "following positions that are not in the following slots";
    if (at.slot + at.following >= policy.capacity()) return "following slots that are not there";
  }
  for (position_t p : positions_in(policy.visible(seen + 1)))
    if (p != seen && !visible.count(p)) return "an evicted token that comes back";
  return "";
}

TEST_CASE("sink_window: every small shape after every count of tokens") {
  for (index_t sinks = 0; sinks <= 5; ++sinks)
    for (index_t window = 1; window <= 6; ++window)
      for (index_t rollback = 0; rollback <= 3; ++rollback) {
        const sink_window policy{sinks, window, rollback};
        for (position_t seen = 0; seen <= 3 * policy.capacity() + 2; ++seen) {
          INFO(sinks << " sink tokens, window " << window << ", rollback " << rollback << ", seen " << seen);
          REQUIRE(broken_promise(policy, seen) == "");

          std::set<position_t> plain, recoverable;
          for (position_t p = 0; p < seen; ++p) {
            if (p < sinks || p >= seen - window) plain.insert(p);
            if (p < sinks || p >= seen - window - rollback) recoverable.insert(p);
          }
          REQUIRE(positions_in(policy.visible(seen)) == plain);

          std::set<index_t> slots;
          for (position_t p : recoverable) slots.insert(policy.place(p).slot);
          REQUIRE(slots.size() == recoverable.size());

          // The longest runs that there are: to the last slot.
          const placed at = policy.place(seen);
          REQUIRE(at.slot + at.following == policy.capacity() - 1);
        }
      }
}

TEST_CASE("sink_window: the same at the far end of a stream") {
  for (const sink_window policy : {sink_window{0, 1}, sink_window{4, 7}, sink_window{3, 5, 9}})
    for (position_t seen = far - 40; seen < far; ++seen) {
      INFO("seen " << seen);
      REQUIRE(broken_promise(policy, seen) == "");
    }
}

TEST_CASE("span_list: refuses more spans than it holds") {
  span_list list;
  for (position_t i = 0; i < span_list::max_spans; ++i) list.push_back({2 * i, 2 * i + 1});
  CHECK(list.size() == span_list::max_spans);
  list.push_back({2 * span_list::max_spans - 1, 2 * span_list::max_spans});  // touches the last one
  list.push_back({100, 100});
  CHECK(list.size() == span_list::max_spans);
  CHECK_THROWS_WITH(list.push_back({200, 201}), "sinkcache: spans of visible positions was 9, had to be at most 8");
  CHECK(list.size() == span_list::max_spans);
  CHECK(list.end()[-1] == position_span{14, 16});
}

// Going back.

// The newest `pages` pages, the one that is being filled among them, and `spare` pages more in memory.
struct page_window {
  index_t page_tokens, pages, spare;

  index_t capacity() const { return (pages + spare) * page_tokens; }
  span_list visible(position_t seen) const {
    span_list list;
    const position_t begun = (seen + page_tokens - 1) / page_tokens;
    list.push_back({std::max<position_t>(0, begun - pages) * page_tokens, seen});
    return list;
  }
  placed place(position_t position) const {
    const index_t slot = static_cast<index_t>(position % capacity());
    return {slot, page_tokens - 1 - slot % page_tokens};  // shorter runs than there are
  }
};
static_assert(eviction_policy<page_window>);

// Slots that remember which token was written into them last.
template <eviction_policy P>
struct written_slots {
  P policy;
  std::vector<int> slots = std::vector<int>(static_cast<std::size_t>(policy.capacity()), -1);
  std::vector<int> stream{};  // token at each position; no two tokens have the same number
  position_t high = 0;
  int next = 0;

  position_t seen() const { return static_cast<position_t>(stream.size()); }
  void append() {
    slots[static_cast<std::size_t>(policy.place(seen()).slot)] = next;
    stream.push_back(next++);
    high = std::max(high, seen());
  }
  bool still_has(position_t count) const {
    for (position_t p : positions_in(policy.visible(count)))
      if (slots[static_cast<std::size_t>(policy.place(p).slot)] != stream[static_cast<std::size_t>(p)]) return false;
    return true;
  }
  position_t min_truncate() const {
    position_t n = seen();
    while (n > 0 && still_has(n - 1)) --n;
    return n;
  }
};

// Appends and goes back at random, never below what min_truncate allows.
template <eviction_policy P>
void compare_going_back(const P& policy, std::uint64_t seed, int steps) {
  effort::dice dice(seed);
  written_slots<P> model{policy};
  for (int step = 0; step < steps; ++step) {
    for (auto n = dice.from_to(0, 2 * policy.capacity()); n > 0; --n) model.append();
    const position_t smallest = model.min_truncate();
    REQUIRE(detail::min_truncate(policy, model.seen(), model.high) == smallest);
    for (position_t back = 0; back <= model.seen(); ++back) {
      INFO("from " << model.seen() << " back to " << back << ", having been at " << model.high);
      REQUIRE(detail::can_go_back(policy, back, model.seen(), model.high) == model.still_has(back));
    }
    const position_t back = dice.from_to(smallest, model.seen());
    model.stream.resize(static_cast<std::size_t>(back));
  }
}

TEST_CASE("going back: as far as a simulation of the slots says") {
  const auto seed = static_cast<std::uint64_t>(GENERATE(range(0, 30)));
  INFO("seed " << seed);
  effort::dice dice(seed);
  const auto draw = [&](index_t low, index_t high) { return static_cast<index_t>(dice.from_to(low, high)); };
  const int steps = effort::cases(10);
  const sink_window plain{draw(0, 4), draw(1, 6), 0}, with_rollback{draw(0, 4), draw(1, 6), draw(1, 7)};
  compare_going_back(plain, seed, steps);
  compare_going_back(with_rollback, seed, steps);
  const page_window pages{draw(1, 4), draw(1, 3), draw(0, 2)};
  for (position_t seen = 0; seen < 50; ++seen) REQUIRE(broken_promise(pages, seen) == "");
  compare_going_back(pages, seed, steps);
}

// A policy that counts how often it is asked.
template <eviction_policy P>
struct counted {
  P policy;
  mutable long questions = 0;

  index_t capacity() const { return policy.capacity(); }
  span_list visible(position_t seen) const {
    ++questions;
    return policy.visible(seen);
  }
  placed place(position_t position) const {
    ++questions;
    return policy.place(position);
  }
};

TEST_CASE("going back: how far is known without a walk over the stream") {
  const sink_window shapes[] = {{4, 1'000'000, 0}, {4, 1'000'000, 7}, {0, 1, 0}, {4, 1020, 16}, {0, 64, 0}};
  for (const sink_window& shape : shapes)
    for (const position_t seen : {position_t{0}, position_t{3}, position_t{900'000}, position_t{1'000'009}, far}) {
      const counted<sink_window> policy{shape};
      const position_t newest_lost = seen - shape.window - shape.rollback;
      const position_t expected = newest_lost <= shape.num_sink_tokens ? 0 : seen - shape.rollback;
      INFO(shape.window << ", rollback " << shape.rollback << ", seen " << seen);
      CHECK(detail::min_truncate(policy, seen, seen) == expected);
      CHECK(policy.questions <= 10 * (shape.rollback + 2));
    }
}

struct says_nothing {
  index_t capacity() const { return 4; }
  span_list visible(position_t seen) const {
    span_list spans;
    spans.push_back({std::max<position_t>(0, seen - 4), seen});
    return spans;
  }
  placed place(position_t p) const { return {static_cast<index_t>(p % 4), static_cast<index_t>(3 - p % 4)}; }
};

TEST_CASE("policy: pinned tokens and the most that are alive are what a policy tells of") {
  CHECK(detail::num_pinned(sink_window{3, 8}) == 3);
  CHECK(detail::num_pinned(says_nothing()) == 0);
  CHECK(detail::max_visible(sink_window{3, 8, 5}) == 11);
  CHECK(detail::max_visible(says_nothing()) == 4);
}

TEST_CASE("policy: spans only grew if nothing but the newest end moved") {
  const auto spans = [](std::initializer_list<position_span> list) {
    span_list result;
    for (const position_span& span : list) result.push_back(span);
    return result;
  };
  const span_list before = spans({{0, 4}, {10, 20}});
  CHECK(detail::only_grew(before, before));
  CHECK(detail::only_grew(before, spans({{0, 4}, {10, 25}})));
  CHECK(!detail::only_grew(before, spans({{0, 4}, {11, 21}})));
  CHECK(!detail::only_grew(before, spans({{0, 5}, {10, 21}})));
  CHECK(!detail::only_grew(before, spans({{0, 4}})));
  CHECK(!detail::only_grew(before, spans({{0, 4}, {10, 20}, {30, 31}})));
}

TEST_CASE("policy: what is stored over one of the spans' positions") {
  const sink_window policy{2, 4, 1};  // positions 2, 7, 12, ... share a row
  span_list kept;
  kept.push_back({0, 2});
  kept.push_back({8, 12});
  for (position_t next = 12; next < 40; ++next) {
    bool over = false;
    for (const position_span& span : kept)
      for (position_t p = span.first; p < span.last; ++p) over = over || (next - p) % 5 == 0;
    over =
        over && (next - 2) % 5 != 0;  // the first two have rows of their own; 7, 12, ... is the row that nobody needs
    CHECK(detail::stored_over(policy, kept, next) == over);
  }
}

}  // namespace
