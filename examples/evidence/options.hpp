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
  bool ranking = false;            // of policies by score, instead of windows and pinned tokens
  bool formats = false;            // what keys and values of few bits cost, instead of those
  bool report_only = false;        // of these two: of what is kept so far
  std::vector<std::string> texts;  // of these two, one after the other; `text` is the one at hand
  std::vector<std::string> only;   // of the ranking: these scorers; empty: all
  std::vector<index_t> caches;     // empty: 1/4, 1/8 and 1/16 of what the model was trained on
  index_t side_tokens = 3072;      // of the ranking: after the first eviction, of what is only compared with sinks:4
  index_t tokens = 65536, targets = 128, facts = 64, check = 4096;
  index_t threads;
  std::string folder, markdown, svg;
};

// Nothing where --help was asked for, and printed. Throws compare::usage_error.
std::optional<options> parse_options(int argc, const char* const* argv);

}  // namespace evidence
