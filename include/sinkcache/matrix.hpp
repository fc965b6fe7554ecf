#pragma once

// Row-major Eigen types, and views of them that refuse what would have to be copied: Eigen::Ref<const RowMajor> copies
// a column-major argument without a word.

#include <Eigen/Core>
#include <concepts>
#include <type_traits>

#include "config.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

namespace detail {

template <class M>
concept eigen_dense = std::derived_from<std::remove_cvref_t<M>, Eigen::DenseBase<std::remove_cvref_t<M>>>;

template <class M>
concept has_memory = bool(std::remove_cvref_t<M>::Flags& Eigen::DirectAccessBit) &&
                     std::same_as<typename std::remove_cvref_t<M>::Scalar, float>;

template <class M>
concept row_major =
    bool(std::remove_cvref_t<M>::Flags& Eigen::RowMajorBit) && std::remove_cvref_t<M>::InnerStrideAtCompileTime == 1;

// A matrix, Map, Ref or block of rows of float, row-major, with neighbouring columns in neighbouring floats.
template <class M>
concept row_major_floats = eigen_dense<M> && has_memory<M> && row_major<M>;

template <class M>
concept not_row_major_floats = eigen_dense<M> && !row_major_floats<M>;

template <class M>
concept writable =
    !std::is_const_v<std::remove_reference_t<M>> && bool(std::remove_cvref_t<M>::Flags & Eigen::LvalueBit);

}  // namespace detail

// Floats [rows, cols] of somebody else's, `stride` floats from row to row.
template <class Float>
class basic_matrix_view {
 public:
  basic_matrix_view(Float* data, index_t rows, index_t cols, index_t stride)
      : data_(data), rows_(rows), cols_(cols), stride_(stride) {}
  basic_matrix_view(Float* data, index_t rows, index_t cols) : basic_matrix_view(data, rows, cols, cols) {}

  template <detail::row_major_floats M>
  requires(std::is_const_v<Float> || detail::writable<M>)
      basic_matrix_view(M&& m)  // NOLINT(google-explicit-constructor): views convert, as std::span does
      : basic_matrix_view(const_cast<Float*>(m.data()), m.rows(), m.cols(), m.outerStride()) {}

  // Column-major, strided along a row, not float, or an expression without memory: it would have to be copied.
  // Make it a sinkcache::matrix, or a Map of one.
  template <detail::not_row_major_floats M>
  basic_matrix_view(M&& m) = delete;

  Float* row(index_t i) const { return data_ + i * stride_; }
  index_t rows() const { return rows_; }
  index_t cols() const { return cols_; }

 private:
  Float* data_;
  index_t rows_, cols_, stride_;
};

using const_matrix_view = basic_matrix_view<const float>;
using matrix_view = basic_matrix_view<float>;

namespace detail {

template <class Float>
void check_shape(const char* rows_name, const char* cols_name, const basic_matrix_view<Float>& m, index_t rows,
                 index_t cols) {
  check(m.rows() == rows, rows_name, m.rows(), "exactly", rows);
  check(m.cols() == cols, cols_name, m.cols(), "exactly", cols);
}

}  // namespace detail
}  // namespace sinkcache::inline SINKCACHE_TAG
