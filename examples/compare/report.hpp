#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

// The tables, the words below them, and JSON.

#include <span>
#include <string>
#include <vector>

#include "comparison.hpp"

namespace compare {

// What all runs have in common.
struct setting {
  std::string text;  // its name
  index_t cache, tokens;
  index_t bytes = 0;            // that the tokens of the first subject stand for; 0: one each
  std::size_t cache_bytes = 0;  // of all layers' caches, where these are what is equal; `cache` is the largest then
};

std::string amount(const setting&);  // 20,480 bytes, or 4,096 tokens (17,823 bytes)

std::string describe(const engine::model&);  // 0.77 M parameters, softmax

std::string header(const setting&, std::span<const subject>);
std::string table(const comparison&);
std::string models_table(std::span<const comparison>);
std::string models_sentence(std::span<const comparison>);
// Names the subjects whose sinks an auxiliary loss seeded in training; empty where there are none.
std::string seeded_note(std::span<const subject>);
std::string to_json(const setting&, std::span<const comparison>);

}  // namespace compare
