#pragma once

// The keys or values of a tile: where they lie, if vectors can be loaded there, else decoded.

#include <algorithm>
#include <cstring>

#include "../format.hpp"
#include "../segment.hpp"
#include "macros_off.hpp"
#include "simd.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// Rows of a tile, `stride` bytes apart, each of `bytes` for round_up(dim, 16) elements; `decoded`: of floats, else of
// the format.
struct tile_rows {
  const std::byte* data;
  index_t stride, bytes;
  bool decoded;

  const std::byte* row(index_t i) const { return data + i * stride; }
  tile_rows from_row(index_t i) const { return {row(i), stride, bytes, decoded}; }
};

// Where the rows of one segment's keys, or values, lie.
struct stored_rows {
  const std::byte* store;
  index_t block, step;  // see segment

  // What a row takes of a cache near the processor: an engine's rows may lie far apart.
  index_t row_bytes(index_t dim) const { return step == 0 ? block : dim * std::min(step, index_t{sizeof(float)}); }
};

// Decodes the rows [first, first + n) into floats [n, stride], zero behind `dim`.
template <kv_format F>
tile_rows decoded_rows(stored_rows from, index_t first, index_t n, index_t dim, index_t stride, float* to) noexcept {
  const index_t bytes = stride * index_t{sizeof(float)};
  const tile_rows rows{reinterpret_cast<const std::byte*>(to), bytes, bytes, true};
  for (index_t i = 0; i < n; ++i) std::fill(to + i * stride + dim, to + i * stride + round_up(dim, 16), 0.f);
  if constexpr (elementwise_format<F>) {
    if (from.step != 0 && from.step != F::element_bytes) {
      const std::byte* const store = from.store + first * from.block;
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
      return rows;
    }
  }
  for (index_t i = 0; i < n; ++i)
    F::decode(from.store + (first + i) / F::block_rows * from.block, (first + i) % F::block_rows, dim, to + i * stride);
  return rows;
}

// The same rows where they lie, if vectors can be loaded there; else decoded.
template <kv_format F>
tile_rows rows_of(stored_rows from, index_t first, index_t n, index_t dim, float* scratch) noexcept {
  if constexpr (elementwise_format<F>)
    if (from.step == 0 || (from.step == F::element_bytes && dim % 16 == 0))
      return {from.store + first * from.block, from.block, from.row_bytes(dim), false};
  return decoded_rows<F>(from, first, n, dim, round_up(dim, 16), scratch);
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

#include "macros_on.hpp"
