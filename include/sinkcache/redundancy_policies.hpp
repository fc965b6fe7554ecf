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

inline constexpr index_t redundancy_rows = 16, redundancy_columns = 64;  // compared at a time

inline index_t redundancy_floats(const scored_sizes& of) noexcept {
  return 2 * ((of.rows + 1) * of.head_dim + redundancy_rows * redundancy_columns + of.rows);
}

// How like the others a row's key is, its newest copy not counted (R-KV, section 3.3), as a softmax over all rows:
// copies are rows with a cosine above 0.5, and where a row has none, row 0 is left out for it, as in the authors' code.
inline double_row redundancy(const scored_head& of, double_scratch& memory) noexcept {
  const index_t n = of.rows, d = of.geometry.head_dim;
  double_rows keys = memory.rows(n, d), like = memory.rows(redundancy_rows, redundancy_columns);
  double_row all = memory.row(d), mean = memory.row(n);
  for (index_t i = 0; i < n; ++i) {
    read_key(of, i, false, keys.row(i));
    const double norm = keys.row(i).norm();
    if (norm > 0) keys.row(i) /= norm;
  }
  // All cosines with a key sum to its product with the sum of keys. What to leave out is searched from the newest on.
  all = keys.colwise().sum();
  for (index_t i = 0; i < n; ++i) mean[i] = keys.row(i).dot(all) - keys.row(i).squaredNorm();
  for (index_t from = 0; from < n; from += redundancy_rows) {
    const index_t m = std::min(redundancy_rows, n - from);
    bool found[redundancy_rows] = {};
    for (index_t end = n, missing = m, first; missing > 0; end = first) {
      first = std::max<index_t>(0, end - redundancy_columns);
      like.topLeftCorner(m, end - first).noalias() =
          keys.middleRows(from, m) * keys.middleRows(first, end - first).transpose();
      for (index_t i = 0; i < m; ++i)
        for (index_t j = end - 1; j >= first && !found[i]; --j) {
          const double cosine = j == from + i ? 0 : like(i, j - first);
          if (!(cosine > 0.5) && j > 0) continue;
          mean[j] -= cosine;
          found[i] = true;
          --missing;
        }
    }
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
    return {.window = window, .group = scorer_needs::over_group::max_logits, .compares_heads = true};
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
    const detail::double_row red = detail::redundancy(head, memory);
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
