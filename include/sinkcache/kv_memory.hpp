#pragma once

// How an engine's own memory is described to a kv_view: strides, and pieces or pages of tokens.

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "detail/macros_off.hpp"
#include "format.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

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
  index_t tokens = 0;                     // that the memory holds; those at `seen` and after are not read
  const void *k = nullptr, *v = nullptr;  // element 0 of head 0 of the first token; of any alignment
};

// A ring of rows: the first `pinned` tokens stay in the first rows for ever, the others take turns in the `rows` rows
// after those (gemma.cpp, llama2.c's windows; mlx-lm's RotatingKVCache with its `keep`).
struct kv_ring {
  const void *k = nullptr, *v = nullptr;  // element 0 of head 0 of row 0
  index_t k_row = 0, v_row = 0;           // bytes from row to row
  index_t pinned = 0, rows = 0;           // rows is at least 1
};

// What such a ring holds after `seen` tokens, as pieces of a view: pinned tokens, then the ring before and after the
// row where it wraps; some may be empty. Keep them as long as the view reads them:
//   const auto pieces = ring_pieces(ring, seen);
//   view.assign(pieces, seen);
inline std::array<kv_piece, 3> try_ring_pieces(const kv_ring& ring, position_t seen, status& found) noexcept {
  found = status();
  found.require(ring.pinned >= 0, "pinned", ring.pinned, "at least 0");
  found.require(ring.rows >= 1, "rows", ring.rows, "at least 1");
  found.require(seen >= 0 && seen <= max_position, "seen", seen, "from 0 to", max_position);
  found.require(ring.k_row >= 0 && ring.v_row >= 0, "bytes from row to row", std::min(ring.k_row, ring.v_row),
                "at least 0");
  const index_t all = detail::checked_sum(found, "pinned + rows", ring.pinned, ring.rows);
  detail::checked_product(found, "bytes of the ring", all, std::max(ring.k_row, ring.v_row));
  if (!found) return {};
  const auto piece = [&](position_t first, position_t last, index_t row) -> kv_piece {
    const auto at = [row](const void* memory, index_t bytes) {
      return memory == nullptr ? nullptr : static_cast<const std::byte*>(memory) + row * bytes;
    };
    return {first, static_cast<index_t>(last - first), at(ring.k, ring.k_row), at(ring.v, ring.v_row)};
  };
  const position_t pinned = std::min<position_t>(seen, ring.pinned), oldest = std::max(pinned, seen - ring.rows);
  const auto row = static_cast<index_t>((oldest - pinned) % ring.rows);
  const position_t wrap = std::min<position_t>(seen, oldest + ring.rows - row);
  return {piece(0, pinned, 0), piece(oldest, wrap, ring.pinned + row), piece(wrap, seen, ring.pinned)};
}
inline std::array<kv_piece, 3> ring_pieces(const kv_ring& ring, position_t seen) {
  status found;
  const std::array<kv_piece, 3> pieces = try_ring_pieces(ring, seen, found);
  found.or_fail();
  return pieces;
}

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
  requires(std::convertible_to<Pieces&, std::span<const kv_piece>> &&
           (std::is_lvalue_reference_v<Pieces> || std::ranges::enable_borrowed_range<std::remove_const_t<Pieces>>))
      kv_memory(Pieces&& pieces)  // NOLINT
      : kv_memory(std::span<const kv_piece>(pieces)) {}
  template <class Pieces>
  requires(std::convertible_to<Pieces, std::span<const kv_piece>> && !std::is_lvalue_reference_v<Pieces> &&
           !std::ranges::enable_borrowed_range<std::remove_const_t<Pieces>>) kv_memory(Pieces&&)
  = delete;  // refused: a temporary would dangle

 private:
  template <viewed_format K, viewed_format V>
  friend class kv_view;

  std::span<const kv_piece> pieces() const noexcept { return pieces_.empty() ? std::span(&piece_, 1) : pieces_; }

  kv_piece piece_;
  std::span<const kv_piece> pieces_;
  kv_pages pages_;
  bool paged_ = false;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
