#pragma once

// One number, or one row of numbers, of one policy and one size of cache.

#include <functional>
#include <span>
#include <vector>

#include "../compare/evaluate.hpp"

namespace evidence {

using sinkcache::index_t;

// Is called with the number of tokens that went through the model since the last call; may throw, to stop.
using progress = std::function<void(index_t)>;

// Prefills the tokens in chunks; `each` gets the logits after every one of them.
void read(const engine::model&, const engine::session_config&, std::span<const int> ids,
          const std::function<void(std::span<const float>)>& each, const progress&);

// [ids.size() - 1] Bits that ids[i + 1] costs given the cache after ids[0..i], by `read`.
std::vector<double> loss_by_prefill(const engine::model&, const engine::session_config&, std::span<const int> ids,
                                    const progress&);

// The same, token by token.
std::vector<double> loss_by_decode(const engine::model&, const engine::session_config&, std::span<const int> ids,
                                   const progress&);

// The tokens that are recomputed: `count` of those after the first eviction, evenly spaced, in the middle of their
// part.
std::vector<index_t> targets(index_t cache, index_t tokens, index_t count);

// Of each target, after a fresh pass over the first token and the newest cache - 1.
std::vector<double> loss_recomputed(const engine::model&, index_t cache, std::span<const int> ids,
                                    std::span<const index_t> targets, const progress&);

// Of a decode step with a full cache: the mean over `tokens` of them.
double ms_per_token(const engine::model&, const engine::session_config&, std::span<const int> ids, index_t tokens,
                    const progress&);

// Of a fresh pass over a full cache: what a token costs where there is none.
double ms_per_pass(const engine::model&, const engine::session_config&, std::span<const int> ids, index_t passes,
                   const progress&);

// [num_hidden_layers, num_attention_heads] What each head gives to the pinned tokens of its attention: the mean over
// `tokens` that are decoded with a full cache.
engine::matrix pinned_shares(const engine::model&, engine::session_config, std::span<const int> ids, index_t tokens,
                             const progress&);

std::size_t cache_bytes(const engine::model&, const engine::session_config&);

}  // namespace evidence
