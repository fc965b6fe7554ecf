#pragma once

// How an engine's own memory is described to a kv_view: strides, and pieces or pages of tokens.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

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
  index_t tokens = 0;                     // that the memory holds; those at `seen` and after are not read
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
  template <viewed_format K, viewed_format V>
  friend class kv_view;

  std::span<const kv_piece> pieces() const noexcept { return pieces_.empty() ? std::span(&piece_, 1) : pieces_; }

  kv_piece piece_;
  std::span<const kv_piece> pieces_;
  kv_pages pages_;
  bool paged_ = false;
};

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
