#pragma once

// All that a cache that evicts by score holds, in one allocation; its sizes, and how tokens are taken back.

#include <algorithm>
#include <memory>
#include <memory_resource>
#include <span>

#include "choice.hpp"
#include "kept_tiers.hpp"
#include "macros_off.hpp"
#include "query_log.hpp"
#include "scored_config.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

class scored_state {
 public:
  explicit scored_state(scored_config config) : of(std::move(config)), needs(of.scorer->needs()) {
    if (of.rules.bound) of.rules.accounts = true;
  }

  // Bytes of all arrays.
  index_t bytes(status& found) const {
    scored_state counted(of);
    carver c(found, nullptr);
    counted.carve(c, found);
    return c.bytes();
  }
  void place(std::byte* memory) noexcept {
    status fits;  // it was counted
    carver c(fits, memory);
    carve(c, fits);
    if (stores_unrotated()) of.geometry.rope->rank_angles({rank_angles_memory, rank_angles().size()});
  }

  // As a cache that has seen nothing.
  void clear() noexcept {
    num_pins = 0;
    evicted_at = 0, prepared_at = -1, floor = 0;
    rows.clear();
    log.clear();
    index_t first = 0;
    for (index_t h = 0; h < num_heads(); ++h) {
      held_rows& head = rows.head(h);
      head.budget = head_budget(of.rules, h);
      head.first = first, head.room = head.budget + growth(of.rules, head.budget);
      first += head.room;
    }
  }

  // Whether keys are stored as they were before rope, and attention rotates them to their places: those change at
  // events.
  bool stores_unrotated() const { return of.geometry.positions == positions::in_cache && of.geometry.rotates(); }
  std::span<const float> rank_angles() const {
    return {rank_angles_memory,
            static_cast<std::size_t>(stores_unrotated() ? of.geometry.rope->rank_angles_size() : 0)};
  }

  index_t num_heads() const { return of.geometry.num_kv_heads; }
  index_t most_rows() const { return most_rows_; }
  // Rows of the fullest head.
  index_t fullest() const noexcept {
    index_t n = 0;
    for (index_t h = 0; h < num_heads(); ++h) n = std::max(n, rows.head(h).n);
    return n;
  }
  // Whether a head will hold more than its budget after so many more tokens.
  bool is_over_budget(position_t more) const noexcept {
    for (index_t h = 0; h < num_heads(); ++h)
      if (rows.head(h).n + more > rows.head(h).budget) return true;
    return false;
  }
  bool is_due(position_t seen) const noexcept { return seen > 0 && seen % of.rules.interval == 0; }
  // An event at `seen` that was undone and waits to be applied again.
  bool is_decided(position_t seen) const noexcept {
    const event_record* const event = rows.newest_event();
    return event != nullptr && event->undone && event->seen == seen;
  }
  // Whether all heads hold a position, and an event that waits takes it from none.
  bool keeps(position_t position, position_t seen) const noexcept {
    return rows.all_hold(position) && !(is_decided(seen) && rows.newest_takes(position));
  }
  // So many of the newest rows no event takes.
  index_t newest_kept(index_t kv_head) const {
    return is_short(of.rules, kv_head) ? 0 : std::max(of.rules.recent, needs.window);
  }
  std::span<const position_t> pins() const { return {pins_memory, static_cast<std::size_t>(num_pins)}; }

  // Stores a token as number i after those that a head holds: rows as formats take them.
  void write(index_t h, index_t i, position_t seen, const float* k, const float* v, float given) const noexcept {
    const index_t at = rows.head(h).n + i;
    rows.begin(h, at, seen + i, given);
    if (!of.has_tiers()) return rows.encode(h, at, k, v);
    tiers.write(rows, h, at, seen, seen + i, k, v, {pins(), pin_numbers});
  }
  // Where the last query before an event reads a row.
  kept_tiers::stored_row stored(index_t h, index_t i) const noexcept {
    if (of.has_tiers()) return tiers.row_for(rows, h, i, prepared_at - 1);
    return {rows.k_rows(h), rows.v_rows(h), i};
  }
  index_t max_parts() const noexcept {
    if (!of.has_tiers()) return 2;
    return tiers.max_parts(num_pins, needs.window, std::max(of.rules.recent, needs.window));
  }
  // What the queries [first, last] may see of a head.
  void push_parts(index_t h, position_t first, position_t last, part_list& parts) const noexcept {
    kv_part like;
    like.rank_angles = rank_angles();
    if (of.has_tiers())
      return tiers.push_parts(rows, h, first, last, of.geometry.positions == positions::in_cache, num_pins > 0, like,
                              parts);
    const held_rows& head = rows.head(h);
    push_rows(h, 0, head.tail, true, like, parts);
    push_rows(h, head.tail, head.n - head.tail, false, like, parts);
  }
  // Whether a part's keys are a head's: of a prefix in front nothing is learned.
  bool holds(const kv_part& part, index_t h) const noexcept {
    return part.k.base == rows.k_rows(h).base || (of.has_tiers() && tiers.is_of(part.k.base, h));
  }
  // The oldest query that finds all its rows where it did.
  position_t oldest_query() const noexcept { return of.has_tiers() ? std::max(evicted_at, floor - 1) : evicted_at; }

  // Keeps a token for ever, if there is room for one more such.
  void pin(status& found, position_t position, bool& pinned) noexcept {
    position_t* const end = pins_memory + num_pins;
    position_t* const place = std::lower_bound(pins_memory, end, position);
    pinned = position < of.num_sink_tokens || (place != end && *place == position);
    if (pinned) return;
    found.require(num_pins < most_pins, "pinned positions beside the sinks", num_pins + 1, "at most", most_pins);
    if (!found) return;
    std::int32_t* const number = pin_numbers + (place - pins_memory);
    std::move_backward(place, end, end + 1);
    std::move_backward(number, pin_numbers + num_pins, pin_numbers + num_pins + 1);
    *place = position;
    *number = static_cast<std::int32_t>(num_pins);
    ++num_pins;
    pinned = true;
  }

  // Adds to `found` why so many tokens cannot come after `seen` without their queries.
  void require_learned(status& found, position_t seen, index_t tokens) const noexcept {
    if (!log.learns()) return;
    const index_t interval = of.rules.interval;
    for (position_t at = seen + (interval - seen % interval) % interval; at < seen + tokens; at += interval) {
      const bool is_done = at == seen && (prepared_at == seen || is_decided(seen));
      if (at == 0 || at <= log.learned() || is_done || !is_over_budget(at - seen)) continue;
      return found.refuse(
          "tokens appended before attention saw their queries were {}, had to be at most {}: {} evicts by what queries "
          "say",
          tokens, at - seen, of.scorer->name());
    }
  }

  void advance(position_t seen) noexcept {
    floor = std::max(floor, seen - of.rollback);
    rows.forget_before(floor);
    if (!needs.query_statistics) return;
    // No event that may be undone knows of a query after these.
    const position_t to = std::min(floor - of.rollback, log.learned());
    if (to > log.folded()) log.fold(of.geometry, std::max<position_t>(log.folded(), of.num_sink_tokens), to);
  }

  // Takes back tokens and events, newest first, until `seen` of `now` tokens are left.
  void take_back(position_t seen, position_t now) noexcept {
    prepared_at = -1;
    for (;;) {
      event_record* const event = rows.newest_event();
      if (event != nullptr && event->undone && event->seen > seen) {
        rows.forget_newest();
        continue;
      }
      const bool undoes = event != nullptr && !event->undone && event->seen >= seen;
      const position_t down_to = undoes ? event->seen : seen;
      for (index_t h = 0; h < num_heads(); ++h) drop(h, now, down_to);
      now = down_to;
      if (!undoes) break;
      evicted_at = event->before;
      rows.undo();
    }
    for (index_t h = 0; h < num_heads(); ++h) log.set_learned(h, std::min(log.learned(h), seen));
  }

  scored_config of;
  scorer_needs needs;
  kept_rows rows;
  kept_tiers tiers;
  query_log log;

  position_t evicted_at = 0;    // the last event
  position_t prepared_at = -1;  // where it was last looked whether one is due
  position_t floor = 0;         // how far can be taken back
  index_t num_pins = 0, most_pins = 0;
  position_t* pins_memory = nullptr;
  std::int32_t* pin_numbers = nullptr;

  // Of an event.
  float *scores = nullptr, *scratch = nullptr, *row = nullptr, *value_row = nullptr;
  index_t scratch_floats = 0;
  float sm_scale = 0;                               // of the attention that was asked last
  std::uint8_t *leaves = nullptr, *kept = nullptr;  // [pool]
  candidate* candidates = nullptr;
  query_statistics* statistics = nullptr;
  float* rank_angles_memory = nullptr;
  double* head_sums = nullptr;  // of the head that is scored

 private:
  void carve(carver& c, status& found) noexcept {
    const kv_geometry& g = of.geometry;
    const eviction& rules = of.rules;
    index_t pool = 0, free = max_position;
    most_rows_ = 0;
    for (index_t h = 0; h < num_different_heads(of); ++h) {
      const index_t budget = head_budget(rules, h);
      const index_t room = checked_sum(found, "budget + interval", budget, growth(rules, budget));
      most_rows_ = std::max(most_rows_, room);
      pool = checked_sum(found, "rows of the cache", pool, room);
      free = std::min(free, budget - of.num_sink_tokens - newest_kept(h));
    }
    if (num_different_heads(of) == 1) pool = checked_product(found, "rows of the cache", pool, num_heads());
    const index_t stays = of.num_sink_tokens + std::max(rules.recent, needs.window);
    // A head may get all that is free, where others keep only what never leaves.
    if (rules.adaptive)
      most_rows_ = pool - checked_product(found, "rows of the cache", num_heads() - 1, stays + rules.interval);
    const index_t events = of.rollback == 0 ? 0 : of.rollback / rules.interval + 2;
    index_t undo = 0;
    if (events > 0) {
      undo = checked_product(found, "rows for rollback", num_heads(),
                             checked_product(found, "rows for rollback", events, rules.interval));
      if (needs.drops || rules.bound) undo = checked_sum(found, "rows for rollback", undo, pool);
    }
    checked_sum(found, "rows of the cache", pool, undo);
    if (!found) return;
    rows.carve(c, {.k = of.k,
                   .v = of.v,
                   .num_kv_heads = num_heads(),
                   .head_dim = g.head_dim,
                   .v_head_dim = g.v_head_dim,
                   .rows = pool,
                   .undo_rows = undo,
                   .events = events,
                   .sums = needs.sums,
                   .carried = needs.carried,
                   .given = needs.given,
                   .tiers = of.has_tiers()});
    log.carve(c, {.needs = needs,
                  .num_qo_heads = rules.num_qo_heads,
                  .num_kv_heads = num_heads(),
                  .head_dim = g.head_dim,
                  .rows = pool,
                  .rollback = of.rollback,
                  .interval = rules.interval,
                  .accounts = rules.accounts});
    c.take(rank_angles_memory, stores_unrotated() ? g.rope->rank_angles_size() : 0);
    most_pins = std::max<index_t>(0, free - 1);
    if (of.has_tiers()) {
      most_pins = std::min(most_pins, rules.spared_pins);
      // What the window of queries sees when it is looked at again, all of them when as many were taken back.
      const index_t later = checked_sum(found, "rows of the newest", of.rollback, needs.window);
      tiers.carve(c, found,
                  {.k = of.whole_k,
                   .v = of.whole_v,
                   .num_kv_heads = num_heads(),
                   .head_dim = g.head_dim,
                   .v_head_dim = g.v_head_dim,
                   .pinned = checked_sum(found, "pinned rows", of.num_sink_tokens, most_pins),
                   .sinks = of.num_sink_tokens,
                   .recent = of.recent,
                   .ring = of.recent > 0 ? checked_sum(found, "rows of the newest", of.recent, later) : 0});
    }
    const index_t group = std::max<index_t>(1, log.group());
    c.take(pins_memory, most_pins + 1);
    c.take(pin_numbers, most_pins + 1);
    c.take(scores, pool);
    c.take(leaves, pool);
    c.take(kept, pool);
    c.take(candidates, rules.adaptive ? pool : most_rows_);
    // What scorers compute in: some floats a row, element and head.
    const index_t floats = checked_sum(found, "floats of a row", g.head_dim + g.v_head_dim, group);
    checked_product(found, "rows of a head", most_rows_, checked_product(found, "floats of a row", 4, floats));
    if (!found) return;
    scratch_floats = of.scorer->scratch_floats({most_rows_, g.head_dim, g.v_head_dim, group});
    found.require(scratch_floats >= 0, "the scorer's scratch_floats", scratch_floats, "at least 0");
    c.take(scratch, scratch_floats);
    c.take(row, round_up(std::max(g.head_dim, g.v_head_dim), 16));
    c.take(value_row, rules.accounts ? g.v_head_dim : 0);
    c.take(statistics, needs.query_statistics ? group : 0);
    c.take(head_sums, needs.sums ? most_rows_ : 0);
  }

  // Rows that lie in the order of their positions, which may follow each other or not.
  void push_rows(index_t h, index_t from, index_t n, bool scattered, const kv_part& like,
                 part_list& parts) const noexcept {
    if (n == 0) return;
    const std::span<const position_t> at =
        rows.at(h).subspan(static_cast<std::size_t>(from), static_cast<std::size_t>(n));
    kv_part& part = parts.emplace_back();
    part = like;
    part.k = rows.k_rows(h);
    part.v = rows.v_rows(h);
    part.row = from;
    part.rows = n;
    part.mark = static_cast<std::int32_t>(from);
    part.first = at.front();
    part.pinned = static_cast<index_t>(std::lower_bound(at.begin(), at.end(), of.num_sink_tokens) - at.begin());
    if (!scattered) return;
    part.at = at;
    part.last = at.back() + 1;
  }

  // The tokens [down_to, now) of a head and what their queries gave.
  void drop(index_t h, position_t now, position_t down_to) noexcept {
    const held_rows& head = rows.head(h);
    for (; now > down_to; --now) {
      if (needs.sums && now <= log.learned(h)) log.take_back(rows.sums(h), now - 1, head.first, head.n);
      rows.drop_newest(h, 1);
    }
  }

  index_t most_rows_ = 0;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
