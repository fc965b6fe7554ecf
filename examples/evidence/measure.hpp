#pragma once

// What is measured besides losses and times: what pinned tokens get.

#include <span>
#include <vector>

#include "../compare/evaluator.hpp"

namespace evidence {

using sinkcache::index_t;

using compare::progress;

// The tokens that are recomputed: `count` of those after the first eviction, evenly spaced, in the middle of their
// part.
std::vector<index_t> targets(index_t cache, index_t tokens, index_t count);

// [num_hidden_layers, num_attention_heads] What each head gives to the pinned tokens of its attention: the mean over
// `tokens` that are decoded with a full cache, by a fresh session that watches sinks.
engine::matrix pinned_shares(engine::session&, index_t cache, std::span<const int> ids, index_t tokens,
                             const progress&);

}  // namespace evidence
