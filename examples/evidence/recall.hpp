#pragma once

// Whether a fact can be told again so many tokens later: numbers planted in running text, and asked for.

#include <span>
#include <string>
#include <vector>

#include "measure.hpp"

namespace evidence {

struct recall_setting {
  std::vector<index_t> distances;  // tokens from the end of a fact to the question
  index_t facts;                   // of each distance
  index_t spacing = 64;            // tokens of running text from one fact to the next, at least
};

struct fact {
  index_t distance;     // the least one that was asked for; events in the way delay a question by some tokens
  index_t first, last;  // the tokens that it takes
  index_t asked_first, asked_last;  // the tokens after which the digits of the answer are predicted
  std::vector<int> digits;
};

// The running text with facts and questions in it. The first fact comes after `lead` tokens.
struct recall_stream {
  std::vector<int> ids;
  std::vector<fact> facts;
  std::vector<int> digit_ids;  // the tokens of 0 to 9
};

recall_stream plant(const compare::subject&, std::span<const int> text, index_t lead, const recall_setting&);

// For each fact how many of its digits were the likeliest of the ten, each after the true ones before it.
std::vector<int> recalled(const compare::subject&, const engine::cache_factory&, const recall_stream&, const progress&);

inline constexpr index_t digits_of_a_fact = 4;

}  // namespace evidence
