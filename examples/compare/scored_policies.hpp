#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

// Policies that score tokens, by name: the library's, and those that a program adds.

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <sinkcache/scorer.hpp>
#include <string>
#include <utility>
#include <vector>

namespace compare {

using sinkcache::index_t;

// Parameters that are numbers, by name.
using numbers = std::map<std::string, double>;

// A policy of one's own: `parameters` are those it knows, with their defaults, and `make` gets them as they were asked
// for.
struct own_policy {
  std::string name, keeps;
  std::function<std::shared_ptr<const sinkcache::token_scorer>(const numbers&)> make;
  numbers parameters = {};
};

// To be called before any policies are read. Throws std::invalid_argument where the name is taken, or is none.
void register_policy(own_policy);
std::vector<std::string> registered_policies();  // their names

// A KV head of a layer, or of all layers.
struct short_head {
  std::optional<index_t> layer;
  index_t head;
};

// What an entry like h2o:sinks=4,recent=32 asks for.
struct scored_policy {
  std::string name;  // the scorer's
  index_t sinks = 4, recent = 32, interval = 16;
  std::optional<double> pyramid, ada;  // beta of budgets by layer, alpha of budgets by head
  std::vector<short_head> duo = {};    // heads that keep the first tokens and the newest alone
  std::optional<index_t> newest = {};  // so many; recent, if it is not given
  std::vector<index_t> pins = {};      // positions that are kept besides the first ones
  std::vector<std::pair<std::string, std::string>> own;

  // The entry again, without what is the default.
  std::string shown() const;
  // Rows that an event leaves where a head has `rows` at most.
  index_t budget(index_t rows) const { return rows - interval; }
  // Rows that no event takes.
  index_t kept() const;
  std::shared_ptr<const sinkcache::token_scorer> scorer(index_t layer) const;
};

// `parameters`: "sinks=4". Throws usage_error: an unknown name or parameter lists the known ones.
scored_policy parse_scored(const std::string& name, const std::vector<std::string>& parameters);

// A line of --list-policies each.
std::string listed_policies();

}  // namespace compare
