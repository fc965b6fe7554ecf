#pragma once

// Eviction by score: when tokens leave, how many stay, and how budgets are shared out. Which tokens leave is up to a
// scorer (scorer.hpp).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "detail/macros_off.hpp"
#include "status.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Tokens leave at events: after every `interval` tokens of the stream a KV head that holds more than its budget is cut
// down to it. Between events all rows are seen, so a head has up to budget + interval of them. Pinned tokens
// (cache_config::num_sink_tokens, and pin()) and the newest `recent` never leave; both count.
struct eviction {
  index_t budget = 0;        // rows that an event leaves; more than those that never leave
  index_t recent = 32;       // or the scorer's own window, where that is longer
  index_t interval = 64;     // at least 1
  index_t num_qo_heads = 0;  // of the attention, for scorers that look at queries or weights; others do without

  std::vector<index_t> head_budgets = {};  // one per KV head, instead of `budget`
  std::vector<bool> short_heads = {};  // per KV head, or none: those keep pinned tokens and the newest, whatever the
                                       // scorer thinks (DuoAttention, Xiao et al. 2024, arXiv 2410.10819)
  std::optional<double> adaptive = std::nullopt;  // Ada-KV (Feng et al. 2024, arXiv 2407.11550): a head is sure of this
                                                  // share of its free rows, the others go to whichever head scores best
  bool accounts = false;                          // reports what each event took away: see eviction_event
  std::optional<double> bound = std::nullopt;     // evicts only while the change that accounts report stays below
  index_t hard_budget = 0;                        // with a bound: rows that a head may grow to; at least its budget
  index_t spared_pins = 16;  // with formats of few bits: the most positions that pin() takes; they are spared
};

// What an event is about to do to a KV head.
struct eviction_event {
  position_t seen;  // tokens so far
  index_t kv_head;
  std::span<const position_t> at;        // of the rows held, oldest first
  std::span<const float> scores;         // of those rows; those of rows that cannot leave count for nothing
  std::span<const std::uint8_t> leaves;  // 1: is evicted now
  double mass;   // with accounts: what the last query gave all that leave, in the query head where that is most
  double bound;  // 2 m / (1 - m) max|v|: the head's output moves by no more, as long as distances stay
};

// Who is told of events.
class eviction_reader {
 public:
  virtual void read(const eviction_event& event) noexcept = 0;

 protected:
  eviction_reader() = default;
  eviction_reader(const eviction_reader&) = default;
  eviction_reader& operator=(const eviction_reader&) = default;
  ~eviction_reader() = default;
};

namespace detail {

// Whole numbers in proportion to `shares` that sum to `total`: what is left by rounding down goes to the largest
// remainders, of equal ones to the first.
inline std::vector<index_t> shared_out(index_t total, const std::vector<double>& shares) {
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  std::vector<index_t> parts(shares.size()), order(shares.size());
  std::vector<double> rest(shares.size());
  index_t left = total;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const double share = sum > 0 ? static_cast<double>(total) * shares[i] / sum : 0;
    parts[i] = static_cast<index_t>(share);
    rest[i] = share - std::floor(share);
    left -= parts[i];
    order[i] = static_cast<index_t>(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) {
    return rest[static_cast<std::size_t>(a)] > rest[static_cast<std::size_t>(b)];
  });
  for (std::size_t i = 0; left > 0 && !order.empty(); i = (i + 1) % order.size(), --left)
    ++parts[static_cast<std::size_t>(order[i])];
  return parts;
}

}  // namespace detail

// Budgets that fall from the first layer to the last in even steps and sum to num_layers * budget exactly (PyramidKV,
// Cai et al. 2024, arXiv 2406.02069): above the rows that never leave, `fixed` in every layer, the last has 1 / beta of
// the mean, the first 2 - 1 / beta. Or nothing, and in `found` why.
inline std::optional<std::vector<index_t>> try_pyramid_budgets(index_t num_layers, index_t budget, index_t fixed,
                                                               status& found, double beta = 20) noexcept {
  found = status();
  found.require(num_layers >= 1, "num_layers", num_layers, "at least 1");
  found.require(fixed >= 0 && budget > fixed, "budget", budget, "above the rows that never leave,", fixed);
  found.require(std::isfinite(beta) && beta >= 1, "beta", beta, "finite and at least 1");
  if (!found) return std::nullopt;
  const index_t total = detail::checked_product(found, "num_layers * budget", num_layers, budget - fixed);
  constexpr index_t most = index_t{1} << 53;  // shares of it are exact
  found.require(total <= most, "num_layers * budget", total, "at most", most);
  return detail::created(found, "budgets", [&] {
    std::vector<double> shares(static_cast<std::size_t>(num_layers), 1.0);
    for (index_t i = 0; i < num_layers && num_layers > 1; ++i)
      shares[static_cast<std::size_t>(i)] =
          2 - 1 / beta - static_cast<double>(i) * 2 * (1 - 1 / beta) / static_cast<double>(num_layers - 1);
    std::vector<index_t> budgets = detail::shared_out(total, shares);
    for (index_t& b : budgets) b += fixed;
    return budgets;
  });
}
inline std::vector<index_t> pyramid_budgets(index_t num_layers, index_t budget, index_t fixed, double beta = 20) {
  status found;
  std::optional<std::vector<index_t>> budgets = try_pyramid_budgets(num_layers, budget, fixed, found, beta);
  found.or_fail();
  return std::move(*budgets);
}

// Budgets of two classes of heads (DuoAttention): `budget` rows for those that are not short, for the others pinned
// tokens and the `newest`. Or nothing, and in `found` why.
inline std::optional<std::vector<index_t>> try_duo_budgets(const std::vector<bool>& short_heads, index_t budget,
                                                           index_t num_sink_tokens, index_t newest,
                                                           status& found) noexcept {
  found = status();
  found.require(num_sink_tokens >= 0, "num_sink_tokens", num_sink_tokens, "at least 0");
  found.require(newest >= 1, "newest", newest, "at least 1");
  if (std::find(short_heads.begin(), short_heads.end(), false) != short_heads.end())
    found.require(budget > num_sink_tokens, "budget", budget, "above num_sink_tokens,", num_sink_tokens);
  const index_t of_short = detail::checked_sum(found, "num_sink_tokens + newest", num_sink_tokens, newest);
  return detail::created(found, "budgets", [&] {
    std::vector<index_t> budgets;
    budgets.reserve(short_heads.size());
    for (const bool is_short : short_heads) budgets.push_back(is_short ? of_short : budget);
    return budgets;
  });
}
inline std::vector<index_t> duo_budgets(const std::vector<bool>& short_heads, index_t budget, index_t num_sink_tokens,
                                        index_t newest) {
  status found;
  std::optional<std::vector<index_t>> budgets = try_duo_budgets(short_heads, budget, num_sink_tokens, newest, found);
  found.or_fail();
  return std::move(*budgets);
}

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
