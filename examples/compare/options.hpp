#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include <algorithm>
#include <cstddef>
#include <optional>
#include <sinkcache/config.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace compare {

using sinkcache::index_t;

// Bad arguments: usage on stderr, exit 2.
struct usage_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct policy {
  enum class kind { full, window, sinks, recompute };

  kind is;
  index_t num_sink_tokens;
  std::string name;  // full, window, sinks:4, recompute
};

struct options {
  std::vector<std::string> models;  // files
  bool remedies = false;            // --models: also each model with its own remedy removed
  std::string text;
  bool bos = false;  // --bos: also before models that do not begin with it by themselves
  index_t cache = 128;
  std::optional<index_t> tokens;  // missing: default_tokens, or all of a shorter text
  std::vector<policy> policies;
  std::size_t threads = std::max(1U, std::thread::hardware_concurrency());
  std::string json, svg;  // empty: none
};

inline constexpr index_t default_tokens = 20480, default_long_tokens = 4096;  // about the same text

// Nothing where --help was asked for, and printed.
std::optional<options> parse_options(int argc, const char* const* argv);

// `list`: comma separated.
std::vector<policy> parse_policies(const std::string& list, index_t cache);

extern const char* const usage;

}  // namespace compare
