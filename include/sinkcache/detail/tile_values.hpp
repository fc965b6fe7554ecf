#pragma once

// Weighted sums of the values of a tile.

#include <algorithm>
#include <type_traits>
#include <utility>

#include "macros_off.hpp"
#include "tile.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// Vectors of columns that load_vector gave, in the order of columns.
template <int Rows, int Vectors>
[[gnu::always_inline]] inline void from_pairs(vfloat (&rows)[Rows][Vectors]) noexcept {
#pragma GCC unroll 16
  for (int i = 0; i < Rows * (Vectors / 2); ++i) {
    vfloat* const pair = rows[i / (Vectors / 2)] + 2 * (i % (Vectors / 2));
    const vfloat even = pair[0], odd = pair[1];
    pair[0] = by_turns<0>(even, odd, lane_numbers);
    pair[1] = by_turns<lanes>(even, odd, lane_numbers);
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

// o[r] += sum over j of weights[j][r] * v[j], for Rows rows of Width and a strip of columns. `keys_at_once` keys,
// counted from key number -`offset` on, are summed by themselves, then the tile. The strip's share of the next tile's
// keys is brought in meanwhile, unless the rows are of a panel.
inline constexpr index_t keys_at_once = 32;

template <class V, int Rows, int Vectors, int Width = Rows>
[[gnu::noinline]] void add_values(const float* weights, tile_rows v, index_t offset, index_t n, index_t column,
                                  const running_states& to, tile_rows next = {}) noexcept {
  constexpr index_t strip = Vectors * lanes * V::element_bytes;
  constexpr bool of_panel = Width != Rows;
  using weight = std::conditional_t<of_panel, vfloat, multiplier>;
  constexpr index_t unrolled = of_panel ? 4 : 1;  // with prefetches among them, g++ 12 is slower with more
  const std::byte* value = v.data + column * V::element_bytes;
  const bool neighbours = next.stride == next.bytes;
  const index_t step = neighbours ? strip : next.stride;
  index_t ahead = column * V::element_bytes * (neighbours ? n : 1);
  vfloat tile[Rows][Vectors], sums[Rows][Vectors];
  const auto weight_at = [](const float* from) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<weight, vfloat>)
      return broadcast(*from);
    else
      return from;
  };
  const auto add_key = [&]() __attribute__((always_inline)) {
    if constexpr (!of_panel) {
#pragma GCC unroll 8
      for (index_t line = 0; line < strip; line += 64) prefetch(next.data, ahead + line);
      ahead += step;
    }
    vfloat vc[Vectors];  // only the fewer of them fit the registers all at once
    weight weight_of[Rows];
    if constexpr (Rows > Vectors) {
#pragma GCC unroll 8
      for (int c = 0; c < Vectors; ++c) vc[c] = load_vector<V>(value, c, Vectors);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        weight_of[r] = weight_at(weights + r);
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; ++c) sums[r][c] = add_product(sums[r][c], vc[c], weight_of[r]);
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) weight_of[r] = weight_at(weights + r);
#pragma GCC unroll 8
      for (int c = 0; c < Vectors; ++c) {
        vc[c] = load_vector<V>(value, c, Vectors);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sums[r][c] = add_product(sums[r][c], vc[c], weight_of[r]);
      }
    }
    value += v.stride, weights += Width;
  };
  clear(tile);
  for (index_t first = 0, last; first < n; first = last) {
    last = std::min(n, first + keys_at_once - (offset + first) % keys_at_once);
    clear(sums);
    index_t j = first;
#pragma GCC unroll 1
    for (; j + unrolled <= last; j += unrolled) {
#pragma GCC unroll 4
      for (index_t i = 0; i < unrolled; ++i) add_key();
    }
#pragma GCC unroll 1
    for (; j < last; ++j) add_key();
    add(tile, sums);
  }
  if constexpr (in_pairs<V> && Vectors > 1) from_pairs(tile);
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Vectors; ++i) {
    const index_t at = i / Vectors * to.o_stride + column + i % Vectors * lanes;
    const vfloat added = tile[i / Vectors][i % Vectors], old = load(to.o + at), sum = old + added;
    store(to.o_rest + at, load(to.o_rest + at) + (added - (sum - old)));
    store(to.o + at, sum);
  }
}

// At most so many vectors of columns at a time: eight to sixteen sums, as far as registers go, hide the latency of an
// FMA.
template <int Rows>
inline constexpr int vectors_of = Rows == 1 ? 8 : (lanes == 16 ? 16 / Rows : (Rows == 4 ? 3 : 4));

// Calls f<Vectors>(column) for strips of columns, as few as there can be and about as wide as each other.
template <int Rows, int Most = vectors_of<Rows>, class F>
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

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "macros_on.hpp"
