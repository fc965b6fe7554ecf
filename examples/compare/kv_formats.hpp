#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

// What caches store keys and values in, by name.

#include <memory>
#include <sinkcache/eviction.hpp>
#include <sinkcache/kv_cache.hpp>
#include <sinkcache/quantized.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <span>
#include <string>

#include "../engine/kernels.hpp"

namespace compare {

using sinkcache::index_t;

struct kv_formats {
  std::string name;  // f32, or q8/q4: of keys and of values
  bool few_bits;     // pinned tokens and the newest cache_config::recent are stored in bf16
  std::unique_ptr<sinkcache::any_kv_cache> (*make)(const sinkcache::cache_config&);
  std::size_t (*bytes)(const sinkcache::cache_config&);
  // Of a row of so many elements.
  index_t (*k_bytes)(index_t);
  index_t (*v_bytes)(index_t);
  // The same for policies by score; null where that was not asked for.
  std::unique_ptr<sinkcache::any_kv_cache> (*make_scored)(const sinkcache::cache_config&, const sinkcache::eviction&,
                                                          std::shared_ptr<const sinkcache::token_scorer>) = nullptr;
  std::size_t (*scored_bytes)(const sinkcache::cache_config&, const sinkcache::eviction&,
                              const sinkcache::token_scorer&) = nullptr;

  // Of an element of a row, keys and values alike.
  double bits(index_t head_dim) const {
    return 4 * static_cast<double>(k_bytes(head_dim) + v_bytes(head_dim)) / static_cast<double>(head_dim);
  }
};

template <sinkcache::kv_format K, sinkcache::kv_format V>
kv_formats kv_formats_of(std::string name) {
  using sinkcache::cache_config, sinkcache::any_kv_cache;
  return {std::move(name),
          sinkcache::tiered_format<K> || sinkcache::tiered_format<V>,
          [](const cache_config& config) -> std::unique_ptr<any_kv_cache> {
            return std::make_unique<sinkcache::kv_cache<K, V>>(config);
          },
          [](const cache_config& config) { return sinkcache::kv_cache<K, V>::required_bytes(config); },
          &K::block_bytes,
          &V::block_bytes};
}

// For policies by score too.
template <sinkcache::kv_format K, sinkcache::kv_format V>
kv_formats scored_kv_formats_of(std::string name) {
  using sinkcache::cache_config, sinkcache::any_kv_cache;
  kv_formats all = kv_formats_of<K, V>(std::move(name));
  all.make_scored = [](const cache_config& config, const sinkcache::eviction& rules,
                       std::shared_ptr<const sinkcache::token_scorer> scorer) -> std::unique_ptr<any_kv_cache> {
    return std::make_unique<sinkcache::scored_kv_cache<K, V>>(config, rules, std::move(scorer));
  };
  all.scored_bytes = [](const cache_config& config, const sinkcache::eviction& rules,
                        const sinkcache::token_scorer& scorer) {
    return sinkcache::scored_kv_cache<K, V>::required_bytes(config, rules, scorer);
  };
  return all;
}

// All that can be had by name. Keys have as many bits as values, or more: they lose more by each that is missing, and
// every pair has to be compiled.
std::span<const kv_formats> all_kv_formats();

}  // namespace compare
