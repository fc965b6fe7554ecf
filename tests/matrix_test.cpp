// Which Eigen objects become views, without a copy, and which are refused: all settled when compiling.

#include <sinkcache/matrix.hpp>

#include <string>
#include <type_traits>
#include <utility>

#include "catch.hpp"

using namespace sinkcache;

namespace {

using column_major = Eigen::MatrixXf;
using doubles = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using fixed = Eigen::Matrix<float, 2, 3, Eigen::RowMajor>;

// Reads and writes / only reads / neither.
template <class M>
constexpr bool writes = std::is_convertible_v<M, matrix_view>&& std::is_convertible_v<M, const_matrix_view>;
template <class M>
constexpr bool only_reads = std::is_convertible_v<M, const_matrix_view> && !std::is_constructible_v<matrix_view, M>;
template <class M>
constexpr bool refused = !std::is_constructible_v<matrix_view, M> && !std::is_constructible_v<const_matrix_view, M>;

template <class M>
M& made();  // an lvalue to take blocks of, never called

static_assert(writes<matrix&> && writes<matrix>);
static_assert(only_reads<const matrix&>);
static_assert(writes<fixed&> && only_reads<const fixed&>);
static_assert(writes<Eigen::RowVectorXf&> && only_reads<const Eigen::RowVectorXf&>);
static_assert(writes<Eigen::Matrix<float, 1, 5>&>);
static_assert(writes<Eigen::Array<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>&>);

static_assert(writes<Eigen::Map<matrix>> && only_reads<Eigen::Map<const matrix>>);
static_assert(writes<Eigen::Map<matrix, Eigen::Aligned64>>);
static_assert(writes<Eigen::Map<matrix, 0, Eigen::OuterStride<>>>);
static_assert(writes<Eigen::Map<matrix, 0, Eigen::OuterStride<16>>>);
static_assert(only_reads<Eigen::Map<const matrix, 0, Eigen::OuterStride<>>>);
static_assert(writes<Eigen::Map<Eigen::RowVectorXf>>);
static_assert(writes<Eigen::Ref<matrix>> && only_reads<const Eigen::Ref<const matrix>&>);

// Rows and columns of a row-major matrix keep its outer stride.
static_assert(writes<decltype(made<matrix>().topRows(2))>);
static_assert(writes<decltype(made<matrix>().middleRows(1, 2))>);
static_assert(writes<decltype(made<matrix>().row(1))>);
static_assert(writes<decltype(made<matrix>().leftCols(2))>);
static_assert(writes<decltype(made<matrix>().block(0, 1, 2, 2))>);
static_assert(writes<decltype(made<fixed>().bottomRows<1>())>);
static_assert(only_reads<decltype(made<const matrix>().topRows(2))>);
static_assert(only_reads<decltype(made<const matrix>().row(1))>);

// Column-major, whatever its shape.
static_assert(refused<column_major&> && refused<const column_major&>);
static_assert(refused<Eigen::VectorXf&> && refused<Eigen::Matrix<float, 2, 3>&>);
static_assert(refused<Eigen::Map<column_major>> && refused<Eigen::Ref<column_major>>);
static_assert(refused<decltype(made<column_major>().topRows(2))>);
static_assert(refused<decltype(made<column_major>().row(1))>, "a row of a column-major matrix has an inner stride");
static_assert(refused<decltype(made<matrix>().col(1))>);
static_assert(refused<decltype(made<matrix>().transpose())>);

// Strided along a row.
static_assert(refused<Eigen::Map<matrix, 0, Eigen::InnerStride<>>>);
static_assert(refused<Eigen::Map<matrix, 0, Eigen::InnerStride<2>>>);
static_assert(refused<Eigen::Map<matrix, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>>);
static_assert(refused<Eigen::Ref<matrix, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>>);

// Expressions have no memory.
static_assert(refused<decltype(made<matrix>() + made<matrix>())>);
static_assert(refused<decltype(made<matrix>() * made<matrix>())>);
static_assert(refused<decltype(2.f * made<matrix>())>);
static_assert(refused<decltype(matrix::Zero(2, 3))>);
static_assert(refused<decltype(made<doubles>().cast<float>())>);

// Not float.
static_assert(refused<doubles&> && refused<Eigen::MatrixXd&>);
static_assert(refused<Eigen::Matrix<int, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>&>);
static_assert(refused<Eigen::Map<doubles>>);
static_assert(refused<float*> && refused<int>);

template <class View, class M>
void check_view(M&& m) {
  const View view = std::forward<M>(m);
  REQUIRE(view.rows() == m.rows());
  REQUIRE(view.cols() == m.cols());
  for (index_t i = 0; i < m.rows(); ++i) REQUIRE(view.row(i) == &m.coeffRef(i, 0));
}

TEST_CASE("matrix views: the floats themselves, no copy") {
  matrix m(5, 6);
  m.setZero();
  check_view<matrix_view>(m);
  check_view<const_matrix_view>(m);
  check_view<const_matrix_view>(std::as_const(m));
  check_view<matrix_view>(m.middleRows(1, 3));
  check_view<matrix_view>(m.block(1, 2, 3, 4));
  check_view<matrix_view>(m.row(4));
  check_view<const_matrix_view>(std::as_const(m).block(1, 2, 3, 4));
  check_view<matrix_view>(Eigen::Ref<matrix>(m.block(1, 2, 3, 4)));

  fixed f;
  check_view<matrix_view>(f);
  check_view<matrix_view>(f.row(1));
  Eigen::RowVectorXf row(7);
  check_view<matrix_view>(row);
  check_view<matrix_view>(Eigen::Map<matrix, 0, Eigen::OuterStride<>>(m.data() + 1, 3, 4, Eigen::OuterStride<>(9)));

  const Eigen::Ref<const matrix> read_only(m.middleRows(2, 2));
  const const_matrix_view view = read_only;
  CHECK(view.row(1) == m.data() + 3 * 6);
}

TEST_CASE("matrix views: of plain pointers") {
  float floats[12] = {};
  const matrix_view strided(floats, 3, 2, 4), dense(floats, 3, 4);
  CHECK((strided.row(2) == floats + 8 && strided.rows() == 3 && strided.cols() == 2));
  CHECK((dense.row(2) == floats + 8 && dense.rows() == 3 && dense.cols() == 4));
  strided.row(1)[1] = 5.f;
  CHECK(floats[5] == 5.f);
  const const_matrix_view read(static_cast<const float*>(floats), 3, 4);
  CHECK(read.row(1)[1] == 5.f);
}

TEST_CASE("matrix views: rows over each other are refused, from the second row on") {
  const float floats[8] = {};
  const auto words = [&](index_t rows, index_t stride) {
    status found;
    detail::require_shape(found, "q", const_matrix_view(floats, rows, 4, stride), rows, 4);
    return std::string(found.message());
  };
  for (const index_t stride : {-4, 0, 3}) {
    CHECK(words(1, stride).empty());
    CHECK(words(2, stride) == "sinkcache: q's stride was " + std::to_string(stride) + ", had to be at least 4");
  }
  CHECK(words(2, 4).empty());
}

TEST_CASE("matrix views: of nothing") {
  const matrix none(0, 6), no_columns(3, 0);
  CHECK((const_matrix_view(none).rows() == 0 && const_matrix_view(none).cols() == 6));
  CHECK((const_matrix_view(no_columns).rows() == 3 && const_matrix_view(no_columns).cols() == 0));
}

static_assert(std::is_convertible_v<matrix_view, const_matrix_view>);
static_assert(!std::is_constructible_v<matrix_view, const_matrix_view>, "what is only read is not written");
static_assert(std::is_trivially_copyable_v<matrix_view> && std::is_trivially_copyable_v<const_matrix_view>);

TEST_CASE("matrix views: what is written can be read") {
  matrix m = matrix::Ones(5, 6);
  const matrix_view written = m.block(1, 2, 3, 4);
  const const_matrix_view read = written;
  CHECK((read.rows() == 3 && read.cols() == 4 && read.stride() == 6));
  for (index_t i = 0; i < 3; ++i) CHECK(read.row(i) == written.row(i));
}

float sum(Eigen::Ref<matrix> m) { return m.sum(); }
float sum_of_const(const Eigen::Ref<const matrix>& m) { return m.sum(); }

TEST_CASE("matrix: does what Eigen's does") {
  static_assert(std::is_nothrow_move_constructible_v<matrix> && sizeof(matrix) == sizeof(matrix::Matrix));
  matrix a(2, 3), listed{{1.f, 2.f}, {3.f, 4.f}};
  a << 1, 2, 3, 4, 5, 6;
  CHECK((listed(1, 0) == 3.f && a(1, 2) == 6.f));
  const column_major converted = a;
  matrix b = a * a.transpose(), c = converted, d(std::move(c));
  CHECK((b(0, 1) == 32.f && d == a));
  b.noalias() = a * a.transpose() + matrix::Ones(2, 2);
  CHECK(b(1, 0) == 33.f);
  a.swap(b);
  CHECK((a.cols() == 2 && b.cols() == 3));
  Eigen::Map<matrix> mapped(b.data(), 3, 2);
  mapped.row(0) = Eigen::Map<const matrix>(listed.data(), 1, 2);
  b = 2 * mapped;
  CHECK((b.rows() == 3 && b(0, 1) == 4.f && b(2, 1) == 12.f));
  CHECK((sum(b) == b.sum() && sum_of_const(converted.transpose()) == 21.f));
}

}  // namespace
