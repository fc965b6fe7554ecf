// Caches print what they hold.

#include <sinkcache/fmt.hpp>
#include <sinkcache/kv_cache.hpp>

#include <string>

#include "catch.hpp"

using namespace sinkcache;

namespace {

TEST_CASE("fmt: a cache prints the positions it holds, and its size") {
  kv_cache<bf16> cache(
      {.num_kv_heads = 8, .head_dim = 128, .num_sink_tokens = 4, .window = 1020, .rope = rope::none()});
  const auto append = [&](index_t tokens) {
    const matrix rows = matrix::Zero(tokens, 8 * 128);
    cache.append(rows, rows);
  };
  CHECK(fmt::format("{}", cache) == "kv_cache{empty, 4.2 MB}");
  append(1);
  CHECK(fmt::format("{}", cache) == "kv_cache{tokens 0-0, 4.2 MB}");
  append(1023);
  CHECK(fmt::format("{}", cache) == "kv_cache{tokens 0-1023, 4.2 MB}");
  append(976);
  CHECK(fmt::format("{}", cache) == "kv_cache{sinks 0-3 | window 980-1999, 4.2 MB}");
  const any_kv_cache& any = cache;
  CHECK(any.seen() == 2000);

  kv_cache<f32> window({.num_kv_heads = 1, .head_dim = 1, .window = 3, .rope = rope::none()});
  const matrix rows = matrix::Zero(10, 1);
  window.append(rows, rows);
  CHECK(fmt::format("[{}]", window) == "[kv_cache{tokens 7-9, 0.0 MB}]");
}

}  // namespace
