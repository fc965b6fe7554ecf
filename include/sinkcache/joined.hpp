#pragma once

// Sources made of sources: tokens that many sequences share, or tokens without positions, in front of a cache's own.

#include <algorithm>
#include <initializer_list>
#include <memory_resource>
#include <optional>
#include <span>
#include <vector>

#include "any_kv_cache.hpp"
#include "detail/macros_off.hpp"
#include "storage.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Keys with values that every query sees, wherever it stands: learned sink keys with values (openPangu), meta tokens,
// soft prompts. They have no positions: a query meets them without its rotary position, and they count nowhere, in no
// distance and no eviction. (Keys that were trained at position 0, and meet rotated queries, are pinned tokens of a
// kv_view.) Holds a copy, in formats K and V. In front of a few-bit cache they have to transform rows as its own
// formats do: transformed<bf16> or q8.
template <kv_format K, kv_format V = K>
class static_tokens final : public kv_source {
  static_assert(K::block_rows == 1 && V::block_rows == 1, "sinkcache: static_tokens stores tokens one by one");

 public:
  // k [tokens, num_kv_heads * head_dim], v [tokens, num_kv_heads * v_head_dim], neither rotated. Of the configuration
  // sizes, positions, inputs and rope are read, which have to be those of the cache that follows; rope has to be given,
  // because rotated queries are rotated back.
  static_tokens(const cache_config& config, const_matrix_view k, const_matrix_view v,
                std::pmr::memory_resource* resource = default_resource())
      : static_tokens(checked(config, k, v, resource), k, v, resource, 0) {
    status found;
    if (nbytes() == 0) detail::refuse_memory(found, bytes_of(found, config, k.rows()));
    found.or_fail();
  }
  // The same, or nothing and in `found` why.
  static std::optional<static_tokens> try_create(const cache_config& config, const_matrix_view k, const_matrix_view v,
                                                 status& found,
                                                 std::pmr::memory_resource* resource = default_resource()) noexcept {
    found = validate(config, k, v);
    detail::require_resource(found, resource);
    if (!found) return std::nullopt;
    return detail::made_cache(found, bytes_of(found, config, k.rows()),
                              [&] { return static_tokens(config, k, v, resource, 0); });
  }
  static_tokens(static_tokens&&) noexcept = default;
  static_tokens& operator=(static_tokens&&) noexcept = default;

  static status validate(const cache_config& config, const_matrix_view k, const_matrix_view v) noexcept {
    status found;
    const kv_geometry of = detail::geometry_of(config);
    detail::require_geometry(found, of);
    found.require(of.rope.has_value(), "rope", "absent",
                  "given, say .rope = rope::plain(head_dim, theta), or rope::none()");
    found.require(k.rows() >= 1, "k.rows()", k.rows(), "at least 1");
    const auto floats = [&](index_t dim) {
      return detail::checked_product(found, "floats of a token", of.num_kv_heads, dim);
    };
    detail::require_shape(found, "k", k, k.rows(), floats(of.head_dim));
    detail::require_shape(found, "v", v, k.rows(), floats(of.v_head_dim));
    if (found) bytes_of(found, config, k.rows());
    return found;
  }

  std::size_t nbytes() const noexcept { return rows_.nbytes(); }
  void require_memory(status& found) const noexcept override {
    found.require(nbytes() > 0, "static_tokens", "moved from", "tokens");
  }
  index_t capacity() const noexcept override { return nbytes() > 0 ? num_tokens_ : 0; }
  index_t num_visible(position_t) const noexcept override { return capacity(); }
  position_t min_truncate() const noexcept override { return 0; }
  index_t max_parts() const noexcept override { return 1; }

  plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept override {
    kv_part part;
    if (nbytes() > 0) {
      part.k = rows_.k_rows(kv_head);
      part.v = rows_.v_rows(kv_head);
      part.rows = num_tokens_;
      part.placeless = true;
    }
    parts.push_back(part);
    return {geometry_.num_kv_heads - kv_head, static_cast<index_t>(last - first + 1)};
  }

 private:
  static const cache_config& checked(const cache_config& config, const_matrix_view k, const_matrix_view v,
                                     const std::pmr::memory_resource* resource) {
    status found = validate(config, k, v);
    detail::require_resource(found, resource);
    found.or_fail();
    return config;
  }

  static std::size_t bytes_of(status& found, const cache_config& config, index_t tokens) noexcept {
    const kv_geometry of = detail::geometry_of(config);
    return detail::storage::required_bytes(found, detail::row_format_of<K>, detail::row_format_of<V>,
                                           {of.num_kv_heads, tokens, of.head_dim, of.v_head_dim});
  }

  // Without memory where the resource had none, and exceptions are off.
  static_tokens(const cache_config& config, const_matrix_view k, const_matrix_view v,
                std::pmr::memory_resource* resource, int)
      : kv_source(detail::geometry_of(config, detail::transform_of<K>(), detail::transform_of<V>())),
        num_tokens_(k.rows()),
        rows_(detail::row_format_of<K>, detail::row_format_of<V>,
              {geometry_.num_kv_heads, num_tokens_, geometry_.head_dim, geometry_.v_head_dim}, resource) {
    if (nbytes() == 0) return;
    const index_t dim = geometry_.head_dim, v_dim = geometry_.v_head_dim;
    for (index_t i = 0; i < num_tokens_; ++i)
      for (index_t head = 0; head < geometry_.num_kv_heads; ++head) {
        alignas(64) float k_row[max_head_dim], v_row[max_head_dim];
        rows_.encode(head, i, detail::transformed_row(geometry_.k_transform, k.row(i) + head * dim, dim, k_row),
                     detail::transformed_row(geometry_.v_transform, v.row(i) + head * v_dim, v_dim, v_row));
      }
  }

  index_t num_tokens_;
  detail::storage rows_;
};

// Several sources in a row, the last of which may grow: its tokens come after all tokens of those in front, which are
// seen for ever. This is how many sequences share one prefix. Each source counts its tokens from 0; first_position of
// one that follows others has to be where those end. The sources stay the caller's, outlive this, and those in front
// must not change while it is used.
class joined_source final : public kv_source {
 public:
  joined_source(std::initializer_list<const kv_source*> sources) : joined_source(std::vector(sources)) {}
  explicit joined_source(std::vector<const kv_source*> sources) : joined_source(std::move(sources), checked(sources)) {}
  static std::optional<joined_source> try_create(std::span<const kv_source* const> sources, status& found) noexcept {
    found = validate(sources);
    return detail::created(found, "a joined_source",
                           [&] { return joined_source(std::vector(sources.begin(), sources.end())); });
  }

  // Whether these can be joined.
  static status validate(std::span<const kv_source* const> sources) noexcept {
    status found;
    found.require(!sources.empty(), "sources", sources.size(), "at least 1");
    for (const kv_source* source : sources) found.require(source != nullptr, "a source", "null", "not null");
    if (!found) return found;
    const kv_geometry& last = sources.back()->geometry();
    position_t before = 0, from = -1;
    for (const kv_source* source : sources) {
      const kv_geometry& of = source->geometry();
      found.require(of.num_kv_heads == last.num_kv_heads, "a source's num_kv_heads", of.num_kv_heads,
                    "that of the last,", last.num_kv_heads);
      found.require(of.head_dim == last.head_dim, "a source's head_dim", of.head_dim, "that of the last,",
                    last.head_dim);
      found.require(of.v_head_dim == last.v_head_dim, "a source's v_head_dim", of.v_head_dim, "that of the last,",
                    last.v_head_dim);
      found.require(of.positions == last.positions, "a source's positions", "others", "those of the last");
      found.require(of.inputs == last.inputs, "a source's inputs", "others", "those of the last");
      found.require(of.rope == last.rope, "a source's rope", "another", "that of the last");
      found.require(of.k_transform == last.k_transform && of.v_transform == last.v_transform,
                    "a source's row transform", "another", "that of the last");
      if (source->seen() == 0 && source != sources.back()) continue;  // tokens without positions
      if (from < 0) from = of.first_position;
      found.require(of.first_position - from == before, "a source's first_position", of.first_position,
                    "where the sources before it end,", from + before);
      before += source->seen();
      found.require(before <= max_position, "tokens of all sources", before, "at most", max_position);
      if (!found) return found;
    }
    return found;
  }

  // One that was moved from has no tokens.
  position_t seen() const noexcept override { return sources_.empty() ? 0 : before_ + sources_.back()->seen(); }
  bool ends_with(const kv_source& cache) const noexcept override {
    return this == &cache || (!sources_.empty() && sources_.back()->ends_with(cache));
  }
  void require_memory(status& found) const noexcept override {
    found.require(!sources_.empty(), "a joined_source", "moved from", "one that has sources");
    for (const kv_source* source : sources_) source->require_memory(found);
    if (found)
      found.require(seen_in_front() == before_, "tokens of the sources in front", seen_in_front(),
                    "as when they were joined,", before_);
  }
  index_t capacity() const noexcept override {
    return sum([](const kv_source& s) { return s.capacity(); });
  }
  index_t num_visible(position_t query) const noexcept override {
    if (sources_.empty()) return 0;
    index_t n = sources_.back()->num_visible(detail::seen_by(query) - 1 - before_);
    for (const kv_source* s : front()) n += s->num_visible(s->seen() - 1);
    return n;
  }
  position_t min_truncate() const noexcept override {
    if (sources_.empty()) return 0;
    const position_t smallest = sources_.back()->min_truncate();
    return smallest == 0 ? before_ : before_ + smallest;
  }
  position_t oldest_query() const noexcept override {
    return sources_.empty() ? 0 : before_ + sources_.back()->oldest_query();
  }
  index_t max_parts() const noexcept override {
    return sum([](const kv_source& s) { return s.max_parts(); });
  }

  plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept override {
    plan_end end{geometry_.num_kv_heads - kv_head, static_cast<index_t>(last - first + 1)};
    if (sources_.empty()) return end;
    position_t before = 0;
    for (const kv_source* source : front()) {
      const index_t from = parts.size();
      const position_t newest = source->seen() - 1;
      end.kv_heads = std::min(end.kv_heads, source->plan(kv_head, newest, newest, parts).kv_heads);
      for (index_t i = from; i < parts.size(); ++i) parts[i].as_of = std::min(parts[i].as_of, newest);
      shift(parts, from, before);
      before += source->seen();
    }
    const index_t from = parts.size();
    const plan_end of_last = sources_.back()->plan(kv_head, first - before_, last - before_, parts);
    shift(parts, from, before_);
    return {std::min(end.kv_heads, of_last.kv_heads), std::min(end.queries, of_last.queries)};
  }

 private:
  joined_source(std::vector<const kv_source*>&& sources, const kv_geometry& geometry)
      : kv_source(geometry), sources_(std::move(sources)), before_(seen_in_front()) {}

  static kv_geometry checked(const std::vector<const kv_source*>& sources) {
    validate(sources).or_fail();
    kv_geometry geometry = sources.back()->geometry();
    for (const kv_source* source : sources)
      if (source->seen() > 0) {
        geometry.first_position = source->geometry().first_position;
        break;
      }
    return geometry;
  }

  std::span<const kv_source* const> front() const noexcept {
    return {sources_.data(), sources_.empty() ? 0 : sources_.size() - 1};
  }
  position_t seen_in_front() const noexcept {
    position_t n = 0;
    for (const kv_source* source : front()) n += std::min(source->seen(), max_position - n);
    return n;
  }
  template <class F>
  index_t sum(const F& f) const noexcept {
    index_t n = 0;
    for (const kv_source* source : sources_) n += f(*source);
    return n;
  }

  static void shift(part_list& parts, index_t from, position_t by) noexcept {
    for (index_t i = from; i < parts.size(); ++i) {
      if (parts[i].placeless) continue;
      parts[i].first += by;
      parts[i].last += by;
      parts[i].at_offset += by;
      if (parts[i].as_of != kv_part::always) parts[i].as_of += by;
    }
  }

  std::vector<const kv_source*> sources_;
  position_t before_;  // that were seen in front
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
