#pragma once

// Scorers that look at keys and values.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>

#include "detail/macros_off.hpp"
#include "matrix.hpp"
#include "policies.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

namespace detail {

using double_rows = Eigen::Map<Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;
using double_row = Eigen::Map<Eigen::RowVectorXd>;

// Doubles out of a scorer's scratch memory, piece by piece.
class double_scratch {
 public:
  explicit double_scratch(std::span<float> memory) noexcept : next_(reinterpret_cast<double*>(memory.data())) {}

  double_rows rows(index_t n, index_t dim) noexcept { return {take(n * dim), n, dim}; }
  double_row row(index_t n) noexcept { return {take(n), n}; }

 private:
  double* take(index_t n) noexcept { return std::exchange(next_, next_ + n); }

  double* next_;
};

// Row i's key, or value, as doubles.
template <class Row>
void read_key(const scored_head& of, index_t i, bool shown, Row&& to) noexcept {
  alignas(64) float row[max_head_dim];
  shown ? of.shown_key(i, row) : of.key(i, row);
  double* const at = to.data();
  for_each_index(of.geometry.head_dim, [&](index_t d) { at[d] = static_cast<double>(row[d]); });
}
inline double value_norm(const scored_head& of, index_t i) noexcept {
  alignas(64) float row[max_head_dim];
  of.value(i, row);
  double sum = 0;
  for (index_t d = 0; d < of.geometry.v_head_dim; ++d) sum += static_cast<double>(row[d]) * static_cast<double>(row[d]);
  return std::sqrt(sum);
}

// The mean of a head's keys, each times what `factor` says of it. `key` is scratch.
template <class Factor>
void mean_of_keys(const scored_head& of, const Factor& factor, double_row& key, double_row& mean) noexcept {
  mean.setZero();
  for (index_t i = 0; i < of.rows; ++i) {
    read_key(of, i, false, key);
    mean += factor(key) * key;
  }
  mean /= static_cast<double>(of.rows);
}

}  // namespace detail

namespace policies {

// Keys of small norm stay (Devoto et al. 2024, arXiv 2406.11430): of the key as given, before it is rotated and stored.
struct knorm final : token_scorer {
  scorer_needs needs() const noexcept override { return {.given = true}; }
  float given(std::span<const float> key) const noexcept override {
    double sum = 0;
    for (const float x : key) sum += static_cast<double>(x) * static_cast<double>(x);
    return static_cast<float>(std::sqrt(sum));
  }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = -head.given[i];
  }
  std::string_view name() const noexcept override { return "knorm"; }
};

// Keys unlike the mean direction of all stay (KeyDiff, Park et al. 2025, arXiv 2504.15364, as kvpress has it).
struct keydiff final : token_scorer {
  scorer_needs needs() const noexcept override { return {}; }
  index_t scratch_floats(const scored_sizes& of) const noexcept override { return 4 * of.head_dim; }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    detail::double_scratch memory(head.scratch);
    detail::double_row key = memory.row(head.geometry.head_dim), mean = memory.row(head.geometry.head_dim);
    const auto to_unit = [](const detail::double_row& k) { return 1 / std::max(k.norm(), 1e-12); };
    detail::mean_of_keys(head, to_unit, key, mean);
    const double mean_norm = std::max(mean.norm(), 1e-8);
    for (index_t i = 0; i < head.rows; ++i) {
      detail::read_key(head, i, false, key);
      scores[static_cast<std::size_t>(i)] =
          static_cast<float>(-key.dot(mean) / (std::max(key.norm(), 1e-8) * mean_norm));
    }
  }
  std::string_view name() const noexcept override { return "keydiff"; }
};

// Keys far from the mean key stay (ManifoldKV, Datta et al. 2026, draft).
struct mean_key final : token_scorer {
  scorer_needs needs() const noexcept override { return {}; }
  index_t scratch_floats(const scored_sizes& of) const noexcept override { return 4 * of.head_dim; }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    detail::double_scratch memory(head.scratch);
    detail::double_row key = memory.row(head.geometry.head_dim), mean = memory.row(head.geometry.head_dim);
    detail::mean_of_keys(
        head, [](const detail::double_row&) { return 1.; }, key, mean);
    for (index_t i = 0; i < head.rows; ++i) {
      detail::read_key(head, i, false, key);
      scores[static_cast<std::size_t>(i)] = static_cast<float>((key - mean).norm());
    }
  }
  std::string_view name() const noexcept override { return "mean_key"; }
};

// Partitions of `lag` tokens, each judged by how it looks in the range of the next (LagKV, Liang et al. 2025, arXiv
// 2504.04704, equations 3 to 8): the more a key or value spreads over its channels there, the more it is worth. Pinned
// rows are in no partition. A token's score is its rank in its partition (kvpress), or, to compare across partitions,
// what it is worth itself. rescore: over all that is kept, at every event; the newest partition and what follows is not
// judged and stays, so long as others can leave. fifo: each token is judged once, `ratio` of a partition survives,
// and of survivors the oldest leave where there are too many; a head may then hold fewer rows than its budget.
struct lagkv final : token_scorer {
  index_t lag = 0;  // 0: as many as make four partitions, at most 128
  float v_ratio = 1, ratio = 0.5f;
  bool fifo = false, cross = false;

  lagkv() = default;
  explicit lagkv(bool as_fifo, index_t of_lag = 0, float of_v_ratio = 1, float of_ratio = 0.5f, bool across = false)
      : lag(of_lag), v_ratio(of_v_ratio), ratio(of_ratio), fifo(as_fifo), cross(across) {}

  scorer_needs needs() const noexcept override { return {.carried = fifo, .drops = fifo}; }
  index_t scratch_floats(const scored_sizes& of) const noexcept override {
    return 2 * std::max(of.head_dim, of.v_head_dim) + 3 * of.rows;
  }
  index_t lag_of(index_t budget, index_t num_sink_tokens) const noexcept {
    return lag > 0 ? lag : std::max<index_t>(1, std::min<index_t>(128, (budget - num_sink_tokens) / 4));
  }
  void require(status& found, const kv_geometry&, index_t budget, index_t num_sink_tokens) const noexcept override {
    found.require(lag >= 0 && lag <= budget, "lag", lag, "at least 0, and at most the budget,", budget);
    found.require(ratio > 0 && ratio <= 1, "ratio", ratio, "above 0, and at most 1");
    found.require(std::isfinite(v_ratio) && v_ratio >= 0, "v_ratio", v_ratio, "finite and at least 0");
    if (found)
      found.require(budget - num_sink_tokens >= 2 * lag_of(budget, num_sink_tokens), "budget", budget,
                    "at least num_sink_tokens and two lags,", num_sink_tokens + 2 * lag_of(budget, num_sink_tokens));
  }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    constexpr float never = std::numeric_limits<float>::infinity();
    const index_t of_lag = lag_of(head.budget, head.num_sink_tokens);
    float* const rows = head.scratch.data() + 2 * std::max(head.geometry.head_dim, head.geometry.v_head_dim);
    index_t m = 0;  // rows that are in partitions: not pinned, nor, under fifo, judged before
    for (index_t i = 0; i < head.rows; ++i) {
      const auto at = static_cast<std::size_t>(i);
      scores[at] = never;
      if (head.pinned[at] != 0) continue;
      if (fifo && head.carried[at] > 0)
        scores[at] = static_cast<float>(i - head.rows);  // the oldest leave first, before any that was not judged
      else
        rows[m++] = static_cast<float>(i);
    }
    float* const total = rows + m;
    for (index_t p = 0; (p + 2) * of_lag <= m; ++p) {
      std::fill_n(total, of_lag, 0.f);
      judge(head, rows + p * of_lag, of_lag, true, total);
      judge(head, rows + p * of_lag, of_lag, false, total);
      rank(head, rows + p * of_lag, of_lag, total, scores);
    }
  }
  std::string_view name() const noexcept override { return "lagkv"; }

 private:
  // Adds the softmax over a partition of each token's spread, scaled by the range of the partition after it.
  void judge(const scored_head& head, const float* rows, index_t n, bool keys, float* total) const noexcept {
    const index_t dim = keys ? head.geometry.head_dim : head.geometry.v_head_dim;
    float *const lo = head.scratch.data(), *const hi = lo + dim;
    alignas(64) float x[max_head_dim];
    alignas(64) double one_over[max_head_dim], in_range[max_head_dim];
    const auto read = [&](index_t i) {
      const auto row = static_cast<index_t>(rows[i]);
      keys ? head.key(row, x) : head.value(row, x);
    };
    for (index_t i = n; i < 2 * n; ++i) {
      read(i);
      if (i == n) std::copy_n(x, dim, lo), std::copy_n(x, dim, hi);
      detail::for_each_index(dim, [&](index_t d) {
        lo[d] = x[d] < lo[d] ? x[d] : lo[d];
        hi[d] = x[d] > hi[d] ? x[d] : hi[d];
      });
    }
    // A channel that does not vary there counts as 0.
    for (index_t d = 0; d < dim; ++d)
      one_over[d] = lo[d] == hi[d] ? 0 : 1 / (static_cast<double>(hi[d]) - static_cast<double>(lo[d]));
    const detail::double_row scaled(in_range, dim);
    float* const spread = total + n;
    float most = -std::numeric_limits<float>::infinity();
    for (index_t i = 0; i < n; ++i) {
      read(i);
      detail::for_each_index(dim, [&](index_t d) {
        in_range[d] = (static_cast<double>(x[d]) - static_cast<double>(lo[d])) * one_over[d];
      });
      const double mean = scaled.mean(), squares = (scaled.array() - mean).square().sum();
      spread[i] = static_cast<float>(std::sqrt(squares / static_cast<double>(std::max<index_t>(1, dim - 1))));
      most = std::max(most, spread[i]);
    }
    double sum = 0;
    for (index_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(spread[i]) - static_cast<double>(most));
    for (index_t i = 0; i < n; ++i)
      total[i] += static_cast<float>((keys ? 1. : static_cast<double>(v_ratio)) *
                                     std::exp(static_cast<double>(spread[i]) - static_cast<double>(most)) / sum);
  }

  // What a partition's tokens are worth beside each other; under fifo the best of them survive and the others leave.
  void rank(const scored_head& head, const float* rows, index_t n, const float* total,
            std::span<float> scores) const noexcept {
    const auto survivors = static_cast<index_t>(static_cast<double>(ratio) * static_cast<double>(n));
    for (index_t i = 0; i < n; ++i) {
      index_t better = 0;  // of equal ones the younger
      for (index_t j = 0; j < n; ++j) better += total[j] > total[i] || (total[j] == total[i] && j > i);
      const auto row = static_cast<std::size_t>(rows[i]);
      if (!fifo) {
        scores[row] = cross ? total[i] : static_cast<float>(n - 1 - better) / static_cast<float>(n);
        continue;
      }
      scores[row] = better < survivors ? static_cast<float>(static_cast<index_t>(row) - head.rows)
                                       : -std::numeric_limits<float>::infinity();
      head.carried[row] = 1;
    }
  }
};

// What queries to come will give a token, from the mean and covariance of those so far, rotated by the mean of the next
// `horizon` positions, times the norm of its value (Expected Attention, Devoto et al. 2025, arXiv 2510.00636, equations
// 6 to 9). The first num_sink_tokens queries, and as many of the newest as may be taken back, are left out.
struct expected_attention final : token_scorer {
  index_t horizon = 512;
  bool covariance = true, v_norm = true;
  float epsilon = 0;

  expected_attention() = default;
  explicit expected_attention(index_t of_horizon, bool with_covariance = true, bool with_v_norm = true, float eps = 0)
      : horizon(of_horizon), covariance(with_covariance), v_norm(with_v_norm), epsilon(eps) {}

  scorer_needs needs() const noexcept override { return {.query_statistics = true, .compares_heads = true}; }
  index_t scratch_floats(const scored_sizes& of) const noexcept override {
    return 2 * (3 * of.head_dim + (of.group + 1) * of.rows + block * (of.head_dim + columns + 1));
  }
  void require(status& found, const kv_geometry&, index_t, index_t) const noexcept override {
    found.require(horizon >= 1 && horizon <= most_horizon, "T", horizon, "from 1 to", most_horizon);
    found.require(std::isfinite(epsilon) && epsilon >= 0, "epsilon", epsilon, "finite and at least 0");
  }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    const index_t d = head.geometry.head_dim, n = head.rows, group = std::ssize(head.queries);
    detail::double_scratch memory(head.scratch);
    detail::double_row cos = memory.row(d), sin = memory.row(d), mean = memory.row(d), p = memory.row(n);
    detail::double_rows z = memory.rows(group, n), keys = memory.rows(block, d), part = memory.rows(block, columns);
    detail::double_row squares = memory.row(block);
    mean_rotation(head, cos, sin);
    const auto scale = static_cast<double>(head.sm_scale);
    for (index_t i = 0; i < n; i += block) {
      const index_t m = std::min(block, n - i);
      for (index_t j = 0; j < m; ++j) {
        detail::read_key(head, i + j, true, keys.row(j));
        rotate_back(head, cos, sin, keys.row(j).data());  // less work than rotating covariances
      }
      for (index_t g = 0; g < group; ++g) {
        const query_statistics& of = head.queries[static_cast<std::size_t>(g)];
        const double count = std::max(1., of.count);
        mean = Eigen::Map<const Eigen::RowVectorXd>(of.sum, d) * (scale / count);
        auto logits = z.row(g).segment(i, m);
        logits.noalias() = mean * keys.topRows(m).transpose();
        if (!covariance) continue;
        square_sums(of, keys, m, part, squares);  // the variance: what squares are in the mean, less the square of it
        logits.array() += (squares.head(m).array() * (scale * scale / count) - logits.array().square()) / 2;
      }
    }
    p.setZero();
    for (index_t g = 0; g < group; ++g) add_softmax(head, z.row(g).data(), p);
    for (index_t i = 0; i < n; ++i) {
      double s = p[i] / static_cast<double>(std::max<index_t>(1, group));
      if (v_norm) s = (s + static_cast<double>(epsilon)) * detail::value_norm(head, i);
      scores[static_cast<std::size_t>(i)] = static_cast<float>(s);
    }
  }
  std::string_view name() const noexcept override { return "expected_attention"; }

 private:
  static constexpr index_t block = 64, columns = 32, most_horizon = index_t{1} << 20;

  // The mean of the next positions' cosines and sines, one a pair.
  void mean_rotation(const scored_head& head, detail::double_row& cos, detail::double_row& sin) const noexcept {
    cos.setZero(), sin.setZero();
    if (!head.geometry.rotates()) return;
    rope::angles angles;
    for (index_t t = 0; t < horizon; ++t) {
      head.geometry.rope->angles_at(head.next_query() + t, true, angles);
      detail::for_each_index(head.geometry.rope->width() / 2, [&](index_t i) {
        cos.data()[i] += static_cast<double>(angles.cos[i]);
        sin.data()[i] += static_cast<double>(angles.sin[i]);
      });
    }
    cos /= static_cast<double>(horizon), sin /= static_cast<double>(horizon);
  }
  static void rotate_back(const scored_head& head, const detail::double_row& cos, const detail::double_row& sin,
                          double* key) noexcept {
    if (!head.geometry.rotates()) return;
    const index_t pairs = head.geometry.rope->width() / 2;
    const index_t step = head.geometry.rope->pairing() == rope_pairing::interleaved ? 2 : 1;
    const index_t apart = step == 2 ? 1 : pairs;
    detail::for_each_index(pairs, [&](index_t i) {
      const double a = key[i * step], b = key[i * step + apart], c = cos.data()[i], s = sin.data()[i];
      key[i * step] = a * c + b * s;
      key[i * step + apart] = b * c - a * s;
    });
  }
  // The sums over all queries q of (q . k)^2, for each of m keys. The matrix of products is symmetric: what stands left
  // of a block of its columns counts twice.
  static void square_sums(const query_statistics& of, const detail::double_rows& keys, index_t m,
                          detail::double_rows& part, detail::double_row& sums) noexcept {
    const index_t d = keys.cols();
    const Eigen::Map<const Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>> products(of.products,
                                                                                                            d, d);
    sums.setZero();
    for (index_t c = 0; c < d; c += columns) {
      const index_t w = std::min(columns, d - c);
      auto of_block = part.topLeftCorner(m, w);
      of_block.noalias() = keys.block(0, c, m, w) * products.block(c, c, w, w);
      if (c > 0) of_block.noalias() += 2 * keys.topLeftCorner(m, c) * products.block(0, c, c, w);
      sums.head(m) += of_block.cwiseProduct(keys.block(0, c, m, w)).rowwise().sum().transpose();
    }
  }
  // Over rows that are not pinned.
  static void add_softmax(const scored_head& head, const double* z, detail::double_row& p) noexcept {
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    const auto counts = [&](index_t i) { return head.pinned[static_cast<std::size_t>(i)] == 0; };
    for (index_t i = 0; i < head.rows; ++i)
      if (counts(i)) most = std::max(most, z[i]);
    for (index_t i = 0; i < head.rows; ++i)
      if (counts(i)) sum += std::exp(z[i] - most);
    for (index_t i = 0; i < head.rows; ++i)
      if (counts(i)) p[i] += std::exp(z[i] - most) / sum;
  }
};

}  // namespace policies
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
