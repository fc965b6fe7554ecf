#pragma once

// The rows of a cache that evicts by score: keys, values and what belongs to them, in one allocation; and what left
// lately, so that it can come back.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <memory_resource>
#include <span>

#include "../source.hpp"
#include "macros_off.hpp"
#include "reader.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// Lays arrays one after the other: without memory it only counts their bytes.
class carver {
 public:
  carver(status& found, std::byte* memory) noexcept : found_(found), memory_(memory) {}

  template <class T>
  void take(T*& to, index_t a, index_t b = 1, index_t c = 1) noexcept {
    const index_t n = checked_product(found_, "rows of a cache", a, checked_product(found_, "rows of a cache", b, c));
    const index_t size = checked_product(found_, "bytes of a cache", n, index_t{sizeof(T)});
    to = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ = checked_sum(found_, "bytes of a cache", bytes_, checked_sum(found_, "bytes of a cache", size, 63) & -64);
  }
  index_t bytes() const { return bytes_; }

 private:
  status& found_;
  std::byte* memory_;
  index_t bytes_ = 0;
};

// Of one KV head: rows [first, first + n) of the pool are held, up to `first + room` may be. From row `tail` on
// positions follow each other.
struct held_rows {
  index_t first, room, n, tail, budget;
  double mass, bound;  // accounts: what was evicted in all, the largest bound so far
};

// What is known of an event that may have to be undone. `undone`: it was, up to its own place of the stream; it is
// applied again as it was.
struct event_record {
  position_t seen, before;    // and where the event before it was
  std::int64_t first, count;  // of rows that left, among all that ever did
  bool undone;
};

struct evicted_row {
  std::int32_t kv_head, row;  // row of the head, as it lay before the event
};

struct kept_sizes {
  row_format k, v;
  index_t num_kv_heads, head_dim, v_head_dim;
  index_t rows;  // of the pool, all heads
  index_t undo_rows, events;
  bool sums, carried, given;
  bool tiers;  // whether some rows lie elsewhere: kept_tiers
};

class kept_rows {
 public:
  kept_rows() = default;

  void carve(carver& c, const kept_sizes& of) noexcept {
    of_ = of;
    k_block_ = of.k.reader->block_bytes(of.head_dim);
    v_block_ = of.v.reader->block_bytes(of.v_head_dim);
    const index_t all = of.rows + of.undo_rows;
    c.take(k_, all, k_block_);
    c.take(v_, all, v_block_);
    c.take(heads_, of.num_kv_heads);
    c.take(at_, all);
    c.take(sums_, of.sums ? all : 0);
    c.take(carried_, of.carried ? all : 0);
    c.take(given_, of.given ? all : 0);
    c.take(spared_, of.tiers ? all : 0);
    c.take(encoded_, of.tiers ? all : 0);
    c.take(evicted_, of.undo_rows);
    c.take(events_, of.events);
    c.take(heads_before_, of.events, of.num_kv_heads);
    c.take(carried_other_, of.carried ? of.events : 0, of.rows);
  }

  held_rows& head(index_t h) const { return heads_[h]; }
  std::span<const position_t> at(index_t h) const {
    return {at_ + heads_[h].first, static_cast<std::size_t>(heads_[h].n)};
  }
  std::int64_t* sums(index_t h) const { return sums_ + heads_[h].first; }
  float* carried(index_t h) const { return carried_ + heads_[h].first; }
  float* given(index_t h) const { return given_ + heads_[h].first; }
  // With tiers: where a row's whole row lies or lay, -1 for nowhere; and 1 where it is encoded here.
  std::int32_t* spared(index_t h) const { return spared_ + heads_[h].first; }
  std::uint8_t* encoded(index_t h) const { return encoded_ + heads_[h].first; }
  kv_rows k_rows(index_t h) const {
    return {.reader = of_.k.reader, .base = k_ + heads_[h].first * k_block_, .block = k_block_};
  }
  kv_rows v_rows(index_t h) const {
    return {.reader = of_.v.reader, .base = v_ + heads_[h].first * v_block_, .block = v_block_};
  }

  bool all_hold(position_t position) const noexcept {
    for (index_t h = 0; h < of_.num_kv_heads; ++h)
      if (!std::binary_search(at(h).begin(), at(h).end(), position)) return false;
    return true;
  }
  // Whether the newest event, which was undone, takes a position from a head when it is applied again.
  bool newest_takes(position_t position) const noexcept {
    const event_record* const event = newest_event();
    for (std::int64_t i = 0; i < event->count; ++i) {
      const evicted_row& row = evicted_[(event->first + i) % of_.undo_rows];
      if (at(row.kv_head)[static_cast<std::size_t>(row.row)] == position) return true;
    }
    return false;
  }

  // Encodes row number i of a head.
  void encode(index_t h, index_t i, const float* k, const float* v) const noexcept {
    const index_t row = heads_[h].first + i;
    of_.k.encode(k, of_.head_dim, k_ + row * k_block_);
    of_.v.encode(v, of_.v_head_dim, v_ + row * v_block_);
  }
  // What belongs to row number i of a head that is written.
  void begin(index_t h, index_t i, position_t position, float given) const noexcept {
    const index_t row = heads_[h].first + i;
    at_[row] = position;
    if (of_.sums) sums_[row] = 0;
    if (of_.carried) carried_[row] = std::numeric_limits<float>::quiet_NaN();
    if (of_.given) given_[row] = given;
  }

  void clear() noexcept {
    num_evicted_ = 0;
    first_event_ = num_events_ = 0;
    for (index_t h = 0; h < of_.num_kv_heads; ++h)
      heads_[h].n = heads_[h].tail = 0, heads_[h].mass = heads_[h].bound = 0;
  }

  // The newest event; null: none is remembered.
  event_record* newest_event() const noexcept {
    return num_events_ == 0 ? nullptr : events_ + (first_event_ + num_events_ - 1) % of_.events;
  }

  // Forgets events before `floor`.
  void forget_before(position_t floor) noexcept {
    while (num_events_ > 0 && events_[first_event_].seen < floor) {
      first_event_ = (first_event_ + 1) % of_.events;
      --num_events_;
    }
  }
  void forget_newest() noexcept { --num_events_; }

  // The newest n rows of a head were never written.
  void drop_newest(index_t h, index_t n) noexcept {
    heads_[h].n -= n;
    heads_[h].tail = std::min(heads_[h].tail, heads_[h].n);
  }

  // Starts the record of an event: heads as they are now, and what was carried, of all as they lie.
  void begin_event(position_t seen, position_t before) noexcept {
    if (of_.events == 0) return;
    if (num_events_ == of_.events) broken_source("a cache remembers too few of its events");
    event_record& event = events_[(first_event_ + num_events_++) % of_.events];
    event = {seen, before, num_evicted_, 0, false};
    std::copy_n(heads_, of_.num_kv_heads, heads_before(event));
    if (of_.carried) std::copy_n(carried_, of_.rows, carried_other(event));
  }

  // Lets go of a head's rows marked in `leaves`, after `seen` tokens; those that stay close up.
  void evict(index_t h, position_t seen, std::span<const std::uint8_t> leaves) noexcept {
    held_rows& head = heads_[h];
    event_record* const event = newest_event();
    index_t kept = 0;
    for (index_t i = 0, end; i < head.n; i = end) {
      const bool leave = leaves[static_cast<std::size_t>(i)] != 0;
      for (end = i + 1; end < head.n && (leaves[static_cast<std::size_t>(end)] != 0) == leave; ++end) {
      }
      if (!leave) {
        move(head.first + i, head.first + kept, end - i);
        kept += end - i;
      } else if (of_.events > 0) {
        for (index_t row = i; row < end; ++row, ++num_evicted_, ++event->count) put_aside(h, row);
      }
    }
    head.n = kept;
    find_tail(head, seen);
  }

  // Gives each head the room of its budget, in the order of heads, and `more` rows.
  void lay_out(index_t more) noexcept {
    index_t next = 0;
    for (index_t h = 0; h < of_.num_kv_heads; next += heads_[h].room, ++h) {
      heads_[h].room = heads_[h].budget + more;
      if (next < heads_[h].first) shift(heads_[h], next);
    }
    for (index_t h = of_.num_kv_heads; h-- > 0;) {
      next -= heads_[h].room;
      if (next > heads_[h].first) shift(heads_[h], next);
    }
  }

  // Takes the newest event back; rows that came after it have to be gone.
  void undo() noexcept {
    event_record* const newest = newest_event();
    if (newest == nullptr) return;
    event_record& event = *newest;
    const held_rows* const before = heads_before(event);
    for (index_t h = 0; h < of_.num_kv_heads; ++h)  // as lay_out, to where the heads lay
      if (before[h].first < heads_[h].first) shift(heads_[h], before[h].first);
    for (index_t h = of_.num_kv_heads; h-- > 0;)
      if (before[h].first > heads_[h].first) shift(heads_[h], before[h].first);
    std::int64_t number = event.first + event.count;
    for (index_t h = of_.num_kv_heads; h-- > 0;) {
      index_t end = before[h].n, source = heads_[h].n;
      for (; number > event.first && evicted_[(number - 1) % of_.undo_rows].kv_head == h; --number) {
        const index_t slot = static_cast<index_t>((number - 1) % of_.undo_rows), row = evicted_[slot].row;
        const index_t after = end - row - 1;
        source -= after;
        move(before[h].first + source, before[h].first + row + 1, after);
        move(of_.rows + slot, before[h].first + row, 1);
        end = row;
      }
    }
    swap_carried(event);
    std::swap_ranges(heads_, heads_ + of_.num_kv_heads, heads_before(event));
    num_evicted_ = event.first;
    event.undone = true;
  }

  // Applies the newest event again.
  void redo(std::span<std::uint8_t> leaves) noexcept {
    event_record* const newest = newest_event();
    if (newest == nullptr) return;
    event_record& event = *newest;
    const index_t count = static_cast<index_t>(event.count);
    event.undone = false;
    event.count = 0;
    swap_carried(event);
    held_rows* const after = heads_before(event);
    for (index_t h = 0, i = 0; h < of_.num_kv_heads; ++h) {
      std::fill_n(leaves.begin(), heads_[h].n, std::uint8_t{0});
      const held_rows now = heads_[h];
      for (; i < count; ++i) {
        const evicted_row& row = evicted_[(event.first + i) % of_.undo_rows];
        if (row.kv_head != h) break;
        leaves[static_cast<std::size_t>(row.row)] = 1;
      }
      evict(h, event.seen, leaves);
      heads_[h].budget = after[h].budget, heads_[h].mass = after[h].mass, heads_[h].bound = after[h].bound;
      after[h] = now;
    }
  }

 private:
  held_rows* heads_before(const event_record& event) const {
    return heads_before_ + (&event - events_) * of_.num_kv_heads;
  }
  float* carried_other(const event_record& event) const { return carried_other_ + (&event - events_) * of_.rows; }

  // Carried numbers as they were before the event for those after it, or the other way about, where all rows lie as
  // before it.
  void swap_carried(const event_record& event) noexcept {
    if (of_.carried) std::swap_ranges(carried_, carried_ + of_.rows, carried_other(event));
  }

  // The newest rows whose positions follow each other up to `seen`, where the next one will be.
  void find_tail(held_rows& head, position_t seen) const noexcept {
    const position_t* const at = at_ + head.first;
    for (head.tail = head.n; head.tail > 0 && at[head.tail - 1] + 1 == seen; --head.tail) --seen;
  }

  void put_aside(index_t h, index_t row) noexcept {
    const index_t slot = static_cast<index_t>(num_evicted_ % of_.undo_rows);
    evicted_[slot] = {static_cast<std::int32_t>(h), static_cast<std::int32_t>(row)};
    move(heads_[h].first + row, of_.rows + slot, 1);
  }

  void shift(held_rows& head, index_t to) noexcept {
    move(head.first, to, head.n);
    head.first = to;
  }

  template <class T>
  static void move_in(T* memory, index_t from, index_t to, index_t n, index_t size = 1) noexcept {
    if (memory != nullptr && n > 0 && from != to)
      std::memmove(memory + to * size, memory + from * size, static_cast<std::size_t>(n * size) * sizeof(T));
  }
  void move(index_t from, index_t to, index_t n) noexcept {
    move_in(k_, from, to, n, k_block_);
    move_in(v_, from, to, n, v_block_);
    move_in(at_, from, to, n);
    if (of_.sums) move_in(sums_, from, to, n);
    if (of_.carried) move_in(carried_, from, to, n);
    if (of_.given) move_in(given_, from, to, n);
    if (!of_.tiers) return;
    move_in(spared_, from, to, n);
    move_in(encoded_, from, to, n);
  }

  kept_sizes of_{};
  index_t k_block_ = 0, v_block_ = 0;
  std::byte *k_ = nullptr, *v_ = nullptr;
  held_rows *heads_ = nullptr, *heads_before_ = nullptr;
  position_t* at_ = nullptr;
  std::int64_t* sums_ = nullptr;
  float *carried_ = nullptr, *given_ = nullptr, *carried_other_ = nullptr;
  std::int32_t* spared_ = nullptr;
  std::uint8_t* encoded_ = nullptr;
  evicted_row* evicted_ = nullptr;
  event_record* events_ = nullptr;
  std::int64_t num_evicted_ = 0;  // since the stream began
  index_t first_event_ = 0, num_events_ = 0;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
