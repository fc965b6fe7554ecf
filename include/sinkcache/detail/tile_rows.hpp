#pragma once

// Rows of a tile as floats, whatever their format and however they lie in memory.

#include <algorithm>
#include <cstring>
#include <span>

#include "../format.hpp"
#include "macros_off.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// Rows that lie together: n rows from `row` on of a page; there is only page 0 where a part has no pages.
struct row_run {
  index_t page, row, n;
};

// The runs of a tile, in the order in which its keys are read.
class tile_runs {
 public:
  tile_runs() = default;
  tile_runs(const kv_part& part, index_t first, index_t n) noexcept { add(part, first, n); }

  // Rows [first, first + n) of a part: cut where pages end.
  void add(const kv_part& part, index_t first, index_t n) noexcept {
    n_ += n;
    if (part.pages.empty()) return push_back({0, part.row + first, n});
    for (index_t row = part.row + first, some; n > 0; row += some, n -= some) {
      const index_t in_page = row % part.page_rows;
      some = std::min(part.page_rows - in_page, n);
      push_back({part.pages[static_cast<std::size_t>(row / part.page_rows)], in_page, some});
    }
  }
  std::span<const row_run> runs() const { return {runs_, static_cast<std::size_t>(size_)}; }
  index_t num_rows() const { return n_; }

 private:
  void push_back(const row_run& run) noexcept { runs_[size_++] = run; }

  row_run runs_[tile_scratch::keys];
  index_t size_ = 0, n_ = 0;
};

// The load of a kv_reader.
template <kv_format F>
void load_rows(const kv_rows& from, index_t first, index_t n, index_t dim, index_t stride, float* to) noexcept {
  for (index_t i = 0; i < n; ++i) std::fill(to + i * stride + dim, to + i * stride + round_up(dim, 16), 0.f);
  if constexpr (elementwise_format<F>) {
    if (from.step != 0 && from.step != F::element_bytes) {
      const std::byte* const store = from.base + first * from.block;
      if (from.block == F::element_bytes) {  // transposed: an element of all rows at a time
        float column[tile_scratch::keys];
        for (index_t d = 0; d < dim; ++d) {
          F::decode(store + d * from.step, 0, n, column);
          for (index_t i = 0; i < n; ++i) to[i * stride + d] = column[i];
        }
      } else {
        std::byte row[max_head_dim * F::element_bytes];  // decoded as a whole: one by one takes ten times as long
        for (index_t i = 0; i < n; ++i) {
          for (index_t d = 0; d < dim; ++d)
            std::memcpy(row + d * F::element_bytes, store + i * from.block + d * from.step, F::element_bytes);
          F::decode(row, 0, dim, to + i * stride);
        }
      }
      return;
    }
  }
  for (index_t i = 0; i < n; ++i)
    F::decode(from.base + (first + i) / F::block_rows * from.block, (first + i) % F::block_rows, dim, to + i * stride);
}

// The rows as floats [n, stride], zero from `dim` on.
inline tile_rows decoded_rows(const kv_rows& from, const tile_runs& tile, index_t dim, index_t stride,
                              float* to) noexcept {
  const index_t bytes = stride * index_t{sizeof(float)};
  const tile_rows rows{reinterpret_cast<const std::byte*>(to), bytes, bytes};
  for (const row_run& run : tile.runs()) {
    kv_rows page = from;
    page.base += run.page * from.page;
    from.reader->load(page, run.row, run.n, dim, stride, to);
    to += run.n * stride;
  }
  return rows;
}

inline bool all_finite(tile_rows decoded, index_t n, index_t dim) noexcept {
  for (index_t j = 0; j < n; ++j)
    if (!all_finite(reinterpret_cast<const float*>(decoded.row(j)), dim)) return false;
  return true;
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
