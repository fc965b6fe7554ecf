#pragma once

// Attention over keys and values in an engine's own memory, read where they lie: attention takes a view wherever it
// takes a cache to read. docs/integrating.md has each host's layout.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include "any_kv_cache.hpp"
#include "detail/macros_off.hpp"
#include "detail/reader.hpp"
#include "format.hpp"
#include "kv_memory.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Keys in format K and values in format V, already rotated at their true positions. A query sees of what the memory
// holds the first num_sink_tokens and the newest `window`; a window of 0 is none: all that is held. Between spans of
// positions that the memory does not hold, in_cache closes the gap as after evicted tokens. A view is cheap to make,
// cheaper to assign again, and allocates nothing. One that was moved from is one without tokens.
template <viewed_format K, viewed_format V = K>
class kv_view final : public kv_source {
  static_assert(K::block_rows == 1 && V::block_rows == 1,
                "sinkcache: kv_view reads element by element; a format whose block_rows is above 1 has no elements");

 public:
  // Holds no tokens until it is assigned some.
  kv_view(const cache_config& config, const kv_layout& layout) : kv_view(checked(config, layout), layout) {}
  kv_view(const cache_config& config, const kv_layout& layout, const kv_memory& memory, position_t seen)
      : kv_view(config, layout) {
    assign(memory, seen);
  }
  kv_view(kv_view&&) noexcept = default;
  kv_view& operator=(kv_view&&) noexcept = default;

  // Whether a view can have these. inputs::raw and rope are about queries only; rollback is not read, the engine knows
  // what it holds.
  static status validate(const cache_config& config, const kv_layout& layout) noexcept {
    status found;
    found.require(config.num_sink_tokens >= 0, "num_sink_tokens", config.num_sink_tokens, "at least 0");
    found.require(config.num_sink_tokens < max_position, "num_sink_tokens", config.num_sink_tokens, "below",
                  max_position);
    found.require(config.window >= 0, "window", config.window, "at least 0");
    detail::require_geometry(found, detail::geometry_of(config));
    const kv_geometry of = detail::geometry_of(config);
    require_strides<K>(found, "k", layout.k, of.head_dim);
    require_strides<V>(found, "v", layout.v, of.v_head_dim);
    return found;
  }

  // The view, or nothing and in `found` why.
  static std::optional<kv_view> try_create(const cache_config& config, const kv_layout& layout,
                                           status& found) noexcept {
    found = validate(config, layout);
    std::optional<kv_view> result;
    if (found) result = kv_view(&config, layout);
    return result;
  }
  static std::optional<kv_view> try_create(const cache_config& config, const kv_layout& layout, const kv_memory& memory,
                                           position_t seen, status& found) noexcept {
    std::optional<kv_view> result = try_create(config, layout, found);
    if (result) found = result->try_assign(memory, seen);
    if (!found) result.reset();
    return result;
  }

  // From now on the view reads this memory, for a stream of which `seen` tokens are known, the newest query's included.
  // Memory may reach beyond them, and may lack any, the newest too (a shared prefix, one rank's share of the tokens).
  // Checks pieces and tables once; they have to stay where they are as long as the view reads them.
  void assign(const kv_memory& memory, position_t seen) { try_assign(memory, seen).or_fail(); }
  status try_assign(const kv_memory& memory, position_t seen) noexcept {
    status found;
    if (memory.paged_)
      require_pages(found, memory.pages_);
    else
      require_pieces(found, memory.pieces());
    require_seen(found, seen);
    if (!found) return found;
    memory_ = memory;
    seen_ = seen;
    return found;
  }

  // The same memory after more tokens, or fewer.
  void set_seen(position_t seen) { try_set_seen(seen).or_fail(); }
  status try_set_seen(position_t seen) noexcept {
    status found;
    require_seen(found, seen);
    if (found) seen_ = seen;
    return found;
  }

  index_t capacity() const noexcept override {
    index_t held = 0, sinks = 0;
    for_each_held([&](position_span span) {
      held += span.size();
      sinks += std::clamp<position_t>(num_sink_tokens_ - span.first, 0, span.size());
    });
    return window_ < held - sinks ? sinks + static_cast<index_t>(window_) : held;
  }

  index_t num_visible(position_t query) const noexcept override {
    index_t n = 0;
    for_each_held([&](position_span span) {
      for (const position_span& seen : sink_window{num_sink_tokens_, window_}.visible(detail::seen_by(query)))
        n += std::max<position_t>(0, std::min(span.last, seen.last) - std::max(span.first, seen.first));
    });
    return n;
  }

  // Tokens that have left the window since then must still be in memory; positions that were never held impose no
  // limit.
  position_t min_truncate() const noexcept override {
    const position_t left = seen_ - window_;  // these and those before them are seen no longer
    if (left <= num_sink_tokens_) return 0;
    position_t kept_from = left, begin = 0, end = -1;  // begin, end: neighbouring pieces
    for_each_held([&](position_span held) {
      if (held.first != end) begin = held.first;
      end = held.last;
      if (begin < left && left <= end && kept_from == left) kept_from = begin;
    });
    return kept_from <= num_sink_tokens_ ? 0 : kept_from + window_;
  }

  // What it was made from.
  cache_config config() const {
    const kv_geometry& of = geometry_;
    return {.num_kv_heads = of.num_kv_heads,
            .head_dim = of.head_dim,
            .v_head_dim = of.v_head_dim,
            .num_sink_tokens = num_sink_tokens_,
            .window = window_ == max_position ? 0 : static_cast<index_t>(window_),
            .positions = of.positions,
            .inputs = of.inputs,
            .rope = of.rope,
            .first_position = of.first_position};
  }

  // One for each piece, or for all pages; one more where the pinned tokens end.
  index_t max_parts() const noexcept override {
    return memory_.paged_ ? 2 : static_cast<index_t>(memory_.pieces().size()) + 1;
  }

  plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept override {
    plan_end end{geometry_.num_kv_heads - kv_head, static_cast<index_t>(last - first + 1)};
    const position_t pinned = num_sink_tokens_, from = first + 1 - window_;
    const bool sees_all = from <= pinned;  // then the plan is for those that do
    if (sees_all) end.queries = static_cast<index_t>(std::min<position_t>(end.queries - 1, pinned - from)) + 1;
    const position_t until = first + end.queries;
    const auto push = [&](kv_part part, position_span held, position_span seen, position_t seen_until) {
      const position_t begin = std::max(held.first, seen.first), stop = std::min(held.last, seen.last);
      part.row = static_cast<index_t>(begin - held.first);
      part.rows = static_cast<index_t>(stop - begin);
      part.first = begin;
      part.seen_until = seen_until;
      part.pinned =
          static_cast<index_t>(std::clamp<position_t>(pinned - begin, 0, std::max<position_t>(0, stop - begin)));
      parts.push_back(part);
    };
    const auto push_seen = [&](const kv_part& part, position_span held) {
      if (sees_all) return push(part, held, {0, until}, kv_part::always);
      push(part, held, {0, pinned}, kv_part::always);
      push(part, held, {from, until}, window_);
    };
    kv_part part;
    part.k = rows_of<K>(k_, memory_.pages_.k, memory_.pages_.k_page, kv_head);
    part.v = rows_of<V>(v_, memory_.pages_.v, memory_.pages_.v_page, kv_head);
    if (memory_.paged_) {
      const kv_pages& pages = memory_.pages_;
      part.pages = pages.table;
      part.page_rows = pages.page_tokens;
      push_seen(part, {pages.first, pages.first + num_paged()});
    } else {
      for (const kv_piece& piece : memory_.pieces()) {
        part.k.base = of_head(piece.k, k_, kv_head);
        part.v.base = of_head(piece.v, v_, kv_head);
        push_seen(part, {piece.first, piece.first + piece.tokens});
      }
    }
    return end;
  }

 private:
  // Of arguments that were checked.
  kv_view(const cache_config* config, const kv_layout& layout) noexcept
      : kv_source(detail::geometry_of(*config)),
        num_sink_tokens_(config->num_sink_tokens),
        window_(config->window == 0 ? max_position : std::min<position_t>(config->window, max_position)),
        k_(in_bytes<K>(layout.k)),
        v_(in_bytes<V>(layout.v)) {}

  static const cache_config* checked(const cache_config& config, const kv_layout& layout) {
    validate(config, layout).or_fail();
    return &config;
  }

  // Bytes of so many elements. A row of units has no stride from element to element: its format knows.
  template <viewed_format F>
  static constexpr index_t bytes_of(index_t elements) noexcept {
    return elements / detail::stride_of<F>::elements * detail::stride_of<F>::bytes;
  }
  template <viewed_format F>
  static kv_strides in_bytes(const kv_strides& s) noexcept {
    return {bytes_of<F>(s.head), bytes_of<F>(s.token), elementwise_format<F> ? bytes_of<F>(s.dim) : 0};
  }

  static const std::byte* of_head(const void* memory, const kv_strides& strides, index_t kv_head) noexcept {
    return memory == nullptr ? nullptr : static_cast<const std::byte*>(memory) + kv_head * strides.head;
  }
  template <viewed_format F>
  static kv_rows rows_of(const kv_strides& strides, const void* memory, index_t page, index_t kv_head) noexcept {
    return {.reader = &reader_of<F>,
            .base = of_head(memory, strides, kv_head),
            .block = strides.token,
            .step = strides.dim,
            .head = strides.head,
            .page = bytes_of<F>(page)};
  }

  index_t num_paged() const noexcept {
    return memory_.pages_.page_tokens * static_cast<index_t>(memory_.pages_.table.size());
  }

  // Calls f with the positions of each piece, or of all pages.
  template <class F>
  void for_each_held(const F& f) const noexcept {
    if (memory_.paged_) {
      if (num_paged() > 0) f(position_span{memory_.pages_.first, memory_.pages_.first + num_paged()});
      return;
    }
    for (const kv_piece& piece : memory_.pieces())
      if (piece.tokens > 0) f(position_span{piece.first, piece.first + piece.tokens});
  }

  // One rule each for what is given.

  template <viewed_format F>
  static void require_strides(status& found, const char* of, const kv_strides& s, index_t dim) noexcept {
    constexpr index_t unit = detail::stride_of<F>::elements, unit_bytes = detail::stride_of<F>::bytes;
    if (s.head < 0) found.refuse("layout.{}.head was {}, had to be at least 0", of, s.head);
    if (s.token < 1) found.refuse("layout.{}.token was {}, had to be at least 1", of, s.token);
    if (s.dim < 1) found.refuse("layout.{}.dim was {}, had to be at least 1", of, s.dim);
    if constexpr (unit > 1) {
      if (s.dim != 1) found.refuse("layout.{}.dim was {}, had to be 1: this format has units of elements", of, s.dim);
      for (const index_t elements : {s.head, s.token, dim})
        if (elements % unit != 0)
          found.refuse("a stride of layout.{}, or its head_dim, was {}, had to be a multiple of {}", of, elements,
                       unit);
    }
    for (const index_t stride : {s.head, s.token, s.dim})
      detail::checked_product(found, "bytes of a stride", stride, unit_bytes);
  }

  static void require_seen(status& found, position_t seen) noexcept {
    found.require(seen >= 0 && seen <= max_position, "seen", seen, "from 0 to", max_position);
  }

  // Bytes from the first element to the last, of all heads of this many tokens; sizes must not overflow.
  static index_t reach(status& found, const kv_strides& bytes, index_t heads, index_t tokens, index_t dim) noexcept {
    constexpr const char* what = "bytes that a layout reaches over";
    const index_t rows =
        detail::checked_sum(found, what, detail::checked_product(found, what, heads - 1, bytes.head),
                            detail::checked_product(found, what, dim, std::max<index_t>(bytes.dim, 1)));
    return detail::checked_sum(found, what, rows, detail::checked_product(found, what, tokens, bytes.token));
  }

  void require_reach(status& found, index_t tokens, index_t k_before = 0, index_t v_before = 0) const noexcept {
    const index_t k = reach(found, k_, geometry_.num_kv_heads, tokens, geometry_.head_dim);
    const index_t v = reach(found, v_, geometry_.num_kv_heads, tokens, geometry_.v_head_dim);
    detail::checked_sum(found, "bytes that a layout reaches over", k, k_before);
    detail::checked_sum(found, "bytes that a layout reaches over", v, v_before);
  }

  static void require_memory(status& found, const void* k, const void* v) noexcept {
    found.require(k != nullptr, "k", "null", "where keys lie");
    found.require(v != nullptr, "v", "null", "where values lie");
  }

  void require_pieces(status& found, std::span<const kv_piece> pieces) const noexcept {
    position_t end = 0;
    index_t longest = 0;
    for (const kv_piece& piece : pieces) {
      found.require(piece.first >= end, "a piece's first position", piece.first,
                    "at least where the piece before it ends,", end);
      found.require(piece.first <= max_position, "a piece's first position", piece.first, "at most", max_position);
      found.require(piece.tokens >= 0, "a piece's tokens", piece.tokens, "at least 0");
      if (!found) return;
      found.require(piece.tokens <= max_position - piece.first, "a piece's tokens", piece.tokens, "at most",
                    max_position - piece.first);
      if (!found) return;
      end = piece.first + piece.tokens;
      if (piece.tokens == 0) continue;
      require_memory(found, piece.k, piece.v);
      longest = std::max(longest, piece.tokens);
    }
    require_reach(found, longest);
  }

  void require_pages(status& found, const kv_pages& pages) const noexcept {
    found.require(pages.page_tokens >= 1, "page_tokens", pages.page_tokens, "at least 1");
    found.require(pages.num_pages >= 0, "num_pages", pages.num_pages, "at least 0");
    const index_t least = pages.num_pages > 1 ? 1 : 0;
    found.require(pages.k_page >= least, "k_page", pages.k_page, "at least", least);
    found.require(pages.v_page >= least, "v_page", pages.v_page, "at least", least);
    found.require(pages.first >= 0 && pages.first <= max_position, "the pages' first position", pages.first,
                  "from 0 to", max_position);
    for (const std::int32_t page : pages.table)
      found.require(page >= 0 && page < pages.num_pages, "a page of the table", page, "at least 0 and below num_pages,",
                    pages.num_pages);
    if (!found || pages.table.empty()) return;
    require_memory(found, pages.k, pages.v);
    const index_t tokens = detail::checked_product(found, "positions of the table", pages.page_tokens,
                                                   static_cast<index_t>(pages.table.size()));
    found.require(tokens <= max_position - pages.first, "positions of the table", tokens, "at most",
                  max_position - pages.first);
    const auto before = [&]<class F>(const char* of, index_t page, F) {
      using unit = detail::stride_of<F>;
      if (page % unit::elements != 0) found.refuse("{} was {}, had to be a multiple of {}", of, page, unit::elements);
      return detail::checked_product(found, "bytes of the pages", pages.num_pages,
                                     detail::checked_product(found, "bytes of a page", page, unit::bytes));
    };
    const index_t k = before("k_page", pages.k_page, K()), v = before("v_page", pages.v_page, V());
    require_reach(found, pages.page_tokens, k, v);
  }

  index_t num_sink_tokens_;
  position_t window_;
  kv_strides k_, v_;  // in bytes
  kv_memory memory_;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
