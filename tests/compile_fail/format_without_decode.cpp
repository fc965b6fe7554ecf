// A format of the user's own that lacks a function: the compiler names it.
// expect: kv_format
// expect: decode

#include <sinkcache/kv_cache.hpp>

struct write_only {
  static constexpr sinkcache::index_t block_rows = 1;
  static constexpr sinkcache::index_t block_bytes(sinkcache::index_t dim) { return (dim + 15) / 16 * 64; }
  static void encode(const float*, sinkcache::index_t, std::byte*) noexcept {}
};

sinkcache::kv_cache<write_only> cache({});
