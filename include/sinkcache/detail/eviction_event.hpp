#pragma once

// One event: every head's rows are scored, then it is chosen for all heads which leave, and only then does any.

#include <algorithm>
#include <cmath>

#include "macros_off.hpp"
#include "scored_state.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

class eviction_run {
 public:
  eviction_run(scored_state& state, position_t seen, eviction_reader* watcher) noexcept
      : s_(state), seen_(seen), watcher_(watcher) {}

  void run() noexcept {
    s_.rows.begin_event(seen_, s_.evicted_at);
    for (index_t h = 0; h < s_.num_heads(); ++h)
      if (is_due(h)) score(h);
    if (s_.needs.one_set) average_scores();
    if (s_.of.rules.adaptive) share_out();
    for (index_t h = 0; h < s_.num_heads(); ++h) {
      std::fill_n(s_.leaves + s_.rows.head(h).first, s_.rows.head(h).n, std::uint8_t{0});
      if (!is_due(h)) continue;
      const double max_value = s_.of.rules.accounts ? largest_value(h) : 0;
      choose(h, max_value);
      tell(h, max_value);
    }
    for (index_t h = 0; h < s_.num_heads(); ++h) s_.rows.evict(h, seen_, {s_.leaves + s_.rows.head(h).first, size(h)});
    if (s_.of.rules.adaptive) s_.rows.lay_out(s_.of.rules.interval);
  }

 private:
  bool is_due(index_t h) const { return s_.of.rules.adaptive || s_.rows.head(h).n > head_budget(s_.of.rules, h); }
  std::size_t size(index_t h) const { return static_cast<std::size_t>(s_.rows.head(h).n); }

  void score(index_t h) noexcept {
    const held_rows& head = s_.rows.head(h);
    std::uint8_t* const kept = s_.kept + head.first;
    mark_pinned(s_.rows.at(h), s_.of.num_sink_tokens, s_.pins(), kept);
    const query_log& log = s_.log;
    if (s_.needs.query_statistics) {
      // As many tokens late as can be taken back.
      const position_t sinks = s_.of.num_sink_tokens, to = std::max(sinks, seen_ - s_.of.rollback);
      log.moments(s_.of.geometry, h, std::max(log.folded(), sinks), to, static_cast<double>(to - sinks), s_.statistics);
    }
    if (s_.needs.sums)
      for (index_t i = 0; i < head.n; ++i) s_.head_sums[i] = static_cast<double>(s_.rows.sums(h)[i]) / query_log::fixed;
    scored_head told{.kv_head = h,
                     .num_kv_heads = s_.num_heads(),
                     .group = std::max<index_t>(1, log.group()),
                     .rows = head.n,
                     .window = static_cast<index_t>(std::min<position_t>(s_.needs.window, seen_)),
                     .num_sink_tokens = s_.of.num_sink_tokens,
                     .budget = head.budget,
                     .seen = seen_,
                     .whole = s_.of.has_tiers() ? s_.of.recent : 0,
                     .sm_scale = s_.sm_scale,
                     .geometry = s_.of.geometry,
                     .at = s_.rows.at(h),
                     .pinned = {kept, size(h)},
                     .sums = {s_.head_sums, s_.needs.sums ? size(h) : 0},
                     .given = {s_.needs.given ? s_.rows.given(h) : nullptr, s_.needs.given ? size(h) : 0},
                     .carried = {s_.needs.carried ? s_.rows.carried(h) : nullptr, s_.needs.carried ? size(h) : 0},
                     .scratch = {s_.scratch, static_cast<std::size_t>(s_.scratch_floats)},
                     .queries = {s_.statistics, static_cast<std::size_t>(s_.needs.query_statistics ? log.group() : 0)},
                     .reader = {&s_, &key_of, &value_of},
                     .weights = s_.needs.window > 0 || s_.needs.last_query ? log.window(0) + head.first : nullptr,
                     .stride = log.sizes().rows};
    if (is_short(s_.of.rules, h))
      for (index_t i = 0; i < head.n; ++i) s_.scores[head.first + i] = static_cast<float>(i);
    else
      s_.of.scorer->score(told, {s_.scores + head.first, size(h)});
    // The newest stay too, which is nothing to a score.
    const index_t newest = std::min(s_.newest_kept(h), head.n);
    std::fill_n(kept + head.n - newest, newest, std::uint8_t{1});
  }

  static void key_of(const void* of, index_t kv_head, index_t i, bool shown, float* to) noexcept {
    const auto& s = *static_cast<const scored_state*>(of);
    const kv_geometry& g = s.of.geometry;
    const auto stored = s.stored(kv_head, i);
    read_row(stored.k, stored.row, g.head_dim, g.k_transform, s.row);
    if (!s.stores_unrotated()) return static_cast<void>(std::copy_n(s.row, g.head_dim, to));
    rope::angles angles;
    g.rope->angles_at(shown ? i : g.first_position + s.rows.at(kv_head)[static_cast<std::size_t>(i)], true, angles);
    g.rope->rotate(angles, s.row, g.head_dim, to);
  }
  static void value_of(const void* of, index_t kv_head, index_t i, float* to) noexcept {
    const auto& s = *static_cast<const scored_state*>(of);
    const auto stored = s.stored(kv_head, i);
    read_row(stored.v, stored.row, s.of.geometry.v_head_dim, s.of.geometry.v_transform, s.row);
    std::copy_n(s.row, s.of.geometry.v_head_dim, to);
  }
  // As stored, before its transform.
  static void read_row(const kv_rows& rows, index_t row, index_t dim, const row_transform* transform,
                       float* to) noexcept {
    rows.reader->load(rows, row, 1, dim, round_up(dim, 16), to);
    if (transform != nullptr) transform->undo(to, dim);
  }

  // The same scores for the same tokens, which all heads hold.
  void average_scores() noexcept {
    const index_t n = s_.rows.head(0).n;
    for (index_t i = 0; i < n; ++i) {
      double sum = 0;
      for (index_t h = 0; h < s_.num_heads(); ++h) sum += static_cast<double>(s_.scores[s_.rows.head(h).first + i]);
      for (index_t h = 0; h < s_.num_heads(); ++h)
        s_.scores[s_.rows.head(h).first + i] = static_cast<float>(sum / static_cast<double>(s_.num_heads()));
    }
  }

  // The rows of a head that may leave, after those of the heads before it.
  index_t add_candidates(index_t h, index_t from) const noexcept {
    const held_rows& head = s_.rows.head(h);
    for (index_t i = 0; i < head.n; ++i) {
      const index_t at = head.first + i;
      if (s_.kept[at] == 0)
        s_.candidates[from++] = {s_.scores[at], static_cast<std::int32_t>(h), static_cast<std::int32_t>(i),
                                 s_.rows.at(h)[static_cast<std::size_t>(i)]};
    }
    return from;
  }

  // Ada-KV: of its free rows each head is sure of a share, its best; for the others all heads compete, and the total
  // stays what it was.
  void share_out() noexcept {
    const double share = *s_.of.rules.adaptive;
    index_t rest = 0, candidates = 0;
    for (index_t h = 0; h < s_.num_heads(); ++h) {
      held_rows& head = s_.rows.head(h);
      const index_t from = candidates, all = add_candidates(h, from), fixed = head.n - (all - from);
      const index_t free = head_budget(s_.of.rules, h) - fixed;
      const index_t sure = std::min(static_cast<index_t>(share * static_cast<double>(free)), all - from);
      std::nth_element(s_.candidates + from, s_.candidates + from + sure, s_.candidates + all, worth_more);
      // Those beyond the sure ones compete.
      std::copy(s_.candidates + from + sure, s_.candidates + all, s_.candidates + from);
      candidates = all - sure;
      rest += free - sure;
      head.budget = fixed + sure;
    }
    rest = std::clamp<index_t>(rest, 0, candidates);
    std::nth_element(s_.candidates, s_.candidates + rest, s_.candidates + candidates, worth_more);
    for (index_t i = 0; i < rest; ++i) ++s_.rows.head(s_.candidates[i].kv_head).budget;
  }

  void choose(index_t h, double max_value) noexcept {
    const held_rows& head = s_.rows.head(h);
    std::uint8_t* const leaves = s_.leaves + head.first;
    const index_t n = add_candidates(h, 0), fixed = head.n - n;
    if (s_.of.rules.bound) return choose_within_bound(h, n, max_value);
    if (head.n > head.budget) keep_best({s_.candidates, static_cast<std::size_t>(n)}, head.budget - fixed, leaves);
    if (s_.needs.drops && !is_short(s_.of.rules, h))
      for (index_t i = 0; i < n; ++i)
        if (s_.candidates[i].score == -std::numeric_limits<float>::infinity()) leaves[s_.candidates[i].row] = 1;
  }

  // The lowest first, as long as the change of the output stays within the bound; more only where the hard budget asks.
  void choose_within_bound(index_t h, index_t n, double max_value) noexcept {
    const held_rows& head = s_.rows.head(h);
    std::sort(s_.candidates, s_.candidates + n, worth_more);
    const index_t most = head.n - head.budget, must = head.n - s_.of.rules.hard_budget;
    for (index_t i = 0; i < std::min(most, n); ++i) {
      std::uint8_t& leaves = s_.leaves[head.first + s_.candidates[n - 1 - i].row];
      leaves = 1;
      if (i >= must && largest_change(mass(h), max_value) > *s_.of.rules.bound) {
        leaves = 0;
        return;
      }
    }
  }

  // What the last query, in the query head where it is most, gave all that leave.
  double mass(index_t h) const noexcept {
    const held_rows& head = s_.rows.head(h);
    double most = 0;
    for (index_t g = 0; g < s_.log.group(); ++g) {
      double sum = 0;
      for (index_t i = head.first; i < head.first + head.n; ++i)
        if (s_.leaves[i] != 0) sum += static_cast<double>(s_.log.last(g)[i]);
      most = std::max(most, sum);
    }
    return most;
  }
  double largest_value(index_t h) const noexcept {
    double most = 0;
    for (index_t i = 0; i < s_.rows.head(h).n; ++i) {
      value_of(&s_, h, i, s_.value_row);
      double sum = 0;
      for (index_t d = 0; d < s_.of.geometry.v_head_dim; ++d)
        sum += static_cast<double>(s_.value_row[d]) * static_cast<double>(s_.value_row[d]);
      most = std::max(most, std::sqrt(sum));
    }
    return most;
  }

  void tell(index_t h, double max_value) noexcept {
    held_rows& head = s_.rows.head(h);
    double m = 0, bound = 0;
    if (s_.of.rules.accounts) {
      m = mass(h);
      bound = largest_change(m, max_value);
      head.mass += m;
      head.bound = std::max(head.bound, bound);
    }
    if (watcher_ != nullptr)
      watcher_->read({.seen = seen_,
                      .kv_head = h,
                      .at = s_.rows.at(h),
                      .scores = {s_.scores + head.first, size(h)},
                      .leaves = {s_.leaves + head.first, size(h)},
                      .mass = m,
                      .bound = bound});
  }

  scored_state& s_;
  position_t seen_;
  eviction_reader* watcher_;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
