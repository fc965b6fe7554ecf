// fmt.hpp in a program of its own, with whatever fmt is there.

#include <sinkcache/fmt.hpp>

#include <cstdio>

int main() {
  const sinkcache::kv_cache<sinkcache::f16> cache(
      {.num_kv_heads = 1, .head_dim = 8, .window = 3, .rope = sinkcache::rope::none()});
  sinkcache::status found;
  found.refuse("{} broke", "more");
  const auto text = fmt::format("{}, {}, {}", cache, found, cache.config());
  std::printf("fmt %d: %s\n", FMT_VERSION, text.c_str());
  return text.find("kv_cache<f16>{empty, 0.0 MB}, sinkcache: more broke, cache_config{") == 0 ? 0 : 1;
}
