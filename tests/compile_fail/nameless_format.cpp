// A format can only be chosen by its name if it has one.
// expect: named_format

#include <sinkcache/with_formats.hpp>

struct nameless {
  static constexpr sinkcache::index_t block_rows = 1;
  static constexpr sinkcache::index_t block_bytes(sinkcache::index_t dim) { return (dim + 15) / 16 * 64; }
  static void encode(const float*, sinkcache::index_t, std::byte*) noexcept {}
  static void decode(const std::byte*, sinkcache::index_t, sinkcache::index_t, float*) noexcept {}
};
static_assert(sinkcache::kv_format<nameless>);

void choose() {
  sinkcache::with_formats<nameless>("f16", "nameless", [](auto, auto) {});
}
