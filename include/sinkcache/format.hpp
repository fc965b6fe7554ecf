#pragma once

// How rows of keys and values are stored. A format is three static functions over blocks of rows; f32, f16 and bf16
// have one row a block.

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "detail/halves.hpp"
#include "detail/macros_off.hpp"
#include "status.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// What a format must offer:
//   block_rows                   rows (tokens) in a block;
//   block_bytes(dim)             bytes of a block of rows of `dim` floats;
//   encode(rows, dim, to)        block_rows x dim floats into the block `to`, padding included;
//   decode(from, row, dim, out)  one row of the block `from` into `dim` floats.
// A `name` is for messages and with_formats; your own format needs none. A format may also say what stored rows go
// through before they are encoded, `transform`, a pointer to a row_transform; and what pinned and the newest tokens are
// stored in, `spared`, a format that they lose little in. kv_cache and scored_kv_cache use both.
template <class F>
concept kv_format = requires(const float* rows, index_t dim, std::byte* to, const std::byte* from, float* out) {
  { F::block_rows } -> std::convertible_to<index_t>;
  { F::block_bytes(dim) } -> std::same_as<index_t>;
  F::encode(rows, dim, to);
  F::decode(from, index_t{}, dim, out);
};

// A format whose elements lie side by side, so that the kernel loads them where they lie: `element_bytes` each, 1, 2
// or 4, and zeros after the last, block_bytes a multiple of 64; element(from) is the float of one.
template <class F>
concept elementwise_format = kv_format<F> && requires(const std::byte* from) {
  { F::element_bytes } -> std::convertible_to<index_t>;
  { F::element(from) } -> std::same_as<float>;
} &&(F::element_bytes == 1 || F::element_bytes == 2 || F::element_bytes == 4);

// A format whose rows are units of several elements, one after another, as other engines lay them out: `unit_elements`
// in `unit_bytes`. kv_view reads such rows in place; its strides have to be multiples of a unit's elements.
template <class F>
concept unit_format = kv_format<F> && requires {
  { F::unit_elements } -> std::convertible_to<index_t>;
  { F::unit_bytes } -> std::convertible_to<index_t>;
};

namespace detail {

// Bytes of this many elements, in whole units.
template <class F>
struct stride_of;
template <elementwise_format F>
struct stride_of<F> {
  static constexpr index_t elements = 1, bytes = F::element_bytes;
};
template <unit_format F>
struct stride_of<F> {
  static constexpr index_t elements = F::unit_elements, bytes = F::unit_bytes;
};

}  // namespace detail

// What a kv_view can read.
template <class F>
concept viewed_format = elementwise_format<F> || unit_format<F>;

// A format for tokens in the middle, whose pinned and newest tokens are spared: stored in another.
template <class F>
concept tiered_format = kv_format<F> && kv_format<typename F::spared>;

// F with `Full` for tokens that are spared: kv_cache<tiered<q4, f16>>. F may be a format of yours.
template <kv_format F, kv_format Full>
struct tiered : F {
  using spared = Full;
};

// Plain floats.
struct f32 {
  static constexpr std::string_view name = "f32";
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
  static constexpr index_t element_bytes = sizeof(float);
  static float element(const std::byte* from) noexcept {
    float x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static detail::vfloat load(const std::byte* from) noexcept {
    return detail::load_once(reinterpret_cast<const float*>(from));
  }
};

namespace detail {

// A row of 16-bit floats; F loads and stores as many at a time as a vector holds.
template <class F>
struct half_row {
  static constexpr index_t block_rows = 1, element_bytes = 2;
  static constexpr index_t block_bytes(index_t dim) { return round_up(dim * element_bytes, 64); }

  static void encode(const float* rows, index_t dim, std::byte* to) noexcept {
    index_t i = 0;
    for (; i + lanes <= dim; i += lanes) F::store(to + 2 * i, detail::load(rows + i));
    for (; 2 * i < block_bytes(dim); i += lanes) {
      float last[lanes] = {};
      if (i < dim) std::copy_n(rows + i, dim - i, last);
      F::store(to + 2 * i, detail::load(last));
    }
  }
  static void decode(const std::byte* from, index_t, index_t dim, float* out) noexcept {
    index_t i = 0;
    for (; i + lanes <= dim; i += lanes) detail::store(out + i, F::load(from + 2 * i));
    if (i == dim) return;
    std::byte last[2 * lanes] = {};
    std::copy_n(from + 2 * i, 2 * (dim - i), last);
    const vfloat decoded = F::load(last);
    std::memcpy(out + i, &decoded, static_cast<std::size_t>(dim - i) * sizeof(float));
  }
  static float element(const std::byte* from) noexcept {
    float x;
    decode(from, 0, 1, &x);
    return x;
  }
};

}  // namespace detail

// IEEE half precision: 11 bits of significand, magnitudes to 65504; those of 65520 and more become infinity, and append
// does not look. num_not_finite(cache) tells (not_finite.hpp); docs/architecture.md has what attention makes of them.
struct f16 : detail::half_row<f16> {
  static constexpr std::string_view name = "f16";
  [[gnu::always_inline]] static detail::vfloat load(const std::byte* from) noexcept { return detail::load_f16(from); }
#if defined(__AVX512DQ__)
  [[gnu::always_inline]] static detail::voct load_eight(const std::byte* from) noexcept {
    return detail::load_eight_f16(from);
  }
#endif
  [[gnu::always_inline]] static void store(std::byte* to, detail::vfloat v) noexcept { detail::store_f16(to, v); }
};

// The upper half of a float: 8 bits of significand, the range of a float.
struct bf16 : detail::half_row<bf16> {
  static constexpr std::string_view name = "bf16";
  [[gnu::always_inline]] static detail::vfloat load(const std::byte* from) noexcept { return detail::load_bf16(from); }
  [[gnu::always_inline]] static detail::vfloat load_even(const std::byte* from) noexcept {
    return detail::load_even_bf16(from);
  }
  [[gnu::always_inline]] static detail::vfloat load_odd(const std::byte* from) noexcept {
    return detail::load_odd_bf16(from);
  }
  [[gnu::always_inline]] static void store(std::byte* to, detail::vfloat v) noexcept { detail::store_bf16(to, v); }
};

namespace detail {

template <class F>
concept named_format = kv_format<F> && requires {
  { F::name } -> std::convertible_to<std::string_view>;
};

template <kv_format F>
struct spared_of {
  using type = F;
};
template <tiered_format F>
struct spared_of<F> {
  using type = typename F::spared;
};
// What spared tokens are stored in: the format itself where it spares none.
template <kv_format F>
using spared_format = typename spared_of<F>::type;

template <kv_format F>
constexpr std::string_view format_name() noexcept {
  if constexpr (named_format<F>)
    return F::name;
  else
    return "custom";
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
