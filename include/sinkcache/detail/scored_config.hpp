#pragma once

// What a cache that evicts by score is made from, and which of that goes together.

#include <algorithm>
#include <memory>

#include "../any_kv_cache.hpp"
#include "../eviction.hpp"
#include "../scorer.hpp"
#include "kept_rows.hpp"
#include "macros_off.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

struct scored_config {
  kv_geometry geometry;
  eviction rules;
  std::shared_ptr<const token_scorer> scorer;
  row_format k, v;
  index_t num_sink_tokens, rollback;
  row_format whole_k, whole_v;  // of tokens that are spared
  index_t recent;               // the newest of those; -1: none is spared

  bool has_tiers() const { return recent >= 0; }
};

inline index_t head_budget(const eviction& rules, index_t kv_head) noexcept {
  return rules.head_budgets.empty() ? rules.budget : rules.head_budgets[static_cast<std::size_t>(kv_head)];
}
// Rows that a head may have beyond its budget.
inline index_t growth(const eviction& rules, index_t budget) noexcept {
  return rules.interval + (rules.bound ? rules.hard_budget - budget : 0);
}

inline bool is_short(const eviction& rules, index_t kv_head) noexcept {
  return !rules.short_heads.empty() && rules.short_heads[static_cast<std::size_t>(kv_head)];
}

// Heads whose rules have to be looked at: one, where all are alike.
inline index_t num_different_heads(const scored_config& of) noexcept {
  return of.rules.head_budgets.empty() && of.rules.short_heads.empty() ? 1 : of.geometry.num_kv_heads;
}

// Rows, tokens and queries are so few that sums of some of them fit.
inline void require_few(status& found, const char* what, index_t n) noexcept {
  constexpr index_t most = index_t{1} << 40;
  found.require(n <= most, what, n, "at most", most);
}

inline void require_budget(status& found, const scored_config& of, index_t kv_head) noexcept {
  const scorer_needs needs = of.scorer->needs();
  const index_t budget = head_budget(of.rules, kv_head);
  const index_t newest = is_short(of.rules, kv_head) ? 0 : std::max(of.rules.recent, needs.window);
  const index_t stays = checked_sum(found, "num_sink_tokens + recent", of.num_sink_tokens, newest);
  found.require(budget > stays, of.rules.head_budgets.empty() ? "budget" : "a head's budget", budget,
                "above num_sink_tokens and recent (or the scorer's window) together,", stays);
  require_few(found, of.rules.head_budgets.empty() ? "budget" : "a head's budget", budget);
  if (!found) return;
  if (!is_short(of.rules, kv_head)) of.scorer->require(found, of.geometry, budget, of.num_sink_tokens);
  if (of.rules.bound)
    found.require(of.rules.hard_budget >= budget, "hard_budget", of.rules.hard_budget, "at least the budget,", budget);
}

inline void require_rules(status& found, const scored_config& of, const cache_config& config) noexcept {
  const eviction& rules = of.rules;
  const scorer_needs needs = of.scorer->needs();
  found.require(config.window == 0, "window", config.window, "0: the budget says what is kept");
  found.require(of.num_sink_tokens >= 0, "num_sink_tokens", of.num_sink_tokens, "at least 0");
  constexpr index_t most_rollback = index_t{1} << 40;
  found.require(of.rollback >= 0 && of.rollback <= most_rollback, "rollback", of.rollback, "from 0 to", most_rollback);
  require_geometry(found, of.geometry);
  found.require(rules.recent >= 0, "recent", rules.recent, "at least 0");
  found.require(config.recent >= 0, "the configuration's recent", config.recent, "at least 0");
  found.require(rules.spared_pins >= 0, "spared_pins", rules.spared_pins, "at least 0");
  found.require(rules.interval >= 1, "interval", rules.interval, "at least 1");
  require_few(found, "interval", rules.interval);
  require_few(found, "hard_budget", rules.hard_budget);
  require_few(found, "spared_pins", rules.spared_pins);
  require_few(found, "the configuration's recent", config.recent);
  require_few(found, "the scorer's window", needs.window);
  const auto heads = static_cast<index_t>(rules.head_budgets.size());
  found.require(heads == 0 || heads == of.geometry.num_kv_heads, "head_budgets.size()", heads, "0 or num_kv_heads,",
                of.geometry.num_kv_heads);
  const auto shorts = static_cast<index_t>(rules.short_heads.size());
  found.require(shorts == 0 || shorts == of.geometry.num_kv_heads, "short_heads.size()", shorts, "0 or num_kv_heads,",
                of.geometry.num_kv_heads);
  found.require(shorts == 0 || !needs.one_set, "short_heads", "given",
                "absent: this scorer keeps one set in all heads");
  found.require(shorts == 0 || !rules.adaptive, "short_heads", "given", "absent where budgets are adaptive");
  found.require(heads == 0 || rules.budget == 0, "budget", rules.budget, "0 where head_budgets are given");
  found.require(needs.window >= 0, "the scorer's window", needs.window, "at least 0");
  found.require(needs.window == 0 || !needs.last_query, "the scorer's window", needs.window,
                "0 where it wants the last query alone");
  if (!found) return;
  bool alike = true;
  for (index_t h = 0; h < num_different_heads(of); ++h) {
    alike = alike && head_budget(rules, h) == head_budget(rules, 0);
    require_budget(found, of, h);
  }
  found.require(alike || !needs.one_set, "head_budgets", "different", "equal: this scorer keeps one set in all heads");
  if (rules.adaptive) {
    found.require(*rules.adaptive >= 0 && *rules.adaptive <= 1, "adaptive", *rules.adaptive, "from 0 to 1");
    found.require(needs.compares_heads, "adaptive", "given",
                  "absent: scores of this scorer cannot be compared across heads");
    found.require(!rules.bound, "adaptive", "given", "absent where a bound is given");
  }
  if (rules.bound) {
    found.require(*rules.bound >= 0, "bound", *rules.bound, "at least 0");
    found.require(!needs.one_set, "bound", "given", "absent: this scorer keeps one set in all heads");
  } else {
    found.require(rules.hard_budget == 0, "hard_budget", rules.hard_budget, "0 without a bound");
  }
  const bool asks =
      needs.window > 0 || needs.last_query || needs.sums || needs.query_statistics || rules.accounts || rules.bound;
  if (asks || rules.num_qo_heads != 0)
    found.require(rules.num_qo_heads >= 1 && rules.num_qo_heads % of.geometry.num_kv_heads == 0, "num_qo_heads",
                  rules.num_qo_heads, "a multiple of num_kv_heads,", of.geometry.num_kv_heads);
}

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "macros_on.hpp"
