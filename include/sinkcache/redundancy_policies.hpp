#pragma once

// Scorers of reasoning models' caches: weights of a window of queries, less what is said twice.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "detail/macros_off.hpp"
#include "key_policies.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

namespace detail {

inline constexpr index_t compared_keys = 64;  // at a time, with as many

inline index_t redundancy_floats(const scored_sizes& of) noexcept {
  return 4 * (of.head_dim + of.rows) + (of.rows + compared_keys) * of.head_dim + compared_keys * compared_keys;
}

// What is remembered of a row: how many tokens its newest copy is younger than it, or less than 0; infinity where it
// has none, NaN where nobody looked.
inline float copy_distance(const scored_head& of, index_t i, index_t copy) noexcept {
  if (copy < 0) return std::numeric_limits<float>::infinity();
  const position_t distance = of.at[static_cast<std::size_t>(copy)] - of.at[static_cast<std::size_t>(i)];
  constexpr position_t exact = 1 << 24;  // as a float
  return std::abs(distance) <= exact ? static_cast<float>(distance) : std::numeric_limits<float>::quiet_NaN();
}
// Whether the newest copy among rows [0, n) is remembered, and which row it is; -1: there is none.
inline bool knows_copy(const scored_head& of, float distance, index_t i, index_t n, index_t& copy) noexcept {
  copy = -1;
  if (std::isinf(distance)) return true;
  if (std::isnan(distance)) return false;
  const position_t at = of.at[static_cast<std::size_t>(i)] + static_cast<position_t>(distance);
  copy = static_cast<index_t>(std::lower_bound(of.at.begin(), of.at.begin() + n, at) - of.at.begin());
  return copy < n && of.at[static_cast<std::size_t>(copy)] == at;
}
// The first row that is new since `copies` were remembered, or stored in codes since: all from there on are compared
// with all again.
inline index_t first_unsettled(const scored_head& of, std::span<const float> copies) noexcept {
  std::size_t first = copies.size();
  while (first > 0 && std::isnan(copies[first - 1])) --first;
  if (of.whole == 0 || first == 0) return static_cast<index_t>(first);
  const position_t whole_then = (first < copies.size() ? of.at[first] : of.seen) - of.whole;
  const auto end = of.at.begin() + static_cast<std::ptrdiff_t>(first);
  return static_cast<index_t>(std::lower_bound(of.at.begin(), end, whole_then) - of.at.begin());
}

using float_rows = Eigen::Map<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

// Row i's key as one of length 1; of length 0 as it is.
inline void read_unit(const scored_head& of, index_t i, double_row& to) noexcept {
  read_key(of, i, false, to);
  const double norm = to.norm();
  if (norm > 0) to /= norm;
}

// Looks for the newest copies of keys, some at a time.
class copy_search {
 public:
  // `units`: keys of length 1. Rows [0, settled) are told of new ones: copy[i] is the newest copy of row i so far, -1
  // where it has none. The other memory is scratch.
  copy_search(const scored_head& of, const float_rows& units, index_t settled, double_row& copy, double_row& a,
              double_row& b, float* memory) noexcept
      : of_(of),
        units_(units),
        settled_(settled),
        copy_(copy),
        a_(a),
        b_(b),
        some_(memory, compared_keys, units.cols()),
        like_(memory + some_.size(), compared_keys, compared_keys) {}

  void add(index_t row) noexcept {
    rows_[m_] = row;
    some_.row(m_++) = units_.row(row);
    if (m_ == compared_keys) run();
  }
  // Those that were added. From the newest on, as far as any has none yet or one is new.
  void run() noexcept {
    bool found[compared_keys] = {};
    const bool tells = settled_ > 0 && m_ > 0 && rows_[m_ - 1] >= settled_;
    index_t missing = m_;
    for (index_t end = units_.rows(), first; end > 0 && (missing > 0 || tells); end = first) {
      first = std::max<index_t>(0, end - compared_keys);
      if (missing == 0 && first >= settled_) continue;
      compare(first, end - first);
      for (index_t i = 0; i < m_; ++i) {
        const float* const like = like_.row(i).data();
        if (rows_[i] >= settled_) {
          const auto row = static_cast<double>(rows_[i]);
          double* const copy = copy_.data() + first;
          for_each_index(std::min(end, settled_) - first,
                         [&](index_t j) { copy[j] = like[j] > 0.5f && copy[j] < row ? row : copy[j]; });
        }
        for (index_t j = end - 1; j >= first && !found[i]; --j)
          if (j != rows_[i] && like[j - first] > 0.5f)
            copy_[rows_[i]] = static_cast<double>(j), found[i] = true, --missing;
      }
    }
    m_ = 0;
  }

 private:
  // Cosines with n rows, in float, and in double where that could be the wrong side of 0.5.
  void compare(index_t first, index_t n) noexcept {
    const float slack = static_cast<float>(units_.cols() + 4) * std::numeric_limits<float>::epsilon();
    auto like = like_.topLeftCorner(m_, n);
    like.noalias() = some_.topRows(m_) * units_.middleRows(first, n).transpose();
    if ((like.array() - 0.5f).abs().minCoeff() > slack) return;
    for (index_t i = 0; i < m_; ++i)
      for (index_t j = 0; j < n; ++j) {
        if (!(std::abs(like(i, j) - 0.5f) <= slack)) continue;
        read_unit(of_, rows_[i], a_);
        read_unit(of_, first + j, b_);
        like(i, j) = a_.dot(b_) > 0.5 ? 1.f : 0.f;
      }
  }

  const scored_head& of_;
  const float_rows& units_;
  index_t settled_;
  double_row &copy_, &a_, &b_;
  float_rows some_, like_;
  index_t rows_[compared_keys], m_ = 0;
};

// How like the others a row's key is, its newest copy not counted (R-KV, section 3.3), as a softmax over all rows:
// copies are rows with a cosine above 0.5, and where a row has none, row 0 is left out for it, as in the authors' code.
// Which row is whose newest copy is remembered in `copies`, if there are any: keys do not change, so that only new
// ones, and those whose copy has left, need be looked at.
inline double_row redundancy(const scored_head& of, double_scratch& memory, std::span<float> copies = {}) noexcept {
  const index_t n = of.rows, d = of.geometry.head_dim;
  double_row key = memory.row(d), all = memory.row(d), mean = memory.row(n), copy = memory.row(n);
  float* const floats = reinterpret_cast<float*>(memory.row(0).data());
  float_rows units(floats, n, d);
  all.setZero();
  for (index_t i = 0; i < n; ++i) {
    read_unit(of, i, key);
    all += key;
    units.row(i) = key.cast<float>();
  }
  // All cosines with a key sum to its product with the sum of keys.
  for (index_t i = 0; i < n; ++i) {
    key = units.row(i).cast<double>();
    mean[i] = key.dot(all) - key.squaredNorm();
  }
  const index_t unsettled = first_unsettled(of, copies);
  const auto known = [&](index_t i, index_t& row) {
    return i < unsettled && knows_copy(of, copies[static_cast<std::size_t>(i)], i, unsettled, row);
  };
  for (index_t i = 0, row; i < n; ++i) copy[i] = known(i, row) ? static_cast<double>(row) : -1;
  copy_search search(of, units, unsettled, copy, key, all, floats + units.size());
  for (index_t i = 0, row; i < n; ++i)
    if (!known(i, row)) search.add(i);
  search.run();
  for (index_t i = 0; i < n; ++i) {
    const auto newest = static_cast<index_t>(copy[i]);
    const index_t left_out = std::max<index_t>(0, newest);
    if (left_out != i) mean[left_out] -= units.row(i).cast<double>().dot(units.row(left_out).cast<double>());
    if (!copies.empty()) copies[static_cast<std::size_t>(i)] = copy_distance(of, i, newest);
  }
  mean /= static_cast<double>(n);
  mean = (mean.array() - mean.maxCoeff()).exp();
  mean /= mean.sum();
  return mean;
}

}  // namespace detail

namespace policies {

// What the newest queries would give a token, and how little it repeats (R-KV, Cai et al. 2025, arXiv 2505.24133,
// section 3): lambda of the one less 1 - lambda of the other. The softmax knows neither sink nor window.
struct rkv final : token_scorer {
  index_t window = 8, kernel = 7;
  float lambda = 0.07f;

  rkv() = default;
  explicit rkv(index_t of_window, index_t of_kernel = 7, float of_lambda = 0.07f)
      : window(of_window), kernel(of_kernel), lambda(of_lambda) {}

  scorer_needs needs() const noexcept override {
    return {.window = window, .group = scorer_needs::over_group::max_logits, .carried = true, .compares_heads = true};
  }
  index_t scratch_floats(const scored_sizes& of) const noexcept override {
    return 2 * of.rows + detail::redundancy_floats(of);
  }
  void require(status& found, const kv_geometry&, index_t, index_t) const noexcept override {
    found.require(window >= 1, "window", window, "at least 1");
    found.require(lambda >= 0 && lambda <= 1, "lambda", lambda, "from 0 to 1");
    detail::require_kernel(found, kernel);
  }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    const index_t n = head.rows - head.window;
    detail::double_scratch memory(head.scratch);
    const std::span<float> importance(reinterpret_cast<float*>(memory.row(head.rows).data()), scores.size());
    detail::mean_softmax(head, n, importance);
    detail::max_pool(importance, n, kernel, head.pinned, true, scores);
    const detail::double_row red = detail::redundancy(head, memory, head.carried);
    const auto share = static_cast<double>(lambda);
    for (index_t i = 0; i < n; ++i) {
      float& s = scores[static_cast<std::size_t>(i)];
      s = static_cast<float>(share * static_cast<double>(s) - (1 - share) * red[i]);
    }
    std::fill(scores.begin() + n, scores.end(), 0.f);
  }
  std::string_view name() const noexcept override { return "rkv"; }
};

// The weights of the newest `window` queries, the largest of a group, as a share of the largest; what a token was worth
// before fades by `decay` per event (G-KV, microsoft/G-KV 6db3b2e). Optionally pooled, and less what repeats, as R-KV.
struct gkv final : token_scorer {
  enum class combine { max, mean, sum };

  index_t window = 8, kernel = 1;
  float decay = 0.8f, lambda = 0.1f;
  combine by = combine::max;
  bool redundancy = false;

  scorer_needs needs() const noexcept override {
    return {.window = window, .group = scorer_needs::over_group::max, .carried = true, .compares_heads = true};
  }
  index_t scratch_floats(const scored_sizes& of) const noexcept override {
    return 2 * of.rows + (redundancy ? detail::redundancy_floats(of) : 0);
  }
  void require(status& found, const kv_geometry&, index_t, index_t) const noexcept override {
    found.require(window >= 1, "window", window, "at least 1");
    found.require(decay >= 0 && decay <= 1, "decay", decay, "from 0 to 1");
    found.require(lambda >= 0 && lambda <= 1, "lambda", lambda, "from 0 to 1");
    detail::require_kernel(found, kernel);
  }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    const index_t n = head.rows - head.window;
    detail::double_scratch memory(head.scratch);
    const std::span<float> now(reinterpret_cast<float*>(memory.row(head.rows).data()), scores.size());
    detail::mean_weight(head, n, now);
    std::fill(scores.begin() + n, scores.end(), 0.f);
    float most = 0;
    for (index_t i = 0; i < n; ++i) most = std::max(most, now[static_cast<std::size_t>(i)]);
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
      if (most > 0) now[i] /= most;
      now[i] = head.carried[i] = combined(head.carried[i], now[i]);
    }
    std::fill(head.carried.begin() + n, head.carried.end(), std::numeric_limits<float>::quiet_NaN());
    detail::max_pool(now, n, kernel, head.pinned, true, scores);
    if (!redundancy || n == 0) return;
    const detail::double_row red = detail::redundancy(head, memory);
    const double largest = red.head(n).maxCoeff();
    const auto share = static_cast<double>(lambda);
    for (index_t i = 0; i < n; ++i) {
      float& s = scores[static_cast<std::size_t>(i)];
      s = static_cast<float>(share * static_cast<double>(s) - (1 - share) * red[i] / largest);
    }
  }
  std::string_view name() const noexcept override { return "gkv"; }

 private:
  // A token without an old score has the new one.
  float combined(float old, float now) const noexcept {
    if (old != old) return now;
    if (by == combine::max) return std::max(decay * old, now);
    return decay * old + (by == combine::mean ? (1 - decay) * now : now);
  }
};

}  // namespace policies
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
