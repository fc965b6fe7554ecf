#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include "../engine/model.hpp"
#include "options.hpp"

namespace compare {

// Caches of the first `num_sink_tokens`, pinned for ever, and of the `window` newest.
engine::cache_factory sink_window(index_t num_sink_tokens, index_t window);

// What a policy keeps in a cache of so many tokens, pinned ones included. Recomputing pins nothing: its first token is
// simply the first of every pass.
engine::cache_factory caches_of(const policy&, index_t cache);

}  // namespace compare
