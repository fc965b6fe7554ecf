// Caches whose formats spare pinned and the newest tokens: which token lies where, byte by byte; attention against the
// oracle on what is stored; sizes, rollback, copies, printing, composition.

#include <fmt/format.h>
#include <sinkcache/fmt.hpp>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "catch.hpp"
#include "counting_resource.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "plain_quantized.hpp"
#include "random_case.hpp"

namespace outside {  // a user's

using sinkcache::index_t;

// A block of its own layout: a float for the largest magnitude, and signed bytes.
struct bytes_of {
  static constexpr std::string_view name = "bytes";
  static constexpr index_t block_rows = 1;
  static index_t block_bytes(index_t dim) { return 4 + dim; }
  static void encode(const float* row, index_t dim, std::byte* to) {
    float most = 0;
    for (index_t i = 0; i < dim; ++i) most = std::max(most, std::abs(row[i]));
    std::memcpy(to, &most, 4);
    for (index_t i = 0; i < dim; ++i)
      to[4 + i] = static_cast<std::byte>(most > 0 ? static_cast<int>(std::lround(row[i] / most * 127)) + 127 : 127);
  }
  static void decode(const std::byte* from, index_t, index_t dim, float* out) {
    float most;
    std::memcpy(&most, from, 4);
    for (index_t i = 0; i < dim; ++i) out[i] = static_cast<float>(static_cast<int>(from[4 + i]) - 127) / 127 * most;
  }
};

using pair = sinkcache::tiered<bytes_of, sinkcache::f32>;

// The first two tokens, ten to seventeen until 120 were seen, and a window of 24.
struct bookmarks {
  static constexpr index_t window = 24;

  index_t capacity() const { return 10 + window; }
  index_t num_pinned() const { return 2; }
  sinkcache::span_list visible(sinkcache::position_t seen) const {
    const sinkcache::position_t from = std::max<sinkcache::position_t>(2, seen - window);
    sinkcache::span_list spans;
    spans.push_back({0, std::min<sinkcache::position_t>(2, seen)});
    if (seen < 120) spans.push_back({10, std::min<sinkcache::position_t>(18, from)});
    spans.push_back({from, seen});
    return spans;
  }
  sinkcache::placed place(sinkcache::position_t p) const {
    if (p < 2) return {static_cast<index_t>(p), static_cast<index_t>(1 - p)};
    if (p >= 10 && p < 18) return {static_cast<index_t>(p - 8), static_cast<index_t>(17 - p)};
    return {static_cast<index_t>(10 + p % window), 0};
  }
};

}  // namespace outside

namespace proof {
namespace {

// H of a row in double: the definition, with signs from the bits that indices share.
void plain_hadamard(double* row, index_t dim) {
  std::vector<double> from(row, row + dim);
  for (index_t first = 0, n; first < dim; first += n) {
    for (n = 1; 2 * n <= dim - first;) n *= 2;
    for (index_t i = 0; i < n; ++i) {
      double sum = 0;
      for (index_t j = 0; j < n; ++j)
        sum += __builtin_parityll(static_cast<unsigned long long>(i & j)) ? -from[as_size(first + j)]
                                                                          : from[as_size(first + j)];
      row[first + i] = sum / std::sqrt(static_cast<double>(n));
    }
  }
}

// A cache of run-time formats, in memory that is seen.
class open_tiers {
 public:
  virtual ~open_tiers() = default;
  virtual any_kv_cache& get() = 0;
  virtual std::size_t required() const = 0;
  virtual std::unique_ptr<open_tiers> clone() const = 0;
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(memory->last), memory->bytes}; }

  std::shared_ptr<counting_resource> memory = std::make_shared<counting_resource>();
};
template <class K, class V>
class open_tiers_of final : public open_tiers {
 public:
  explicit open_tiers_of(const cache_config& config) : cache_(config, memory.get()) {}
  explicit open_tiers_of(kv_cache<K, V>&& cache, std::shared_ptr<counting_resource> of) : cache_(std::move(cache)) {
    memory = std::move(of);
  }
  any_kv_cache& get() override { return cache_; }
  std::size_t required() const override { return kv_cache<K, V>::required_bytes(cache_.config()); }
  std::unique_ptr<open_tiers> clone() const override { return std::make_unique<open_tiers_of>(cache_.clone(), memory); }

 private:
  kv_cache<K, V> cache_;
};

const char* const names[] = {"q8/q8",  "q6/q4",  "q4/q4",       "q4/q2",        "q2/q2",
                             "f16/q8", "q8/f32", "bytes/bytes", "q8 f16/q4 f32"};
std::unique_ptr<open_tiers> make(int pair, const cache_config& config) {
  switch (pair) {
    case 0:
      return std::make_unique<open_tiers_of<q8, q8>>(config);
    case 1:
      return std::make_unique<open_tiers_of<q6, q4>>(config);
    case 2:
      return std::make_unique<open_tiers_of<q4, q4>>(config);
    case 3:
      return std::make_unique<open_tiers_of<q4, q2>>(config);
    case 4:
      return std::make_unique<open_tiers_of<q2, q2>>(config);
    case 5:
      return std::make_unique<open_tiers_of<f16, q8>>(config);
    case 6:
      return std::make_unique<open_tiers_of<q8, f32>>(config);
    case 7:
      return std::make_unique<open_tiers_of<outside::pair, outside::pair>>(config);
    default:
      return std::make_unique<open_tiers_of<tiered<q8, f16>, tiered<q4, f32>>>(config);
  }
}

// What the query at a position of KV head 0 and up sees, in the order of positions: as the plan says it, decoded.
struct seen_rows {
  std::vector<position_t> positions;
  std::vector<std::string> formats;                // of keys and values
  std::vector<const std::byte*> k_bytes, v_bytes;  // of the last head asked for
};
seen_rows read(const kv_source& source, position_t query, index_t head, std::vector<float>* keys,
               std::vector<float>* values) {
  const kv_geometry& of = source.geometry();
  std::vector<kv_part> memory(as_size(source.max_parts()));
  part_list parts(memory.data(), source.max_parts());
  source.plan(head, query, query, parts);
  seen_rows rows;
  for (const kv_part& part : parts)
    for (index_t i = 0; i < part.rows; ++i) {
      const position_t p = part.first + i;
      if (query - p < part.seen_from || query - p >= part.seen_until) continue;
      rows.positions.push_back(p);
      rows.formats.push_back(
          fmt::format("{}/{}{}", part.k.reader->name, part.v.reader->name, i < part.pinned ? " pinned" : ""));
      rows.k_bytes.push_back(part.k.base + (part.row + i) * part.k.block);
      rows.v_bytes.push_back(part.v.base + (part.row + i) * part.v.block);
      const auto decode = [&](const kv_rows& from, index_t dim, const row_transform* transform,
                              std::vector<float>* to) {
        if (to == nullptr) return;
        std::vector<float> row(as_size(dim + 16));
        from.reader->load(from, part.row + i, 1, dim, dim + 16, row.data());
        std::vector<double> exact(row.begin(), row.begin() + dim);
        if (transform != nullptr) plain_hadamard(exact.data(), dim);
        const std::size_t at = as_size((p * of.num_kv_heads + head) * dim);
        to->resize(std::max(to->size(), as_size((p + 1) * of.num_kv_heads * dim)));
        for (index_t d = 0; d < dim; ++d) (*to)[at + as_size(d)] = static_cast<float>(exact[as_size(d)]);
      };
      decode(part.k, of.head_dim, of.k_transform, keys);
      decode(part.v, of.v_head_dim, of.v_transform, values);
    }
  return rows;
}

cache_config small_config(index_t heads, index_t dim, index_t pinned, index_t window, index_t recent,
                          index_t rollback) {
  return {.num_kv_heads = heads,
          .head_dim = dim,
          .num_sink_tokens = pinned,
          .window = window,
          .positions = positions::in_cache,
          .inputs = inputs::raw,
          .rope = rope::none(),
          .rollback = rollback,
          .recent = recent};
}

matrix random_rows(std::uint64_t seed, index_t rows, index_t columns) {
  effort::dice dice(seed);
  matrix m(rows, columns);
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = static_cast<float>(normal(dice));
  return m;
}

template <class F>
std::vector<std::byte> stored(const float* row, index_t dim, const row_transform* transform) {
  std::vector<float> y(row, row + dim);
  if (transform != nullptr) transform->apply(y.data(), dim);
  std::vector<std::byte> bytes(as_size(F::block_bytes(dim)));
  F::encode(y.data(), dim, bytes.data());
  return bytes;
}

// The bytes that rows hold after a way through bf16: by the plain encoder.
std::vector<std::byte> plain_few(int bits, const float* row, index_t dim, bool spared_before) {
  std::vector<float> y(row, row + dim);
  hadamard.apply(y.data(), dim);
  if (spared_before)
    for (float& x : y) x = static_cast<float>(plain::rounded<bf16>(x));
  return plain::quantized_row(bits, y).bytes();
}

bool same(const std::vector<std::byte>& expected, const std::byte* found) {
  return std::memcmp(expected.data(), found, expected.size()) == 0;
}

TEST_CASE("tiers: every token lies where its distance says, as a plain encoder stores it") {
  struct shape {
    index_t pinned, window, recent, rollback;
  };
  for (const shape& s :
       {shape{4, 40, 8, 5}, shape{0, 40, 8, 5}, shape{4, 40, 0, 5}, shape{0, 30, 0, 0}, shape{1, 30, 64, 7},
        shape{2, 30, 30, 3}, shape{3, 30, 29, 0}, shape{0, 1, 1, 0}, shape{9, 12, 3, 20}}) {
    for (index_t chunk : {index_t{1}, index_t{3}, s.recent - 1, s.recent + 1, index_t{1000}}) {
      INFO(fmt::format("pinned {}, window {}, recent {}, rollback {}, chunks of {}", s.pinned, s.window, s.recent,
                       s.rollback, chunk));
      if (chunk < 1) continue;
      constexpr index_t heads = 2, dim = 33, tokens = 150;
      const matrix k = random_rows(1, tokens, heads * dim), v = random_rows(2, tokens, heads * dim);
      open_tiers_of<q6, q4> cache(small_config(heads, dim, s.pinned, s.window, s.recent, s.rollback));
      for (index_t first = 0; first < tokens; first += chunk) {
        const index_t n = std::min(chunk, tokens - first);
        cache.get().append(k.middleRows(first, n), v.middleRows(first, n));
        const position_t query = first + n - 1;
        for (index_t head = 0; head < heads; ++head) {
          const seen_rows rows = read(cache.get(), query, head, nullptr, nullptr);
          std::size_t i = 0;
          for (position_t p = 0; p <= query; ++p) {
            const bool pinned = p < s.pinned, recent = query - p < s.recent;
            if (!pinned && query - p >= s.window) continue;
            REQUIRE(i < rows.positions.size());
            REQUIRE(rows.positions[i] == p);
            REQUIRE(rows.formats[i] == (pinned ? "bf16/bf16 pinned" : recent ? "bf16/bf16" : "q6/q4"));
            const float *key = k.row(p).data() + head * dim, *value = v.row(p).data() + head * dim;
            if (pinned || recent) {
              REQUIRE(same(stored<bf16>(key, dim, &hadamard), rows.k_bytes[i]));
              REQUIRE(same(stored<bf16>(value, dim, &hadamard), rows.v_bytes[i]));
            } else {
              REQUIRE(same(plain_few(6, key, dim, s.recent > 0), rows.k_bytes[i]));
              REQUIRE(same(plain_few(4, value, dim, s.recent > 0), rows.v_bytes[i]));
            }
            ++i;
          }
          REQUIRE(i == rows.positions.size());
          REQUIRE(cache.get().size() == static_cast<index_t>(i));
        }
      }
    }
  }
}

TEST_CASE("tiers: the arena is the same in whatever chunks tokens come") {
  constexpr index_t heads = 2, tokens = 700, recent = 20;
  for (index_t dim : {33, 80}) {
    const matrix k = random_rows(3, tokens, heads * dim), v = random_rows(4, tokens, heads * dim);
    std::vector<std::byte> expected;
    for (index_t chunk : {index_t{1}, index_t{3}, recent - 1, recent + 1, index_t{1000}}) {
      INFO("chunks of " << chunk << ", head_dim " << dim);
      open_tiers_of<q4, q2> cache(small_config(heads, dim, 3, 200, recent, 63));
      for (index_t first = 0; first < tokens; first += chunk) {
        const index_t n = std::min(chunk, tokens - first);
        cache.get().append(k.middleRows(first, n), v.middleRows(first, n));
      }
      if (expected.empty()) expected.assign(cache.bytes().begin(), cache.bytes().end());
      CHECK(std::equal(expected.begin(), expected.end(), cache.bytes().begin(), cache.bytes().end()));
    }
  }
}

// Counts what it encodes.
struct counted : q4 {
  static inline std::vector<float> firsts;  // first elements of the rows
  static void encode(const float* row, index_t dim, std::byte* to) {
    firsts.push_back(row[0]);
    q4::encode(row, dim, to);
  }
};

TEST_CASE("tiers: each token is encoded once, whatever is taken back") {
  counted::firsts.clear();
  kv_cache<counted, bf16> cache(small_config(1, 16, 2, 50, 10, 6));
  matrix row = matrix::Zero(1, 16);
  effort::dice dice(5);
  position_t furthest = 0;
  for (int i = 0; i < 1000; ++i) {
    if (dice.one_in(5)) cache.truncate(std::max(cache.min_truncate(), cache.seen() - dice.from_to(0, 6)));
    // The same token every time: its stored row tells which it is.
    row(0, 0) = static_cast<float>(cache.seen() % 128 + 1);
    cache.append(row, row);
    furthest = std::max(furthest, cache.seen());
  }
  // All but pinned ones, in their order.
  REQUIRE(static_cast<position_t>(counted::firsts.size()) == furthest - 10 - 2);
  for (std::size_t i = 0; i < counted::firsts.size(); ++i)
    REQUIRE(counted::firsts[i] == static_cast<float>((i + 2) % 128 + 1) / 4);
}

TEST_CASE("tiers: what was taken back may come again as something else") {
  const cache_config config = small_config(1, 48, 3, 40, 9, 12);
  const matrix k = random_rows(6, 400, 48), other = random_rows(7, 400, 48);
  effort::dice dice(8);
  for (int round = 0; round < effort::cases(40); ++round) {
    kv_cache<q4, q8> cache(config), straight(config);
    matrix stream(400, 48);
    index_t seen = 0;
    while (seen < 200) {
      if (dice.one_in(3) && seen > 0) {
        const position_t to = dice.one_in(6) ? dice.from_to(0, 3) : dice.from_to(std::max<index_t>(0, seen - 14), seen);
        const bool possible = to >= cache.min_truncate() || to <= 3;
        if (to <= seen) {
          REQUIRE((cache.try_truncate(to).ok() || !possible));
          if (cache.seen() == to) seen = to;
        }
      }
      const index_t n = dice.from_to(1, 20);
      const matrix& from = dice.one_in(2) ? k : other;
      stream.middleRows(seen, n) = from.middleRows(seen, n);
      cache.append(from.middleRows(seen, n), from.middleRows(seen, n));
      seen += n;
    }
    straight.append(stream.topRows(seen), stream.topRows(seen));
    std::vector<float> keys, values, straight_keys, straight_values;
    const seen_rows a = read(cache, seen - 1, 0, &keys, &values);
    const seen_rows b = read(straight, seen - 1, 0, &straight_keys, &straight_values);
    CHECK(a.positions == b.positions);
    CHECK(a.formats == b.formats);
    CHECK(keys == straight_keys);
    CHECK(values == straight_values);
  }
}

TEST_CASE("tiers: a rollback of `rollback` is always possible, one more only where nothing was written over") {
  for (index_t recent : {0, 5, 100}) {
    kv_cache<q8> cache(small_config(1, 16, 2, 30, recent, 7));
    const matrix rows = random_rows(9, 200, 16);
    cache.append(rows, rows);
    CHECK(cache.min_truncate() == 193);
    CHECK(cache.try_truncate(192).message() ==
          "sinkcache: seen was 192, had to be at least 193: older tokens are overwritten");
    CHECK(cache.seen() == 200);
    CHECK(cache.try_truncate(193));
    CHECK(cache.try_truncate(2));
    CHECK(cache.size() == 2);
    CHECK(cache.try_truncate(1));
    cache.append(rows.topRows(3), rows.topRows(3));
    CHECK(cache.min_truncate() == 0);
    // Until a row is written over all can be taken back.
    const index_t rows_of_ring = recent == 5 ? 5 + 7 : 30 + 7;
    cache.clear();
    cache.append(rows.topRows(2 + rows_of_ring), rows.topRows(2 + rows_of_ring));
    CHECK(cache.min_truncate() == 0);
    cache.append(rows.topRows(1), rows.topRows(1));
    CHECK(cache.min_truncate() == 2 + rows_of_ring + 1 - 7);
  }
}

// How far outputs may be from the oracle's on what is stored: 16 u (1 + A) max|v| and 16 u (1 + A), four times that,
// for the transforms of a query and of an output round too; and where codes meet integers, half a unit of a query of 16
// bits, and of weights of 15 bits 3e-4 of the values, three times what was met.
std::string far_from(const oracle::answer& e, const float* out, float lse, double head_dim, bool integers) {
  const double of_logits = 4 * 16 * u * (1 + e.a) + (integers ? std::sqrt(head_dim) / 65278 * e.a : 0);
  const double root = std::sqrt(static_cast<double>(e.out.size()));
  const double bound = 4 * 16 * u * (1 + e.a) * root + (integers ? 2 * of_logits + 3e-4 : 0);
  for (double x : e.out) {
    const double error = std::abs(static_cast<double>(*out++) - x);
    if (!(error <= bound * e.v_max))
      return fmt::format("output {} instead of {}, {} times the bound", out[-1], x, error / (bound * e.v_max));
  }
  const double error = static_cast<double>(lse) == e.lse ? 0 : std::abs(static_cast<double>(lse) - e.lse);
  return error <= of_logits ? ""
                            : fmt::format("lse {} instead of {}, {} times the bound", lse, e.lse, error / of_logits);
}

TEST_CASE("tiers: attention against the oracle on what is stored") {
  for (int i = 0; i < effort::cases(120); ++i) {
    const auto seed = static_cast<std::uint64_t>(70000 + i);
    random_case c = draw_case(seed, {.max_head_dim = i % 10 == 0 ? 576 : 130,
                                     .max_group = i % 4 == 0 ? 71 : 6,
                                     .max_sinks = 8,
                                     .max_window = 150,
                                     .max_tokens = 400});
    effort::dice dice(seed);
    if (i % 3 == 0) c.config.head_dim = c.config.v_head_dim = 64, c.layer.head_dim = c.layer.v_head_dim = 64;
    if (i % 3 == 0 && c.config.rope) c.config.rope.emplace(rope::none()), c.layer.inv_freq.clear();
    c.params.sm_scale = static_cast<float>(c.layer.sm_scale);
    c.layer.sm_scale = static_cast<double>(*c.params.sm_scale);
    c.config.recent = one_of<index_t>(dice, {0, 1, 5, 20, 64});
    c.logit_scale = std::min(c.logit_scale, 100.);
    const int pair = static_cast<int>(dice.from_to(0, std::size(names) - 1));
    INFO(c.name() << ", recent " << c.config.recent << ", " << names[pair]);
    const std::unique_ptr<open_tiers> cache = make(pair, c.config);
    const attention attention(c.params);
    workspace w;
    const tokens t = draw_tokens(c, dice, 0, c.tokens);
    const index_t heads = c.params.num_qo_heads, v_dim = c.config.v_head_dim;
    for (index_t first = 0, n; first < c.tokens; first += n) {
      n = std::min<index_t>(c.tokens - first, dice.one_in(2) ? 1 : dice.from_to(2, 90));
      matrix out(n, heads * v_dim);
      std::vector<float> lse(as_size(n * heads));
      const matrix q = t.q.middleRows(first, n), k = t.k.middleRows(first, n), v = t.v.middleRows(first, n);
      if (n == 1) {
        cache->get().append(k, v);
        attention.decode(q, cache->get(), out, w, {.lse = lse});
      } else {
        attention.prefill(q, k, v, cache->get(), out, w, {.lse = lse});
      }
      // Queries that the cache still has all rows for, some of them.
      for (position_t query = first + n - 1; query >= first && query + 1 >= cache->get().min_truncate();
           query -= dice.from_to(1, 30)) {
        std::vector<float> keys(as_size((query + 1) * c.config.num_kv_heads * c.config.head_dim)),
            values(as_size((query + 1) * c.config.num_kv_heads * v_dim));
        seen_rows rows;
        for (index_t head = 0; head < c.config.num_kv_heads; ++head)
          rows = read(cache->get(), query, head, &keys, &values);
        REQUIRE(rows.positions == plain_sink_window(c.config.num_sink_tokens, c.config.window).visible(query + 1));
        const auto expected =
            oracle::attend(c.layer, t.q.row(query).data(), query, rows.positions, keys.data(), values.data());
        for (index_t head = 0; head < heads; ++head) {
          const std::string wrong =
              far_from(expected[as_size(head)], &out(query - first, head * v_dim),
                       lse[as_size((query - first) * heads + head)], static_cast<double>(c.config.head_dim), pair != 7);
          INFO("query " << query << ", head " << head);
          REQUIRE(wrong == "");
        }
        if (!dice.one_in(3)) break;
      }
    }
  }
}

TEST_CASE("tiers: a user-defined policy has them too") {
  constexpr index_t heads = 2, dim = 33, tokens = 150;
  const matrix k = random_rows(21, tokens, heads * dim), v = random_rows(22, tokens, heads * dim);
  const matrix q = random_rows(23, tokens, 2 * heads * dim);
  const outside::bookmarks policy;
  const attention attention({.num_qo_heads = 2 * heads});
  workspace w;
  for (index_t recent : {0, 6, 40})
    for (index_t chunk : {index_t{1}, index_t{3}, recent - 1, recent + 1, index_t{1000}}) {
      if (chunk < 1) continue;
      INFO("recent " << recent << ", chunks of " << chunk);
      cache_config config = small_config(heads, dim, 0, 0, recent, 9);
      counting_resource memory;
      kv_cache<q8, q6, outside::bookmarks> cache(config, policy, &memory);
      kv_cache<f32, f32, outside::bookmarks> floats(config, policy);
      CHECK(memory.bytes == cache.nbytes());
      CHECK(memory.bytes == decltype(cache)::required_bytes(config, policy));
      matrix out(tokens, 2 * heads * dim), expected(out);
      for (index_t first = 0; first < tokens; first += chunk) {
        const index_t n = std::min(chunk, tokens - first);
        attention.prefill(q.middleRows(first, n), k.middleRows(first, n), v.middleRows(first, n), cache,
                          out.middleRows(first, n), w);
        const position_t query = first + n - 1;
        for (index_t head = 0; head < heads; ++head) {
          const seen_rows rows = read(cache, query, head, nullptr, nullptr);
          std::vector<position_t> visible;
          for (const position_span& span : policy.visible(query + 1))
            for (position_t p = span.first; p < span.last; ++p) visible.push_back(p);
          REQUIRE(rows.positions == visible);
          for (std::size_t i = 0; i < visible.size(); ++i) {
            const position_t p = visible[i];
            const bool pinned = p < 2, newest = query - p < recent;
            CAPTURE(query, p);
            REQUIRE(rows.formats[i] == (pinned ? "bf16/bf16 pinned" : newest ? "bf16/bf16" : "q8/q6"));
            const float *key = k.row(p).data() + head * dim, *value = v.row(p).data() + head * dim;
            if (pinned || newest) {
              REQUIRE(same(stored<bf16>(key, dim, &hadamard), rows.k_bytes[i]));
            } else {
              REQUIRE(same(plain_few(8, key, dim, recent > 0), rows.k_bytes[i]));
              REQUIRE(same(plain_few(6, value, dim, recent > 0), rows.v_bytes[i]));
            }
          }
        }
      }
      attention.prefill(q, k, v, floats, expected, w);
      CHECK((out - expected).cwiseAbs().maxCoeff() < 0.06f);
    }
  // What was taken back may come again as something else.
  effort::dice dice(24);
  cache_config config = small_config(1, 16, 0, 0, 5, 9);
  for (int round = 0; round < 20; ++round) {
    kv_cache<q4, q8, outside::bookmarks> cache(config, policy), straight(config, policy);
    matrix stream(400, 16);
    while (cache.seen() < 200) {
      if (dice.one_in(3)) {
        const position_t to = dice.from_to(std::max<position_t>(0, cache.seen() - 14), cache.seen());
        const bool possible = to >= cache.min_truncate();
        REQUIRE((cache.try_truncate(to).ok() || !possible));
      }
      const index_t n = dice.from_to(1, 12), seen = cache.seen();
      stream.middleRows(seen, n) = random_rows(dice.bits(), n, 16);
      cache.append(stream.middleRows(seen, n), stream.middleRows(seen, n));
    }
    straight.append(stream.topRows(cache.seen()), stream.topRows(cache.seen()));
    const auto copy = cache.clone();
    std::vector<float> of_cache, of_copy, of_straight, values;
    read(cache, cache.seen() - 1, 0, &of_cache, &values);
    read(copy, cache.seen() - 1, 0, &of_copy, &values);
    read(straight, cache.seen() - 1, 0, &of_straight, &values);
    CHECK(of_cache == of_straight);
    CHECK(of_copy == of_straight);
  }
  config.window = 3;
  CHECK(kv_cache<q4, q4, outside::bookmarks>::validate(config, policy).message() ==
        "sinkcache: window was 3, had to be 0: the policy that is given says what it keeps");
}

TEST_CASE("tiers: a NaN or an infinity reaches the outputs of those that see the token, and no others") {
  constexpr index_t dim = 64, tokens = 60;
  for (float x : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity})
    for (bool in_key : {true, false})
      for (bool prefill : {true, false}) {
        INFO(x << (in_key ? " in a key" : " in a value") << (prefill ? ", prefill" : ", decode"));
        matrix k = random_rows(10, tokens, dim), v = random_rows(11, tokens, dim);
        const matrix q = random_rows(12, tokens, dim);
        constexpr index_t bad = 7, window = 20;
        (in_key ? k : v)(bad, 5) = x;
        kv_cache<q4, q8> cache(small_config(1, dim, 2, window, 6, 63));
        const attention attention({.num_qo_heads = 1});
        workspace w;
        matrix out(tokens, dim);
        if (prefill)
          attention.prefill(q, k, v, cache, out, w);
        else
          for (index_t i = 0; i < tokens; ++i) {
            cache.append(k.row(i), v.row(i));
            attention.decode(q.row(i), cache, out.row(i), w);
          }
        for (index_t i = 0; i < tokens; ++i) {
          const bool sees = i >= bad && i - bad < window;
          for (index_t d = 0; d < dim; ++d) REQUIRE(std::isfinite(out(i, d)) == !sees);
        }
      }
}

TEST_CASE("tiers: what is asked of the resource is what is told") {
  effort::dice dice(13);
  for (int i = 0; i < 200; ++i) {
    cache_config config = small_config(dice.from_to(1, 4), dice.from_to(1, 576), dice.from_to(0, 8),
                                       dice.from_to(1, 300), dice.from_to(0, 90), dice.from_to(0, 70));
    config.v_head_dim = dice.from_to(1, 576);
    const int pair = static_cast<int>(dice.from_to(0, std::size(names) - 1));
    INFO(fmt::format("{} {}", config, names[pair]));
    const std::unique_ptr<open_tiers> cache = make(pair, config);
    CHECK(cache->memory->allocations == 1);
    CHECK(cache->memory->bytes == cache->get().nbytes());
    CHECK(cache->required() == cache->get().nbytes());
    const std::unique_ptr<open_tiers> copy = cache->clone();
    CHECK(copy->get().nbytes() == cache->get().nbytes());
  }
  // 4 + 8 + 1 rows of bf16 and 12 + 1 rows of q4, of 64, for keys and for values; each of the four in whole lines.
  const cache_config config = small_config(1, 64, 4, 20, 8, 1);
  CHECK(kv_cache<q4>::required_bytes(config) == 2 * (13 * 128 + (13 * 34 + 63) / 64 * 64));
  counting_resource none;
  none.exhausted = true;
  status found;
  CHECK(!kv_cache<q4>::try_create(config, found, &none));
  CHECK(found.message() == fmt::format("sinkcache: bytes of the cache was {}, had to be at most what the memory "
                                       "resource has",
                                       kv_cache<q4>::required_bytes(config)));
  cache_config wrong = config;
  wrong.recent = -1;
  CHECK(kv_cache<q4>::validate(wrong).message() == "sinkcache: recent was -1, had to be at least 0");
  CHECK(!kv_cache<q4>::try_create(config, found, nullptr));
  CHECK(found.message() == "sinkcache: resource was null, had to be a memory resource");
}

TEST_CASE("tiers: copies and moves") {
  const cache_config config = small_config(2, 80, 2, 30, 8, 4);
  const matrix rows = random_rows(14, 90, 160);
  kv_cache<q4, q2> cache(config);
  cache.append(rows, rows);
  kv_cache<q4, q2> copy = cache.clone();
  const auto keys_of = [](const kv_source& source) {
    std::vector<float> keys, values;
    read(source, source.seen() - 1, 1, &keys, &values);
    keys.insert(keys.end(), values.begin(), values.end());
    return keys;
  };
  CHECK(keys_of(cache) == keys_of(copy));
  cache.append(rows.topRows(3), rows.topRows(3));
  CHECK(keys_of(cache) != keys_of(copy));
  copy.append(rows.topRows(3), rows.topRows(3));
  CHECK(keys_of(cache) == keys_of(copy));
  kv_cache<q4, q2> moved = std::move(copy);
  CHECK(keys_of(cache) == keys_of(moved));
  CHECK(copy.nbytes() == 0);  // NOLINT(bugprone-use-after-move): what is left is stated
  CHECK(copy.seen() == 0);
  CHECK(copy.max_parts() == 0);
  CHECK(copy.try_append(rows, rows).message() ==
        "sinkcache: the cache was moved from, had to be one that holds memory");
  copy = std::move(moved);
  CHECK(keys_of(cache) == keys_of(copy));
  const cache_config back = copy.config();
  CHECK(back.recent == 8);
  CHECK(back.rollback == 4);
  CHECK(back.window == 30);
  CHECK(back.num_sink_tokens == 2);
  copy.clear();
  CHECK(copy.size() == 0);
}

TEST_CASE("tiers: a cache prints them") {
  kv_cache<q4> cache(small_config(2, 64, 4, 1020, 64, 63));
  const matrix rows = matrix::Zero(2000, 128);
  CHECK(fmt::format("{}", cache) == "kv_cache<q4>{empty, 0.2 MB}");
  cache.append(rows.topRows(60), rows.topRows(60));
  CHECK(fmt::format("{}", cache) == "kv_cache<q4>{tokens 0-59 bf16, 0.2 MB}");
  cache.append(rows.topRows(964), rows.topRows(964));
  CHECK(fmt::format("{}", cache) == "kv_cache<q4>{sinks 0-3 bf16 | 4-959 q4 | 960-1023 bf16, 0.2 MB}");
  cache.append(rows, rows);
  CHECK(fmt::format("{}", cache) == "kv_cache<q4>{sinks 0-3 bf16 | 2004-2959 q4 | 2960-3023 bf16, 0.2 MB}");
  kv_cache<q8, q4> two(small_config(1, 64, 0, 30, 0, 0));
  two.append(rows.topRows(9).leftCols(64), rows.topRows(9).leftCols(64));
  CHECK(fmt::format("{}", two) == "kv_cache<q8, q4>{tokens 0-8, 0.0 MB}");
  kv_cache<q8, q4> three(small_config(1, 64, 0, 30, 2, 0));
  three.append(rows.topRows(9).leftCols(64), rows.topRows(9).leftCols(64));
  CHECK(fmt::format("{}", three) == "kv_cache<q8, q4>{tokens 0-6 q8 and q4 | 7-8 bf16, 0.0 MB}");
}

TEST_CASE("tiers: sources that were transformed join with those that were alike, others are refused") {
  const cache_config config = small_config(1, 64, 0, 40, 8, 5);
  const matrix front = random_rows(15, 20, 64), rows = random_rows(16, 60, 64), q = random_rows(17, 1, 64);
  kv_cache<q8> cache(config);
  cache.append(rows, rows);
  const static_tokens<transformed<bf16>> tokens(config, front, front);
  const static_tokens<q4> of_few_bits(config, front, front);
  const static_tokens<bf16> untransformed(config, front, front);
  const attention attention({.num_qo_heads = 1});
  workspace w;
  const auto attend = [&](const kv_source& source) {
    matrix out(1, 64);
    attention.decode(q, source, out, w);
    return out;
  };
  const kv_source* const refused[] = {&untransformed, &cache};
  CHECK(joined_source::validate(refused).message() ==
        "sinkcache: a source's row transform was another, had to be that of the last");
  kv_cache<f32> plain(small_config(1, 64, 0, 40, 8, 5));
  plain.append(rows, rows);
  const static_tokens<f32> plain_tokens(config, front, front);
  const matrix expected = attend(joined_source{&plain_tokens, &plain});
  CHECK((attend(joined_source{&tokens, &cache}) - expected).cwiseAbs().maxCoeff() < 0.02);
  CHECK((attend(joined_source{&of_few_bits, &cache}) - expected).cwiseAbs().maxCoeff() < 0.2);
  // A prefix, whose newest tokens stay spared.
  kv_cache<q8> prefix(small_config(1, 64, 0, 1000, 8, 5));
  prefix.append(front, front);
  cache_config behind = config;
  behind.first_position = 20;
  kv_cache<q8> own(behind);
  own.append(rows, rows);
  kv_cache<f32> plain_prefix(small_config(1, 64, 0, 1000, 8, 5)), plain_own(behind);
  plain_prefix.append(front, front);
  plain_own.append(rows, rows);
  const matrix forked = attend(joined_source{&plain_prefix, &plain_own});
  CHECK((attend(joined_source{&prefix, &own}) - forked).cwiseAbs().maxCoeff() < 0.02);
}

TEST_CASE("tiers: formats chosen at run time") {
  with_formats("q8", "q4", []<tiered_format K, tiered_format V>(K, V) {
    const kv_cache<K, V> cache(small_config(1, 16, 0, 4, 2, 0));
    CHECK(cache.kind().k_format == "q8");
    CHECK(cache.kind().v_format == "q4");
  });
}

}  // namespace
}  // namespace proof
