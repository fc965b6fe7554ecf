#pragma once

// The softmax of a tile: logits [keys, rows of a group or panel] become weights, and a row's maximum and denominator
// grow.

#include <algorithm>
#include <cstring>
#include <limits>

#include "macros_off.hpp"
#include "tile.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// How a tile's logits [keys, Rows] lie in vectors, and what there is one of for each row.
template <int Rows>
struct row_lanes {
  // Vectors after which rows lie as in the first, the keys that they hold, and vectors of one value a row.
  static constexpr int vectors = Rows > lanes ? Rows / lanes : (Rows == 3 ? 3 : 1);
  static constexpr int keys = vectors * lanes / Rows, row_vectors = Rows > lanes ? vectors : 1;

  // One value a row, in the first lanes or all those of the row; may read up to four.
  static void load_rows(const float* from, vfloat (&to)[row_vectors]) noexcept {
    if constexpr (Rows == 1)
      to[0] = broadcast(*from);
    else if constexpr (Rows == 3)
      to[0] = repeated<4>(from);
    else if constexpr (Rows < lanes)
      to[0] = repeated<Rows>(from);
    else
      for (int i = 0; i < row_vectors; ++i) to[i] = load(from + i * lanes);
  }
  // The same in all lanes of the row.
  static void spread(const vfloat (&rows)[row_vectors], vfloat (&to)[vectors]) noexcept {
    if constexpr (Rows == 3) {
      to[0] = repeated<3>(rows[0]);
      to[1] = repeated<3, lanes>(rows[0]);
      to[2] = repeated<3, 2 * lanes>(rows[0]);
    } else {
      for (int i = 0; i < vectors; ++i) to[i] = rows[i];
    }
  }
  // Joins `lanes` keys into one value a row, halves first: in the same order whatever Rows.
  template <class F>
  static vfloat join(vfloat (&of)[Rows], const F& f) noexcept {
    if constexpr (Rows == 3) {
      const vfloat half = f(of[0], from_lane<lanes / 2>(of[1], of[2]));
      const vfloat rest = f(of[1], from_lane<lanes / 2>(of[2], of[2]));
      const vfloat quarter = f(half, from_lane<3 * lanes / 4>(half, rest));
      return join_lanes<3, 3 * lanes / 8>(quarter, f);
    } else {
#pragma GCC unroll 4
      for (int half = Rows / 2; half > 0; half /= 2)
#pragma GCC unroll 4
        for (int part = 0; part < half; ++part) of[part] = f(of[part], of[part + half]);
      return join_lanes<Rows>(of[0], f);
    }
  }
  // Calls f(row, its logits for `lanes` keys) of up to four rows.
  template <class F>
  static void for_rows(const vfloat (&of)[Rows], const F& f) noexcept {
    if constexpr (Rows == 1) {
      f(0, of[0]);
    } else if constexpr (Rows == 2) {
      f(0, every_second<0>(of[0], of[1]));
      f(1, every_second<1>(of[0], of[1]));
    } else if constexpr (Rows == 3) {
      f(0, every_third<0>(of));
      f(1, every_third<1>(of));
      f(2, every_third<2>(of));
    } else {
      const vfloat even[] = {every_second<0>(of[0], of[1]), every_second<0>(of[2], of[3])};
      const vfloat odd[] = {every_second<1>(of[0], of[1]), every_second<1>(of[2], of[3])};
      f(0, every_second<0>(even[0], even[1]));
      f(1, every_second<0>(odd[0], odd[1]));
      f(2, every_second<1>(even[0], even[1]));
      f(3, every_second<1>(odd[0], odd[1]));
    }
  }
  // The keys' numbers, from 0 on.
  static void key_numbers(vfloat (&to)[vectors]) noexcept {
    alignas(64) float numbers[vectors * lanes];
    for (int i = 0; i < vectors * lanes; ++i)
      numbers[i] = static_cast<float>(i / Rows);  // NOLINT(bugprone-integer-division)
    for (int i = 0; i < vectors; ++i) to[i] = load(numbers + i * lanes);
  }
};

// Soft cap, ALiBi and sink bias of Rows rows' logits for the keys [first, first + n).
template <int Rows>
void adjust_logits(const query_rows& rows, index_t row, const extent* extents, position_t first, index_t n,
                   float* logits) noexcept {
  using lanes_of = row_lanes<Rows>;
  constexpr int vectors = lanes_of::vectors;
  const index_t all = round_up(n, lanes_of::keys) * Rows;
  if (const float cap = rows.soft_cap; cap > 0) {
    const float inverse = std::min(1 / cap, std::numeric_limits<float>::max());  // 0 times it has to be 0
    for (index_t i = 0; i < all; i += lanes) store(logits + i, scaled_tanh(load(logits + i) * inverse, cap));
  }
  if (rows.terms == nullptr) return;
  float slope[std::max(Rows, 4)] = {}, bias[Rows] = {}, nearest[std::max(Rows, 4)] = {};
  for (int r = 0; r < Rows && row + r < rows.rows; ++r) {
    const logit_terms& terms = rows.terms[row + r];
    slope[r] = terms.alibi_slope;
    bias[r] = terms.sink_bias;
    nearest[r] = static_cast<float>(first - (terms.query - extents[row + r].gap));
  }
  vfloat of_rows[lanes_of::row_vectors], slopes[vectors], from[vectors], key[vectors];
  lanes_of::load_rows(slope, of_rows);
  lanes_of::spread(of_rows, slopes);
  lanes_of::load_rows(nearest, of_rows);
  lanes_of::spread(of_rows, from);
  lanes_of::key_numbers(key);
  for (index_t i = 0; i < all; i += vectors * lanes)
    for (int part = 0; part < vectors; ++part) {
      float* const at = logits + i + part * lanes;
      store(at, load(at) + slopes[part] * (from[part] + key[part]));
      key[part] += static_cast<float>(lanes_of::keys);
    }
  const index_t pinned = static_cast<index_t>(std::clamp<position_t>(rows.num_sink_tokens - first, 0, n));
  for (index_t j = 0; j < pinned; ++j)
    for (int r = 0; r < Rows; ++r) logits[j * Rows + r] += bias[r];
}

// Turns the logits of Rows rows for n keys, from number `offset` of a tile on, into weights relative to their new
// maxima, and brings d along; scale: what o has to be multiplied with.
template <int Rows>
void weigh(float* logits, index_t offset, index_t n, const running_states& to, float* scale) noexcept {
  using lanes_of = row_lanes<Rows>;
  constexpr int vectors = lanes_of::vectors, row_vectors = lanes_of::row_vectors;
  constexpr bool few = Rows <= 4;
  // A few rows: `lanes` keys at a time, and a chain each, or every maximum waits for the one before.
  constexpr int chains = few ? Rows : vectors;
  const index_t used = n * Rows, all = few ? round_up(n, lanes) * Rows : used;
  for (index_t i = used; i < all; ++i) logits[i] = no_logit;
  vfloat largest[chains], subtract[row_vectors], old_max[row_vectors], factor[row_vectors];
#pragma GCC unroll 4
  for (int i = 0; i < chains; ++i) largest[i] = load(logits + i * lanes);
  for (index_t first = chains * lanes; first < all; first += chains * lanes)
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) largest[i] = max(largest[i], load(logits + first + i * lanes));
  if constexpr (few) largest[0] = lanes_of::join(largest, [](vfloat a, vfloat b) { return max(a, b); });
  lanes_of::load_rows(to.m, old_max);
  for (int part = 0; part < row_vectors; ++part) {
    // A whole number, so that no later change of it rounds what was summed.
    const vfloat new_max = max(ceil(largest[part]), old_max[part]);
    subtract[part] = new_max == broadcast(no_logit) ? vfloat{} : new_max;  // logits of -inf alone: weights 0, not NaN
    // Where nothing was summed yet there is nothing to scale.
    const vfloat from = old_max[part] == broadcast(no_logit) ? new_max : old_max[part];
    factor[part] = exp2_nonpositive(from == new_max ? vfloat{} : from - new_max);
    largest[part] = new_max;
  }
  vfloat maximum[vectors], sum[row_vectors] = {};
  lanes_of::spread(subtract, maximum);
  const auto to_weight = [&](index_t i, int part) {
    const vfloat w = exp2_nonpositive(load(logits + i) - maximum[part]);
    store(logits + i, w);
    return w;
  };
  if constexpr (few) {
    // Keys `lanes` apart are summed first, then halves: the same whatever Rows.
    vfloat sums[Rows];
#pragma GCC unroll 4
    for (int part = 0; part < Rows; ++part) sums[part] = to_weight(part * lanes, part % vectors);
    for (index_t i = Rows * lanes; i < all; i += Rows * lanes)
#pragma GCC unroll 4
      for (int part = 0; part < Rows; ++part) sums[part] += to_weight(i + part * lanes, part % vectors);
    sum[0] = lanes_of::join(sums, [](vfloat a, vfloat b) { return a + b; });
  } else {
    // Sixteen keys first, by their numbers in the tile; one vector after the other, or clang 14 sums in memory.
    for (index_t first = 0, some; first < all; first = some) {
      some = std::min(all, first + (16 - (offset + first / Rows) % 16) * Rows);
      for (int part = 0; part < vectors; ++part) {
        vfloat some_sum{};
        for (index_t i = first; i < some; i += Rows) some_sum += to_weight(i + part * lanes, part);
        sum[part] += some_sum;
      }
    }
  }
  vfloat old_d[row_vectors], old_rest[row_vectors];
  lanes_of::load_rows(to.d, old_d);
  lanes_of::load_rows(to.d_rest, old_rest);
  for (int part = 0; part < row_vectors; ++part) {
    const vfloat old = old_d[part] * factor[part], new_d = old + sum[part];
    const vfloat rest = old_rest[part] * factor[part] + (sum[part] - (new_d - old));
    constexpr std::size_t bytes = std::min(Rows, lanes) * sizeof(float);
    std::memcpy(to.m + part * lanes, &largest[part], bytes);
    std::memcpy(to.d + part * lanes, &new_d, bytes);
    std::memcpy(to.d_rest + part * lanes, &rest, bytes);
    std::memcpy(scale + part * lanes, &factor[part], bytes);
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
