#pragma once

// What each bit of keys and values costs: caches of few bits beside one of floats over the same tokens.

#include <optional>
#include <string>
#include <vector>

#include "../compare/kv_formats.hpp"
#include "jobs.hpp"

namespace evidence {

// A window after `pinned` first tokens whose rows are stored so; the newest `recent` are spared, as the pinned ones
// are.
struct cell {
  const compare::kv_formats* formats;
  index_t pinned, recent;

  std::string name() const;  // q8/q4 p1 r64
  bool operator==(const cell&) const = default;
};

// Cells with as many pinned tokens, and a cache of floats with them, in lockstep over a part of a text: a stream of its
// own that begins at `first`; after `cache` tokens the next `tokens` are scored. One file.
struct formats_job {
  index_t cache, pinned, first, tokens;
  bool is_main;  // of the first table
  std::vector<cell> cells;

  std::string name() const;
};

inline constexpr index_t pinned_tokens[] = {0, 1, 4}, recent_tokens[] = {0, 32, 64};
inline constexpr const char* few_bits[] = {"q8", "q6/q4", "q4", "q4/q2", "q2"};

std::vector<cell> main_cells();    // all formats, sparing 1 pinned token and the newest 64
std::vector<cell> spared_cells();  // the same formats with all of pinned_tokens and recent_tokens else
std::vector<cell> unlike_cells();  // without rotation, keys or values alone, and as ggml rounds
const compare::kv_formats& formats_named(const std::string&);

// Most telling first.
std::vector<formats_job> formats_plan(const options&);
index_t work(const formats_job&);
json inputs(const formats_job&, const setting&);

// For each cell, block by block: tokens, bits that they cost, nats of divergence from the floats' predictions, and how
// many have the same likeliest token.
json measure(const formats_job&, const setting&, const progress&);

// Null where it is not kept.
using formats_results = std::function<const json*(const formats_job&)>;
// Of the tokens that all cells but the first table's are measured on, all texts together.
std::optional<double> mean_nats(const std::vector<setting>&, const std::vector<formats_results>&, index_t cache,
                                const cell&);
std::string formats_report(const std::vector<setting>&, const std::string& command,
                           const std::vector<formats_results>&);
std::string formats_svg(const std::vector<setting>&, const std::vector<formats_results>&);

}  // namespace evidence
