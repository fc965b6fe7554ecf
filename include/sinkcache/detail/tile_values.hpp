#pragma once

// Weighted sums of the values of a tile.

#include <algorithm>
#include <type_traits>
#include <utility>

#include "macros_off.hpp"
#include "tile.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// Vectors of columns that load_vector gave, in the order of columns.
template <int Vectors, int Rows>
[[gnu::always_inline]] inline void from_pairs(vfloat (&columns)[Vectors][Rows]) noexcept {
#pragma GCC unroll 16
  for (int i = 0; i < Vectors / 2 * Rows; ++i) {
    vfloat &first = columns[i / Rows * 2][i % Rows], &second = columns[i / Rows * 2 + 1][i % Rows];
    const vfloat even = first, odd = second;
    first = by_turns<0>(even, odd);
    second = by_turns<lanes>(even, odd);
  }
}

// o *= scale, for `rows` rows.
inline void rescale_values(const float* scale, index_t rows, const running_states& of) noexcept {
  for (index_t r = 0; r < rows; ++r) {
    if (scale[r] == 1.f) continue;  // most often
    float *const o = of.o + r * of.o_stride, *const rest = of.o_rest + r * of.o_stride;
    for (index_t i = 0; i < of.o_stride; i += lanes) {
      store(o + i, load(o + i) * scale[r]);
      store(rest + i, load(rest + i) * scale[r]);
    }
  }
}

// Prefetches a strip's share of the next tile's keys while values are added, one key's per step.
template <index_t Bytes>
struct key_prefetcher {
  const std::byte* data;
  index_t at, step;

  // Where keys lie one after the other, a strip's share are as many bytes in one piece.
  key_prefetcher(tile_rows keys, index_t n, index_t column)
      : data(keys.data),
        at(column * (keys.stride == keys.bytes ? n : 1)),
        step(keys.stride == keys.bytes ? Bytes : keys.stride) {}
  [[gnu::always_inline]] void next() noexcept {
#pragma GCC unroll 8
    for (index_t line = 0; line < Bytes; line += 64) prefetch_line(data, at + line);
    at += step;
  }
};

// o[r] += sum over j of weights[j][r] * v[j], for Rows rows (of Width, or a group or two) and a strip of columns.
// `keys_at_once` keys, counted from key number -`offset` on, are summed by themselves, then the tile. The strip's share
// of the next tile's keys is prefetched meanwhile, unless the rows are of a panel.
inline constexpr index_t keys_at_once = 32;

template <class V, int Rows, int Vectors, int Width = std::min(Rows, 4)>
[[gnu::noinline]] void add_values(const float* weights, tile_rows v, index_t offset, index_t n, index_t column,
                                  const running_states& to, tile_rows next = {}) noexcept {
  constexpr bool of_panel = Width != std::min(Rows, 4);
  using weight = std::conditional_t<of_panel, vfloat, multiplier>;
  const std::byte* value = v.data + column * V::element_bytes;
  key_prefetcher<Vectors * lanes * V::element_bytes> prefetch(next, n, column * V::element_bytes);
  vfloat tile[Vectors][Rows], sums[Vectors][Rows];
  clear(tile);
  for (index_t first = 0, last; first < n; first = last) {
    last = std::min(n, first + keys_at_once - (offset + first) % keys_at_once);
    clear(sums);
#pragma GCC unroll 1
    for (index_t j = first; j < last; ++j, value += v.stride, weights += Width) {
      if constexpr (!of_panel) prefetch.next();
      add_products(
          sums, [&](int c) __attribute__((always_inline)) { return load_vector<V>(value, c, Vectors); },
          [&](int r)
              __attribute__((always_inline)) { return multiply_by<weight>(weights + r / 4 * group_floats + r % 4); },
          no_prefetch{});
    }
    add(tile, sums);
  }
  if constexpr (in_pairs<V> && Vectors > 1) from_pairs(tile);
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Vectors; ++i) {
    to.add(i % Rows * to.o_stride + column + i / Rows * lanes, tile[i / Rows][i % Rows]);
  }
}

// Calls f<Vectors>(column) for strips of columns, as few as there can be and about as wide as each other.
template <int Rows, int Most = cpu.vectors_of(Rows), class F>
void in_strips(index_t dim, const F& f) {
  const index_t columns = dim / lanes;
  for (index_t done = 0, vectors; done < columns; done += vectors) {
    const index_t left = columns - done, strips = (left + Most - 1) / Most;
    vectors = (left + strips - 1) / strips;
    const auto take = [&]<int... Before>(std::integer_sequence<int, Before...>) {
      ((vectors == Before + 1 ? f.template operator()<Before + 1>(done * lanes) : void()), ...);
    };
    take(std::make_integer_sequence<int, Most>());
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
