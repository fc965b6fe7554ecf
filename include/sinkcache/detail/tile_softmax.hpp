#pragma once

// The softmax of a tile: logits [keys, rows of a group or panel] become weights, and a row's maximum and denominator
// grow.

#include <algorithm>
#include <cstring>
#include <limits>

#include "tile.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// Lanes of a tile's logits [keys, Width] that one vector, or the several of one key, hold.
template <int Width>
struct row_lanes {
  static constexpr int vectors = Width > lanes ? Width / lanes : 1, keys = Width < lanes ? lanes / Width : 1;

  // One value a row in all lanes of the row; may read up to four.
  static void spread(const float* from, vfloat (&to)[vectors]) noexcept {
    if constexpr (Width == 1)
      to[0] = broadcast(*from);
    else if constexpr (Width < lanes)
      to[0] = repeated<Width>(from);
    else
      for (int i = 0; i < vectors; ++i) to[i] = load(from + i * lanes);
  }
  // The keys' numbers, from 0 on.
  static vfloat key_numbers() noexcept {
    alignas(64) float numbers[lanes];
    for (int i = 0; i < lanes; ++i) numbers[i] = static_cast<float>(i / Width);  // NOLINT(bugprone-integer-division)
    return load(numbers);
  }
};

// Soft cap, ALiBi and sink bias of Rows rows' logits for the keys [first, first + n).
template <int Rows, int Width = width_of<Rows>>
void adjust_logits(const query_rows& rows, index_t row, const extent* extents, position_t first, index_t n,
                   float* logits) noexcept {
  using lanes_of = row_lanes<Width>;
  const index_t all = round_up(n * Width, lanes);
  if (const float cap = rows.soft_cap; cap > 0) {
    const float inverse = std::min(1 / cap, std::numeric_limits<float>::max());  // 0 times it has to be 0
    for (index_t i = 0; i < all; i += lanes) store(logits + i, scaled_tanh(load(logits + i) * inverse, cap));
  }
  if (rows.terms == nullptr) return;
  float slope[std::max(Width, 4)] = {}, bias[Width] = {}, nearest[std::max(Width, 4)] = {};
  for (int r = 0; r < Rows && row + r < rows.rows; ++r) {
    const logit_terms& terms = rows.terms[row + r];
    slope[r] = terms.alibi_slope;
    bias[r] = terms.sink_bias;
    nearest[r] = static_cast<float>(first - (terms.query - extents[row + r].gap));
  }
  vfloat slopes[lanes_of::vectors], from[lanes_of::vectors], key = lanes_of::key_numbers();
  lanes_of::spread(slope, slopes);
  lanes_of::spread(nearest, from);
  for (index_t i = 0; i < all; i += lanes_of::vectors * lanes, key += static_cast<float>(lanes_of::keys))
    for (int part = 0; part < lanes_of::vectors; ++part) {
      float* const at = logits + i + part * lanes;
      store(at, load(at) + slopes[part] * (from[part] + key));
    }
  const index_t pinned = static_cast<index_t>(std::clamp<position_t>(rows.num_sink_tokens - first, 0, n));
  for (index_t j = 0; j < pinned; ++j)
    for (int r = 0; r < Width; ++r) logits[j * Width + r] += bias[r];
}

// Turns the logits of Rows rows for n keys, from number `offset` of a tile on, into weights relative to their new
// maxima, and brings d along; scale: what o has to be multiplied with.
template <int Rows, int Width = width_of<Rows>>
void weigh(float* logits, index_t offset, index_t n, const running_states& to, float* scale) noexcept {
  using lanes_of = row_lanes<Width>;
  constexpr int vectors = lanes_of::vectors;
  // A few rows: `lanes` keys at a time.
  const index_t used = n * Width, all = vectors == 1 ? round_up(used, Width * lanes) : used;
  for (index_t i = used; i < all; ++i) logits[i] = no_logit;
  constexpr int chains = vectors == 1 ? Width : vectors;  // or every maximum waits for the one before
  vfloat largest[chains], old_max[vectors], subtract[vectors], factor[vectors], sum[vectors] = {};
  for (int i = 0; i < chains; ++i) largest[i] = load(logits + i * lanes);
  for (index_t first = chains * lanes; first < all; first += chains * lanes)
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) largest[i] = max(largest[i], load(logits + first + i * lanes));
  for (int i = vectors; i < chains; ++i) largest[0] = max(largest[0], largest[i]);
  lanes_of::spread(to.m, old_max);
  for (int part = 0; part < vectors; ++part) {
    // A whole number, so that no later change of it rounds what was summed.
    const vfloat tile_max = ceil(join_lanes<Width>(largest[part], [](vfloat a, vfloat b) { return max(a, b); }));
    const vfloat new_max = max(tile_max, old_max[part]);
    subtract[part] = new_max == broadcast(no_logit) ? vfloat{} : new_max;  // logits of -inf alone: weights 0, not NaN
    // Where nothing was summed yet there is nothing to scale.
    const vfloat from = old_max[part] == broadcast(no_logit) ? new_max : old_max[part];
    factor[part] = exp2_nonpositive(from == new_max ? vfloat{} : from - new_max);
    largest[part] = new_max;
  }
  const auto to_weight = [&](index_t i, int part) {
    const vfloat w = exp2_nonpositive(load(logits + i) - subtract[part]);
    store(logits + i, w);
    return w;
  };
  if constexpr (vectors == 1) {
    // Keys `lanes` apart are summed first, then halves: the same whatever the width.
    vfloat sums[Width];
    for (int part = 0; part < Width; ++part) sums[part] = to_weight(part * lanes, 0);
    for (index_t i = Width * lanes; i < all; i += Width * lanes)
#pragma GCC unroll 4
      for (int part = 0; part < Width; ++part) sums[part] += to_weight(i + part * lanes, 0);
    for (int half = Width / 2; half > 0; half /= 2)
      for (int part = 0; part < half; ++part) sums[part] += sums[part + half];
    sum[0] = sums[0];
  } else {
    // Sixteen keys first, by their numbers in the tile; one vector after the other, or clang 14 sums in memory.
    for (index_t first = 0, some; first < all; first = some) {
      some = std::min(all, first + (16 - (offset + first / Width) % 16) * Width);
      for (int part = 0; part < vectors; ++part) {
        vfloat some_sum{};
        for (index_t i = first; i < some; i += Width) some_sum += to_weight(i + part * lanes, part);
        sum[part] += some_sum;
      }
    }
  }
  vfloat old_d[vectors], old_rest[vectors];
  lanes_of::spread(to.d, old_d);
  lanes_of::spread(to.d_rest, old_rest);
  for (int part = 0; part < vectors; ++part) {
    const vfloat tile_d = join_lanes<Width>(sum[part], [](vfloat a, vfloat b) { return a + b; });
    const vfloat old = old_d[part] * factor[part], new_d = old + tile_d;
    const vfloat rest = old_rest[part] * factor[part] + (tile_d - (new_d - old));
    constexpr std::size_t bytes = std::min(Rows, lanes) * sizeof(float);
    std::memcpy(to.m + part * lanes, &largest[part], bytes);
    std::memcpy(to.d + part * lanes, &new_d, bytes);
    std::memcpy(to.d_rest + part * lanes, &rest, bytes);
    std::memcpy(scale + part * lanes, &factor[part], bytes);
  }
}

}  // namespace sinkcache::inline SINKCACHE_TAG::detail
