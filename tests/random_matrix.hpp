#pragma once

#include <sinkcache/matrix.hpp>

#include <cstddef>

#include "effort.hpp"

namespace proof {

inline std::size_t as_size(sinkcache::index_t n) { return static_cast<std::size_t>(n); }

// [rows, cols] from -2 to 2.
inline sinkcache::matrix random_matrix(effort::dice& dice, sinkcache::index_t rows, sinkcache::index_t cols) {
  sinkcache::matrix m(rows, cols);
  for (sinkcache::index_t i = 0; i < m.size(); ++i) m.data()[i] = 2 * dice.signed_unit();
  return m;
}

}  // namespace proof
