#pragma once

// The caches of one sequence: one for each layer of a model.

#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "any_kv_cache.hpp"
#include "detail/macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Owns one cache per layer, each with its own shape, window and formats. A layer's tokens are appended by its own
// attention, layer after layer; what concerns the sequence is asked here. As safe for threads as its caches: const
// calls may run concurrently, and so may calls for different layers. One that was moved from has no layers.
class layer_caches {
 public:
  layer_caches() = default;  // of no layers
  explicit layer_caches(std::vector<std::unique_ptr<any_kv_cache>> caches) : caches_(std::move(caches)) {
    validate(caches_).or_fail();
  }
  // The same, or nothing and in `found` why.
  static std::optional<layer_caches> try_create(std::vector<std::unique_ptr<any_kv_cache>> caches,
                                                status& found) noexcept {
    found = validate(caches);
    std::optional<layer_caches> result;
    if (found) result.emplace().caches_ = std::move(caches);
    return result;
  }
  static status validate(std::span<const std::unique_ptr<any_kv_cache>> caches) noexcept {
    status found;
    for (const auto& cache : caches) found.require(cache != nullptr, "a layer's cache", "null", "a cache");
    return found;
  }

  index_t size() const noexcept { return static_cast<index_t>(caches_.size()); }
  any_kv_cache& operator[](index_t layer) { return *caches_[checked(layer)]; }
  const any_kv_cache& operator[](index_t layer) const { return *caches_[checked(layer)]; }

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

  // Takes back tokens in all layers until `seen` are left, or in none: also after a forward pass that failed between
  // layers.
  void truncate(position_t seen) { try_truncate(seen).or_fail(); }
  status try_truncate(position_t seen) noexcept {
    status found;
    found.require(seen >= 0 && seen <= this->seen(), "seen", seen, "from 0 to what was seen,", this->seen());
    for (const auto& cache : caches_) cache->require_truncate(found, seen);
    for (const auto& cache : caches_)
      if (found) found = cache->try_truncate(seen);
    return found;
  }
  // truncate takes any count from this one on.
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
    detail::require_range(found, first, last, seen());
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
    status found;
    std::optional<layer_caches> copy = try_clone(found);
    found.or_fail();
    return std::move(*copy);
  }
  std::optional<layer_caches> try_clone(status& found) const noexcept {
    found = status();
    auto copies = detail::created(found, "copies of caches", [&] {
      std::vector<std::unique_ptr<any_kv_cache>> of_layers(caches_.size());
      return of_layers;
    });
    for (std::size_t i = 0; i < caches_.size() && found; ++i) (*copies)[i] = caches_[i]->try_clone_any(found);
    return found ? try_create(std::move(*copies), found) : std::nullopt;
  }

 private:
  std::size_t checked(index_t layer) const {
    detail::check(layer >= 0 && layer < size(), "layer", layer, "from 0 to below", size());
    return static_cast<std::size_t>(layer);
  }

  std::vector<std::unique_ptr<any_kv_cache>> caches_;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
