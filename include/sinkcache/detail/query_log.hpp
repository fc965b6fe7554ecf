#pragma once

// What a cache that evicts by score remembers of queries: the newest rows of q, what they gave each row, and sums over
// all queries so far.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../any_kv_cache.hpp"
#include "../scorer.hpp"
#include "kept_rows.hpp"
#include "macros_off.hpp"
#include "panel_sums.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

struct query_sizes {
  scorer_needs needs;
  index_t num_qo_heads, num_kv_heads, head_dim;
  index_t rows;      // of the pool
  index_t rollback;  // queries that may be taken back
  index_t interval;  // and that may come at once
  bool accounts;
};

class query_log {
 public:
  // Weights as whole numbers, so that their sum is the same in any order and can be taken back exactly. 63 bits hold
  // what 2^31 queries give.
  static constexpr double fixed = 0x1p32;

  query_log() = default;

  void carve(carver& c, const query_sizes& of) noexcept {
    of_ = of;
    const index_t queries = num_queries(), stats = of.needs.query_statistics ? of.num_qo_heads : 0;
    c.take(learned_, of.num_kv_heads);
    c.take(q_, queries, of.num_qo_heads, of.head_dim);
    c.take(window_q_, of.needs.window, of.num_qo_heads, of.head_dim);
    c.take(window_lse_, of.needs.window, of.num_qo_heads);
    c.take(weights_, of.needs.together || of.needs.last_query ? 1 : of.needs.window, of.rows);
    c.take(given_, of.needs.sums ? of.rollback : 0, of.rows);
    c.take(last_, of.accounts ? group() : 0, of.rows);
    c.take(sum_q_, stats, of.head_dim);
    c.take(products_, stats, of.head_dim, of.head_dim);
    c.take(now_sum_q_, stats > 0 ? group() : 0, of.head_dim);
    c.take(now_products_, stats > 0 ? group() : 0, of.head_dim * of.head_dim);
    c.take(some_q_, stats > 0 ? summed_at_once : 0, of.head_dim);
  }

  index_t group() const { return of_.num_qo_heads / std::max<index_t>(1, of_.num_kv_heads); }
  const query_sizes& sizes() const { return of_; }
  bool learns() const {
    return of_.needs.window > 0 || of_.needs.last_query || of_.needs.sums || of_.needs.query_statistics || of_.accounts;
  }
  // Rows of q that are kept.
  index_t num_queries() const {
    if (of_.needs.window == 0 && !of_.needs.query_statistics) return 0;
    return of_.needs.window +
           (of_.needs.query_statistics ? 2 * of_.rollback + of_.interval + summed_at_once - 1 : of_.rollback);
  }

  void clear() noexcept {
    folded_ = 0;
    std::fill_n(learned_, of_.num_kv_heads, position_t{0});
    if (of_.needs.query_statistics) {
      std::fill_n(sum_q_, of_.num_qo_heads * of_.head_dim, 0.0);
      std::fill_n(products_, of_.num_qo_heads * of_.head_dim * of_.head_dim, 0.0);
    }
  }

  // Queries that each KV head has learned from, from the stream's first on.
  position_t learned(index_t kv_head) const { return learned_[kv_head]; }
  position_t learned() const { return *std::min_element(learned_, learned_ + of_.num_kv_heads); }
  void set_learned(index_t kv_head, position_t n) noexcept { learned_[kv_head] = n; }

  // The row of q of a query that is kept.
  float* q(position_t query) const { return q_ + query % num_queries() * of_.num_qo_heads * of_.head_dim; }

  // What one query gave n rows of a head, from `row` of the pool on: weights [heads of the group, stride]. It can be
  // taken back.
  void add(std::int64_t* sums, position_t query, index_t row, const weight_tile& tile) noexcept {
    constexpr index_t most = 64;
    float* const given = given_ + query % of_.rollback * of_.rows + row;
    const auto heads = static_cast<float>(group());
    if (tile.first_qo_head % group() == 0)
      std::fill_n(given, tile.n, 0.f);
    else  // the other blocks of the group were added
      for_each_index(tile.n, [&](index_t j) { sums[j] -= whole(given[j]); });
    for (index_t first = 0; first < tile.n; first += most) {
      const index_t n = std::min(most, tile.n - first);
      float w[most] = {};
      for (index_t i = 0; i < tile.num_qo_heads; ++i) {
        const float* const of_head = tile.w.data() + i * tile.stride + first;
        for_each_index(n, [&](index_t j) { w[j] += known_weight(of_head[j]); });
      }
      for_each_index(n, [&](index_t j) {
        given[first + j] += w[j] / heads;
        sums[first + j] += whole(given[first + j]);
      });
    }
  }
  // What several queries that cannot be taken back gave n rows, summed over them and the group.
  void add_sums(std::int64_t* sums, std::span<const float> given) const noexcept {
    const auto heads = static_cast<float>(group());
    const float* const from = given.data();
    for_each_index(static_cast<index_t>(given.size()), [&](index_t j) { sums[j] += whole(from[j] / heads); });
  }
  // Takes it back, of the first n rows of a head, which lie as they did.
  void take_back(std::int64_t* sums, position_t query, index_t row, index_t n) const noexcept {
    const float* const given = given_ + query % of_.rollback * of_.rows + row;
    for (index_t j = 0; j < n; ++j) sums[j] -= whole(given[j]);
  }

  float* window(index_t w) const { return weights_ + w * of_.rows; }
  float* last(index_t head_of_group) const { return last_ + head_of_group * of_.rows; }
  float* window_q() const { return window_q_; }
  float* window_lse() const { return window_lse_; }

  // Sums over queries up to `to`, as far as they fill blocks, join those before them.
  void fold(const kv_geometry& of, position_t from, position_t to) noexcept {
    to -= to % summed_at_once;
    if (to <= from) return;
    for (index_t h = 0; h < of_.num_qo_heads; ++h)
      add_moments(of, from, to, h, sum_q_ + h * of_.head_dim, products_ + h * of_.head_dim * of_.head_dim);
    folded_ = to;
  }
  position_t folded() const { return folded_; }

  // Of a KV head's query heads, with the queries [folded, to) that may yet be taken back.
  void moments(const kv_geometry& of, index_t kv_head, position_t from, position_t to, double count,
               query_statistics* stats) const noexcept {
    const index_t d = of_.head_dim;
    for (index_t g = 0; g < group(); ++g) {
      const index_t h = kv_head * group() + g;
      stats[g] = {count, now_sum_q_ + g * d, now_products_ + g * d * d};
      std::copy_n(sum_q_ + h * d, d, now_sum_q_ + g * d);
      std::copy_n(products_ + h * d * d, d * d, now_products_ + g * d * d);
      add_moments(of, from, to, h, now_sum_q_ + g * d, now_products_ + g * d * d);
    }
  }

  static std::int64_t whole(float weight) noexcept {
    return static_cast<std::int64_t>(static_cast<double>(weight) * fixed);  // in vectors, unlike rounding
  }

 private:
  static constexpr index_t summed_at_once = 16;

  // Block by block of the stream, so that sums are the same however far those before have been taken. Rows of q are
  // rotated back first if they come rotated.
  void add_moments(const kv_geometry& of, position_t from, position_t to, index_t head, double* sum,
                   double* products) const noexcept {
    using doubles = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const index_t d = of_.head_dim;
    while (from < to) {
      const position_t end = std::min(to, from - from % summed_at_once + summed_at_once);
      const Eigen::Map<doubles> some(some_q_, end - from, d);
      for (double* row = some_q_; from < end; ++from, row += d) unrotated_query(of, from, head, row);
      Eigen::Map<Eigen::RowVectorXd>(sum, d) += some.colwise().sum();
      Eigen::Map<doubles>(products, d, d).noalias() += some.transpose() * some;
    }
  }
  // Sums that survive do not take in what would make them NaN for ever: such a query is as one of length 0.
  void unrotated_query(const kv_geometry& of, position_t query, index_t head, double* to) const noexcept {
    const index_t d = of_.head_dim;
    const float* const given = q(query) + head * d;
    if (!all_finite(given, d)) return static_cast<void>(std::fill_n(to, d, 0.0));
    alignas(64) float unrotated[max_head_dim];
    key_rotation back(of, false);
    back.go_to(query);
    const float* const row = back(given, unrotated);
    for_each_index(d, [&](index_t j) { to[j] = static_cast<double>(row[j]); });
  }

  query_sizes of_{};
  position_t* learned_ = nullptr;
  float *q_ = nullptr, *window_q_ = nullptr, *window_lse_ = nullptr, *weights_ = nullptr;
  float *given_ = nullptr, *last_ = nullptr;
  double *sum_q_ = nullptr, *products_ = nullptr, *now_sum_q_ = nullptr, *now_products_ = nullptr, *some_q_ = nullptr;
  position_t folded_ = 0;  // queries whose moments are in the sums
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
