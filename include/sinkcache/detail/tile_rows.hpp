#pragma once

// Rows of a tile as floats, whatever their format and however they lie in memory.

#include <algorithm>
#include <cstring>

#include "../format.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

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

inline bool all_finite(tile_rows decoded, index_t n, index_t dim) noexcept {
  vfloat sum{};
  for (index_t j = 0; j < n; ++j)
    for (index_t d = 0; d < dim; d += lanes) {
      const vfloat x = load(reinterpret_cast<const float*>(decoded.row(j)) + d);
      sum += x * 0.f;
    }
  for (int i = 0; i < lanes; ++i)
    if (sum[i] != 0) return false;
  return true;
}

}  // namespace sinkcache::inline SINKCACHE_TAG::detail
