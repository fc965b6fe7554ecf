#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sinkcache/config.hpp>
#include <string>
#include <thread>

#include "sampler.hpp"

namespace chat {

using sinkcache::index_t;

struct options {
  std::string model = "smollm2";      // a file
  std::optional<std::string> prompt;  // to be continued; without it, a chat
  std::string policy = "sinks:4";
  std::optional<index_t> cache;
  index_t num_sink_tokens = 0;  // of the policy
  sampler_config sampling;
  std::optional<index_t> tokens;
  index_t threads = static_cast<index_t>(std::max(1U, std::thread::hardware_concurrency()));
};

inline constexpr index_t default_cache = 512;

// Nothing where --help was asked for, and printed. Bad arguments: compare::usage_error.
std::optional<options> parse_options(int argc, const char* const* argv);

}  // namespace chat
