// Caches print what they hold.

#include <sinkcache/fmt.hpp>
#include <sinkcache/kv_cache.hpp>

#include <algorithm>
#include <string>

#include "catch.hpp"

using namespace sinkcache;

namespace {

TEST_CASE("fmt: a cache prints the positions it holds, and its size") {
  kv_cache<bf16> cache(
      {.num_kv_heads = 8, .head_dim = 128, .num_sink_tokens = 4, .window = 1020, .rope = rope::none(), .rollback = 0});
  const auto append = [&](index_t tokens) {
    const matrix rows = matrix::Zero(tokens, 8 * 128);
    cache.append(rows, rows);
  };
  CHECK(fmt::format("{}", cache) == "kv_cache<bf16>{empty, 4.2 MB}");
  append(1);
  CHECK(fmt::format("{}", cache) == "kv_cache<bf16>{tokens 0-0, 4.2 MB}");
  append(1023);
  CHECK(fmt::format("{}", cache) == "kv_cache<bf16>{tokens 0-1023, 4.2 MB}");
  append(976);
  CHECK(fmt::format("{}", cache) == "kv_cache<bf16>{sinks 0-3 | window 980-1999, 4.2 MB}");
  const any_kv_cache& any = cache;
  CHECK(fmt::format("{}", any) == "kv_cache<bf16>{sinks 0-3 | window 980-1999, 4.2 MB}");

  kv_cache<f32> window({.num_kv_heads = 1, .head_dim = 1, .window = 3, .rope = rope::none()});
  const matrix rows = matrix::Zero(10, 1);
  window.append(rows, rows);
  CHECK(fmt::format("[{}]", window) == "[kv_cache<f32>{tokens 7-9, 0.0 MB}]");
}

// The first token, and the newest two.
struct first_and_newest {
  index_t capacity() const { return 3; }
  span_list visible(position_t seen) const {
    span_list spans;
    spans.push_back({0, std::min<position_t>(seen, 1)});
    spans.push_back({std::max<position_t>(1, seen - 2), seen});
    return spans;
  }
  placed place(position_t position) const { return {position == 0 ? 0 : static_cast<index_t>(1 + position % 2), 0}; }
};

struct nameless {
  static constexpr index_t block_rows = 1;
  static constexpr index_t block_bytes(index_t dim) { return f32::block_bytes(dim); }
  static void encode(const float* rows, index_t dim, std::byte* to) noexcept { f32::encode(rows, dim, to); }
  static void decode(const std::byte* from, index_t row, index_t dim, float* out) noexcept {
    f32::decode(from, row, dim, out);
  }
};

TEST_CASE("fmt: a cache prints its formats, and spans of a policy of one's own without names") {
  const cache_config config{.num_kv_heads = 1, .head_dim = 1, .num_sink_tokens = 2, .window = 3, .rope = rope::none()};
  const matrix rows = matrix::Zero(10, 1);
  kv_cache<f16, bf16> two(config);
  two.append(rows, rows);
  CHECK(fmt::format("{}", two) == "kv_cache<f16, bf16>{sinks 0-1 | window 7-9, 0.0 MB}");
  cache_config own_config = config;
  own_config.num_sink_tokens = own_config.window = 0;
  kv_cache<f32, nameless> own(config);
  CHECK(fmt::format("{}", own) == "kv_cache<f32, custom>{empty, 0.0 MB}");
  kv_cache<f32, f32, first_and_newest> policy(own_config, {});
  policy.append(rows.topRows(2), rows.topRows(2));
  CHECK(fmt::format("{}", policy) == "kv_cache<f32>{tokens 0-1, 0.0 MB}");
  policy.append(rows, rows);
  CHECK(fmt::format("{}", static_cast<const any_kv_cache&>(policy)) == "kv_cache<f32>{tokens 0-0 | 10-11, 0.0 MB}");
}

TEST_CASE("fmt: spans, statuses, configurations") {
  CHECK(fmt::format("{}", position_span{4, 10}) == "4-9");
  CHECK(fmt::format("{}", position_span{4, 4}) == "empty");
  CHECK(fmt::format("{}", span_list()) == "empty");
  CHECK(fmt::format("<{}>", sink_window{4, 8}.visible(100)) == "<0-3 | 92-99>");

  cache_config config{.num_kv_heads = 8, .head_dim = 64, .num_sink_tokens = 4, .window = 1020, .rope = rope::none()};
  CHECK(fmt::format("{}", validate(config)) == "ok");
  CHECK(fmt::format("{}", config) ==
        "cache_config{8 KV heads of 64, 4 sink tokens, window 1020, rollback 63, positions in_cache, "
        "inputs raw, rope of width 0}");
  config.v_head_dim = 32;
  config.positions = positions::absolute;
  config.inputs = inputs::rotated;
  config.rope.reset();
  config.first_position = 7;
  config.rollback = 3;
  CHECK(fmt::format("{}", config) ==
        "cache_config{8 KV heads of 64, values of 32, 4 sink tokens, window 1020, rollback 3, positions absolute, "
        "inputs rotated, first_position 7}");
  config.window = 0;
  CHECK(fmt::format("{}", validate(config)) ==
        "sinkcache: window was 0, had to be at least 1: of a layer without a window, as many tokens as its stream may "
        "have");
}

}  // namespace
