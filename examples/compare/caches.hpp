#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include "../engine/model.hpp"
#include "options.hpp"

namespace compare {

// Rows that a window keeps longer so that prefill can take many tokens at a time; what is visible does not change.
inline constexpr index_t prefill_rollback = 63;

// Caches of the first `num_sink_tokens`, pinned for ever, and of the `window` newest.
engine::cache_factory sink_window(index_t num_sink_tokens, index_t window, index_t rollback = prefill_rollback);

// What a policy keeps in a cache of so many tokens, pinned ones included. Recomputing pins nothing: its first token is
// simply the first of every pass. Layers that the model has windowed keep their windows under scored policies.
engine::cache_factory caches_of(const policy&, index_t cache, index_t rollback = prefill_rollback);

// Of all layers' caches, as decoding needs them: without the rows for prefill.
std::size_t cache_bytes(const policy&, const engine::model&, index_t cache);

// The most tokens that a policy's caches hold in so many bytes. Throws usage_error where that is too few for it.
index_t cache_of(const policy&, const engine::model&, std::size_t bytes);

}  // namespace compare
