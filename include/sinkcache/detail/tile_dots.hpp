#pragma once

// Dot products of query rows with the keys of a tile.

#include <algorithm>
#include <cstring>

#include "macros_off.hpp"
#include "tile.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// The vectors that keys of a format K are multiplied in.
template <class K>
using key_vector = std::conditional_t<in_eights<K>, voct, vfloat>;

// Rows [Rows, dim] as [dim / width, Rows, width], so that one address reaches them all, their elements in the order in
// which keys of a format K are loaded, in vectors of so many.
template <class K, int Rows>
void pack_rows(const float* rows, index_t dim, float* to) noexcept {
  using vector = key_vector<K>;
  constexpr int width = width_of<vector>;
  for (int r = 0; r < Rows; ++r) {
    const float* const row = rows + r * dim;
    float* const packed = to + r * width;
    index_t d = 0;
    if constexpr (in_pairs<K>)
      for (; d + 2 * lanes <= dim; d += 2 * lanes) {
        const vfloat a = load(row + d), b = load(row + d + lanes);
        store(packed + d * Rows, every_second<0>(a, b, lane_numbers));
        store(packed + (d + lanes) * Rows, every_second<1>(a, b, lane_numbers));
      }
    for (; d < dim; d += width) store(packed + d * Rows, load<vector>(row + d));
  }
}

// Whether rows are packed for keys of a format K.
template <class K>
inline constexpr bool packed = lanes == 16 || in_pairs<K>;

// `count` rows as dot_products reads them, group by group: packed into `to`, or where they are.
template <class K>
const float* packed_rows(const float* rows, index_t count, index_t dim, float* to) noexcept {
  if constexpr (packed<K>) {
    in_groups(count, [&]<int Rows>(index_t r, index_t) { pack_rows<K, Rows>(rows + r * dim, dim, to + r * dim); });
    return to;
  } else {
    return rows;
  }
}

// Keys at a time: as many sums as hide the latency of an FMA and leave registers for what is multiplied.
template <int Rows>
inline constexpr int keys_of = Rows == 1 ? 8 : (Rows == 4 ? 3 : 4);

// Adds, for a few keys, the products of vector number `vector` of the `of` that begin at d. Calls between(i), i from 0
// to below Keys, at as many places among them.
template <class K, int Rows, int Keys, class V, class Between>
[[gnu::always_inline]] inline void add_products(V (&sums)[Keys][Rows], const float* q, index_t q_step,
                                                const std::byte* const (&key)[Keys], index_t d, int vector, int of,
                                                const Between& between) noexcept {
#if defined(__x86_64__) && defined(__clang__)
  if (vector == 1) asm("" : "+r"(d));  // or it loads both vectors of a key at once, and spills
#endif
  const auto load_key = [&](int i) __attribute__((always_inline)) {
    return load_vector<K, V>(key[i] + d * K::element_bytes, vector, of);
  };
  V qd[Rows], kd[Keys];  // only the fewer of them fit the registers all at once
  if constexpr (Rows > Keys) {
#pragma GCC unroll 8
    for (int i = 0; i < Keys; ++i) kd[i] = load_key(i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      if (r < Keys) between(r);
      qd[r] = load_once<V>(q + r * q_step);
#pragma GCC unroll 4
      for (int i = 0; i < Keys; ++i) sums[i][r] = add_product(sums[i][r], qd[r], kd[i]);
    }
  } else {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) qd[r] = load_once<V>(q + r * q_step);
#pragma GCC unroll 8
    for (int i = 0; i < Keys; ++i) {
      between(i);
      kd[i] = load_key(i);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        sums[i][r] = add_product(sums[i][r], qd[r], kd[i]);
#if defined(__AVX__) && defined(__clang__)
        if (Rows == 3 && K::element_bytes < 4) asm("" : "+v"(sums[i][r]));  // or it moves them round, and spills
#endif
      }
    }
  }
}

// The sums across vectors, four vectors a quad: four steps, of which the last gives the dot products [keys, Rows].
template <class V, int Rows, int Keys>
struct joined_sums {
  static constexpr int quads = std::max(1, Keys*Rows / 4), steps = 4;
  static constexpr std::make_index_sequence<width_of<V>> numbers{};

  V joined[quads][2];
  vquad dots[quads];

  [[gnu::always_inline]] void step(int number, const V (&sums)[Keys][Rows]) noexcept {
    const auto sum = [&](int i) { return i < Keys * Rows ? sums[i / Rows][i % Rows] : V{}; };
#pragma GCC unroll 4
    for (int i = 0; i < quads; ++i) {
      if (number < 2)
        joined[i][number] = join_pair(sum(4 * i + 2 * number), sum(4 * i + 2 * number + 1), numbers);
      else if (number == 2)
        joined[i][0] = join_pairs(joined[i][0], joined[i][1], numbers);
      else
        dots[i] = sums_of_lanes(joined[i][0]);
    }
  }

  // To the logits of keys `key_step` floats apart. Three rows take a float more, which the next key's overwrite, unless
  // these are the last.
  [[gnu::always_inline]] void put(float* logits, index_t key_step, bool last) const noexcept {
    if constexpr (Rows == 3) {
      static_assert(Keys == 4);  // which three quads hold
      const vquad a = dots[0], b = dots[1], c = dots[2];
      const vquad keys[] = {a, __builtin_shufflevector(a, b, 3, 4, 5, 6), __builtin_shufflevector(b, c, 2, 3, 4, 5),
                            __builtin_shufflevector(c, c, 1, 2, 3, 0)};
      if (last) {
        for (int i = 0; i < Keys; ++i) std::memcpy(logits + i * key_step, &keys[i], Rows * sizeof(float));
      } else {
        for (int i = 0; i < Keys; ++i) std::memcpy(logits + i * key_step, &keys[i], sizeof keys[i]);
      }
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < Keys; ++i)
        std::memcpy(logits + i * key_step, reinterpret_cast<const float*>(dots) + i * Rows, Rows * sizeof(float));
    }
  }
};

// logits[j][r] = q[r] . k[j], for Rows rows, from packed_rows, and a few keys at a time. Behind the n-th key the last
// one repeats. The keys come from as many parts of the tile, streams that hardware prefetches better than neighbours;
// the tile's values are brought in meanwhile, from two or three parts.
template <class K, int Rows, int Keys = keys_of<Rows>>
[[gnu::noinline]] void dot_products(const float* q, index_t dim, tile_rows k, index_t n, tile_rows v,
                                    float* logits) noexcept {
  if constexpr (Rows == 1 && Keys > 1)
    if (n == 1) return dot_products<K, 1, 1>(q, dim, k, n, v, logits);  // not eight times the same key
  using vector = key_vector<K>;
  constexpr int width = width_of<vector>;
  // With 32 registers, the sums of the keys before are joined among the products of the next: behind all of them, a
  // processor does not look far enough ahead to begin with those meanwhile.
  constexpr bool late = lanes == 16 && Keys > 1;
  constexpr int together = packed<K> ? Rows : 1;  // NOLINT(bugprone-branch-clone)
  constexpr index_t line = 64 / K::element_bytes;
  constexpr int at_once = in_pairs<K> || in_eights<K> || (lanes == 16 && line == 2 * lanes) ? 2 : 1;
  constexpr index_t unit = at_once * width;
  constexpr int v_parts = Keys % 3 == 0 ? 3 : std::min(Keys, 2), v_rows = Keys / v_parts;
  const index_t part = (n + Keys - 1) / Keys, v_part = (n + v_parts - 1) / v_parts;
  // Three rows of 16-bit keys from memory of their own: why is not known, but many tokens take 0.9 of the time.
  constexpr bool own = Rows == 3 && packed<K> && K::element_bytes < 4;
  alignas(64) float memory[own ? Rows * max_head_dim : 1];
  if constexpr (own) q = std::copy_n(q, Rows * dim, memory) - Rows * dim;
  const std::byte* key[Keys];
  vector sums[Keys][Rows], before[Keys][Rows];
  joined_sums<vector, Rows, Keys> joined;
  const auto add_vectors = [&](index_t d, const auto& between) __attribute__((always_inline)) {
    const auto add_vector = [&](int number, int of) __attribute__((always_inline)) {
      const auto at_first = [&](int i) __attribute__((always_inline)) {
        if (number == 0) between(i);
      };
      add_products<K>(sums, q + (d + number * width) * together, packed<K> ? width : dim, key, d, number, of, at_first);
    };
    if (at_once == 1 || width < 16 || d + lanes < dim)
#pragma GCC unroll 2
      for (int number = 0; number < at_once; ++number) add_vector(number, at_once);
    else
      add_vector(0, 1);
  };
  const auto bring_in = [&](index_t j, index_t first, int i) __attribute__((always_inline)) {
    prefetch(v.data, (i % v_parts * v_part + j * v_rows + i / v_parts) * v.stride + first * K::element_bytes);
  };
  const auto nothing = [](int) {};
  // A line's values come in among its first products: in a burst they hold up the keys.
  const auto add_unit = [&](index_t j, index_t d) __attribute__((always_inline)) {
    const auto bring_in_line = [&](int i) __attribute__((always_inline)) { bring_in(j, d, i); };
    if (unit == line || d % line == 0)
      add_vectors(d, bring_in_line);
    else
      add_vectors(d, nothing);
  };
  const auto add_line = [&](index_t j, index_t first) __attribute__((always_inline)) {
    if (unit == line || (in_eights<K> && first + line <= dim)) {
#pragma GCC unroll 2
      for (index_t d = 0; d < line; d += unit) add_unit(j, first + d);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < Keys; ++i) bring_in(j, first, i);
      const index_t last = std::min(dim, first + line);
#pragma GCC unroll 1
      for (index_t d = first; d < last; d += unit) add_vectors(d, nothing);
    }
  };
  const auto join_all = [&](index_t j) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int step = 0; step < joined.steps; ++step) joined.step(step, before);
    joined.put(logits + j * Rows, part * Rows, j + 1 == part);
  };
  clear(before);
  for (index_t j = 0; j < part; ++j) {
    if (j == 0 || j + (Keys - 1) * part >= n)
#pragma GCC unroll 8
      for (int i = 0; i < Keys; ++i) key[i] = k.row(std::min(j + i * part, n - 1));
    clear(sums);
    if constexpr (late) {
#pragma GCC unroll 4
      for (int step = 0; step < joined.steps; ++step) {
        if (step * lanes % unit == 0 && step * lanes < dim) add_unit(j, step * lanes);
        joined.step(step, before);
      }
      joined.put(logits + (j == 0 ? 0 : j - 1) * Rows, part * Rows, false);  // at first zeros, which do not stay
    }
    for (index_t first = late ? joined.steps * lanes : 0; first < dim; first += line) add_line(j, first);
#pragma GCC unroll 8
    for (int i = 0; i < Keys; ++i) key[i] += k.stride;
    copy(before, sums);
    if constexpr (!late) join_all(j);
  }
  if constexpr (late) join_all(part - 1);
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

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "macros_on.hpp"
