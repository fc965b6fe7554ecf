#pragma once

// Dot products of query rows with the keys of a tile.

#include <algorithm>
#include <cstring>

#include "macros_off.hpp"
#include "tile.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// The vectors that keys of a format K are multiplied in.
template <class K>
struct key_vector_of {
  using type = std::conditional_t<in_eights<K>, voct, vfloat>;
};
template <class K>
requires requires { typename K::key_vector; }
struct key_vector_of<K> {
  using type = typename K::key_vector;
};
template <class K>
using key_vector = typename key_vector_of<K>::type;

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
        store(packed + d * Rows, every_second<0>(a, b));
        store(packed + (d + lanes) * Rows, every_second<1>(a, b));
      }
    for (; d < dim; d += width) store(packed + d * Rows, load<vector>(row + d));
  }
}

// `count` rows as dot_products reads them, group by group, in `to`.
template <class K>
const float* packed_rows(const float* rows, index_t count, index_t dim, float* to) noexcept {
  in_groups(count, [&]<int Rows>(index_t r, index_t) { pack_rows<K, Rows>(rows + r * dim, dim, to + r * dim); });
  return to;
}

// The sums across vectors, four vectors a quad: four steps, of which the last gives the dot products [keys, Rows].
template <class V, int Keys, int Rows>
struct joined_sums {
  static constexpr int quads = Keys * Rows / 4, steps = 4;

  using quad = decltype(sums_of_lanes(V{}));

  V joined[quads][2];
  quad dots[quads];

  [[gnu::always_inline]] void step(int number, const V (&sums)[Keys][Rows]) noexcept {
    const auto sum = [&](int i) { return sums[i / Rows][i % Rows]; };
#pragma GCC unroll 4
    for (int i = 0; i < quads; ++i) {
      if (number < 2)
        joined[i][number] = join_pair(sum(4 * i + 2 * number), sum(4 * i + 2 * number + 1));
      else if (number == 2)
        joined[i][0] = join_pairs(joined[i][0], joined[i][1]);
      else
        dots[i] = sums_of_lanes(joined[i][0]);
    }
  }

  // To the logits of keys `key_step` floats apart. Three rows take a float more, which the next key's overwrite, unless
  // these are the last.
  [[gnu::always_inline]] void put(float* logits, index_t key_step, bool last) const noexcept {
    if constexpr (Rows == 3) {
      static_assert(Keys == 4);  // which three quads hold
      const quad a = dots[0], b = dots[1], c = dots[2];
      const quad keys[] = {a, __builtin_shufflevector(a, b, 3, 4, 5, 6), __builtin_shufflevector(b, c, 2, 3, 4, 5),
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

// Prefetches values while the keys of a tile are multiplied: as many rows as there are keys at a time, a line of each
// for a line of keys. Three come from as many parts of the tile; more are neighbours, which are read line by line if
// they lie one after the other: a line of each row at a time takes up to 1.2 times as long from memory.
template <int Keys>
class value_prefetcher {
 public:
  // `lines` of each key.
  value_prefetcher(tile_rows values, index_t n, index_t lines) : at_(values.data), across_(values.stride) {
    index_t turn = Keys * values.stride;
    if (Keys == 3)
      turn = values.stride, across_ = (n + 2) / 3 * values.stride;
    else if (values.stride == values.bytes)
      along_ = Keys * 64, across_ = 64;
    to_next_keys_ = turn - lines * along_;
  }
  // The i-th of the lines that go with a line of the keys.
  [[gnu::always_inline]] void operator()(int i) const noexcept {
    if (i < Keys) prefetch_line(at_, i * across_);
  }
  [[gnu::always_inline]] void next_line() noexcept { at_ = moved(at_, along_); }
  [[gnu::always_inline]] void next_keys() noexcept { at_ = moved(at_, to_next_keys_); }

 private:
  const std::byte* at_;
  index_t along_ = 64, across_, to_next_keys_;
};

// logits[j][r] = q[r] . k[j], for Rows rows, from packed_rows, and a few keys at a time. Behind the n-th key the last
// one repeats. The keys come from as many parts of the tile, streams that hardware prefetches better than neighbours;
// the tile's values are prefetched meanwhile.
template <class K, int Rows>
[[gnu::noinline]] void dot_products(const float* q, index_t dim, tile_rows k, index_t n, tile_rows v,
                                    float* logits) noexcept {
  using vector = key_vector<K>;
  constexpr int keys = cpu.keys_of(Rows, K::element_bytes == 4 || in_pairs<K> || in_integers<vector>),
                width = width_of<vector>;
  constexpr index_t line = 64 / K::element_bytes;
  constexpr index_t chunk = in_integers<vector> ? width : in_pairs<K> ? std::max(16, 2 * lanes) : 16;
  const index_t part = (n + keys - 1) / keys;
  value_prefetcher<keys> values(v, n, (dim + line - 1) / line);
  const std::byte* key[keys];
  vector sums[keys][Rows], before[keys][Rows];
  joined_sums<vector, keys, Rows> joined;
  const auto add_vector = [&](index_t d, int i, int count, const auto& prefetch) __attribute__((always_inline)) {
    const float* const q_d = q + (d + i * width) * Rows;
#if defined(__x86_64__) && defined(__clang__)
    if (i % 2 == 1) asm("" : "+r"(d));  // or it loads both vectors of a key at once, and spills
#endif
    add_products(
        sums,
        [&](int j)
            __attribute__((always_inline)) { return load_vector<K, vector>(key[j] + d * K::element_bytes, i, count); },
        [&](int r) __attribute__((always_inline)) { return load_once<vector>(q_d + r * width); }, prefetch);
  };
  // The elements [d, d + chunk), fewer at the end.
  const auto add_chunk = [&](index_t d, const auto& prefetch) __attribute__((always_inline)) {
    if (chunk <= 16 || d + 16 < dim) {
      constexpr int count = chunk / width;
      add_vector(d, 0, count, prefetch);
#pragma GCC unroll 4
      for (int i = 1; i < count; ++i) add_vector(d, i, count, no_prefetch{});
    } else {
      add_vector(d, 0, 1, prefetch);
    }
  };
  // The same, and with the first of a line what is to be prefetched: among its products, for in a burst it holds up the
  // keys, or before them, where sums take all registers.
  const auto add = [&](index_t d) __attribute__((always_inline)) {
    const bool first = line <= chunk || d % line == 0;
    if (cpu.joins_late && first) {
      add_chunk(d, values);
    } else {
      if (first)
#pragma GCC unroll 8
        for (int i = 0; i < keys; ++i) values(i);
      add_chunk(d, no_prefetch{});
    }
    if (first) values.next_line();
  };
  const auto join = [&](const auto& of, bool last) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int step = 0; step < joined.steps; ++step) joined.step(step, of);
    joined.put(logits, part * Rows, last);
  };
  clear(before);
  for (index_t j = 0; j < part; ++j) {
    if (j == 0 || j + (keys - 1) * part >= n)
#pragma GCC unroll 8
      for (int i = 0; i < keys; ++i) key[i] = k.row(std::min(j + i * part, n - 1));
    clear(sums);
    index_t d = 0;
    if constexpr (cpu.joins_late) {
#pragma GCC unroll 4
      for (int step = 0; step < joined.steps; ++step, d += std::min<index_t>(16, chunk)) {
        if (d % chunk == 0 && d < dim) add(d);
        joined.step(step, before);
      }
      joined.put(logits, part * Rows, false);
      if (j > 0) logits += Rows;  // at first they were zeros, which do not stay
    }
#pragma GCC unroll 1
    for (; d < dim; d += chunk) add(d);
#pragma GCC unroll 8
    for (int i = 0; i < keys; ++i) key[i] += k.stride;
    values.next_keys();
    if constexpr (cpu.joins_late)
      copy(before, sums);
    else
      join(sums, j + 1 == part), logits += Rows;
  }
  if constexpr (cpu.joins_late) join(before, true);
}

// logits[j][r] = q[r] . k[j] for a panel of rows, a few keys at a time: their sums, and the sums of those, take the
// registers. 32 products are summed by themselves. Behind the n-th key the last one repeats.
[[gnu::noinline]] inline void panel_dot_products(const float* q, index_t dim, tile_rows k, index_t n,
                                                 float* logits) noexcept {
  constexpr index_t panel = query_rows::panel;
  constexpr int keys = cpu.panel_keys;
  for (index_t j = 0; j < n; j += keys) {
    const float* key[keys];
#pragma GCC unroll 8
    for (int i = 0; i < keys; ++i) key[i] = reinterpret_cast<const float*>(k.row(std::min(j + i, n - 1)));
    vfloat dots[keys][2], sums[keys][2];
    clear(dots);
    for (index_t first = 0; first < dim; first += 32) {
      const index_t last = std::min<index_t>(dim, first + 32);
      clear(sums);
#pragma GCC unroll 4
      for (index_t d = first; d < last; ++d)
        add_products(
            sums, [&](int i) __attribute__((always_inline)) { return broadcast(key[i][d]); },
            [&](int part) __attribute__((always_inline)) { return load_once(q + d * panel + part * lanes); },
            no_prefetch{});
      add(dots, sums);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * keys; ++i) store(logits + j * panel + i * lanes, dots[i / 2][i % 2]);
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
