#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sinkcache/status.hpp>
#include <string>
#include <thread>

#include "sampler.hpp"

namespace chat {

using sinkcache::index_t;

struct options {
  std::string model = "smollm2";      // a file
  std::optional<std::string> prompt;  // to be continued; without it, a chat
  std::string policy;                 // sinks:system in a chat, sinks:4 where it writes, unless another was asked for
  std::optional<index_t> cache;
  sampler_config sampling;
  std::optional<index_t> tokens;
  index_t threads = static_cast<index_t>(std::max(1U, std::thread::hardware_concurrency()));
};

inline constexpr index_t default_cache = 512;

// How many tokens the policy pins, where the system turn has so many. A usage_error where the cache has no room for
// them and one more.
index_t pinned_tokens(const options&, index_t system_tokens);

// What to tell a user whose system turn is going to be evicted; empty where it is not.
std::string pinning_hint(const options&, index_t system_tokens);

// Nothing where --help was asked for, and printed. Bad arguments: compare::usage_error.
std::optional<options> parse_options(int argc, const char* const* argv);

}  // namespace chat
