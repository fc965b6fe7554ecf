#pragma once

// Which rows leave: the top of the scores stays, whoever made them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "../scorer.hpp"
#include "macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// A row that may leave.
struct candidate {
  float score;
  std::int32_t kv_head, row;
  position_t at;
};

// Whether a is worth more than b: by score, NaN lowest; of equal ones the younger, then the lower KV head.
inline bool worth_more(const candidate& a, const candidate& b) noexcept {
  const bool a_known = a.score == a.score, b_known = b.score == b.score;
  if (a_known != b_known) return a_known;
  if (a_known && a.score != b.score) return a.score > b.score;
  if (a.at != b.at) return a.at > b.at;
  return a.kv_head < b.kv_head;
}

// Puts the n that are worth most first, and marks the rows of the others.
inline void keep_best(std::span<candidate> candidates, index_t n, std::uint8_t* leaves) noexcept {
  const auto kept = candidates.begin() + std::clamp<index_t>(n, 0, static_cast<index_t>(candidates.size()));
  std::nth_element(candidates.begin(), kept, candidates.end(), worth_more);
  for (auto c = kept; c != candidates.end(); ++c) leaves[c->row] = 1;
}

// Marks rows that stay for ever: sinks, and positions that were pinned.
inline void mark_pinned(std::span<const position_t> at, index_t num_sink_tokens, std::span<const position_t> pins,
                        std::uint8_t* pinned) noexcept {
  for (const position_t position : at)
    *pinned++ = position < num_sink_tokens || std::binary_search(pins.begin(), pins.end(), position) ? 1 : 0;
}

// What takes away a mass m from a head's weights moves its output by at most this (decision: 2 m / (1 - m) max|v|).
inline double largest_change(double mass, double max_value) noexcept {
  if (mass <= 0) return 0;
  return mass < 1 ? 2 * mass / (1 - mass) * max_value : std::numeric_limits<double>::infinity();
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
