// Formats, policies and scorers as a user writes them, outside the library's namespace: the same suites as for the
// library's own (run_case.cpp, eviction_case.cpp); here are only the caches. Sources are in user_extension_test.cpp.

#include <sys/wait.h>
#include <unistd.h>

#include <sinkcache/scorer.hpp>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "eviction_case.hpp"
#include "random_case.hpp"

namespace {

using sinkcache::index_t;
using sinkcache::position_t;

// A format: rows of 6-bit numbers.

// A row is one float, the distance between neighbouring numbers, and four numbers in every three bytes, offset by 32.
struct six_bits {
  static constexpr index_t block_rows = 1;
  static constexpr index_t block_bytes(index_t dim) { return ((dim + 3) / 4 * 3 + 4 + 63) / 64 * 64; }

  static void encode(const float* row, index_t dim, std::byte* to) noexcept {
    float step = 0;
    for (index_t i = 0; i < dim; ++i) {
      if (!std::isfinite(row[i])) step = std::numeric_limits<float>::quiet_NaN();
      step = std::max(std::abs(row[i]) / 31, step) + 0 * step;  // a NaN stays
    }
    std::memset(to, 0, static_cast<std::size_t>(block_bytes(dim)));
    std::memcpy(to, &step, sizeof step);
    for (index_t i = 0; i < dim && step > 0; ++i) {
      const auto code = static_cast<std::uint32_t>(std::lrint(row[i] / step) + 32);
      const index_t bit = 6 * i;
      std::byte* const at = to + 4 + bit / 8;
      at[0] |= static_cast<std::byte>(code << bit % 8 & 0xffu);
      if (bit % 8 > 2) at[1] |= static_cast<std::byte>(code >> (8 - bit % 8));
    }
  }
  static void decode(const std::byte* from, index_t, index_t dim, float* out) noexcept {
    float step;
    std::memcpy(&step, from, sizeof step);
    for (index_t i = 0; i < dim; ++i) {
      const index_t bit = 6 * i;
      const std::byte* const at = from + 4 + bit / 8;
      unsigned code = std::to_integer<unsigned>(at[0]) >> bit % 8;
      if (bit % 8 > 2) code |= std::to_integer<unsigned>(at[1]) << (8 - bit % 8);
      out[i] = step > 0 ? static_cast<float>(static_cast<int>(code & 63u) - 32) * step : step;
    }
  }
};
static_assert(sinkcache::kv_format<six_bits>);

// Half a step of a 31st of the row's largest number, and what rounding adds.
constexpr proof::storage_error six_bit_error{1e-6, 0.5 / 31 * 1.0001};

// A format whose elements the kernel loads where they lie.

// The upper byte of a half: fp8 with five bits of exponent and two of significand.
struct upper_byte {
  static constexpr index_t block_rows = 1, element_bytes = 1;
  static constexpr index_t block_bytes(index_t dim) { return (dim + 63) / 64 * 64; }

  static void encode(const float* row, index_t dim, std::byte* to) noexcept {
    std::memset(to, 0, static_cast<std::size_t>(block_bytes(dim)));
    for (index_t i = 0; i < dim; ++i) {
      std::byte block[64];
      sinkcache::f16::encode(row + i, 1, block);
      std::uint16_t half;
      std::memcpy(&half, block, sizeof half);
      to[i] = static_cast<std::byte>((half + 0x7fu + ((half >> 8) & 1u)) >> 8);
    }
  }
  static float element(const std::byte* from) noexcept {
    const std::byte half[2] = {std::byte{0}, *from};
    return sinkcache::f16::element(half);
  }
  static void decode(const std::byte* from, index_t, index_t dim, float* out) noexcept {
    for (index_t i = 0; i < dim; ++i) out[i] = element(from + i);
  }
};
static_assert(sinkcache::elementwise_format<upper_byte>);

// A policy: a window of whole pages.

// The first tokens for ever, and the newest `pages` pages of `page` tokens, the one that is being filled among them.
// Pages lie in memory in reverse, so that a run ends with its page.
struct page_window {
  index_t pinned, page, pages;

  index_t capacity() const { return pinned + page * pages; }
  index_t num_pinned() const { return pinned; }
  sinkcache::span_list visible(position_t seen) const {
    const position_t begun = std::max<position_t>(0, seen - pinned + page - 1) / page;
    sinkcache::span_list spans;
    spans.push_back({0, std::min<position_t>(seen, pinned)});
    spans.push_back({pinned + std::max<position_t>(0, begun - pages) * page, seen});
    return spans;
  }
  sinkcache::placed place(position_t position) const {
    if (position < pinned) return {static_cast<index_t>(position), static_cast<index_t>(pinned - 1 - position)};
    const auto in_page = static_cast<index_t>((position - pinned) % page);
    const auto physical = pages - 1 - static_cast<index_t>((position - pinned) / page % pages);
    return {pinned + physical * page + in_page, page - 1 - in_page};
  }
};
static_assert(sinkcache::eviction_policy<page_window>);

// The same, written without pages: one by one.
proof::plain_policy plain(const page_window& p) {
  return {[=](position_t seen) {
            std::vector<position_t> list;
            position_t newest_page = -1;
            for (position_t i = p.pinned; i < seen; ++i) newest_page = (i - p.pinned) / p.page;
            for (position_t i = 0; i < seen; ++i)
              if (i < p.pinned || (i - p.pinned) / p.page > newest_page - p.pages) list.push_back(i);
            return list;
          },
          [=](position_t i) {
            if (i < p.pinned) return static_cast<index_t>(i);
            const index_t turn = static_cast<index_t>((i - p.pinned) % (p.page * p.pages));
            return p.pinned + (p.pages - 1 - turn / p.page) * p.page + turn % p.page;
          },
          p.capacity()};
}

// A policy: three spans.

// The first tokens, a few later ones until they expire all at once, and a window: two gaps of different sizes.
struct bookmarks {
  index_t pinned, first_kept, kept, expire, window;

  index_t capacity() const { return pinned + kept + window + kept; }
  index_t num_pinned() const { return pinned; }
  sinkcache::span_list visible(position_t seen) const {
    const position_t newest = std::max<position_t>(0, seen - window);
    sinkcache::span_list spans;
    spans.push_back({0, std::min<position_t>(newest, pinned)});
    if (seen <= expire) spans.push_back({first_kept, std::min<position_t>(newest, first_kept + kept)});
    spans.push_back({newest, seen});
    return spans;
  }
  sinkcache::placed place(position_t position) const {
    const auto p = static_cast<index_t>(position), end_kept = first_kept + kept;
    if (p < pinned) return {p, pinned - 1 - p};
    if (p >= first_kept && p < end_kept) return {pinned + p - first_kept, end_kept - 1 - p};
    const index_t turn = p % (window + kept), to_end = window + kept - 1 - turn;
    return {pinned + kept + turn, p < first_kept ? std::min(to_end, first_kept - 1 - p) : to_end};
  }
};
static_assert(sinkcache::eviction_policy<bookmarks>);

proof::plain_policy plain(const bookmarks& p) {
  return {[=](position_t seen) {
            std::vector<position_t> list;
            for (position_t i = 0; i < seen; ++i)
              if (i < p.pinned || i >= seen - p.window ||
                  (i >= p.first_kept && i < p.first_kept + p.kept && seen <= p.expire))
                list.push_back(i);
            return list;
          },
          [=](position_t i) {
            if (i < p.pinned) return static_cast<index_t>(i);
            if (i >= p.first_kept && i < p.first_kept + p.kept)
              return p.pinned + static_cast<index_t>(i - p.first_kept);
            return p.pinned + p.kept + static_cast<index_t>(i % (p.window + p.kept));
          },
          p.capacity()};
}

// The suite.

proof::random_case draw(int seed, bool keeps_rollback) {
  proof::random_case c = proof::draw_case(static_cast<std::uint64_t>(seed), {.max_head_dim = 128, .max_window = 80});
  if (!keeps_rollback) c.config.rollback = 0;
  return c;
}

// K, V: 0 for the library's f32, 3 for six_bits.
template <class K, class V, class Policy>
void check(proof::random_case c, const Policy& policy) {
  constexpr bool own_k = std::same_as<K, six_bits>, own_v = std::same_as<V, six_bits>;
  c.k_format = own_k ? 3 : 0;
  c.v_format = own_v ? 3 : 0;
  INFO(c.name());
  const auto make = [&](sinkcache::cache_config config) -> std::unique_ptr<proof::open_cache> {
    config.num_sink_tokens = config.window = 0;  // the policy has them
    return std::make_unique<proof::open_cache_of<K, V, Policy>>(config, policy);
  };
  CHECK(proof::run_case(c, make, plain(policy), own_k ? six_bit_error : proof::storage_error{},
                        own_v ? six_bit_error : proof::storage_error{}) == "");
}

template <class F>
void check_format(int seed, proof::storage_error error) {
  proof::random_case c = draw(seed, true);
  c.k_format = c.v_format = 3;
  INFO(c.name());
  const auto make = [](const sinkcache::cache_config& config) -> std::unique_ptr<proof::open_cache> {
    return std::make_unique<proof::open_cache_of<F>>(config);
  };
  const sinkcache::cache_config& config = c.config;
  CHECK(proof::run_case(c, make, proof::plain_sink_window(config.num_sink_tokens, config.window, config.rollback),
                        error, error) == "");
}

TEST_CASE("user's format: 6-bit rows") {
  for (int i = 0; i < effort::cases(60); ++i) check_format<six_bits>(70000 + i, six_bit_error);
}

TEST_CASE("user's format: elements of one byte") {
  constexpr proof::storage_error error{0.126, 1e-3};
  for (int i = 0; i < effort::cases(60); ++i) check_format<upper_byte>(71000 + i, error);
}

TEST_CASE("user's policy: a window of whole pages, with pinned first tokens") {
  for (int i = 0; i < effort::cases(80); ++i) {
    const proof::random_case c = draw(80000 + i, false);
    effort::dice dice(c.seed + 5);
    const index_t page = dice.from_to(1, 24);
    const page_window policy{c.config.num_sink_tokens, page, std::max<index_t>(1, c.config.window / page)};
    if (i % 2 == 0)
      check<sinkcache::f32, sinkcache::f32>(c, policy);
    else
      check<six_bits, sinkcache::f32>(c, policy);
  }
}

TEST_CASE("user's policy: three spans with different gaps") {
  for (int i = 0; i < effort::cases(60); ++i) {
    const proof::random_case c = draw(90000 + i, false);
    effort::dice dice(c.seed + 5);
    const index_t pinned = c.config.num_sink_tokens;
    const index_t first_kept = dice.from_to(pinned, pinned + 30), kept = dice.from_to(1, 6);
    const index_t expire = first_kept + kept + c.config.window + dice.from_to(0, 60);
    check<sinkcache::f32, six_bits>(c, bookmarks{pinned, first_kept, kept, expire, c.config.window});
  }
}

// A policy that breaks its promise: four slots, and a place for position 3 that is told.
struct misplaced {
  sinkcache::placed last;

  index_t capacity() const { return 4; }
  sinkcache::span_list visible(position_t seen) const {
    sinkcache::span_list spans;
    spans.push_back({0, seen});
    return spans;
  }
  sinkcache::placed place(position_t position) const {
    return position < 3 ? sinkcache::placed{static_cast<index_t>(position), 0} : last;
  }
};

// Whether a process ends by abort() when it stores four tokens.
template <class Format>
bool aborts(const sinkcache::placed& last) {
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);
    alarm(60);  // a count of slots below 0 would go round for ever
    sinkcache::kv_cache<Format, Format, misplaced> cache(
        {.num_kv_heads = 2, .head_dim = 32, .rope = sinkcache::rope::none(), .recent = 1}, misplaced{last});
    const sinkcache::matrix rows = sinkcache::matrix::Ones(1, 64);
    for (int i = 0; i < 4; ++i) cache.append(rows, rows);
    sinkcache::workspace scratch;
    sinkcache::matrix out(1, 64);
    sinkcache::attention({.num_qo_heads = 2}).decode(rows, cache, out, scratch);
    _exit(0);
  }
  int ended = 0;
  waitpid(child, &ended, 0);
  return WIFSIGNALED(ended) && WTERMSIG(ended) == SIGABRT;
}

TEST_CASE("user's policy: one that leaves its slots ends the program, before rows are written there") {
  for (const sinkcache::placed& wrong : {sinkcache::placed{4, 0}, {-1, 0}, {3, 1}, {3, -1}}) {
    CAPTURE(wrong.slot, wrong.following);
    CHECK(aborts<sinkcache::f32>(wrong));
  }
  CHECK(!aborts<sinkcache::f32>({3, 0}));
  CHECK(aborts<sinkcache::q8>({4, 0}));
  CHECK(!aborts<sinkcache::q8>({3, 0}));
}

// Scorers.

// The oldest odd position leaves first.
struct oldest_odd final : sinkcache::token_scorer {
  sinkcache::scorer_needs needs() const noexcept override { return {}; }
  void score(const sinkcache::scored_head& head, std::span<float> scores) const noexcept override {
    for (std::size_t i = 0; i < scores.size(); ++i)
      scores[i] = static_cast<float>(head.at[i] % 2 == 0 ? head.rows : 0) + static_cast<float>(i);
  }
};

TEST_CASE("user's scorer: the oldest odd position leaves first") {
  const auto scores = [](const proof::plain_rows& rows) {
    proof::doubles worth;
    for (const position_t at : rows.at) {
      const std::size_t age = worth.size();
      worth.push_back(static_cast<double>(at % 2 == 1 ? age : age + rows.at.size()));
    }
    return worth;
  };
  CHECK(proof::run_eviction_cases({"oldest_odd", {}, scores}, 8000, effort::cases(30),
                                  std::make_shared<const oldest_odd>()) == "");
}

// What queries gave a token, by how long its value is.
struct heavy_values final : sinkcache::token_scorer {
  sinkcache::scorer_needs needs() const noexcept override { return {.sums = true, .compares_heads = true}; }
  sinkcache::index_t scratch_floats(const sinkcache::scored_sizes& of) const noexcept override { return of.v_head_dim; }
  void score(const sinkcache::scored_head& head, std::span<float> scores) const noexcept override {
    for (index_t i = 0; i < head.rows; ++i) {
      head.value(i, head.scratch.data());
      double sum = 0;
      for (const float x : head.scratch) sum += double{x} * double{x};
      const auto at = static_cast<std::size_t>(i);
      scores[at] = static_cast<float>(head.sums[at] * std::sqrt(sum));
    }
  }
};

TEST_CASE("user's scorer: what queries gave, by the length of values") {
  const auto scores = [](const proof::plain_rows& rows) {
    proof::doubles worth = rows.sums;
    for (std::size_t i = 0; i < worth.size(); ++i) {
      double sum = 0;
      for (const double x : rows.values[i]) sum += x * x;
      worth[i] *= std::sqrt(sum);
    }
    return worth;
  };
  CHECK(proof::run_eviction_cases({"heavy_values", {}, scores}, 8100, effort::cases(30),
                                  std::make_shared<const heavy_values>()) == "");
}

}  // namespace
