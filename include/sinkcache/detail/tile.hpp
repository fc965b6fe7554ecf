#pragma once

// The inner loops over one tile of keys: dot products of query rows with keys, and weighted sums of values.

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <utility>

#include "tile_rows.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// Brings a line into the L2, while there is arithmetic to do: on the way to the L1 fewer may be under way, and those
// too many are dropped. Integers: it may lie behind the end.
[[gnu::always_inline]] inline void prefetch(const std::byte* from, index_t offset) noexcept {
  const std::uintptr_t line = reinterpret_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(offset);
  __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);  // NOLINT(performance-no-int-to-ptr)
}

// Zeros. `= {}` is a slow string instruction, and g++ keeps in memory what it does not unroll early.
template <int Rows, int Columns>
[[gnu::always_inline]] inline void clear(vfloat (&sums)[Rows][Columns]) noexcept {
#pragma GCC unroll 32
  for (int i = 0; i < Rows * Columns; ++i) sums[i / Columns][i % Columns] = vfloat{};
}
template <int Rows, int Columns>
[[gnu::always_inline]] inline void add(vfloat (&to)[Rows][Columns], const vfloat (&sums)[Rows][Columns]) noexcept {
#pragma GCC unroll 32
  for (int i = 0; i < Rows * Columns; ++i) to[i / Columns][i % Columns] += sums[i / Columns][i % Columns];
}

// Whether two vectors of a row are loaded as elements of even and of odd number. With AVX2 that takes as many
// instructions as neighbours, and a register more.
template <class F>
concept in_pairs = elementwise_format<F> && lanes != 8 && requires(const std::byte* from) {
  { F::load_even(from) } -> std::same_as<vfloat>;
  { F::load_odd(from) } -> std::same_as<vfloat>;
};

// Vector i of the `count` that begin there: of a format in pairs every two hold even and odd elements, a last one alone
// neighbours.
template <class F>
[[gnu::always_inline]] inline vfloat load_vector(const std::byte* from, int i, int count) noexcept {
  constexpr index_t bytes = lanes * F::element_bytes;
  if constexpr (in_pairs<F>) {
    if (i % 2 == 1) return F::load_odd(from + (i - 1) * bytes);
    if (i + 1 < count) return F::load_even(from + i * bytes);
  }
  return F::load(from + i * bytes);
}

inline constexpr std::make_index_sequence<lanes> lane_numbers;

// A row's elements in the order in which load_vector gives them.
[[gnu::always_inline]] inline void to_pairs(const float* row, index_t dim, float* to) noexcept {
  index_t d = 0;
  for (; d + 2 * lanes <= dim; d += 2 * lanes) {
    const vfloat a = load(row + d), b = load(row + d + lanes);
    store(to + d, every_second<0>(a, b, lane_numbers));
    store(to + d + lanes, every_second<1>(a, b, lane_numbers));
  }
  if (d < dim) store(to + d, load(row + d));
}
// The reverse, of vectors of rows.
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

// Lanes that a group of Rows rows takes of a tile's logits [keys, width].
template <int Rows>
inline constexpr int width_of = Rows == 3 ? 4 : Rows;

// Keys at a time, of elements of `Bytes` bytes: as many sums as hide the latency of an FMA and leave registers for what
// is multiplied. AVX-512 has twice the registers, and floats gain nothing from more keys.
template <int Rows, int Bytes>
inline constexpr int keys_of = (Rows == 1 ? 8 : (Rows == 4 ? 3 : 4)) * (lanes == 16 && Rows != 1 && Bytes < 4 ? 2 : 1);

// logits[j][r] = q[r] . k[j], for Rows rows and a few keys at a time. Behind the n-th key the last one repeats. The
// keys come from as many parts of the tile, streams that hardware prefetches better than neighbours; the tile's values
// are brought in meanwhile, from two or three parts.
template <class K, int Rows, int Keys = keys_of<Rows, K::element_bytes>>
[[gnu::noinline]] void dot_products(const float* q, index_t dim, tile_rows k, index_t n, tile_rows v,
                                    float* logits) noexcept {
  if constexpr (Rows == 1 && Keys > 1)
    if (n == 1) return dot_products<K, 1, 1>(q, dim, k, n, v, logits);  // not eight times the same key
  constexpr int width = width_of<Rows>, at_once = in_pairs<K> ? 2 : 1;
  constexpr index_t line = 64 / K::element_bytes;
  constexpr int v_parts = Keys % 3 == 0 ? 3 : std::min(Keys, 2), v_rows = Keys / v_parts;
  const index_t part = (n + Keys - 1) / Keys, v_part = (n + v_parts - 1) / v_parts;
  const std::byte* key[Keys];
  float paired[in_pairs<K> ? Rows * max_head_dim : 1];
  if constexpr (in_pairs<K>) {
    for (int r = 0; r < Rows; ++r) to_pairs(q + r * dim, dim, paired + r * dim);
    q = paired;
  }
  const auto add_vector = [&](vfloat(&sums)[Keys][Rows], index_t d, int vector, int of) __attribute__((always_inline)) {
    const float* const part = q + d + vector * lanes;
#if defined(__x86_64__) && defined(__clang__)
    if (vector == 1) asm("" : "+r"(d));  // or it loads both vectors of a key at once, and spills
#endif
    vfloat qd[Rows], kd[Keys];  // only the fewer of them fit the registers all at once
    if constexpr (Rows > Keys) {
#pragma GCC unroll 8
      for (int i = 0; i < Keys; ++i) kd[i] = load_vector<K>(key[i] + d * K::element_bytes, vector, of);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        qd[r] = load_once(part + r * dim);
#pragma GCC unroll 4
        for (int i = 0; i < Keys; ++i) sums[i][r] = add_product(sums[i][r], qd[r], kd[i]);
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) qd[r] = load_once(part + r * dim);
#pragma GCC unroll 8
      for (int i = 0; i < Keys; ++i) {
        kd[i] = load_vector<K>(key[i] + d * K::element_bytes, vector, of);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sums[i][r] = add_product(sums[i][r], qd[r], kd[i]);
      }
    }
  };
  for (index_t j = 0; j < part; ++j) {
    if (j == 0 || j + (Keys - 1) * part >= n)
#pragma GCC unroll 8
      for (int i = 0; i < Keys; ++i) key[i] = k.row(std::min(j + i * part, n - 1));
    vfloat sums[Keys][Rows];
    clear(sums);
    for (index_t first = 0; first < dim; first += line) {
#pragma GCC unroll 8
      for (int i = 0; i < Keys; ++i)
        prefetch(v.data, (i % v_parts * v_part + j * v_rows + i / v_parts) * v.stride + first * K::element_bytes);
      const index_t last = std::min(dim, first + line);
      index_t d = first;
#pragma GCC unroll 1
      for (; d + (at_once - 1) * lanes < last; d += at_once * lanes)
#pragma GCC unroll 2
        for (int vector = 0; vector < at_once; ++vector) add_vector(sums, d, vector, at_once);
      if constexpr (in_pairs<K>)
        if (d < last) add_vector(sums, d, 0, 1);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Keys; ++i) key[i] += k.stride;
    constexpr int quads = std::max(1, Keys * Rows / 4);
    const vfloat* const sum = sums[0];
    vquad dots[quads];  // [keys, Rows]
#pragma GCC unroll 8
    for (int i = 0; i < quads; ++i) {
      if constexpr (Keys * Rows == 1)
        dots[i] = sums_of_lanes(sum[0], vfloat{}, vfloat{}, vfloat{});
      else
        dots[i] = sums_of_lanes(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
    }
    const auto put = [&](int i, const void* of_key) __attribute__((always_inline)) {
      std::memcpy(logits + (j + i * part) * width, of_key, width * sizeof(float));
    };
    if constexpr (Rows == 3) {
      // Three quads hold four keys. What is stored behind a key's three takes no part in anything.
#pragma GCC unroll 2
      for (int i = 0; i < Keys; i += 4) {
        const vquad a = dots[i / 4 * 3], b = dots[i / 4 * 3 + 1], c = dots[i / 4 * 3 + 2];
        const vquad keys[] = {a, __builtin_shufflevector(a, b, 3, 4, 5, 6), __builtin_shufflevector(b, c, 2, 3, 4, 5),
                              __builtin_shufflevector(c, c, 1, 2, 3, 0)};
#pragma GCC unroll 4
        for (int at = 0; at < 4; ++at) put(i + at, &keys[at]);
      }
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < Keys; ++i) put(i, reinterpret_cast<const float*>(dots) + i * Rows);
    }
  }
}

// logits[j][r] = q[r] . k[j] for a panel of rows, a few keys at a time: their sums, and the sums of those, take the
// registers. 32 products are summed by themselves. Behind the n-th key the last one repeats.
[[gnu::noinline]] inline void panel_dot_products(const float* q, index_t dim, tile_rows k, index_t n,
                                                 float* logits) noexcept {
  constexpr index_t panel = query_rows::panel, unrolled = 4;
  constexpr int keys = lanes == 16 ? 6 : 4;
  for (index_t j = 0; j < n; j += keys) {
    const float* key[keys];
#pragma GCC unroll 8
    for (int i = 0; i < keys; ++i) key[i] = reinterpret_cast<const float*>(k.row(std::min(j + i, n - 1)));
    vfloat dots[keys][2], sums[keys][2];
    clear(dots);
    for (index_t first = 0; first < dim; first += 32) {
      const index_t last = std::min<index_t>(dim, first + 32);
      clear(sums);
#pragma GCC unroll 1
      for (index_t d = first; d < last; d += unrolled) {
#pragma GCC unroll 4
        for (index_t u = d; u < d + unrolled; ++u) {
          const vfloat q0 = load_once(q + u * panel), q1 = load_once(q + u * panel + lanes);
#pragma GCC unroll 8
          for (int i = 0; i < keys; ++i) {
            const vfloat kd = broadcast(key[i][u]);
            sums[i][0] = add_product(sums[i][0], q0, kd);
            sums[i][1] = add_product(sums[i][1], q1, kd);
          }
        }
      }
      add(dots, sums);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * keys; ++i) store(logits + j * panel + i * lanes, dots[i / 2][i % 2]);
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

template <class V, int Rows, int Vectors, int Width = width_of<Rows>>
[[gnu::noinline]] void add_values(const float* weights, tile_rows v, index_t offset, index_t n, index_t column,
                                  const running_states& to, tile_rows next = {}) noexcept {
  constexpr index_t strip = Vectors * lanes * V::element_bytes;
  constexpr bool of_panel = Width != width_of<Rows>;
  constexpr index_t unrolled = of_panel ? 4 : 1;  // with prefetches among them, g++ 12 is slower with more
  const std::byte* value = v.data + column * V::element_bytes;
  const bool neighbours = next.stride == next.bytes;
  const index_t step = neighbours ? strip : next.stride;
  index_t ahead = column * V::element_bytes * (neighbours ? n : 1);
  vfloat tile[Rows][Vectors], sums[Rows][Vectors];
  const auto add_key = [&]() __attribute__((always_inline)) {
    if constexpr (!of_panel) {
#pragma GCC unroll 8
      for (index_t line = 0; line < strip; line += 64) prefetch(next.data, ahead + line);
      ahead += step;
    }
    vfloat vc[Vectors], weight[Rows];  // only the fewer of them fit the registers all at once
    if constexpr (Rows > Vectors) {
#pragma GCC unroll 8
      for (int c = 0; c < Vectors; ++c) vc[c] = load_vector<V>(value, c, Vectors);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        weight[r] = broadcast(weights[r]);
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; ++c) sums[r][c] = add_product(sums[r][c], vc[c], weight[r]);
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) weight[r] = broadcast(weights[r]);
#pragma GCC unroll 8
      for (int c = 0; c < Vectors; ++c) {
        vc[c] = load_vector<V>(value, c, Vectors);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sums[r][c] = add_product(sums[r][c], vc[c], weight[r]);
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

// Calls f<Rows>(row, group) for groups of up to four of `count` rows.
template <class F>
void in_groups(index_t count, const F& f) {
  index_t group = 0;
  for (index_t row = 0; row < count; ++group) {
    const index_t left = count - row;
    if (left % 4 == 0)
      f.template operator()<4>(row, group), row += 4;
    else if (left >= 3)
      f.template operator()<3>(row, group), row += 3;
    else if (left == 2)
      f.template operator()<2>(row, group), row += 2;
    else
      f.template operator()<1>(row, group), row += 1;
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
