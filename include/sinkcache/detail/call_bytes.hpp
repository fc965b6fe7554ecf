#pragma once

// What calls of attention need of a workspace.

#include <algorithm>
#include <utility>

#include "macros_off.hpp"
#include "schedule.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// Sums are of so many queries at a time, so that they see few rows more than one of them does.
inline constexpr index_t sum_queries = 512;

// Rows of parts that so many neighbours see, at most.
inline index_t most_kept(const kv_source& keys, index_t tokens) noexcept {
  const auto seen = static_cast<index_t>(std::min<position_t>(keys.capacity(), max_position));
  return seen + keys.max_parts() * std::max<index_t>(0, std::min(tokens, sum_queries) - 1);
}

// What workers share in a call over one source, with so many logits kept per query head; -1: none.
inline index_t shared_bytes(status& found, const attention_params& params, const kv_source& keys,
                            index_t kept) noexcept {
  return checked_sum(found, "bytes of a batch", schedule::batch_bytes(1),
                     schedule::decode_bytes(found, params, keys, kept));
}

inline index_t call_bytes(status& found, const attention_params& params, const kv_source& keys, index_t tokens,
                          index_t concurrency, bool weights) noexcept {
  const index_t shared = shared_bytes(found, params, keys, weights ? most_kept(keys, tokens) : -1);
  return schedule::bytes(found, concurrency, schedule::shape_of(params, keys, tokens), shared);
}

// Of what a reader attends with itself.
inline index_t bytes_again(status& found, const attention_params& params, const kv_source& keys, index_t concurrency,
                           const weight_reader* weights) noexcept {
  const index_t queries = weights == nullptr ? 0 : weights->num_queries_again();
  return queries == 0 ? 0 : call_bytes(found, params, keys, queries, concurrency, true);
}

// What decode over each item(i).keys needs: a worker's shape, and bytes that all share.
template <class Item, class Kept>
std::pair<schedule::shape, index_t> batch_needs(status& found, const attention_params& params, index_t size,
                                                const Item& item, const Kept& kept) noexcept {
  index_t shared = schedule::batch_bytes(size);
  schedule::shape of{0, 1, 1, 0};
  for (index_t i = 0; i < size; ++i) {
    const kv_source& keys = *item(i).keys;
    shared = checked_sum(found, "bytes of a batch", shared, schedule::decode_bytes(found, params, keys, kept(i)));
    of = of.with(schedule::shape_of(params, keys, 1));
  }
  return {of, shared};
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
