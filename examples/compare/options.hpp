#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <sinkcache/status.hpp>
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

struct kv_formats;
struct scored_policy;

struct policy {
  enum class kind { full, window, sinks, recompute, scored };

  kind is;
  index_t num_sink_tokens;
  std::string name;                                       // full, window, sinks:4, recompute, h2o:interval=64
  std::shared_ptr<const scored_policy> scored = nullptr;  // of that kind
  index_t cache = 0;                                      // tokens, where not that of all: at equal bytes
  const kv_formats* formats = nullptr;                    // that rows are stored in; null: f32
  index_t kv_recent = 64;                                 // tokens that formats of few bits spare, besides those pinned
};

// Tokens that its cache has to hold at least.
index_t least_cache(const policy&);

struct options {
  std::vector<std::string> models;  // files
  bool remedies = false;            // --models: also each model with its own remedy removed
  std::string text;
  bool bos = false;  // --bos: also before models that do not begin with it by themselves
  index_t cache = 128;
  std::optional<std::size_t> bytes;  // --bytes: of all layers' caches, instead of `cache`
  std::optional<index_t> tokens;     // missing: default_tokens, or all of a shorter text
  std::vector<policy> policies;
  bool crosses_formats = false;  // --kv-format
  std::string left_out;          // those of default_policies() that a cache is too small for
  std::size_t threads = std::max(1U, std::thread::hardware_concurrency());
  std::string json, svg;  // empty: none
};

inline constexpr index_t most_tokens = index_t{1} << 20;                      // that a cache may hold
inline constexpr index_t default_tokens = 20480, default_long_tokens = 4096;  // about the same text

// Nothing where --help or --list-policies was asked for, and printed.
std::optional<options> parse_options(int argc, const char* const* argv);

// `list`: comma separated; what has a '=' and no ':' before it goes on with the policy before it, as in
// window,h2o:sinks=4,recent=32,tova. Each has to fit a cache of `cache` tokens.
std::vector<policy> parse_policies(const std::string& list, index_t cache);

// Each policy with each of the formats; names then end with the format's. `list`: comma separated, as in f32,q8,q8/q4.
std::vector<policy> with_kv_formats(const std::vector<policy>&, const std::string& list, index_t kv_recent);

// Throws usage_error where the policy does not fit.
void require_fits(const policy&, index_t cache);

// Those of the command line that names none: the program's own too.
std::string default_policies();

extern const char* const usage;

}  // namespace compare
