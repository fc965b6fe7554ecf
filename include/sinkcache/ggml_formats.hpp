#pragma once

// Rows as ggml lays out its types Q8_0 and Q4_0, for a kv_view of a cache that llama.cpp quantised (--cache-type-k
// q8_0): blocks of 32 elements, each a scale as an f16, then codes. A kv_cache that you make is better off with q8 and
// q4: less error in fewer bits, and kernels of their own.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>

#include "detail/macros_off.hpp"
#include "format.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

namespace detail {

// Blocks of 32 elements in `Bytes` bytes, as F encodes and decodes one. Strides of a view are in elements, multiples of
// a block's. What holds a NaN or an infinity gets a scale of NaN, and codes of 0.
template <class F, index_t Bytes>
struct ggml_row {
  static constexpr index_t block_rows = 1, unit_elements = 32, unit_bytes = Bytes;
  static constexpr index_t block_bytes(index_t dim) { return (dim + 31) / 32 * Bytes; }

  static void encode(const float* row, index_t dim, std::byte* to) noexcept {
    for (index_t d = 0; d < dim; d += 32, to += Bytes) {
      float elements[32] = {};
      std::copy_n(row + d, std::min<index_t>(32, dim - d), elements);
      if (all_finite(elements, 32)) {
        F::encode_unit(elements, to);
      } else {
        std::memset(to, 0, Bytes);
        put_scale(std::numeric_limits<float>::quiet_NaN(), to);
      }
    }
  }
  static void decode(const std::byte* from, index_t, index_t dim, float* out) noexcept {
    for (index_t d = 0; d < dim; d += 32, from += Bytes) {
      float elements[32];
      F::decode_unit(from + 2, f16::element(from), elements);
      std::copy_n(elements, std::min<index_t>(32, dim - d), out + d);
    }
  }

 protected:
  static constexpr float smallest_step = 0x1p-126f;  // its inverse is finite; far below the smallest f16
  static void put_scale(float d, std::byte* to) noexcept {
    std::byte halves[2 * lanes];
    f16::store(halves, broadcast(d));
    std::memcpy(to, halves, 2);
  }
};

}  // namespace detail

// d, then 32 signed bytes: values are code * d, d the largest magnitude / 127. Of 8.5 bits an element.
struct q8_0 : detail::ggml_row<q8_0, 34> {
  static constexpr std::string_view name = "q8_0";
  static void encode_unit(const float* x, std::byte* to) noexcept {
    float most = 0;
    for (int i = 0; i < 32; ++i) most = std::max(most, std::abs(x[i]));
    const float d = most / 127, per_unit = d >= smallest_step ? 1 / d : 0;
    put_scale(d, to);
    for (int i = 0; i < 32; ++i)
      to[2 + i] = static_cast<std::byte>(static_cast<std::int8_t>(std::lround(x[i] * per_unit)));
  }
  static void decode_unit(const std::byte* codes, float d, float* out) noexcept {
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<std::int8_t>(codes[i])) * d;
  }
};

// d, then 16 bytes, of which number i has elements i (its low four bits) and i + 16: values are (code - 8) * d, d the
// number of largest magnitude / -8. Of 4.5 bits an element.
struct q4_0 : detail::ggml_row<q4_0, 18> {
  static constexpr std::string_view name = "q4_0";
  static void encode_unit(const float* x, std::byte* to) noexcept {
    float most = 0;
    for (int i = 0; i < 32; ++i)
      if (std::abs(x[i]) > std::abs(most)) most = x[i];
    const float d = most / -8, per_unit = std::abs(d) >= smallest_step ? 1 / d : 0;
    put_scale(d, to);
    const auto code = [&](float element) {
      return static_cast<unsigned>(std::min(15, static_cast<int>(element * per_unit + 8.5f)));
    };
    for (int i = 0; i < 16; ++i) to[2 + i] = static_cast<std::byte>(code(x[i]) | code(x[i + 16]) << 4);
  }
  static void decode_unit(const std::byte* codes, float d, float* out) noexcept {
    for (int i = 0; i < 16; ++i) {
      out[i] = static_cast<float>(static_cast<int>(codes[i] & std::byte{15}) - 8) * d;
      out[i + 16] = static_cast<float>(static_cast<int>(codes[i] >> 4) - 8) * d;
    }
  }
};

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
