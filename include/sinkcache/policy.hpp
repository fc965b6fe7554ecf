#pragma once

// Eviction policies: pure functions of how many tokens were seen. Integers only; nothing here knows of memory or
// floats.

#include <algorithm>
#include <array>
#include <concepts>

#include "detail/macros_off.hpp"
#include "status.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// The positions that are visible, oldest first. Neighbours that touch are one span.
class span_list {
 public:
  static constexpr index_t max_spans = 8;

  constexpr void push_back(position_span span) {
    if (span.first >= span.last) return;
    if (size_ > 0 && spans_[static_cast<std::size_t>(size_ - 1)].last == span.first) {
      spans_[static_cast<std::size_t>(size_ - 1)].last = span.last;
      return;
    }
    detail::check(size_ < max_spans, "spans of visible positions", size_ + 1, "at most", max_spans);
    spans_[static_cast<std::size_t>(size_++)] = span;
  }
  constexpr index_t size() const { return size_; }
  constexpr const position_span& operator[](index_t i) const { return spans_[static_cast<std::size_t>(i)]; }
  constexpr const position_span* begin() const { return spans_.data(); }
  constexpr const position_span* end() const { return spans_.data() + size_; }

  constexpr index_t num_tokens() const {
    index_t n = 0;
    for (const position_span& span : *this) n += span.size();
    return n;
  }
  // Where the span that holds `position` ends; `position` itself if none does.
  constexpr position_t end_of_span_at(position_t position) const {
    for (const position_span& span : *this)
      if (span.first <= position && position < span.last) return span.last;
    return position;
  }
  // Tokens evicted between span i and the newest of `seen` tokens: by so much its cache-order distance is shorter.
  constexpr position_t gap(index_t i, position_t seen) const {
    position_t gap = seen - (*this)[i].last;
    for (index_t later = i + 1; later < size_; ++later) gap -= (*this)[later].size();
    return gap;
  }

 private:
  std::array<position_span, max_spans> spans_{};
  index_t size_ = 0;
};

// Where a position is stored, and how many of the positions after it lie in the slots after it.
struct placed {
  index_t slot = 0;
  index_t following = 0;
};

// What a policy must answer, for any n >= 0:
//   capacity()   slots it needs: place() stays below this, or ends the program;
//   visible(n)   what is alive after n tokens; the newest is n - 1, and what left never returns;
//   place(p)     the slot of position p. Positions visible together have different slots.
// It may also say max_visible(), the most tokens that are alive at once, where it has more slots than that; and
// num_pinned(), how many of the first tokens never leave: those take an attention's sink_bias.
template <class P>
concept eviction_policy = requires(const P p, position_t n) {
  { p.capacity() } -> std::same_as<index_t>;
  { p.visible(n) } -> std::same_as<span_list>;
  { p.place(n) } -> std::same_as<placed>;
};

// The first `num_sink_tokens` for ever, and the newest `window` (Xiao et al. 2024, arXiv 2309.17453, section 3.2).
// A plain window has no sink tokens; a full cache has a window as long as the stream. `rollback` more slots keep
// evicted tokens a while longer, so that as many appended tokens can be taken back.
struct sink_window {
  index_t num_sink_tokens = 0, window = 1, rollback = 0;

  constexpr index_t capacity() const { return num_sink_tokens + window + rollback; }
  constexpr index_t max_visible() const { return num_sink_tokens + window; }
  constexpr index_t num_pinned() const { return num_sink_tokens; }

  constexpr span_list visible(position_t seen) const {
    span_list spans;
    const position_t pinned = std::min<position_t>(seen, num_sink_tokens);
    spans.push_back({0, pinned});
    spans.push_back({std::max<position_t>(pinned, seen - window), seen});
    return spans;
  }

  constexpr placed place(position_t position) const {
    const index_t ring = window + rollback;
    if (position < num_sink_tokens) return {static_cast<index_t>(position), capacity() - 1 - position};
    const index_t turn = static_cast<index_t>((position - num_sink_tokens) % ring);
    return {num_sink_tokens + turn, ring - 1 - turn};
  }
};

namespace detail {

template <eviction_policy P>
constexpr index_t max_visible(const P& policy) {
  if constexpr (requires {
                  { policy.max_visible() } -> std::convertible_to<index_t>;
                })
    return policy.max_visible();
  else
    return policy.capacity();
}

template <eviction_policy P>
constexpr index_t num_pinned(const P& policy) {
  if constexpr (requires {
                  { policy.num_pinned() } -> std::convertible_to<index_t>;
                })
    return policy.num_pinned();
  else
    return 0;
}

// Where a policy says that a position is stored. A user-defined one that leaves its slots ends the program: rows would
// be written beyond the cache's memory.
template <eviction_policy P>
constexpr placed place_of(const P& policy, position_t position) {
  const placed at = policy.place(position);
  if constexpr (!std::same_as<P, sink_window>)
    if (at.slot < 0 || at.following < 0 || at.slot >= policy.capacity() - at.following)
      broken_source("a policy's place() has to lie in its slots, from 0 to below capacity()");
  return at;
}

// Whether one of the positions [first, last) was stored over `position`.
template <eviction_policy P>
constexpr bool overwritten(const P& policy, position_t position, position_t first, position_t last) {
  const index_t slot = policy.place(position).slot;
  for (position_t p = std::max(first, position + 1); p < last;) {
    const placed at = place_of(policy, p);
    if (at.slot <= slot && slot - at.slot <= std::min<position_t>(at.following, last - 1 - p)) return true;
    p += at.following + 1;
  }
  return false;
}

// Whether `next` would be stored over a position of these spans.
template <eviction_policy P>
constexpr bool stored_over(const P& policy, const span_list& spans, position_t next) {
  const index_t slot = policy.place(next).slot;
  for (const position_span& span : spans)
    for (position_t p = span.first; p < span.last;) {
      const placed at = place_of(policy, p);
      if (at.slot <= slot && slot - at.slot <= std::min<position_t>(at.following, span.last - 1 - p)) return true;
      p += at.following + 1;
    }
  return false;
}

// How many tokens may come so that the first still sees what it has to; `most` at most.
template <eviction_policy P>
constexpr index_t room_after(const P& policy, position_t seen, index_t most) {
  span_list kept = policy.visible(seen + 1);
  index_t n = 1;
  for (; n < most && !stored_over(policy, kept, seen + n); ++n) kept.push_back({seen + n, seen + n + 1});
  return n;
}

// Whether `grown` is `spans` but for newer tokens in the last of them.
constexpr bool only_grew(const span_list& spans, const span_list& grown) {
  if (spans.size() != grown.size()) return false;
  for (index_t i = 0; i < spans.size(); ++i)
    if (spans[i].first != grown[i].first || (i + 1 < spans.size() && spans[i].last != grown[i].last)) return false;
  return true;
}

// For how many queries from `first` on, to `last` at most, the newest span alone grows: one plan holds for them.
template <eviction_policy P>
constexpr index_t planned_queries(const P& policy, position_t first, position_t last) {
  span_list spans = policy.visible(first + 1);
  index_t queries = 1;
  for (; first + queries <= last; ++queries) {
    const span_list grown = policy.visible(first + queries + 1);
    if (!only_grew(spans, grown)) break;
    spans = grown;
  }
  return queries;
}

// Whether all that was visible after `back` tokens is still visible after `seen`, or at least still stored. `high` is
// how far the stream got before it was last taken back.
template <eviction_policy P>
constexpr bool can_go_back(const P& policy, position_t back, position_t seen, position_t high) {
  const span_list now = policy.visible(seen);
  for (const position_span& span : policy.visible(back)) {
    for (position_t p = span.first; p < span.last; ++p) {
      const position_t alive_until = now.end_of_span_at(p);
      if (alive_until > p)
        p = std::min(alive_until, span.last) - 1;
      else if (overwritten(policy, p, back, high))
        return false;
    }
  }
  return true;
}

// The smallest count of tokens down to which every count can be gone back to. Where all n tokens are still there, so is
// what any smaller count saw; so a sink_window takes `rollback` steps at most.
template <eviction_policy P>
constexpr position_t min_truncate(const P& policy, position_t seen, position_t high) {
  for (position_t n = seen; n > 0; --n) {
    if (policy.visible(n).num_tokens() == n) return 0;
    if (!can_go_back(policy, n - 1, n, high)) return n;
  }
  return 0;
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
