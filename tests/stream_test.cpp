// Ten million tokens through one small cache (a hundred thousand at SINKCACHE_TEST_EFFORT=0 and where assertions are
// on): what changes in its memory, byte by byte, and what comes out.

#include <fmt/format.h>

#include <sinkcache/sinkcache.hpp>

#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "random_case.hpp"

namespace proof {
namespace {

constexpr index_t dim = 8, sinks = 4, window = 16, rows = sinks + window, heads = 2;
constexpr std::size_t row_bytes = 64;

using row = std::array<float, dim>;

// The slots that a stream writes, one after the other: the first tokens once, then round and round.
index_t next_slot(index_t slot) { return slot + 1 < rows ? slot + 1 : sinks; }

TEST_CASE("stream: between two appends only the new token's rows change, and outputs stay exact") {
#if defined(NDEBUG)
  const position_t tokens = effort::cases(100) < 100 ? 100'000 : 10'000'000;
#else
  const position_t tokens = 100'000;
#endif
  cache_config config{.num_kv_heads = 1,
                      .head_dim = dim,
                      .num_sink_tokens = sinks,
                      .window = window,
                      .rope = rope::plain(dim, 10000.0),
                      .rollback = 0};
  oracle::layer layer;
  layer.num_qo_heads = heads;
  layer.head_dim = layer.v_head_dim = dim;
  layer.k_rotated = false;
  for (int i = 0; i < dim / 2; ++i)
    layer.inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / static_cast<double>(dim))));
  layer.sm_scale = 1 / std::sqrt(static_cast<double>(dim));
  layer.sink_logits = {0.5f, -1.f};

  open_memory memory;
  kv_cache<f32> cache(config, &memory);
  const attention attention({.num_qo_heads = heads, .softmax = softmax_variant::sink_logits(layer.sink_logits)});
  workspace workspace;
  const std::byte* const bytes = memory.bytes().data();
  const std::size_t size = memory.bytes().size();
  REQUIRE(size == 2 * rows * row_bytes);
  std::vector<std::byte> expected(bytes, bytes + size);

  effort::dice dice(17);
  std::array<row, rows> keys{}, values{};  // by slot, before they were rotated
  const auto draw = [&](float* to, index_t n) {
    for (index_t i = 0; i < n; i += 2) {
      const std::uint64_t bits = dice.bits();
      to[i] = static_cast<float>(static_cast<std::int32_t>(bits)) * 0x1p-30f;
      to[i + 1] = static_cast<float>(static_cast<std::int32_t>(bits >> 32)) * 0x1p-30f;
    }
  };

  std::array<float, heads * dim> q{}, out{};
  std::array<float, heads> lse{};
  int sampled = 0;
  position_t next_sample = 0;
  std::string wrong;
  index_t slot = 0;
  for (position_t p = 0; p < tokens && wrong.empty(); ++p, slot = next_slot(slot)) {
    const auto at = static_cast<std::size_t>(slot);
    draw(keys[at].data(), dim);
    draw(values[at].data(), dim);
    draw(q.data(), heads * dim);

    cache.append({keys[at].data(), 1, dim}, {values[at].data(), 1, dim});
    std::byte* const key = expected.data() + at * row_bytes;
    std::byte* const value = key + rows * row_bytes;
    if (std::memcmp(key, bytes + (key - expected.data()), row_bytes) == 0) wrong = "append left its row as it was";
    std::memcpy(key, bytes + (key - expected.data()), row_bytes);
    std::memset(value, 0, row_bytes);
    std::memcpy(value, values[at].data(), sizeof(row));
    if (std::memcmp(expected.data(), bytes, size) != 0) wrong = "append changed another row, or stored another value";
    if (cache.seen() != p + 1) wrong = "seen() is off";

    attention.decode({q.data(), 1, heads * dim}, cache, {out.data(), 1, heads * dim}, workspace, {.lse = lse});
    if (std::memcmp(expected.data(), bytes, size) != 0) wrong = "decode changed the cache";

    if (p == next_sample || p == tokens - 1) {
      // The visible tokens, oldest first, become a stream of their own: tokens count their places in the cache.
      const index_t n = cache.size();
      index_t from = p < rows ? 0 : next_slot(slot);
      matrix k(n, dim), v(n, dim);
      std::vector<oracle::position> visible;
      for (index_t i = 0; i < n; ++i) {
        const bool pinned = p >= rows && i < sinks;
        const auto source = static_cast<std::size_t>(pinned ? i : from);
        std::memcpy(k.row(i).data(), keys[source].data(), sizeof(row));
        std::memcpy(v.row(i).data(), values[source].data(), sizeof(row));
        visible.push_back(i);
        if (!pinned) from = next_slot(from);
      }
      if (n != std::min<position_t>(p + 1, rows)) wrong = "size() is off";
      const std::string far =
          far_from(oracle::attend(layer, q.data(), n - 1, visible, k.data(), v.data()), out.data(), lse.data());
      if (!far.empty()) wrong = far;
      ++sampled;
      // Every token while the window fills and first wraps; later, one in each thousandth part of the stream.
      next_sample = p < 3 * rows ? p + 1 : (p / (tokens / 1000) + 1) * (tokens / 1000) + dice.from_to(0, tokens / 2000);
    }
    if (!wrong.empty()) wrong += fmt::format(", token {}", p);
  }
  CHECK(wrong == "");
  CHECK(sampled >= 1000);
}

}  // namespace
}  // namespace proof
