#pragma once

#include <sinkcache/format.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace proof {

using sinkcache::index_t;

// A row and its own scale, eight bits an element: a format that is only loaded.
struct scaled_row {
  static constexpr index_t block_rows = 1;
  static constexpr index_t block_bytes(index_t dim) { return (dim + 4 + 63) / 64 * 64; }

  static void encode(const float* row, index_t dim, std::byte* to) noexcept {
    std::memset(to, 0, static_cast<std::size_t>(block_bytes(dim)));
    float largest = 0;
    for (index_t d = 0; d < dim; ++d) largest = std::max(largest, std::abs(row[d]));
    const float step = largest / 127;
    std::memcpy(to, &step, sizeof step);
    for (index_t d = 0; d < dim; ++d)
      to[4 + d] = static_cast<std::byte>(static_cast<std::int8_t>(step > 0 ? std::lrint(row[d] / step) : 0));
  }
  static void decode(const std::byte* from, index_t, index_t dim, float* out) noexcept {
    float step;
    std::memcpy(&step, from, sizeof step);
    for (index_t d = 0; d < dim; ++d) out[d] = step * static_cast<float>(static_cast<std::int8_t>(from[4 + d]));
  }
};

}  // namespace proof
