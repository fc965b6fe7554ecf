#pragma once

// The caches of one sequence: one for each layer of a model.

#include <memory>
#include <utility>
#include <vector>

#include "any_kv_cache.hpp"
#include "detail/macros_off.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

// Owns a cache a layer, each with shape, window and formats of its own. A layer's tokens are appended by its own
// attention, layer after layer; what concerns the sequence is asked here. As safe for threads as its caches: const
// calls may run concurrently, and so may calls for different layers.
class layer_caches {
 public:
  layer_caches() = default;  // of no layers
  explicit layer_caches(std::vector<std::unique_ptr<any_kv_cache>> caches) : caches_(std::move(caches)) {
    for (const std::unique_ptr<any_kv_cache>& cache : caches_)
      detail::check(cache != nullptr, "a layer's cache", "null", "a cache");
  }

  index_t size() const noexcept { return static_cast<index_t>(caches_.size()); }
  any_kv_cache& operator[](index_t layer) { return *caches_[static_cast<std::size_t>(layer)]; }
  const any_kv_cache& operator[](index_t layer) const { return *caches_[static_cast<std::size_t>(layer)]; }

  // Bytes of all layers.
  std::size_t nbytes() const noexcept {
    std::size_t bytes = 0;
    for (const auto& cache : caches_) bytes += cache->nbytes();
    return bytes;
  }

  // Tokens that every layer has seen; while a forward pass runs, its first layers are ahead.
  position_t seen() const noexcept {
    position_t least = caches_.empty() ? 0 : max_position;
    for (const auto& cache : caches_) least = std::min(least, cache->seen());
    return least;
  }

  // Takes back tokens in all layers until `seen` are left, or in none: also the way out of a forward pass that failed
  // between layers.
  void truncate(position_t seen) { try_truncate(seen).or_fail(); }
  status try_truncate(position_t seen) noexcept {
    status found;
    for (const auto& cache : caches_) cache->require_truncate(found, seen);
    for (const auto& cache : caches_)
      if (found) found = cache->try_truncate(seen);
    return found;
  }
  // The smallest argument down to which truncate takes any.
  position_t min_truncate() const noexcept {
    position_t most = 0;
    for (const auto& cache : caches_) most = std::max(most, cache->min_truncate());
    return most;
  }

  // Drops tokens from the middle in all layers, or in none (any_kv_cache::erase).
  void erase(position_t first, position_t last) { try_erase(first, last).or_fail(); }
  status try_erase(position_t first, position_t last) noexcept {
    status found;
    for (const auto& cache : caches_) cache->require_erase(found, first, last);
    for (const auto& cache : caches_)
      if (found) found = cache->try_erase(first, last);
    return found;
  }

  void clear() noexcept {
    for (const auto& cache : caches_) cache->clear();
  }

  // A copy that goes on by itself. Throws where a cache of your own cannot be copied (any_kv_cache::try_clone_any), or
  // there is no memory.
  layer_caches clone() const {
    std::vector<std::unique_ptr<any_kv_cache>> copies;
    copies.reserve(caches_.size());
    for (const auto& cache : caches_) copies.push_back(cache->clone_any());
    return layer_caches(std::move(copies));
  }

 private:
  std::vector<std::unique_ptr<any_kv_cache>> caches_;
};

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
