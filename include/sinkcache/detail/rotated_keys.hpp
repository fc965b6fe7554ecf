#pragma once

// Keys that are stored as they were before rope, rotated by their places modulo 64 as they are loaded. What is left of
// a place is a multiple of 64, by which a few queries are rotated, or the keys of a tile that many queries meet.

#include <algorithm>
#include <cstring>

#include "macros_off.hpp"
#include "tile_dots.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// What keys of a part are rotated with.
struct key_rotations {
  const rope& of;
  const float* table;              // rope::rank_angles
  const row_transform* transform;  // that is undone first; null: none

  static position_t base_of(position_t place) { return place & -position_t{rope::num_ranks}; }
  const float* row(position_t place) const {
    return table + static_cast<index_t>(place % rope::num_ranks) * of.rank_floats();
  }
  bool interleaved() const { return of.pairing() == rope_pairing::interleaved; }
  // Whether the pairs of a row fill vectors.
  bool in_vectors() const { return of.width() % (2 * lanes) == 0; }
};
// Where cosines lie in a row of the table; sines follow after sixteen.
[[gnu::always_inline]] inline index_t in_table(index_t pair) { return lanes == 16 ? 2 * pair : 2 * pair - pair % 16; }

// Query rows that keys are rotated for at a time: as many as there are registers for the sums of.
inline constexpr int rows_together = cpu.registers == 32 ? 8 : 4;

// `count` rows, rotated back by these angles, as rotated_dot_products reads them: the two halves of pairs by turns,
// then what is not rotated.
inline void pack_rotated_back(const key_rotations& rotations, const rope::angles& back, const float* rows,
                              index_t count, index_t dim, float* to) noexcept {
  const index_t width = rotations.of.width(), pairs = width / 2;
  const bool interleaved = rotations.interleaved();
  in_groups<rows_together>(count, [&]<int Rows>(index_t first, index_t) {
    for (int r = 0; r < Rows; ++r) {
      const float* const row = rows + (first + r) * dim;
      float* const packed = to + first * dim + r * lanes;
      for (index_t p = 0; p < pairs; p += lanes) {
        vfloat a, b;
        if (interleaved) {
          const vfloat x = load(row + 2 * p), y = load(row + 2 * p + lanes);
          a = every_second<0>(x, y), b = every_second<1>(x, y);
        } else {
          a = load(row + p), b = load(row + p + pairs);
        }
        const vfloat c = load(back.cos + p), s = load(back.sin + p);
        store(packed + 2 * p * Rows, a * c + b * s);
        store(packed + (2 * p + lanes) * Rows, b * c - a * s);
      }
      for (index_t d = width; d < dim; d += lanes) store(packed + d * Rows, load(row + d));
    }
  });
}

// logits[j][r] = q[r] . k[j], where the keys k, the first of them at `place`, are rotated on the way; all n have the
// same multiple of 64 below them. Behind the n-th key the last one repeats. The tile's values are prefetched meanwhile.
// With a Width, all dim are so many and are rotated: loops that know their length.
template <class K, int Rows, bool Interleaved, int Width = 0>
[[gnu::noinline]] void rotated_dot_products(const float* q, index_t dim, const key_rotations& rotations,
                                            position_t place, tile_rows k, index_t n, tile_rows v,
                                            float* logits) noexcept {
  constexpr int keys = Rows == 8 || (Rows == 4 && cpu.registers < 32) ? 2 : 4, together = Rows == 1 ? 1 : 2;
  constexpr index_t bytes = K::element_bytes;
  const index_t width = Width > 0 ? Width : rotations.of.width(), pairs = width / 2, table_step = round_up(width, 32);
  const float* const table = rotations.row(place);
  if (Width > 0) dim = Width;
  for (index_t j = 0; j < n; j += keys) {
    vfloat sums[keys][Rows];
    clear(sums);
#pragma GCC unroll 4
    for (int first = 0; first < keys; first += together) {
      const std::byte* key[together];
      const float* angles[together];
#pragma GCC unroll 2
      for (int i = 0; i < together; ++i) {
        const index_t number = std::min(j + first + i, n - 1);
        key[i] = k.row(number), angles[i] = table + number * table_step;
        for (index_t line = 0; line < v.bytes; line += 64) prefetch_line(v.data, number * v.stride + line);
      }
      const auto add_vector = [&](const float* q_d, const vfloat(&of_keys)[together]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const vfloat of_row = load_once(q_d + r * lanes);
#pragma GCC unroll 2
          for (int i = 0; i < together; ++i) sums[first + i][r] = add_product(sums[first + i][r], of_keys[i], of_row);
        }
      };
#pragma GCC unroll 4
      for (index_t p = 0; p < pairs; p += lanes) {
        vfloat rotated[2][together];
#pragma GCC unroll 2
        for (int i = 0; i < together; ++i) {
          vfloat a, b;
          if constexpr (Interleaved) {
            const vfloat x = K::load(key[i] + 2 * p * bytes), y = K::load(key[i] + (2 * p + lanes) * bytes);
            a = every_second<0>(x, y), b = every_second<1>(x, y);
          } else {
            a = K::load(key[i] + p * bytes), b = K::load(key[i] + (p + pairs) * bytes);
          }
          const vfloat c = load_once(angles[i] + in_table(p)), s = load_once(angles[i] + in_table(p) + 16);
          rotated[0][i] = a * c - b * s;
          rotated[1][i] = b * c + a * s;
        }
        add_vector(q + 2 * p * Rows, rotated[0]);
        add_vector(q + (2 * p + lanes) * Rows, rotated[1]);
      }
#pragma GCC unroll 1
      for (index_t d = width; d < dim; d += lanes) {
        vfloat as_it_is[together];
#pragma GCC unroll 2
        for (int i = 0; i < together; ++i) as_it_is[i] = K::load(key[i] + d * bytes);
        add_vector(q + d * Rows, as_it_is);
      }
    }
    joined_sums<vfloat, keys, Rows> joined;
#pragma GCC unroll 4
    for (int step = 0; step < joined.steps; ++step) joined.step(step, sums);
    if constexpr (Rows == 8) {
#pragma GCC unroll 4
      for (int i = 0; i < 2 * keys; ++i)
        std::memcpy(logits_of(logits, i % 2) + (j + i / 2) * 4, &joined.dots[i], sizeof joined.dots[i]);
    } else {
      joined.put(logits + j * Rows, Rows, false);
    }
  }
}

// The rotated_dots of a kv_reader. Logits from number `done` of each group on.
template <class K>
void rotated_group_dots(const float* packed, index_t count, index_t dim, const key_rotations& rotations,
                        position_t place, tile_rows k, index_t n, tile_rows next, index_t done,
                        float* logits) noexcept {
  in_groups<rows_together>(count, [&]<int Rows>(index_t r, index_t group) {
    float* const to = logits_of(logits, group) + done * std::min(Rows, 4);
    const auto multiply = [&]<bool Interleaved, int Width = 0>() {
      rotated_dot_products<K, Rows, Interleaved, Width>(packed + r * dim, dim, rotations, place, k, n, next, to);
    };
    if (rotations.interleaved()) return multiply.template operator()<true>();
    if constexpr (Rows == 1 || Rows == 8) {
      if (dim == 64 && rotations.of.width() == 64) return multiply.template operator()<false, 64>();
      if (dim == 128 && rotations.of.width() == 128) return multiply.template operator()<false, 128>();
    }
    multiply.template operator()<false>();
  });
}

// The rows of a part from number `first` on as they were before rope, as floats [n, round_up(dim, 16)].
inline tile_rows unrotated_rows(const kv_part& part, index_t dim, index_t first, index_t n,
                                const key_rotations& rotations, float* to) noexcept {
  const index_t stride = round_up(dim, 16);
  const tile_rows rows = decoded_rows(part.k, tile_runs(part, first, n), dim, stride, to);
  for (index_t i = 0; rotations.transform != nullptr && i < n; ++i) rotations.transform->undo(to + i * stride, dim);
  return rows;
}

// The same, rotated by their places modulo 64, the first of them at `place`.
inline tile_rows rotated_rows(const kv_part& part, index_t dim, index_t first, index_t n,
                              const key_rotations& rotations, position_t place, float* to) noexcept {
  const tile_rows rows = unrotated_rows(part, dim, first, n, rotations, to);
  const index_t stride = round_up(dim, 16);
  rope::angles by;
  for (index_t i = 0; i < n; ++i) {
    const float* const row = rotations.row(place + i);
    for (index_t p = 0; p < rotations.of.width() / 2; p += 16) {
      std::copy_n(row + 2 * p, 16, by.cos + p);
      std::copy_n(row + 2 * p + 16, 16, by.sin + p);
    }
    rotations.of.rotate(by, to + i * stride, rotations.of.width(), to + i * stride);
  }
  return rows;
}

// The same, rotated by their whole places: for a tile that many rows of queries meet.
inline tile_rows placed_rows(const kv_part& part, index_t dim, index_t first, index_t n, const key_rotations& rotations,
                             position_t place, float* to) noexcept {
  const tile_rows rows = rotated_rows(part, dim, first, n, rotations, place, to);
  rope::angles rest;
  for (index_t i = 0; i < n; ++i) {
    float* const row = to + i * round_up(dim, 16);
    if (i == 0 || (place + i) % rope::num_ranks == 0)
      rotations.of.angles_at(key_rotations::base_of(place + i), false, rest);
    rotations.of.rotate(rest, row, rotations.of.width(), row);
  }
  return rows;
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
