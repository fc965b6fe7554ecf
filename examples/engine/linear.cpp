#include "linear.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace engine {
namespace {

constexpr index_t panel_rows = 48;  // dequantised, they fit in the cache; a multiple of what Eigen's product works in

// One row of codes times x.
#if defined(__AVX2__)
// g++ 12 takes twice as long for its own idea of the loop below.
template <int Group>
float dot(const std::int8_t* codes, const float* scales, const float* offsets, index_t groups, const float* x) {
  typedef float lanes __attribute__((vector_size(32)));
  lanes sums[4] = {};
  for (index_t group = 0; group < groups; ++group, codes += Group, x += Group) {
    const float scale = scales[group], offset = offsets[group];
    for (int i = 0; i < Group; i += 8) {
      const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
      lanes values;
      std::memcpy(&values, x + i, sizeof values);
      sums[i / 8 % 4] += (scale * lanes(_mm256_cvtepi32_ps(wide)) + offset) * values;
    }
  }
  const lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}
#else
// A sum for each place in a group, so that the compiler needs no leave to reorder one.
template <int Group>
float dot(const std::int8_t* codes, const float* scales, const float* offsets, index_t groups, const float* x) {
  float sums[Group] = {};
  for (index_t group = 0; group < groups; ++group, codes += Group, x += Group) {
    const float scale = scales[group], offset = offsets[group];
    for (int i = 0; i < Group; ++i) sums[i] += (scale * static_cast<float>(codes[i]) + offset) * x[i];
  }
  for (int half = Group / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}
#endif

void dequantise(const coded_tensor& from, index_t first, index_t count, float* to) {
  const index_t group = from.group;
  for (index_t i = first; i < first + count; i += group) {
    const float scale = from.scales[static_cast<std::size_t>(i / group)],
                offset = from.offsets[static_cast<std::size_t>(i / group)];
    const std::int8_t* const codes = from.codes.data() + i;
    for (index_t j = 0; j < group; ++j) to[i - first + j] = scale * static_cast<float>(codes[j]) + offset;
  }
}

}  // namespace

void linear::append(matrix values) {
  const index_t rows = values.rows(), cols = values.cols();
  append({rows_, rows, std::move(values), {}}, cols);
}

void linear::append(coded_tensor coded) {
  const index_t rows = coded.shape.front(), cols = coded.shape.back();
  append({rows_, rows, {}, std::move(coded)}, cols);
}

void linear::append(part&& p, index_t cols) {
  for (index_t row = 0; row < p.rows; row += panel_rows)
    panels_.push_back({parts_.size(), row, std::min(panel_rows, p.rows - row)});
  rows_ += p.rows;
  cols_ = cols;
  parts_.push_back(std::move(p));
}

void linear::row(index_t i, float* to) const {
  const auto it = std::find_if(parts_.begin(), parts_.end(), [=](const part& p) { return i < p.first_row + p.rows; });
  const index_t at = i - it->first_row;
  if (it->values.size() > 0)
    std::copy_n(it->values.row(at).data(), cols_, to);
  else
    dequantise(it->coded, at * cols_, cols_, to);
}

void linear::multiply(const const_rows_view& x, rows_view y, sinkcache::thread_pool* pool) const {
  auto item = [&](index_t i, index_t) { multiply(panels_[static_cast<std::size_t>(i)], x, y); };
  const sinkcache::work_ref work(item);
  const auto n = static_cast<index_t>(panels_.size());
  if (pool)
    pool->run(n, work);
  else
    sinkcache::sequential().run(n, work);
}

void linear::multiply(const panel& p, const const_rows_view& x, rows_view& y) const {
  const part& from = parts_[p.part];
  const index_t column = from.first_row + p.first_row;
  if (from.values.size() > 0) {
    const const_rows_view w = from.values.middleRows(p.first_row, p.rows);
    if (x.rows() == 1)
      y.row(0).segment(column, p.rows).transpose().noalias() = w * x.row(0).transpose();
    else
      y.middleCols(column, p.rows).noalias() = x * w.transpose();
    return;
  }
  const coded_tensor& coded = from.coded;
  if (x.rows() > 1) {
    matrix w(p.rows, cols_);
    dequantise(coded, p.first_row * cols_, w.size(), w.data());
    y.middleCols(column, p.rows).noalias() = x * w.transpose();
    return;
  }
  const index_t groups = cols_ / coded.group;
  for (index_t i = 0; i < p.rows; ++i) {
    const index_t first_group = (p.first_row + i) * groups;
    const std::int8_t* const codes = coded.codes.data() + first_group * coded.group;
    const float *const scales = coded.scales.data() + first_group, *const offsets = coded.offsets.data() + first_group;
    y(0, column + i) = coded.group == 32 ? dot<32>(codes, scales, offsets, groups, x.data())
                                         : dot<16>(codes, scales, offsets, groups, x.data());
  }
}

}  // namespace engine
