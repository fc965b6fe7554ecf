#pragma once

// Whole rows beside those of few bits, in a cache that evicts by score: of pinned tokens, and of the newest. They lie
// where their positions say, whether evicted or not, so that neither events nor rollback move any; kept_rows has room
// for every row, and holds those that left the newest.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>

#include "kept_rows.hpp"
#include "macros_off.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// Positions that the caller pinned, in order, and which of them was the first, the second, ...
struct pin_list {
  std::span<const position_t> at;
  const std::int32_t* numbers;

  std::int32_t number_of(position_t position) const noexcept {
    const auto place = std::lower_bound(at.begin(), at.end(), position);
    return place != at.end() && *place == position ? numbers[place - at.begin()] : -1;
  }
};

struct tier_sizes {
  row_format k, v;
  index_t num_kv_heads, head_dim, v_head_dim;
  index_t pinned, sinks;  // rows that stay, those of sinks first
  index_t recent, ring;   // newest tokens that are spared; rows for them, for those of a chunk, and for rollback
};

class kept_tiers {
 public:
  kept_tiers() = default;

  void carve(carver& c, status& found, const tier_sizes& of) noexcept {
    of_ = of;
    rows_ = checked_sum(found, "whole rows of the cache", of.pinned, of.ring);
    constexpr index_t most = std::numeric_limits<std::int32_t>::max();
    found.require(rows_ <= most, "whole rows of the cache", rows_, "at most", most);
    k_block_ = of.k.reader->block_bytes(of.head_dim);
    v_block_ = of.v.reader->block_bytes(of.v_head_dim);
    c.take(k_, of.num_kv_heads, rows_, k_block_);
    c.take(v_, of.num_kv_heads, rows_, v_block_);
  }

  // As many tokens as the ring takes before it loses one that the first of them sees.
  index_t room() const { return of_.recent > 0 ? of_.ring - of_.recent + 1 : max_position; }

  // Stores a token that comes after `seen`, as number `row` of a head. The one that leaves the newest by it is encoded
  // from its stored row, unless it is pinned.
  void write(const kept_rows& rows, index_t h, index_t row, position_t seen, position_t position, const float* k,
             const float* v, const pin_list& pins) const noexcept {
    if (of_.recent > 0 && position - of_.recent >= of_.sinks) settle(rows, h, seen, position - of_.recent, pins);
    const index_t at = place(position, pins);
    rows.spared(h)[row] = static_cast<std::int32_t>(at);
    rows.encoded(h)[row] = at < 0;
    if (at < 0) return rows.encode(h, row, k, v);
    of_.k.encode(k, of_.head_dim, k_at(h, at));
    of_.v.encode(v, of_.v_head_dim, v_at(h, at));
  }

  // Where the query at `query` reads a row.
  struct stored_row {
    kv_rows k, v;
    index_t row;
  };
  stored_row row_for(const kept_rows& rows, index_t h, index_t i, position_t query) const noexcept {
    const bool whole = stays(rows, h, i) || query - rows.at(h)[static_cast<std::size_t>(i)] < of_.recent;
    return whole ? stored_row{k_rows(h), v_rows(h), rows.spared(h)[i]} : stored_row{rows.k_rows(h), rows.v_rows(h), i};
  }

  // Of so many pinned positions, where the newest query before the last event was so many tokens old, and the newest
  // `kept` of an event have no gaps.
  index_t max_parts(index_t pins, index_t window, index_t kept) const {
    const index_t gaps = (std::max<index_t>(0, of_.recent + window - kept) + 1) / 2;
    return 2 * (pins + 1) + 2 * (gaps + 2 + pins);
  }

  // What the queries [first, last] may see of a head, as parts like `like`.
  void push_parts(const kept_rows& rows, index_t h, position_t first, position_t last, bool in_cache, bool any_pins,
                  const kv_part& like, part_list& parts) const noexcept {
    const std::span<const position_t> at = rows.at(h);
    const auto upto = [&](position_t position) {
      return static_cast<index_t>(std::upper_bound(at.begin(), at.end(), position) - at.begin());
    };
    const index_t n = upto(last), old = upto(first - of_.recent), left = upto(last - of_.recent);
    for (index_t i = 0, end; i < n; i = end) {
      const bool stay = stays(rows, h, i);
      if (!stay && !any_pins)
        end = n;
      else
        for (end = i + 1; end < n && stays(rows, h, end) == stay;) ++end;
      if (stay) {
        push_runs(rows, h, true, i, end, like, parts);
        continue;
      }
      // Encoded rows for queries far enough away, whole ones for those that are near.
      kv_part few = like, whole = like;
      few.seen_from = of_.recent;
      whole.seen_until = of_.recent;
      const index_t few_for_all = std::clamp(old, i, end), few_end = std::clamp(left, i, end);
      push_scattered(rows, h, false, i, in_cache ? few_end : few_for_all, few, parts);
      if (!in_cache) push_runs(rows, h, false, few_for_all, few_end, few, parts);
      if (of_.recent == 0) continue;
      if (first == last)
        push_scattered(rows, h, true, few_end, end, like, parts);
      else
        push_runs(rows, h, true, few_for_all, end, whole, parts);
    }
  }

  bool is_of(const std::byte* base, index_t h) const noexcept { return base == k_rows(h).base; }

 private:
  std::byte* k_at(index_t h, index_t row) const { return k_ + (h * rows_ + row) * k_block_; }
  std::byte* v_at(index_t h, index_t row) const { return v_ + (h * rows_ + row) * v_block_; }
  kv_rows k_rows(index_t h) const {
    return {.reader = of_.k.reader, .base = k_at(h, 0), .block = k_block_, .page = k_block_};
  }
  kv_rows v_rows(index_t h) const {
    return {.reader = of_.v.reader, .base = v_at(h, 0), .block = v_block_, .page = v_block_};
  }

  // The whole row of a token that comes; -1: it is encoded at once.
  index_t place(position_t position, const pin_list& pins) const noexcept {
    if (position < of_.sinks) return static_cast<index_t>(position);
    if (const index_t number = pins.number_of(position); number >= 0) return of_.sinks + number;
    return of_.recent > 0 ? of_.pinned + static_cast<index_t>(position % of_.ring) : -1;
  }
  bool stays(const kept_rows& rows, index_t h, index_t i) const noexcept {
    const std::int32_t at = rows.spared(h)[i];
    return at >= 0 && at < of_.pinned;
  }

  // A position leaves the newest: if the head holds it still it is encoded, once, or gets a row that stays.
  void settle(const kept_rows& rows, index_t h, position_t seen, position_t position,
              const pin_list& pins) const noexcept {
    const std::span<const position_t> at = rows.at(h);
    index_t row = rows.head(h).n + static_cast<index_t>(position - seen);
    if (position < seen) {
      const auto place = std::lower_bound(at.begin(), at.end(), position);
      if (place == at.end() || *place != position) return;
      row = static_cast<index_t>(place - at.begin());
    }
    if (stays(rows, h, row)) return;
    std::int32_t& from = rows.spared(h)[row];
    std::uint8_t& encoded = rows.encoded(h)[row];
    if (const std::int32_t number = pins.number_of(position); number >= 0) {
      const index_t to = of_.sinks + number;
      std::memcpy(k_at(h, to), k_at(h, from), static_cast<std::size_t>(k_block_));
      std::memcpy(v_at(h, to), v_at(h, from), static_cast<std::size_t>(v_block_));
      from = static_cast<std::int32_t>(to);
      encoded = 0;
    } else if (encoded == 0) {
      alignas(64) float k[max_head_dim], v[max_head_dim];
      of_.k.reader->load(k_rows(h), from, 1, of_.head_dim, round_up(of_.head_dim, 16), k);
      of_.v.reader->load(v_rows(h), from, 1, of_.v_head_dim, round_up(of_.v_head_dim, 16), v);
      rows.encode(h, row, k, v);
      encoded = 1;
    }
  }

  kv_part& push(const kept_rows& rows, index_t h, bool whole, index_t i, index_t end, const kv_part& like,
                part_list& parts) const noexcept {
    const std::span<const position_t> at = rows.at(h);
    kv_part& part = parts.emplace_back();
    part = like;
    part.k = whole ? k_rows(h) : rows.k_rows(h);
    part.v = whole ? v_rows(h) : rows.v_rows(h);
    part.row = whole ? rows.spared(h)[i] : i;
    part.rows = end - i;
    part.first = at[static_cast<std::size_t>(i)];
    part.pinned = static_cast<index_t>(std::clamp<position_t>(of_.sinks - part.first, 0, part.rows));
    part.mark = static_cast<std::int32_t>(i);
    return part;
  }

  // The end of the rows from i on that lie one after the other, at positions that do.
  index_t end_of_run(const kept_rows& rows, index_t h, bool whole, index_t i, index_t end) const noexcept {
    const position_t* const at = rows.at(h).data();
    const std::int32_t* const from = rows.spared(h);
    for (++i; i < end && at[i] == at[i - 1] + 1 && (!whole || from[i] == from[i - 1] + 1);) ++i;
    return i;
  }
  void push_runs(const kept_rows& rows, index_t h, bool whole, index_t i, index_t end, const kv_part& like,
                 part_list& parts) const noexcept {
    for (index_t next; i < end; i = next) {
      next = end_of_run(rows, h, whole, i, end);
      push(rows, h, whole, i, next, like, parts);
    }
  }
  // As one part, or as two runs.
  void push_scattered(const kept_rows& rows, index_t h, bool whole, index_t i, index_t end, const kv_part& like,
                      part_list& parts) const noexcept {
    if (i == end) return;
    const std::span<const position_t> at =
        rows.at(h).subspan(static_cast<std::size_t>(i), static_cast<std::size_t>(end - i));
    if (at.back() - at.front() == end - 1 - i) return push_runs(rows, h, whole, i, end, like, parts);
    kv_part& part = push(rows, h, whole, i, end, like, parts);
    part.at = at;
    part.last = at.back() + 1;
    if (!whole) return;
    part.row = i;
    part.page_rows = 1;
    part.pages = {rows.spared(h), static_cast<std::size_t>(end)};
  }

  tier_sizes of_{};
  index_t rows_ = 0, k_block_ = 0, v_block_ = 0;
  std::byte *k_ = nullptr, *v_ = nullptr;
};

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "macros_on.hpp"
