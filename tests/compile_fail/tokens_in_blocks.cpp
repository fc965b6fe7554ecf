// A format that keeps four tokens in a block.
// expect: a format whose block_rows is above 1 has to wait for tiers

#include <sinkcache/kv_cache.hpp>

struct four_tokens {
  static constexpr sinkcache::index_t block_rows = 4;
  static constexpr sinkcache::index_t block_bytes(sinkcache::index_t dim) { return (dim + 15) / 16 * 64; }
  static void encode(const float*, sinkcache::index_t, std::byte*) noexcept {}
  static void decode(const std::byte*, sinkcache::index_t, sinkcache::index_t, float*) noexcept {}
};
static_assert(sinkcache::kv_format<four_tokens>);

sinkcache::kv_cache<sinkcache::f32, four_tokens> cache({});
