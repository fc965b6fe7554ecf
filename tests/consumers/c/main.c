#include <sinkcache/sinkcache.h>

int main(void) {
  const sinkcache_rope rope = {.size = sizeof rope, .theta = 10000};
  const sinkcache_cache_config config = {
      .size = sizeof config, .k_format = "f16", .num_kv_heads = 1, .head_dim = 8, .window = 5, .rope = &rope};
  sinkcache_cache* cache = NULL;
  const float row[8] = {1};
  const sinkcache_input in = {row, 8, 0};
  if (sinkcache_c_version() != SINKCACHE_C_VERSION) return 1;
  if (sinkcache_cache_create(&config, &cache, NULL) != SINKCACHE_OK) return 2;
  if (sinkcache_append(cache, 1, in, in, NULL) != SINKCACHE_OK || sinkcache_size(cache) != 1) return 3;
  sinkcache_cache_destroy(cache);
  return 0;
}
