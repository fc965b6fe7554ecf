#pragma once

// What queries see of a part.

#include <algorithm>

#include "macros_off.hpp"
#include "scratch.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// What a part's rows are told apart by: positions, or numbers where each row has a position of its own.
inline position_t first_of(const kv_part& part) { return part.at.empty() ? part.first : 0; }

// Whether the query at `query` sees a token at `position`.
inline bool sees(const kv_part& part, position_t query, position_t position) {
  query = std::min(query, part.as_of);
  return part.placeless || (part.seen_from <= query - position && query - position < part.seen_until);
}

// Whether it sees all rows of a part.
inline bool sees_all(const kv_part& part, position_t query) {
  return part.placeless || (sees(part, query, part.first) && sees(part, query, part.end() - 1));
}

// What it sees: of consecutive rows their positions; of rows with positions of their own the numbers of all of them,
// or, where they lie by age and keys are rotated to their places, of those that it does see.
inline position_span span_of(const kv_part& part, position_t query) {
  if (!part.at.empty()) {
    if (part.rank_angles.empty() || sees_all(part, query)) return {0, part.rows};
    const position_t newest = std::min(query, part.as_of) - part.seen_from - part.at_offset;
    const auto rows = part.at.first(static_cast<std::size_t>(part.rows));
    return {0, std::upper_bound(rows.begin(), rows.end(), newest) - rows.begin()};
  }
  if (part.placeless) return {part.first, part.first + part.rows};
  query = std::min(query, part.as_of);
  const position_t first = std::max(part.first, query - part.seen_until + 1);
  return {first, std::max(first, std::min(part.first + part.rows, query - part.seen_from + 1))};
}
// How many rows of its span it sees.
inline index_t num_seen(const kv_part& part, position_t query, const position_span& span) {
  if (part.at.empty() || !part.rank_angles.empty() || sees_all(part, query)) return span.size();
  index_t n = 0;
  for (index_t i = 0; i < part.rows; ++i) n += sees(part, query, part.position(i));
  return n;
}

// What some query from `first` to `last` sees, and maybe more.
inline position_span span_of(const kv_part& part, position_t first, position_t last) {
  const position_t from = span_of(part, first).first;
  return {from, std::max(from, std::min(span_of(part, last).last, first_of(part) + part.rows))};
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
