#pragma once

// All policies on the same texts and rows: which of them lose least, and what they recall.

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bootstrap.hpp"
#include "jobs.hpp"

namespace evidence {

inline constexpr index_t pinned_by_all[] = {0, 1, 4};
inline constexpr const char* random_seeds[] = {"", "seed=1", "seed=2"};

// A policy as it is ranked, whatever is pinned: h2o at an interval of 16.
struct contender {
  std::string name, own;  // own: its parameters but those below
  index_t recent, interval;
  std::string kv_format = "";  // empty: f32

  compare::policy policy(index_t sinks, const std::string& seed = "") const;  // seed: empty, or of chance
  std::string shown() const;
  bool is_random() const { return name == "random"; }
  bool rolls() const { return name == "window"; }
  // Whether it changes another: by its budgets or formats, or by events that are further apart than usual.
  bool is_variant() const;
};

// Sinks and window in few bits, as the best three are stored too.
inline const contender few_bits_window{"window", "", 0, 0, "q8/q4"};

// Those of options::only, or all, at the intervals that a cache has room for: 16 and 64, with 32 recent tokens, and
// smaller ones where neither fits.
std::vector<contender> contenders(const options&, index_t cache);
// Whether it fits with so many pinned.
bool fits(const contender&, index_t cache, index_t sinks);

// Of fewer tokens, options::side_tokens after the first eviction, where less or more than 4 are pinned and for
// variants.
job loss_job(const options&, const contender&, index_t sinks, index_t cache, const std::string& seed = "");

// `first`: of the first text, which times and recall are measured on.
std::vector<job> ranking_plan(const options&, bool first);

// What matters most comes first, on all texts, so that a ranking that is cut short is worth something; what is timed
// comes last.
inline constexpr int stages = 4;
int stage(const job&);

// A contender in a cache of a text: what it lost, and by how much more than sinks:4 over the same tokens.
struct standing {
  contender of;
  index_t sinks;
  interval bits, more;
};

// What is kept of a job; null where nothing is.
using results = std::function<const json*(const job&)>;

// Of all that fit, the least loss first; `some`: these instead of the usual contenders.
std::vector<standing> standings(const setting&, index_t cache, const results&, const std::vector<contender>& some);

// The three of the usual ones that lose least over all texts with 4 pinned, with budgets by layer and by head, and with
// few bits.
std::vector<contender> variants(const std::vector<setting>&, index_t cache, const std::vector<results>&);
std::vector<job> variants_plan(const setting&, index_t cache, const std::vector<contender>&);

// Of the digits that a kept recall job asked for so many tokens later; nothing where none were.
std::optional<double> recalled_share(const json& file, index_t distance);

// Tables in Markdown, and a picture.
std::string ranking_report(const std::vector<setting>&, const std::string& command, const std::vector<results>&);
std::string ranking_svg(const std::vector<setting>&, const std::vector<results>&);

}  // namespace evidence
