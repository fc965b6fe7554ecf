// The cache as an object: what it asks for, what it holds, what can be taken back, what it refuses.

#include <sinkcache/attention.hpp>
#include <sinkcache/kv_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "counting_resource.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "plain_format.hpp"

using namespace sinkcache;

namespace {

constexpr index_t most = std::numeric_limits<index_t>::max();

static_assert(std::is_nothrow_move_constructible_v<kv_cache<f32>> && std::is_nothrow_move_assignable_v<kv_cache<f32>>);
static_assert(!std::is_copy_constructible_v<kv_cache<f32>> && !std::is_copy_assignable_v<kv_cache<f32>>);
static_assert(std::is_base_of_v<any_kv_cache, kv_cache<bf16, f16>>);
static_assert(!std::is_convertible_v<cache_config, kv_cache<f32>>);

cache_config small_config() {
  return {.num_kv_heads = 2,
          .head_dim = 4,
          .v_head_dim = 3,
          .num_sink_tokens = 2,
          .window = 5,
          .rope = rope::plain(4, 100.0),
          .rollback = 0};
}

// The same without a window: a user-defined policy has its own.
cache_config for_policy(cache_config config) {
  config.num_sink_tokens = config.window = 0;
  return config;
}

matrix random_matrix(effort::dice& dice, index_t rows, index_t cols) {
  matrix m(rows, cols);
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = dice.signed_unit();
  return m;
}

// Keys and values of token number `id`, the same whenever asked.
struct token_rows {
  matrix k, v;
};
token_rows rows_of(const kv_geometry& config, const std::vector<int>& ids) {
  const auto n = static_cast<index_t>(ids.size());
  token_rows rows{matrix(n, config.num_kv_heads * config.head_dim), matrix(n, config.num_kv_heads * config.v_head_dim)};
  for (index_t i = 0; i < n; ++i) {
    effort::dice dice(static_cast<std::uint64_t>(ids[static_cast<std::size_t>(i)]) + 1000);
    rows.k.row(i) = random_matrix(dice, 1, rows.k.cols());
    rows.v.row(i) = random_matrix(dice, 1, rows.v.cols());
  }
  return rows;
}

template <class Cache>
void append(Cache& cache, const std::vector<int>& ids) {
  const token_rows rows = rows_of(cache.geometry(), ids);
  cache.append(rows.k, rows.v);
}

std::vector<int> numbers(int from, int to) {
  std::vector<int> ids;
  for (int i = from; i < to; ++i) ids.push_back(i);
  return ids;
}

// Four query heads' attention now, and lse.
std::vector<float> attend(const any_kv_cache& cache) {
  static workspace scratch;
  effort::dice dice(7);
  const attention attention({.num_qo_heads = 4});
  const matrix q = random_matrix(dice, 1, 4 * cache.geometry().head_dim);
  matrix out(1, 4 * cache.geometry().v_head_dim);
  float lse[4];
  attention.decode(q, cache, out, scratch, {.lse = lse});
  std::vector<float> result(out.data(), out.data() + out.size());
  result.insert(result.end(), lse, lse + 4);
  return result;
}

std::vector<std::byte> bytes_of(const counting_resource& resource) {
  const auto* const memory = static_cast<const std::byte*>(resource.last);
  return {memory, memory + resource.last_bytes};
}

// Configuration.

TEST_CASE("kv_cache: a bad configuration is refused in exact words, before memory is asked for") {
  struct bad {
    std::function<void(cache_config&)> set;
    const char* message;
  };
  const bad table[] = {
      {[](auto& c) { c.num_kv_heads = 0; }, "num_kv_heads was 0, had to be at least 1"},
      {[](auto& c) { c.num_kv_heads = -1; }, "num_kv_heads was -1, had to be at least 1"},
      {[](auto& c) { c.num_kv_heads = most; }, "num_kv_heads * tokens was 9223372036854775807 * 7, had to fit 63 bits"},
      {[](auto& c) { c.num_kv_heads = most / 8; },
       "bytes of the cache was 8070450532247928825 * 128, had to fit 63 bits"},
      {[](auto& c) { c.head_dim = 0; }, "head_dim was 0, had to be from 1 to 576"},
      {[](auto& c) { c.head_dim = -4; }, "head_dim was -4, had to be from 1 to 576"},
      {[](auto& c) { c.head_dim = 577; }, "head_dim was 577, had to be from 1 to 576"},
      {[](auto& c) { c.head_dim = most; }, "head_dim was 9223372036854775807, had to be from 1 to 576"},
      {[](auto& c) { c.v_head_dim = -1; }, "v_head_dim was -1, had to be from 1 to 576"},
      {[](auto& c) { c.v_head_dim = 577; }, "v_head_dim was 577, had to be from 1 to 576"},
      {[](auto& c) { c.num_sink_tokens = -1; }, "num_sink_tokens was -1, had to be at least 0"},
      {[](auto& c) { c.num_sink_tokens = most; },
       "num_sink_tokens + window + rollback was 9223372036854775807 + 5, had to fit 63 bits"},
      {[](auto& c) { c.num_sink_tokens = most - 5; },
       "num_kv_heads * tokens was 2 * 9223372036854775807, had to fit 63 bits"},
      {[](auto& c) { c.window = 0; },
       "window was 0, had to be at least 1: of a layer without a window, as many tokens as its stream may have"},
      {[](auto& c) { c.window = -5; },
       "window was -5, had to be at least 1: of a layer without a window, as many tokens as its stream may have"},
      {[](auto& c) { c.window = most; },
       "num_sink_tokens + window + rollback was 2 + 9223372036854775807, had to fit 63 bits"},
      {[](auto& c) { c.window = (most >> 2) + 1; },
       "bytes of the cache was 4611686018427387908 * 128, had to fit 63 bits"},
      {[](auto& c) { c.rollback = -1; }, "rollback was -1, had to be at least 0"},
      {[](auto& c) { c.rollback = most; }, "window + rollback was 5 + 9223372036854775807, had to fit 63 bits"},
      {[](auto& c) { c.first_position = -1; }, "first_position was -1, had to be from 0 to 4611686018427387904"},
      {[](auto& c) { c.first_position = (position_t{1} << 62) + 1; },
       "first_position was 4611686018427387905, had to be from 0 to 4611686018427387904"},
      {[](auto& c) { c.rope.reset(); },
       "rope was absent, had to be given, say .rope = rope::plain(head_dim, theta), or rope::none(), unless positions "
       "are absolute and inputs rotated"},
      {[](auto& c) { c.rope.reset(), c.positions = positions::absolute; },
       "rope was absent, had to be given, say .rope = rope::plain(head_dim, theta), or rope::none(), unless positions "
       "are absolute and inputs rotated"},
      {[](auto& c) { c.rope.reset(), c.inputs = inputs::rotated; },
       "rope was absent, had to be given, say .rope = rope::plain(head_dim, theta), or rope::none(), unless positions "
       "are absolute and inputs rotated"},
      {[](auto& c) { c.rope = rope::plain(6, 100.0); }, "rope's width was 6, had to be at most head_dim, 4"},
  };
  for (const bad& row : table) {
    cache_config config = small_config();
    row.set(config);
    counting_resource resource;
    const std::string message = std::string("sinkcache: ") + row.message;
    CHECK_THROWS_WITH(kv_cache<f32>(config, &resource), message);
    CHECK_THROWS_WITH(kv_cache<f32>::required_bytes(config), message);
    CHECK(kv_cache<f32>::validate(config).message() == message);
    status found;
    CHECK(!kv_cache<f32>::try_create(config, found, &resource));
    CHECK(found.message() == message);
    if (message.find("num_kv_heads * tokens") == message.npos && message.find("bytes of") == message.npos)
      CHECK(validate(config).message() == message);
    CHECK(resource.last_bytes == 0);
  }
}

TEST_CASE("kv_cache: what a configuration may leave out, and its ends") {
  cache_config config = small_config();
  config.v_head_dim = 0;
  CHECK(kv_cache<f32>(config).config().v_head_dim == 4);
  config.rope.reset();
  config.positions = positions::absolute;
  config.inputs = inputs::rotated;
  CHECK_NOTHROW(kv_cache<f32>(config));
  config.num_sink_tokens = 0;
  config.window = 1;
  config.first_position = position_t{1} << 62;
  config.head_dim = config.v_head_dim = 512;
  config.rollback = 3;
  const kv_cache<f32> cache(config);
  CHECK(cache.capacity() == 1);
  CHECK(cache.config().rollback == 3);
  CHECK(cache.config().first_position == position_t{1} << 62);
}

TEST_CASE("kv_cache: required_bytes is what the resource is asked for, once, and nbytes()") {
  effort::dice dice(1);
  for (int i = 0; i < 50; ++i) {
    const cache_config config{.num_kv_heads = static_cast<index_t>(dice.from_to(1, 5)),
                              .head_dim = static_cast<index_t>(dice.from_to(1, 512)),
                              .v_head_dim = static_cast<index_t>(dice.from_to(0, 512)),
                              .num_sink_tokens = static_cast<index_t>(dice.from_to(0, 5)),
                              .window = static_cast<index_t>(dice.from_to(1, 50)),
                              .rope = rope::none(),
                              .rollback = static_cast<index_t>(dice.from_to(0, 5))};
    const auto check = [&]<class Cache>(std::type_identity<Cache>) {
      counting_resource resource;
      {
        const Cache cache(config, &resource);
        CHECK(resource.allocations == 1);
        CHECK(resource.last_bytes == Cache::required_bytes(config));
        CHECK(resource.last_bytes == cache.nbytes());
        CHECK(resource.last_alignment == 64);
      }
      CHECK(resource.all_returned());
    };
    check(std::type_identity<kv_cache<f32>>());
    check(std::type_identity<kv_cache<bf16>>());
    check(std::type_identity<kv_cache<f16, f32>>());
    const index_t rows = config.num_kv_heads * (config.num_sink_tokens + config.window + config.rollback);
    const index_t v_dim = config.v_head_dim == 0 ? config.head_dim : config.v_head_dim;
    CHECK(kv_cache<bf16, f32>::required_bytes(config) ==
          static_cast<std::size_t>(rows * (plain::row_bytes<bf16>(config.head_dim) + plain::row_bytes<f32>(v_dim))));
  }
}

TEST_CASE("kv_cache: a resource that has no more leaves nothing behind") {
  counting_resource resource;
  resource.exhausted = true;
  CHECK_THROWS_AS(kv_cache<f32>(small_config(), &resource), std::bad_alloc);
  resource.exhausted = false;
  {
    kv_cache<f32> cache(small_config(), &resource);
    append(cache, numbers(0, 9));
    const std::vector<float> before = attend(cache);
    resource.exhausted = true;
    CHECK_THROWS_AS(cache.clone(), std::bad_alloc);
    CHECK(cache.seen() == 9);
    CHECK(attend(cache) == before);
    CHECK(resource.allocations == 1);  // nor does anything else ask for memory
  }
  CHECK(resource.all_returned());
}

// The stream.

TEST_CASE("kv_cache: capacity, size and seen along a stream") {
  for (index_t rollback : {0, 3}) {
    cache_config config = small_config();
    config.rollback = rollback;
    kv_cache<f32> cache(config);
    CHECK(cache.capacity() == 7);
    CHECK(cache.policy().num_sink_tokens == 2);
    for (int seen = 0; seen < 40; ++seen) {
      REQUIRE(cache.seen() == seen);
      REQUIRE(cache.size() == std::min(seen, 7));
      REQUIRE(cache.capacity() == 7);
      append(cache, {seen});
    }
  }
}

// The row that holds a position, as bytes: the keys', then the values'.
template <class Cache>
std::pair<const std::byte*, const std::byte*> row_of(const Cache& cache, index_t head, position_t position) {
  kv_part memory[8];
  part_list parts(memory, 8);
  cache.plan(head, cache.seen() - 1, cache.seen() - 1, parts);
  for (const kv_part& part : parts)
    if (part.first <= position && position < part.end()) {
      const index_t row = part.row + static_cast<index_t>(position - part.first);
      return {part.k.base + row * part.k.block, part.v.base + row * part.v.block};
    }
  return {};
}

// What a stored row lacks of these numbers in the format, padding with zeros included: rounded to the format, and off
// by no more than `allowed` before that. Empty if nothing.
template <class F>
std::string not_stored(const std::byte* row, const std::vector<double>& numbers, double allowed) {
  const auto dim = static_cast<index_t>(numbers.size());
  const double half_ulp = std::is_same_v<F, f32> ? 0 : std::is_same_v<F, f16> ? 0x1p-11 : 0x1p-8;
  for (index_t i = 0; i < dim; ++i) {
    const double exact = numbers[static_cast<std::size_t>(i)], found = plain::element<F>(row, i);
    const bool right = allowed == 0 ? found == plain::rounded<F>(static_cast<float>(exact))
                                    : std::abs(found - exact) <= half_ulp * std::abs(exact) + allowed;
    if (!right) return std::to_string(found) + " instead of " + std::to_string(exact);
  }
  for (index_t byte = dim * plain::element_bytes<F>; byte < plain::row_bytes<F>(dim); ++byte)
    if (row[byte] != std::byte{0}) return "padding that is not zero";
  return "";
}

TEMPLATE_TEST_CASE("kv_cache: stores keys rotated to their position and values as they are, in the format", "",
                   (std::pair<f32, f32>), (std::pair<bf16, f16>), (std::pair<f16, f32>)) {
  using K = typename TestType::first_type;
  using V = typename TestType::second_type;
  oracle::layer layer;
  layer.head_dim = 21;
  for (int i = 0; i < 10; ++i) layer.inv_freq.push_back(static_cast<float>(std::pow(1000., -i / 10.)));
  for (const bool raw : {true, false})
    for (const position_t first_position : {position_t{0}, position_t{1'000'000'007}}) {
      cache_config config = small_config();
      config.head_dim = 21;
      config.v_head_dim = 37;
      config.rope = rope(layer.inv_freq, rope_pairing::half_split, 1.25f);
      config.inputs = raw ? inputs::raw : inputs::rotated;
      config.first_position = first_position;
      kv_cache<K, V> cache(config);
      const token_rows rows = rows_of(detail::geometry_of(config), numbers(0, 19));
      cache.append(rows.k.topRows(12), rows.v.topRows(12));
      cache.append(rows.k.bottomRows(7), rows.v.bottomRows(7));
      for (const position_span& span : cache.policy().visible(19))
        for (position_t p = span.first; p < span.last; ++p)
          for (index_t head = 0; head < 2; ++head) {
            std::vector<double> key(rows.k.row(p).data() + head * 21, rows.k.row(p).data() + (head + 1) * 21);
            const std::vector<double> value(rows.v.row(p).data() + head * 37, rows.v.row(p).data() + (head + 1) * 37);
            if (raw) std::for_each(key.begin(), key.begin() + 20, [](double& x) { x *= 1.25; });
            if (raw) oracle::rotate(layer, first_position + p, key.data());
            const auto [k_row, v_row] = row_of(cache, head, p);
            // A sine, a cosine and their products, of numbers below 1.25.
            REQUIRE(not_stored<K>(k_row, key, raw ? 10 * 0x1p-24 : 0) == "");
            REQUIRE(not_stored<V>(v_row, value, 0) == "");
          }
    }
}

TEST_CASE("kv_cache: many tokens at once are as many one by one") {
  effort::dice dice(2);
  for (int i = 0; i < 20; ++i) {
    counting_resource one_resource, many_resource;
    kv_cache<f16> one(small_config(), &one_resource), many(small_config(), &many_resource);
    for (int next = 0; next < 60;) {
      const int n = static_cast<int>(dice.from_to(0, 20));
      append(many, numbers(next, next + n));
      for (const int end = next + n; next < end; ++next) append(one, {next});
      REQUIRE(one.seen() == many.seen());
      REQUIRE(bytes_of(one_resource) == bytes_of(many_resource));
    }
  }
}

// More would be written over tokens that the first of them sees.
TEST_CASE("kv_cache: there is room for the rows that the next token does not see") {
  constexpr index_t pinned = 2, window = 7;
  const matrix row = matrix::Ones(1, 4);
  for (const index_t rollback : {0, 1, 5}) {
    kv_cache<f32> cache({.num_kv_heads = 1,
                         .head_dim = 4,
                         .num_sink_tokens = pinned,
                         .window = window,
                         .rope = rope::none(),
                         .rollback = rollback});
    CHECK(cache.room() == pinned + window + rollback);
    for (index_t seen = 1; seen < 30; ++seen) {
      cache.append(row, row);
      const position_t oldest = std::max<position_t>(pinned, seen + 1 - window);  // that the next token sees
      CHECK(cache.room() == std::max<position_t>(1, window + rollback + oldest - seen));
    }
  }
}

TEST_CASE("kv_cache: appending nothing changes nothing") {
  counting_resource resource;
  kv_cache<f32> cache(small_config(), &resource);
  append(cache, {});
  CHECK((cache.seen() == 0 && cache.size() == 0));
  append(cache, numbers(0, 9));
  const auto before = bytes_of(resource);
  append(cache, {});
  CHECK(cache.seen() == 9);
  CHECK(bytes_of(resource) == before);
}

TEST_CASE("kv_cache: wrong shapes are refused, and change nothing") {
  counting_resource resource;
  kv_cache<f32> cache(small_config(), &resource);
  append(cache, numbers(0, 9));
  const auto before = bytes_of(resource);
  const auto appending = [&](index_t k_rows, index_t k_cols, index_t v_rows, index_t v_cols) {
    const matrix k = matrix::Ones(k_rows, k_cols), v = matrix::Ones(v_rows, v_cols);
    cache.append(k, v);
  };
  CHECK_THROWS_WITH(appending(1, 7, 1, 6), "sinkcache: k.cols() was 7, had to be exactly 8");
  CHECK_THROWS_WITH(appending(1, 0, 1, 6), "sinkcache: k.cols() was 0, had to be exactly 8");
  CHECK_THROWS_WITH(appending(1, 8, 1, 8), "sinkcache: v.cols() was 8, had to be exactly 6");
  CHECK_THROWS_WITH(appending(3, 8, 2, 6), "sinkcache: v.rows() was 2, had to be exactly 3");
  CHECK_THROWS_WITH(appending(0, 8, 1, 6), "sinkcache: v.rows() was 1, had to be exactly 0");
  CHECK_THROWS_WITH(appending(0, 9, 0, 6), "sinkcache: k.cols() was 9, had to be exactly 8");
  CHECK(cache.seen() == 9);
  CHECK(cache.size() == 7);
  CHECK(bytes_of(resource) == before);
}

// Policies of one's own.

// Whole pages of two tokens: the newest two, the one that is being filled among them, and a spare one in memory.
struct page_window {
  index_t capacity() const { return 6; }
  span_list visible(position_t seen) const {
    span_list list;
    list.push_back({std::max<position_t>(0, (seen + 1) / 2 - 2) * 2, seen});
    return list;
  }
  placed place(position_t position) const {
    const index_t slot = static_cast<index_t>(position % 6);
    return {slot, 5 - slot};
  }
};

// Pins tokens 2 and 3 beside a window of 2. So token 1 leaves while the stream is shorter than what stays for ever.
struct late_pins {
  index_t capacity() const { return 4; }
  span_list visible(position_t seen) const {
    const position_t first = std::max<position_t>(0, seen - 2);
    span_list list;
    list.push_back({2, std::min<position_t>(first, 4)});
    list.push_back({first, seen});
    return list;
  }
  placed place(position_t position) const {
    if (position == 2 || position == 3) return {static_cast<index_t>(position - 2), 0};
    return {2 + static_cast<index_t>(position % 2), 0};
  }
};

struct nothing_kept {
  index_t capacity() const { return 0; }
  span_list visible(position_t) const { return {}; }
  placed place(position_t) const { return {}; }
};

TEST_CASE("kv_cache: a sink_window of one's own is checked like that of a configuration") {
  cache_config config = small_config();
  config.num_sink_tokens = config.window = 0;
  counting_resource resource;
  const auto make = [&](sink_window policy) { return kv_cache<f32>(config, policy, &resource); };
  CHECK(make({2, 5}).capacity() == 7);
  CHECK(make({2, 5, 3}).capacity() == 7);
  CHECK(make({2, 5, 3}).nbytes() == 2 * 10 * 128);
  CHECK_THROWS_WITH(make({-3, 8}), "sinkcache: num_sink_tokens was -3, had to be at least 0");
  CHECK_THROWS_WITH(make({4, 0, 2}),
                    "sinkcache: window was 0, had to be at least 1: of a layer without a window, as many tokens as its "
                    "stream may have");
  CHECK_THROWS_WITH(make({4, 8, -1}), "sinkcache: rollback was -1, had to be at least 0");
  CHECK_THROWS_WITH(make({1, most, 0}),
                    "sinkcache: num_sink_tokens + window + rollback was 1 + 9223372036854775807, had to fit 63 bits");
  CHECK_THROWS_AS(kv_cache<f32>::required_bytes(config, sink_window{4, 0}), std::invalid_argument);
  CHECK(resource.all_returned());
}

TEST_CASE("kv_cache: a policy of one's own brings its own rows") {
  cache_config config = for_policy(small_config());
  CHECK((kv_cache<f32, f32, page_window>(config, {}).capacity()) == 6);
  CHECK((kv_cache<f32, f32, page_window>::required_bytes(config, {})) == 2 * 6 * 128);
  CHECK_THROWS_WITH((kv_cache<f32, f32, nothing_kept>(config, {})),
                    "sinkcache: the policy's capacity() was 0, had to be at least 1");
  counting_resource resource;
  config.window = 3;
  CHECK_THROWS_WITH((kv_cache<f32, f32, page_window>(config, {}, &resource)),
                    "sinkcache: window was 3, had to be 0: the policy that is given says what it keeps");
  config = for_policy(config);
  config.num_sink_tokens = 2;
  CHECK_THROWS_WITH((kv_cache<f32, f32, page_window>(config, {}, &resource)),
                    "sinkcache: num_sink_tokens was 2, had to be 0: the policy that is given says what it pins");
  CHECK(resource.all_returned());
}

// Going back.

template <class Policy>
kv_cache<f32, f32, Policy> make_cache(const cache_config& config, const Policy& policy, counting_resource* resource) {
  if constexpr (std::same_as<Policy, sink_window>)
    return kv_cache<f32>(config, resource);
  else
    return kv_cache<f32, f32, Policy>(for_policy(config), policy, resource);
}

// Beside the cache: the tokens of the stream, and which token was written last into each slot.
template <class Policy>
struct simulation {
  const cache_config& config;
  const Policy& policy;
  counting_resource resource{};
  kv_cache<f32, f32, Policy> cache = make_cache(config, policy, &resource);
  std::vector<int> stream{};
  std::map<index_t, int> slots{};

  void wrote(const std::vector<int>& ids) {
    for (int id : ids) {
      slots[policy.place(static_cast<position_t>(stream.size())).slot] = id;
      stream.push_back(id);
    }
  }
  bool still_has(position_t seen) const {
    for (const position_span& span : policy.visible(seen))
      for (position_t p = span.first; p < span.last; ++p)
        if (slots.at(policy.place(p).slot) != stream[static_cast<std::size_t>(p)]) return false;
    return true;
  }
  // Down to here, any count can be gone back to.
  position_t smallest() const {
    auto n = static_cast<position_t>(stream.size());
    while (n > 0 && still_has(n - 1)) --n;
    return n;
  }
  void check_outputs() {
    REQUIRE(cache.seen() == static_cast<position_t>(stream.size()));
    counting_resource fresh_resource;
    auto fresh = make_cache(config, policy, &fresh_resource);
    append(fresh, stream);
    if (!stream.empty()) REQUIRE(attend(cache) == attend(fresh));
  }
};

// `exact`: the cache goes back whenever it could; else it may refuse though it could.
template <class Policy>
void go_back_at_random(const cache_config& config, const Policy& policy, std::uint64_t seed, bool exact) {
  effort::dice dice(seed);
  CAPTURE(seed, config.num_sink_tokens, config.window, config.rollback);
  simulation<Policy> run{config, policy};
  workspace scratch;
  int next = 0;
  for (int step = 0; step < 60; ++step) {
    const auto seen = static_cast<position_t>(run.stream.size());
    const auto draw = dice.from_to(0, 99);
    CAPTURE(step, seen, draw);
    if (draw < 35) {
      const std::vector<int> ids = numbers(next, next + static_cast<int>(dice.from_to(0, 4)));
      append(run.cache, ids);
      run.wrote(ids);
      next += static_cast<int>(ids.size());
    } else if (draw < 55) {
      const std::vector<int> ids = numbers(next, next + static_cast<int>(dice.from_to(0, 20)));
      const token_rows rows = rows_of(detail::geometry_of(config), ids);
      const matrix q = random_matrix(dice, rows.k.rows(), 4 * config.head_dim);
      matrix out(rows.k.rows(), 4 * config.v_head_dim);
      attention({.num_qo_heads = 4}).prefill(q, rows.k, rows.v, run.cache, out, scratch);
      REQUIRE(out.allFinite());
      run.wrote(ids);
      next += static_cast<int>(ids.size());
    } else if (draw < 58) {
      run.cache.clear();
      run.stream.clear();
    } else {
      const position_t back = dice.one_in(3) ? dice.from_to(0, std::min<position_t>(seen, 6))
                                             : dice.from_to(std::max<position_t>(0, seen - 12), seen);
      CAPTURE(back);
      const position_t smallest = run.smallest();
      if (exact) REQUIRE(run.cache.min_truncate() == smallest);
      const auto before = bytes_of(run.resource);
      const position_t min_before = run.cache.min_truncate();
      bool went = true;
      std::string message;
      try {
        run.cache.truncate(back);
      } catch (const std::invalid_argument& refused) {
        went = false;
        message = refused.what();
      }
      REQUIRE(bytes_of(run.resource) == before);
      if (exact)
        REQUIRE(went == run.still_has(back));
      else if (went)
        REQUIRE(run.still_has(back));
      if (went) {
        run.stream.resize(static_cast<std::size_t>(back));
      } else {
        REQUIRE(message == "sinkcache: seen was " + std::to_string(back) + ", had to be at least " +
                               std::to_string(min_before) + ": older tokens are overwritten");
        REQUIRE(run.cache.min_truncate() == min_before);
      }
    }
    run.check_outputs();
    REQUIRE(run.cache.min_truncate() >= run.smallest());
    if (exact) REQUIRE(run.cache.min_truncate() == run.smallest());
  }
}

TEST_CASE("kv_cache: truncate goes back exactly where nothing needed was overwritten") {
  const auto rounds = static_cast<std::uint64_t>(effort::cases(60));
  for (std::uint64_t seed = 0; seed < rounds; ++seed) {
    effort::dice dice(seed + 1'000'000);
    cache_config config = small_config();
    config.num_sink_tokens = static_cast<index_t>(dice.from_to(0, 4));
    config.window = static_cast<index_t>(dice.from_to(1, 8));
    go_back_at_random(config, sink_window{config.num_sink_tokens, config.window, 0}, seed, true);
    config.rollback = static_cast<index_t>(dice.from_to(1, 8));
    go_back_at_random(config, sink_window{config.num_sink_tokens, config.window, config.rollback}, seed, true);
    config.rollback = 0;
    go_back_at_random(config, page_window{}, seed, true);
    go_back_at_random(config, late_pins{}, seed, false);
  }
}

TEST_CASE("kv_cache: what was lost before a return to the pinned tokens stays lost") {
  kv_cache<f32, f32, late_pins> cache(for_policy(small_config()), {});
  append(cache, numbers(0, 7));  // 5 lies where 1 was
  cache.truncate(4);             // {2, 3}, pinned
  CHECK_THROWS_WITH(cache.truncate(3),
                    "sinkcache: seen was 3, had to be at least 4: older tokens are overwritten");  // {1, 2}
  CHECK(cache.seen() == 4);
}

TEST_CASE("kv_cache: truncate, by example") {
  cache_config config = small_config();
  config.rollback = 2;
  kv_cache<f32> cache(config);
  CHECK(cache.min_truncate() == 0);
  cache.truncate(0);
  append(cache, numbers(0, 9));
  CHECK(cache.min_truncate() == 0);  // seven visible, two more in the rows for rollback
  append(cache, numbers(9, 10));
  CHECK(cache.min_truncate() == 8);
  CHECK_THROWS_WITH(cache.truncate(7), "sinkcache: seen was 7, had to be at least 8: older tokens are overwritten");
  CHECK_THROWS_WITH(cache.truncate(-1), "sinkcache: seen was -1, had to be from 0 to what was seen, 10");
  CHECK_THROWS_WITH(cache.truncate(11), "sinkcache: seen was 11, had to be from 0 to what was seen, 10");
  CHECK(cache.seen() == 10);
  cache.truncate(10);
  cache.truncate(9);
  cache.truncate(8);
  CHECK(cache.min_truncate() == 8);
  CHECK_THROWS_WITH(cache.truncate(7), "sinkcache: seen was 7, had to be at least 8: older tokens are overwritten");
  append(cache, numbers(100, 102));
  CHECK(cache.seen() == 10);
  CHECK(cache.min_truncate() == 8);
  CHECK_THROWS_WITH(cache.truncate(3), "sinkcache: seen was 3, had to be at least 8: older tokens are overwritten");
  cache.truncate(2);  // the pinned tokens alone
  CHECK(cache.size() == 2);
  cache.truncate(1);
  append(cache, numbers(200, 203));
  CHECK(cache.seen() == 4);
  CHECK(cache.min_truncate() <= 1);
  cache.truncate(0);
  CHECK(cache.min_truncate() == 0);
}

// Copies.

TEST_CASE("kv_cache: a clone goes on by itself") {
  cache_config config = small_config();
  config.rollback = 3;
  counting_resource resource;
  {
    kv_cache<bf16, f32> cache(config, &resource);
    append(cache, numbers(0, 20));
    cache.truncate(18);
    kv_cache<bf16, f32> copy = cache.clone();
    CHECK(resource.allocations == 2);
    CHECK(resource.last_bytes == cache.nbytes());
    CHECK((copy.seen() == 18 && copy.min_truncate() == cache.min_truncate() && copy.capacity() == 7));
    CHECK(attend(copy) == attend(cache));

    const std::vector<float> before = attend(cache);
    append(copy, numbers(500, 510));
    CHECK(cache.seen() == 18);
    CHECK(attend(cache) == before);
    std::vector<int> stream = numbers(0, 18);
    for (int id : numbers(500, 510)) stream.push_back(id);
    kv_cache<bf16, f32> fresh(config);
    append(fresh, stream);
    CHECK(attend(copy) == attend(fresh));

    const std::vector<float> copys = attend(copy);
    append(cache, numbers(900, 930));
    cache.clear();
    CHECK(attend(copy) == copys);
  }
  CHECK(resource.all_returned());
  kv_cache<f32, f32, page_window> paged(for_policy(small_config()), {});
  append(paged, numbers(0, 5));
  CHECK(attend(paged.clone()) == attend(paged));
}

TEST_CASE("kv_cache: moves") {
  counting_resource resource, other_resource;
  {
    kv_cache<f32> a(small_config(), &resource);
    append(a, numbers(0, 9));
    const std::vector<float> before = attend(a);
    kv_cache<f32> b(std::move(a));
    CHECK(attend(b) == before);

    cache_config config = small_config();
    config.window = 50;
    kv_cache<f32> c(config, &other_resource);
    append(c, numbers(0, 3));
    c = std::move(b);
    CHECK((c.seen() == 9 && c.capacity() == 7 && c.config().window == 5));
    CHECK(attend(c) == before);
    append(c, numbers(9, 30));
    kv_cache<f32> fresh(small_config());
    append(fresh, numbers(0, 30));
    CHECK(attend(c) == attend(fresh));
    CHECK(resource.allocations == 1);
  }
  CHECK(resource.all_returned());
  CHECK(other_resource.all_returned());
}

TEST_CASE("kv_cache: clear forgets all, and keeps the memory") {
  counting_resource resource;
  kv_cache<f32> cache(small_config(), &resource), fresh(small_config());
  append(cache, numbers(0, 33));
  cache.clear();
  CHECK((cache.seen() == 0 && cache.size() == 0 && cache.min_truncate() == 0 && cache.capacity() == 7));
  append(cache, numbers(50, 54));
  append(fresh, numbers(50, 54));
  CHECK(attend(cache) == attend(fresh));
  CHECK(cache.min_truncate() == 0);
  CHECK(resource.allocations == 1);
}

// Without exceptions.

static_assert(noexcept(validate(cache_config())) && noexcept(kv_cache<f32>::validate(cache_config())));
static_assert(noexcept(std::declval<kv_cache<f32>&>().try_append(std::declval<matrix&>(), std::declval<matrix&>())));
static_assert(noexcept(std::declval<any_kv_cache&>().try_truncate(0)));

TEST_CASE("kv_cache: validate knows the formats, the free one does not") {
  cache_config config = small_config();
  CHECK((validate(config) && kv_cache<f32>::validate(config)));
  config.num_kv_heads = most / 8;  // fits 63 bits with small enough rows
  CHECK(validate(config).ok());
  CHECK(!kv_cache<f32>::validate(config));
  CHECK(kv_cache<f32, f32, page_window>::validate(for_policy(small_config()), {}).ok());
  CHECK(kv_cache<f32, f32, nothing_kept>::validate(for_policy(small_config()), {}).message() ==
        "sinkcache: the policy's capacity() was 0, had to be at least 1");
  CHECK(kv_cache<f32>::validate(for_policy(small_config()), {4, 0, 2}).message() ==
        "sinkcache: window was 0, had to be at least 1: of a layer without a window, as many tokens as its "
        "stream may have");
  CHECK(kv_cache<f32, f32, page_window>::validate(small_config(), {}).message() ==
        "sinkcache: num_sink_tokens was 2, had to be 0: the policy that is given says what it pins");
}

TEST_CASE("kv_cache: try_create gives what the constructor makes") {
  counting_resource resource;
  status found;
  found.refuse("left from before");
  {
    std::optional<kv_cache<bf16, f16>> cache = kv_cache<bf16, f16>::try_create(small_config(), found, &resource);
    REQUIRE((cache && found));
    append(*cache, numbers(0, 20));
    kv_cache<bf16, f16> plain(small_config());
    append(plain, numbers(0, 20));
    CHECK(attend(*cache) == attend(plain));
    CHECK(resource.allocations == 1);

    auto own = kv_cache<f32, f32, page_window>::try_create(for_policy(small_config()), {}, found, &resource);
    REQUIRE((own && found));
    CHECK(own->capacity() == 6);

    std::optional<kv_cache<bf16, f16>> copy = cache->try_clone(found);
    REQUIRE((copy && found));
    cache->clear();
    CHECK(attend(*copy) == attend(plain));
  }
  CHECK(resource.all_returned());
  CHECK(kv_cache<f32>::try_create(small_config(), found)->capacity() == 7);
}

TEST_CASE("kv_cache: memory that a resource refuses is a status") {
  counting_resource resource;
  resource.exhausted = true;
  status found;
  CHECK(!kv_cache<f32>::try_create(small_config(), found, &resource));
  CHECK(found.message() == "sinkcache: bytes of the cache was 1792, had to be at most what the memory resource has");
  CHECK(!kv_cache<f32>::try_create(small_config(), found, std::pmr::null_memory_resource()));
  CHECK(!found);
  cache_config endless = small_config();
  endless.window = index_t{1} << 50;
  CHECK(!kv_cache<f32>::try_create(endless, found));
  CHECK(found.message() ==
        "sinkcache: bytes of the cache was 288230376151712256, had to be at most what the memory resource has");
  CHECK(!kv_cache<f32>::try_create(small_config(), found, nullptr));
  CHECK(found.message() == "sinkcache: resource was null, had to be a memory resource");
  CHECK_THROWS_WITH(kv_cache<f32>(small_config(), nullptr), found.c_str());

  resource.exhausted = false;
  kv_cache<f32> cache(small_config(), &resource);
  resource.exhausted = true;
  CHECK(!cache.try_clone(found));
  CHECK(!found);
}

TEST_CASE("kv_cache: a try_ call that is refused says what would be thrown, and changes nothing") {
  counting_resource resource;
  kv_cache<f32> cache(small_config(), &resource);
  append(cache, numbers(0, 12));
  const auto before = bytes_of(resource);
  any_kv_cache& any = cache;
  const auto trying = [&](index_t k_rows, index_t k_cols, index_t v_rows, index_t v_cols) {
    const matrix k = matrix::Ones(k_rows, k_cols), v = matrix::Ones(v_rows, v_cols);
    const status found = any.try_append(k, v);
    CHECK_THROWS_WITH(cache.append(k, v), std::string(found.message()));
    return std::string(found.message());
  };
  CHECK(trying(1, 7, 1, 6) == "sinkcache: k.cols() was 7, had to be exactly 8");
  CHECK(trying(1, 6, 1, 8) == "sinkcache: k.cols() was 6, had to be exactly 8");  // swapped
  CHECK(trying(1, 8, 1, 8) == "sinkcache: v.cols() was 8, had to be exactly 6");
  CHECK(trying(3, 8, 2, 6) == "sinkcache: v.rows() was 2, had to be exactly 3");

  // As they come over a C interface.
  const float floats[16] = {};
  const const_matrix_view v(floats, 1, 6), nothing(nullptr, 1, 8), k(floats, 1, 8);
  CHECK(any.try_append(nothing, v).message() == "sinkcache: k's data was null, had to be 1 x 8 floats");
  CHECK(any.try_append(k, {nullptr, 1, 6}).message() == "sinkcache: v's data was null, had to be 1 x 6 floats");
  for (const index_t stride : {-8, 0, 7})
    CHECK(any.try_append({floats, 2, 8, stride}, {floats, 2, 6}).message() ==
          "sinkcache: k's stride was " + std::to_string(stride) + ", had to be at least 8");
  CHECK(any.try_append({floats, -1, 8}, {floats, -1, 6}).message() ==
        "sinkcache: k.rows() was -1, had to be at least 0");
  CHECK(any.try_append({floats, most, 8}, {floats, most, 6}).message() ==
        "sinkcache: tokens seen and appended was 9223372036854775819, had to be at most 4611686018427387904");
  CHECK(any.try_append({floats, max_position, 8}, {floats, max_position, 6}).message() ==
        "sinkcache: tokens seen and appended was 4611686018427387916, had to be at most 4611686018427387904");
  // A stream ends at 2^62: one token more than it has room for, after the 12 seen and from the start.
  CHECK(any.try_append({floats, max_position - 11, 8}, {floats, max_position - 11, 6}).message() ==
        "sinkcache: tokens seen and appended was 4611686018427387905, had to be at most 4611686018427387904");
  CHECK(kv_cache<f32>(small_config())
            .try_append({floats, (index_t{1} << 62) + 1, 8}, {floats, (index_t{1} << 62) + 1, 6})
            .message() ==
        "sinkcache: tokens seen and appended was 4611686018427387905, had to be at most 4611686018427387904");
  CHECK(any.try_append({nullptr, 0, 8}, {nullptr, 0, 6}).ok());

  CHECK(any.try_truncate(3).message() == "sinkcache: seen was 3, had to be at least 12: older tokens are overwritten");
  CHECK(any.try_truncate(-1).message() == "sinkcache: seen was -1, had to be from 0 to what was seen, 12");
  CHECK(any.try_truncate(13).message() == "sinkcache: seen was 13, had to be from 0 to what was seen, 12");
  CHECK((cache.seen() == 12 && cache.min_truncate() == 12));
  CHECK(bytes_of(resource) == before);
  CHECK((any.try_truncate(12) && any.try_truncate(2) && cache.seen() == 2));
  CHECK((any.try_append(k, v) && cache.seen() == 3));
}

// Formats chosen at run time.

TEST_CASE("kv_cache: everything but its making works through any_kv_cache") {
  cache_config config = small_config();
  config.rollback = 2;
  for (const char* k_name : {"f32", "f16", "bf16"})
    for (const char* v_name : {"f32", "f16", "bf16"}) {
      const auto cache = with_formats(k_name, v_name,
                                      [&](viewed_format auto k, viewed_format auto v) -> std::unique_ptr<any_kv_cache> {
                                        return std::make_unique<kv_cache<decltype(k), decltype(v)>>(config);
                                      });
      CHECK((cache->kind().k_format == k_name && cache->kind().v_format == v_name));
      append(*cache, numbers(0, 20));
      CHECK((cache->seen() == 20 && cache->size() == 7 && cache->capacity() == 7 && cache->min_truncate() == 18));
      CHECK(cache->nbytes() == 2 * 9 * 128);
      cache->truncate(18);
      CHECK_THROWS_AS(cache->truncate(17), std::invalid_argument);
      append(*cache, numbers(50, 53));
      std::vector<int> stream = numbers(0, 18);
      for (int id : numbers(50, 53)) stream.push_back(id);
      const std::vector<float> direct = with_formats(k_name, v_name, [&](viewed_format auto k, viewed_format auto v) {
        kv_cache<decltype(k), decltype(v)> fresh(config);
        append(fresh, stream);
        return attend(fresh);
      });
      CHECK(attend(*cache) == direct);
      cache->clear();
      CHECK((cache->seen() == 0 && cache->size() == 0 && cache->min_truncate() == 0));
    }
}

TEST_CASE("kv_cache: what was overwritten stays known after a move") {
  cache_config config = small_config();
  config.rollback = 4;
  kv_cache<f32> a(config), c(config);
  append(a, numbers(0, 30));
  a.truncate(27);
  const position_t smallest = a.min_truncate();
  REQUIRE(smallest == 26);
  kv_cache<f32> b(std::move(a));
  CHECK(b.min_truncate() == smallest);
  CHECK(!b.try_truncate(smallest - 1));
  c = std::move(b);
  CHECK(c.min_truncate() == smallest);
  CHECK(!c.try_truncate(smallest - 1));
}

// What was moved from.

// A policy that is worth nothing once moved from.
struct kept_elsewhere {
  std::unique_ptr<sink_window> policy;

  explicit kept_elsewhere(sink_window p) : policy(std::make_unique<sink_window>(p)) {}
  kept_elsewhere(const kept_elsewhere& other) : kept_elsewhere(*other.policy) {}
  kept_elsewhere(kept_elsewhere&&) noexcept = default;
  kept_elsewhere& operator=(kept_elsewhere&&) noexcept = default;

  index_t capacity() const { return policy->capacity(); }
  span_list visible(position_t seen) const { return policy->visible(seen); }
  placed place(position_t position) const { return policy->place(position); }
};

template <class Cache>
void check_moved_from(Cache& from, Cache other) {
  CHECK((from.seen() == 0 && from.size() == 0 && from.min_truncate() == 0));
  CHECK((from.nbytes() == 0 && from.capacity() == 0 && from.num_visible(8) == 0));
  const std::string refused = "sinkcache: the cache was moved from, had to be one that holds memory";
  const token_rows rows = rows_of(from.geometry(), numbers(0, 3));
  CHECK(from.try_append(rows.k, rows.v).message() == refused);
  CHECK_THROWS_WITH(from.append(rows.k, rows.v), refused);
  CHECK_THROWS_WITH(from.append(rows.k.topRows(0), rows.v.topRows(0)), refused);
  CHECK_THROWS_WITH(from.clone(), refused);
  status found;
  CHECK(!from.try_clone(found));
  CHECK(found.message() == refused);
  CHECK(from.try_truncate(0).ok());
  CHECK(!from.try_truncate(1));
  from.clear();

  workspace scratch;
  const attention attention({.num_qo_heads = 4});
  matrix q = matrix::Ones(3, 16), out(3, 12);
  CHECK_THROWS_WITH(attention.prefill(q, rows.k, rows.v, from, out, scratch), refused);
  CHECK(attention.try_prefill(q, rows.k, rows.v, from, out, scratch).message() == refused);
  CHECK(attention.try_decode(q.topRows(1), from, out.topRows(1), scratch).message() == refused);

  const std::vector<float> before = attend(other);
  from = std::move(other);
  CHECK(attend(from) == before);
}

TEST_CASE("kv_cache: one that was moved from is empty, takes nothing, and can be assigned to") {
  kv_cache<f32> a(small_config()), b(small_config()), c(small_config());
  append(a, numbers(0, 9));
  append(b, numbers(20, 40));
  append(c, numbers(0, 3));
  const kv_cache<f32> taken(std::move(a));
  check_moved_from(a, std::move(b));  // NOLINT(bugprone-use-after-move)
  c = std::move(a);
  check_moved_from(a, std::move(c));  // NOLINT(bugprone-use-after-move)

  using own_cache = kv_cache<f32, f32, kept_elsewhere>;
  own_cache own(for_policy(small_config()), kept_elsewhere({2, 5})),
      other(for_policy(small_config()), kept_elsewhere({1, 3}));
  append(own, numbers(0, 9));
  append(other, numbers(0, 9));
  const own_cache kept(std::move(own));
  check_moved_from(own, std::move(other));  // NOLINT(bugprone-use-after-move)
}

}  // namespace
