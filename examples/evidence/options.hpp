#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../compare/options.hpp"

namespace evidence {

using compare::index_t;

struct options {
  std::string model, text;
  bool bos = false;
  std::vector<index_t> caches = {256, 1024};
  index_t tokens = 65536, targets = 128, facts = 64, check = 4096;
  index_t threads;
  std::string folder, markdown;
};

// Nothing where --help was asked for, and printed. Throws compare::usage_error.
std::optional<options> parse_options(int argc, const char* const* argv);

}  // namespace evidence
