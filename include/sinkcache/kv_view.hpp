#pragma once

// Attention over keys and values in an engine's own memory, read where they lie: attention takes a view wherever it
// takes a cache to read. docs/integrating.md has each host's layout.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include "any_kv_cache.hpp"
#include "detail/absorb.hpp"
#include "detail/macros_off.hpp"
#include "format.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

// Elements from one head, token or dimension to the next.
struct kv_strides {
  index_t head = 0, token = 0, dim = 1;
};

struct kv_layout {
  kv_strides k, v;
};

// Tokens at neighbouring positions, at a layout's strides: all of a linear cache, a part of a ring that wraps.
struct kv_piece {
  position_t first = 0;                   // position of the piece's first token, counted from the start of the stream
  index_t tokens = 0;                     // that the memory holds; those at `seen` and behind are not read
  const void *k = nullptr, *v = nullptr;  // element 0 of head 0 of the first token; of any alignment
};

// Pages of a pool: page table[i] holds the positions from first + i * page_tokens on.
struct kv_pages {
  const void *k = nullptr, *v = nullptr;  // element 0 of head 0 of the first token of page 0
  index_t k_page = 0, v_page = 0;         // elements from page to page of the pool
  index_t num_pages = 0;                  // of the pool
  index_t page_tokens = 0;
  std::span<const std::int32_t> table;
  position_t first = 0;
};

// What a view reads: one piece, pieces in the order of their positions, or pages. Pieces and tables stay the engine's,
// and have to stay where they are while the view reads them.
class kv_memory {
 public:
  kv_memory() = default;
  kv_memory(const kv_piece& piece) : piece_(piece) {}                // NOLINT(google-explicit-constructor)
  kv_memory(std::span<const kv_piece> pieces) : pieces_(pieces) {}   // NOLINT(google-explicit-constructor)
  kv_memory(const kv_pages& pages) : pages_(pages), paged_(true) {}  // NOLINT(google-explicit-constructor)
  template <class Pieces>
  requires(std::convertible_to<Pieces&, std::span<const kv_piece>>) kv_memory(Pieces& pieces)  // NOLINT
      : kv_memory(std::span<const kv_piece>(pieces)) {}
  template <class Pieces>
  requires(std::convertible_to<Pieces, std::span<const kv_piece>> && !std::is_lvalue_reference_v<Pieces> &&
           !std::ranges::enable_borrowed_range<std::remove_const_t<Pieces>>) kv_memory(Pieces&&)
  = delete;  // refused: a temporary would dangle

 private:
  template <elementwise_format K, elementwise_format V>
  friend class kv_view;

  std::span<const kv_piece> pieces() const noexcept { return pieces_.empty() ? std::span(&piece_, 1) : pieces_; }

  kv_piece piece_;
  std::span<const kv_piece> pieces_;
  kv_pages pages_;
  bool paged_ = false;
};

// Keys in format K and values in format V, already turned at their true positions. A query sees of what the memory
// holds the first num_sink_tokens and the newest `window`; a window of 0 is none: all that is held. Between spans of
// positions that the memory does not hold, in_cache closes the gap as behind evicted tokens. A view is cheap to make,
// cheaper to assign again, and allocates nothing.
template <elementwise_format K, elementwise_format V = K>
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

  // Whether a view can have these. inputs::raw and rope are about queries only; rollback has to be 0.
  static status validate(const cache_config& config, const kv_layout& layout) noexcept {
    status found;
    found.require(config.num_sink_tokens >= 0, "num_sink_tokens", config.num_sink_tokens, "at least 0");
    found.require(config.window >= 0, "window", config.window, "at least 0");
    found.require(config.rollback == 0, "rollback", config.rollback, "0: what a view holds is the engine's to say");
    detail::require_config(found, config);
    require_strides(found, "k", layout.k, K::element_bytes);
    require_strides(found, "v", layout.v, V::element_bytes);
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
  // Reads through pieces and tables once.
  void assign(const kv_memory& memory, position_t seen) { try_assign(memory, seen).or_fail(); }
  status try_assign(const kv_memory& memory, position_t seen) noexcept {
    status found;
    span_list held;
    if (memory.paged_)
      require_pages(found, memory.pages_, held);
    else
      require_pieces(found, memory.pieces(), held);
    require_seen(found, seen);
    if (!found) return found;
    memory_ = memory;
    held_ = held;
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
    const index_t held = held_.num_tokens(), sinks = std::min(held, config_.num_sink_tokens);
    return window() < held - sinks ? sinks + static_cast<index_t>(window()) : held;
  }

  // Tokens that left the window since then have to be held still. Any count will do for those that are missing anyway.
  position_t min_truncate() const noexcept override {
    const position_t left = seen_ - window();  // these and those before them are seen no longer
    if (left <= config_.num_sink_tokens) return 0;
    position_t kept_from = left;
    for (const position_span& held : held_)
      if (held.first < left && left <= held.last) kept_from = held.first;
    return kept_from <= config_.num_sink_tokens ? 0 : kept_from + window();
  }

  span_list visible(position_t seen) const noexcept override {
    span_list spans;
    for (const position_span& kept : sink_window{config_.num_sink_tokens, window()}.visible(seen))
      for (const position_span& held : held_)
        spans.push_back({std::max(kept.first, held.first), std::min(kept.last, held.last)});
    return spans;
  }

  segment segment_at(index_t kv_head, position_t first, position_t last) const noexcept override {
    const kv_piece piece = piece_at(first);
    const auto of_head = [&](const void* memory, index_t stride) {
      return memory == nullptr ? nullptr : static_cast<const std::byte*>(memory) + kv_head * stride;
    };
    return {of_head(piece.k, k_.head),
            of_head(piece.v, v_.head),
            k_.token,
            v_.token,
            k_.dim,
            v_.dim,
            static_cast<index_t>(first - piece.first),
            first,
            std::min(last, piece.first + piece.tokens),
            &detail::absorb<K, V>};
  }

 private:
  // Of arguments that were checked.
  kv_view(const cache_config* config, const kv_layout& layout) noexcept
      : kv_source(*config), k_(in_bytes<K>(layout.k)), v_(in_bytes<V>(layout.v)) {}

  static const cache_config* checked(const cache_config& config, const kv_layout& layout) {
    validate(config, layout).or_fail();
    return &config;
  }

  template <elementwise_format F>
  static kv_strides in_bytes(const kv_strides& s) noexcept {
    return {s.head * F::element_bytes, s.token * F::element_bytes, s.dim * F::element_bytes};
  }

  position_t window() const noexcept { return config_.window == 0 ? max_position : config_.window; }

  // The piece, or page, that holds a position. Rows with different windows see different spans: what lies between, of
  // which none sees anything, is a piece without memory.
  kv_piece piece_at(position_t position) const noexcept {
    if (memory_.paged_) return page_at(position);
    const std::span<const kv_piece> pieces = memory_.pieces();
    const auto next = std::upper_bound(pieces.begin(), pieces.end(), position,
                                       [](position_t p, const kv_piece& piece) { return p < piece.first; });
    if (next != pieces.begin() && position - std::prev(next)->first < std::prev(next)->tokens) return *std::prev(next);
    return {position, static_cast<index_t>((next == pieces.end() ? max_position : next->first) - position)};
  }
  kv_piece page_at(position_t position) const noexcept {
    const kv_pages& pages = memory_.pages_;
    const index_t i = static_cast<index_t>((position - pages.first) / pages.page_tokens);
    const index_t page = pages.table[static_cast<std::size_t>(i)];
    return {pages.first + i * pages.page_tokens, pages.page_tokens,
            static_cast<const std::byte*>(pages.k) + page * pages.k_page * K::element_bytes,
            static_cast<const std::byte*>(pages.v) + page * pages.v_page * V::element_bytes};
  }

  // One rule each for what is given.

  static void require_strides(status& found, const char* of, const kv_strides& s, index_t element_bytes) noexcept {
    if (s.head < 0) found.refuse("layout.{}.head was {}, had to be at least 0", of, s.head);
    if (s.token < 1) found.refuse("layout.{}.token was {}, had to be at least 1", of, s.token);
    if (s.dim < 1) found.refuse("layout.{}.dim was {}, had to be at least 1", of, s.dim);
    for (const index_t stride : {s.head, s.token, s.dim})
      detail::checked_product(found, "bytes of a stride", stride, element_bytes);
  }

  static void require_seen(status& found, position_t seen) noexcept {
    found.require(seen >= 0 && seen <= max_position, "seen", seen, "from 0 to", max_position);
  }

  // That sizes do not overflow: bytes from the first element to the last, of all heads of so many tokens.
  static index_t reach(status& found, const kv_strides& bytes, index_t heads, index_t tokens, index_t dim) noexcept {
    constexpr const char* what = "bytes that a layout reaches over";
    const index_t rows = detail::checked_sum(found, what, detail::checked_product(found, what, heads - 1, bytes.head),
                                             detail::checked_product(found, what, dim, bytes.dim));
    return detail::checked_sum(found, what, rows, detail::checked_product(found, what, tokens, bytes.token));
  }

  void require_reach(status& found, index_t tokens, index_t k_before = 0, index_t v_before = 0) const noexcept {
    const index_t k = reach(found, k_, config_.num_kv_heads, tokens, config_.head_dim);
    const index_t v = reach(found, v_, config_.num_kv_heads, tokens, config_.v_head_dim);
    detail::checked_sum(found, "bytes that a layout reaches over", k, k_before);
    detail::checked_sum(found, "bytes that a layout reaches over", v, v_before);
  }

  static void require_memory(status& found, const void* k, const void* v) noexcept {
    found.require(k != nullptr, "k", "null", "where keys lie");
    found.require(v != nullptr, "v", "null", "where values lie");
  }

  void require_pieces(status& found, std::span<const kv_piece> pieces, span_list& held) const noexcept {
    // What is seen can have one span more, if one holds pinned tokens and newer ones.
    const index_t max_spans = span_list::max_spans - (config_.num_sink_tokens > 0 && config_.window > 0);
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
      const bool follows = held.size() > 0 && held[held.size() - 1].last == piece.first;
      if (!follows && held.size() == max_spans) {
        found.refuse("pieces had more than {} spans of positions, had to have at most {}", max_spans, max_spans);
        return;
      }
      held.push_back({piece.first, end});
      longest = std::max(longest, piece.tokens);
    }
    require_reach(found, longest);
  }

  void require_pages(status& found, const kv_pages& pages, span_list& held) const noexcept {
    found.require(pages.page_tokens >= 1, "page_tokens", pages.page_tokens, "at least 1");
    found.require(pages.num_pages >= 0, "num_pages", pages.num_pages, "at least 0");
    found.require(pages.k_page >= 0, "k_page", pages.k_page, "at least 0");
    found.require(pages.v_page >= 0, "v_page", pages.v_page, "at least 0");
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
    const auto before = [&](index_t page, index_t element_bytes) {
      return detail::checked_product(found, "bytes of the pages", pages.num_pages,
                                     detail::checked_product(found, "bytes of a page", page, element_bytes));
    };
    require_reach(found, pages.page_tokens, before(pages.k_page, K::element_bytes),
                  before(pages.v_page, V::element_bytes));
    held.push_back({pages.first, pages.first + tokens});
  }

  kv_strides k_, v_;  // in bytes
  kv_memory memory_;
  span_list held_;  // positions in memory
};

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
