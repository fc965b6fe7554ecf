#pragma once

#include <Eigen/Core>
#include <sinkcache/matrix.hpp>
#include <vector>

#include <sinkcache/thread_pool.hpp>
#include "../loaders/file.hpp"

namespace engine {

using loaders::coded_tensor;
using sinkcache::index_t;
// Of Eigen's own, whose memory is aligned: how its sums associate would depend on where a matrix lies.
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using rows_view = Eigen::Ref<matrix, 0, Eigen::OuterStride<>>;
using const_rows_view = Eigen::Ref<const matrix, 0, Eigen::OuterStride<>>;

// A layer's weights, [rows, cols]: floats, or codes where the file has codes, which are a third as much to read for a
// token. The work is cut into panels of rows, the same ones whatever runs them, so results are the same bits for any
// number of threads.
class linear {
 public:
  // Below what is there: tensors with the same input are one product. The shapes are [rows, cols].
  void append(matrix values);
  void append(coded_tensor codes);

  index_t rows() const { return rows_; }
  index_t cols() const { return cols_; }
  void row(index_t i, float* to) const;

  // y = x * w^T. A single row of x reads w once and allocates nothing. `pool` may be null.
  void multiply(const const_rows_view& x, rows_view y, sinkcache::thread_pool* pool) const;

 private:
  struct part {
    index_t first_row, rows;
    matrix values;       // either these
    coded_tensor coded;  // or these
  };
  struct panel {
    std::size_t part;
    index_t first_row, rows;  // of the part
  };

  void append(part&&, index_t cols);
  void multiply(const panel&, const const_rows_view& x, rows_view& y) const;

  index_t rows_ = 0, cols_ = 0;
  std::vector<part> parts_;
  std::vector<panel> panels_;
};

}  // namespace engine
