#pragma once

// How rows of keys and values are stored. A format is three static functions over blocks of rows; f32, f16 and bf16
// have one row a block.

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "config.hpp"
#include "detail/simd.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

// What a format must offer:
//   block_rows                   rows (tokens) in a block;
//   block_bytes(dim)             bytes of a block of rows of `dim` floats, a multiple of 64;
//   encode(rows, dim, to)        block_rows x dim floats into the block `to`, padding included;
//   decode(from, row, dim, out)  one row of the block `from` into `dim` floats.
template <class F>
concept kv_format = requires(const float* rows, index_t dim, std::byte* to, const std::byte* from, float* out) {
  { F::block_rows } -> std::convertible_to<index_t>;
  { F::block_bytes(dim) } -> std::same_as<index_t>;
  F::encode(rows, dim, to);
  F::decode(from, index_t{}, dim, out);
};

// Plain floats. The kernel reads them where they lie.
struct f32 {
  static constexpr index_t block_rows = 1;
  static constexpr index_t block_bytes(index_t dim) { return detail::round_up(dim * index_t{sizeof(float)}, 64); }

  static void encode(const float* rows, index_t dim, std::byte* to) noexcept {
    const std::size_t bytes = static_cast<std::size_t>(dim) * sizeof(float);
    std::memcpy(to, rows, bytes);
    std::memset(to + bytes, 0, static_cast<std::size_t>(block_bytes(dim)) - bytes);
  }
  static void decode(const std::byte* from, index_t, index_t dim, float* out) noexcept {
    std::memcpy(out, from, static_cast<std::size_t>(dim) * sizeof(float));
  }
};

namespace detail {

// A row of 16-bit floats, rounded to nearest even by Convert.
template <class Convert>
struct half_row {
  static constexpr index_t block_rows = 1;
  static constexpr index_t block_bytes(index_t dim) { return round_up(dim * 2, 64); }

  static void encode(const float* rows, index_t dim, std::byte* to) noexcept {
    const std::size_t bytes = static_cast<std::size_t>(dim) * 2;
    Convert::narrow(rows, dim, to);
    std::memset(to + bytes, 0, static_cast<std::size_t>(block_bytes(dim)) - bytes);
  }
  static void decode(const std::byte* from, index_t, index_t dim, float* out) noexcept {
    Convert::widen(from, dim, out);
  }
};

}  // namespace detail

// IEEE half precision: 11 bits of significand, magnitudes to 65504; larger ones become infinity.
struct f16 : detail::half_row<detail::f16_convert> {};

// The upper half of a float: 8 bits of significand, the range of a float.
struct bf16 : detail::half_row<detail::bf16_convert> {};

}  // namespace sinkcache::inline SINKCACHE_TAG
