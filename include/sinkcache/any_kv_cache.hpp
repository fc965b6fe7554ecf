#pragma once

// What every cache is, whatever its formats and policy: a source that grows, and the calls that an engine makes on it.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <optional>
#include <string_view>
#include <utility>

#include "cache_config.hpp"
#include "detail/macros_off.hpp"
#include "matrix.hpp"
#include "source.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

namespace detail {

// What erase asks of its range.
inline void require_range(status& found, position_t first, position_t last, position_t seen) noexcept {
  found.require(first >= 0 && first <= last, "first", first, "from 0 to last,", last);
  found.require(last <= seen, "last", last, "at most what was seen,", seen);
}

// Rotates keys that come raw to their true positions, or those that come rotated back, where they are stored so; and
// queries that are remembered so.
class key_rotation {
 public:
  explicit key_rotation(const kv_geometry& of, bool stores_rotated = true) noexcept
      : rope_(of.rotates() && (of.inputs == inputs::raw) == stores_rotated ? &*of.rope : nullptr),
        back_(!stores_rotated),
        dim_(of.head_dim),
        first_position_(of.first_position) {}

  void go_to(position_t position) noexcept {
    if (rope_ == nullptr) return;
    if (back_) return rope_->angles_at(-(first_position_ + position), false, angles_);
    rope_->angles_at(first_position_ + position, true, angles_);
  }
  // A key as it is, or rotated, in `to`.
  const float* operator()(const float* key, float* to) const noexcept {
    if (rope_ == nullptr) return key;
    rope_->rotate(angles_, key, dim_, to);
    if (back_) [[unlikely]]
      for (index_t i = 0; i < rope_->width(); ++i) to[i] /= rope_->attention_factor();
    return to;
  }

 private:
  const rope* rope_;
  bool back_;  // to what it was before rope
  index_t dim_;
  position_t first_position_;
  rope::angles angles_;
};

// Adds `part` for each run of neighbouring rows of a span, of which positions below `pinned` take sink_bias.
template <class Place>
void push_runs(kv_part part, const position_span& span, position_t pinned, part_list& parts,
               const Place& place) noexcept {
  for (position_t p = span.first, end; p < span.last; p = end) {
    const placed at = place(p);
    end = std::min<position_t>(span.last, p + at.following + 1);
    part.row = at.slot;
    part.rows = static_cast<index_t>(end - p);
    part.first = p;
    part.pinned = static_cast<index_t>(std::clamp<position_t>(pinned - p, 0, end - p));
    parts.push_back(part);
  }
}

// A row as it is, or transformed, in `to`.
inline const float* transformed_row(const row_transform* transform, const float* row, index_t dim, float* to) noexcept {
  if (transform == nullptr) return row;
  std::copy_n(row, dim, to);
  transform->apply(to, dim);
  return to;
}

}  // namespace detail

// The names of a cache's formats, for messages.
struct cache_kind {
  std::string_view k_format, v_format;
};

// A cache of whatever formats and policy. A call that is refused changes nothing. One that was moved from holds no
// tokens and no memory, takes none, and can be assigned to.
//
// append, and attention's prefill, are loops over four functions, which an engine may write itself:
//   for (index_t i = 0; i < tokens; i += n) {
//     cache.prepare();
//     n = std::min(tokens - i, cache.room());
//     cache.write(0, num_kv_heads, k, v, i, n);
//     cache.advance(n);
//     attention.attend(q.middleRows(i, n), cache, out.middleRows(i, n), workspace);
//   }
class any_kv_cache : public kv_source {
 public:
  virtual ~any_kv_cache() = default;

  virtual std::size_t nbytes() const noexcept = 0;  // memory held, above 0 unless it was moved from
  virtual cache_kind kind() const noexcept = 0;

  // Makes room: evicts where that is due at this place of the stream, before tokens are written and never in between.
  virtual void prepare() noexcept {}

  // How many tokens, 1 or more, may be written now so that each still sees all that it would see in decode.
  virtual index_t room() const noexcept = 0;

  // Stores rows [first_row, first_row + n) of k and v, for some KV heads, as the next n tokens. Calls for other heads
  // may run at the same time. They are seen after advance(n). Shapes are as in append, and not checked.
  virtual void write(index_t first_kv_head, index_t num_kv_heads, const_matrix_view k, const_matrix_view v,
                     index_t first_row, index_t n) noexcept = 0;
  virtual void advance(index_t n) noexcept = 0;

  // The reader that learns what queries give tokens, for policies that evict by it; null: none. Attention tells it when
  // it is handed a cache that is not const.
  virtual weight_reader* learner() noexcept { return nullptr; }

  // Appends tokens: k [tokens, num_kv_heads * head_dim], v [tokens, num_kv_heads * v_head_dim].
  void append(const_matrix_view k, const_matrix_view v) { try_append(k, v).or_fail(); }
  status try_append(const_matrix_view k, const_matrix_view v) noexcept {
    status found;
    require_tokens(found, k.rows(), k, v);
    require_learned(found, k.rows());
    if (!found) return found;
    for (index_t row = 0, n; row < k.rows(); row += n) {
      n = next_block(k.rows() - row);
      write(0, geometry_.num_kv_heads, k, v, row, n);
      advance(n);
    }
    return found;
  }

  // Prepares for as many of the `left` tokens as there is room for; returns how many.
  index_t next_block(index_t left) noexcept {
    prepare();
    const index_t n = std::min(left, room());
    if (n < 1) detail::broken_source("a cache's room() is below 1");
    return n;
  }

  // Takes back tokens until `seen` are left, as long as none that becomes visible again was overwritten.
  void truncate(position_t seen) { try_truncate(seen).or_fail(); }
  virtual status try_truncate(position_t seen) noexcept = 0;

  // Adds to `found` why truncate would be refused.
  virtual void require_truncate(status& found, position_t seen) const noexcept {
    found.require(seen >= 0 && seen <= seen_, "seen", seen, "from 0 to what was seen,", seen_);
    if (found && seen < min_truncate()) refuse_overwritten(found, seen);
  }

  // truncate takes any count from this one on. (It also takes those that leave pinned tokens alone.)
  position_t min_truncate() const noexcept override = 0;

  // Drops the tokens at positions [first, last), counted from the start of the stream, pinned ones too: old frames,
  // finished thinking. From now on queries see what is before and after them, under in_cache as neighbours, under
  // absolute at its true distance. Nothing moves and nothing is rotated: a window goes on counting positions, so
  // dropped tokens keep their place in it until it has passed them. truncate takes tokens back as before; what was
  // dropped before `seen` stays dropped. kv_cache serves this in any format. Each range takes 16 bytes besides
  // nbytes(). Those that a window has passed are forgotten by the next erase, so there is at most one for every two
  // rows; with a user-defined policy none is forgotten.
  void erase(position_t first, position_t last) { try_erase(first, last).or_fail(); }
  virtual status try_erase(position_t first, position_t last) noexcept {
    status found;
    require_erase(found, first, last);
    return found;
  }

  // Adds to `found` why erase would be refused.
  virtual void require_erase(status& found, position_t /*first*/, position_t /*last*/) const noexcept {
    found.refuse("this cache cannot drop a range, had to be a kv_cache: clear it and append the tokens that stay");
  }

  // Forgets all tokens.
  virtual void clear() noexcept = 0;

  // A copy that goes on by itself, in memory from the same resource. A cache of your own is refused unless it overrides
  // this.
  std::unique_ptr<any_kv_cache> clone_any() const {
    status found;
    std::unique_ptr<any_kv_cache> copy = try_clone_any(found);
    found.or_fail();
    return copy;
  }
  // The same; or null, and in `found` why.
  virtual std::unique_ptr<any_kv_cache> try_clone_any(status& found) const noexcept {
    found = status();
    found.refuse("the cache has no try_clone_any, had to be one that can be copied");
    return nullptr;
  }

  // Keeps the token at a position for ever, one that comes later too. `pinned`: false where a head has evicted it.
  // Refused by caches that pin their first tokens alone: all but scored_kv_cache.
  virtual status try_pin(position_t position, bool& pinned) noexcept {
    status found;
    pinned = false;
    found.refuse("position was {}, had to be none: this cache pins its first num_sink_tokens alone", position);
    return found;
  }

  // Adds to `found` why this many tokens cannot be appended before their queries are seen: a cache that evicts by what
  // queries give tokens has to have learned from all of them before it does.
  virtual void require_learned(status& /*found*/, index_t /*tokens*/) const noexcept {}

  void require_memory(status& found) const noexcept override {
    found.require(nbytes() > 0, "the cache", "moved from", "one that holds memory");
  }

  // Adds to `found` why k and v cannot be appended as so many tokens.
  void require_tokens(status& found, index_t tokens, const_matrix_view k, const_matrix_view v) const noexcept {
    require_memory(found);
    detail::require_shape(found, "k", k, tokens, geometry_.num_kv_heads * geometry_.head_dim);
    detail::require_shape(found, "v", v, tokens, geometry_.num_kv_heads * geometry_.v_head_dim);
    found.require(tokens >= 0, "k.rows()", tokens, "at least 0");
    found.require(tokens <= max_position - seen_, "tokens seen and appended",
                  static_cast<std::uint64_t>(tokens) + static_cast<std::uint64_t>(seen_), "at most", max_position);
  }

 protected:
  explicit any_kv_cache(const kv_geometry& geometry) noexcept : kv_source(geometry) {}
  any_kv_cache(any_kv_cache&&) noexcept = default;
  any_kv_cache& operator=(any_kv_cache&&) noexcept = default;

  void refuse_overwritten(status& found, position_t seen) const noexcept {
    found.refuse("seen was {}, had to be at least {}: older tokens are overwritten", seen, min_truncate());
  }
};

namespace detail {

// For the small memory that objects and names take.
inline void refuse_exhausted(status& found) noexcept { found.refuse_memory("memory was exhausted, had to be there"); }

// Moves what a try_ function made to the heap; null where it made nothing, or there is no memory.
template <class Cache>
std::unique_ptr<any_kv_cache> on_heap(std::optional<Cache>&& made, status& found) noexcept {
  if (!made) return nullptr;
  std::unique_ptr<any_kv_cache> cache(new (std::nothrow) Cache(std::move(*made)));
  if (cache == nullptr) refuse_exhausted(found);
  return cache;
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
