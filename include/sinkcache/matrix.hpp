#pragma once

// Row-major Eigen types, and views of them that refuse what would have to be copied: Eigen::Ref<const RowMajor> copies
// a column-major argument without a word.

#include <Eigen/Core>
#include <concepts>
#include <type_traits>

#include "detail/macros_off.hpp"
#include "status.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Floats, row-major: an Eigen matrix in all that it does. A class of ours, so that the linker refuses a function that
// takes one where the caller is compiled for another instruction set, which would take Eigen's memory to be aligned
// otherwise. The linker cannot see one inside a struct, so its memory is malloc's as well, without Eigen's alignment.
// Pass plain pointers between such files.
class matrix : public Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor | Eigen::DontAlign> {
 public:
  using Matrix::Matrix;
  using Matrix::operator=;
  matrix() = default;
  template <class Expression>
  matrix(const Eigen::EigenBase<Expression>& e) : Matrix(e) {}  // NOLINT(google-explicit-constructor)
};

namespace detail {

template <class D>
void take_dense(const Eigen::DenseBase<D>&);

// A class of Eigen's, or derived from one.
template <class M>
concept eigen_dense = requires(const std::remove_cvref_t<M>& m) {
  take_dense(m);
};

template <class M>
concept has_memory = bool(std::remove_cvref_t<M>::Flags& Eigen::DirectAccessBit) &&
                     std::same_as<typename std::remove_cvref_t<M>::Scalar, float>;

template <class M>
concept row_major =
    bool(std::remove_cvref_t<M>::Flags& Eigen::RowMajorBit) && std::remove_cvref_t<M>::InnerStrideAtCompileTime == 1;

// A matrix, Map, Ref or block of rows of float, row-major, with neighbouring columns in neighbouring floats.
template <class M>
concept row_major_floats = eigen_dense<M> && has_memory<M> && row_major<M>;

// Why the others are refused.
template <class M>
concept not_of_float = eigen_dense<M> && !std::same_as<typename std::remove_cvref_t<M>::Scalar, float>;
template <class M>
concept without_memory = eigen_dense<M> && !not_of_float<M> && !has_memory<M>;
template <class M>
concept column_major_or_strided = eigen_dense<M> && has_memory<M> && !row_major<M>;

template <class M>
concept writable =
    !std::is_const_v<std::remove_reference_t<M>> && bool(std::remove_cvref_t<M>::Flags & Eigen::LvalueBit);

}  // namespace detail

// Floats [rows, cols] of somebody else's, `stride` floats from row to row.
template <class Float>
class basic_matrix_view {
 public:
  basic_matrix_view(Float* data, index_t rows, index_t cols, index_t stride) noexcept
      : data_(data), rows_(rows), cols_(cols), stride_(stride) {}
  basic_matrix_view(Float* data, index_t rows, index_t cols) noexcept : basic_matrix_view(data, rows, cols, cols) {}

  template <detail::row_major_floats M>
  requires(std::is_const_v<Float> || detail::writable<M>)
      basic_matrix_view(M&& m)  // NOLINT(google-explicit-constructor)
  noexcept : basic_matrix_view(const_cast<Float*>(m.data()), m.rows(), m.cols(), m.outerStride()) {}

  // What can be written can be read. Views convert, as std::span does.
  template <class Other>
  requires(std::is_const_v<Float>&& std::same_as<Other, std::remove_const_t<Float>>)
      basic_matrix_view(const basic_matrix_view<Other>& m)  // NOLINT(google-explicit-constructor)
  noexcept : basic_matrix_view(m.row(0), m.rows(), m.cols(), m.stride()) {}

  // These would have to be copied. Compilers show the line.
  // clang-format off
  template <detail::column_major_or_strided M>
  basic_matrix_view(M&&) = delete;  // refused: not row-major. Copy it into a sinkcache::matrix, or Map its memory as one
  template <detail::not_of_float M>
  basic_matrix_view(M&&) = delete;  // refused: not float. Cast it into a sinkcache::matrix
  template <detail::row_major_floats M>
  requires(!std::is_const_v<Float> && !detail::writable<M>)
  basic_matrix_view(M&&) = delete;  // refused: read-only, but it has to be written
  template <detail::without_memory M>
  basic_matrix_view(M&&) = delete;  // refused: an expression without memory. Evaluate it into a sinkcache::matrix
  // clang-format on

  Float* row(index_t i) const { return data_ + i * stride_; }
  index_t rows() const { return rows_; }
  index_t cols() const { return cols_; }
  index_t stride() const { return stride_; }

 private:
  Float* data_;
  index_t rows_, cols_, stride_;
};

using const_matrix_view = basic_matrix_view<const float>;
using matrix_view = basic_matrix_view<float>;

namespace detail {

// That `name` is floats [rows, cols], whose rows do not lie over each other.
template <class Float>
void require_shape(status& found, const char* name, const basic_matrix_view<Float>& m, index_t rows,
                   index_t cols) noexcept {
  if (m.rows() != rows) found.refuse("{}.rows() was {}, had to be exactly {}", name, m.rows(), rows);
  if (m.cols() != cols) found.refuse("{}.cols() was {}, had to be exactly {}", name, m.cols(), cols);
  if (m.row(0) == nullptr && rows > 0 && cols > 0)
    found.refuse("{}'s data was null, had to be {} x {} floats", name, rows, cols);
  if (rows > 1 && m.stride() < cols) found.refuse("{}'s stride was {}, had to be at least {}", name, m.stride(), cols);
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

// What Eigen asks of a type that it maps or refers to.
template <>
struct Eigen::internal::traits<sinkcache::matrix> : traits<sinkcache::matrix::Matrix> {};
template <>
struct Eigen::internal::evaluator<sinkcache::matrix> : evaluator<sinkcache::matrix::Matrix> {
  using evaluator<sinkcache::matrix::Matrix>::evaluator;
};

#include "detail/macros_on.hpp"
