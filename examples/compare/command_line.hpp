#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

// What the programs' command lines share, so that all of them read alike.

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <concepts>
#include <functional>
#include <string>
#include <vector>

#include "../loaders/numbers.hpp"
#include "options.hpp"

namespace compare {

// Whether to go on: not where --help was asked for, and printed. Throws usage_error.
inline bool parse(CLI::App& app, int argc, const char* const* argv) {
  std::vector<std::string> arguments;  // the last one first; argc may be 0, and then argv has no name either
  for (int i = argc - 1; i > 0; --i) arguments.emplace_back(argv[i]);
  try {
    app.parse(std::move(arguments));
  } catch (const CLI::CallForHelp&) {
    fmt::print("{}", app.help());
    return false;
  } catch (const CLI::ParseError& error) {
    throw usage_error(error.what());
  }
  return true;
}

template <std::integral Integer>
Integer parse_count(const std::string& option, const std::string& text, Integer min, Integer max) {
  const std::optional<Integer> value = loaders::whole_number(text, min, max);
  if (!value)
    throw usage_error(fmt::format("{} is '{}', had to be a whole number from {} to {}", option, text, min, max));
  return *value;
}

// A whole number; CLI11's own reading would take 010 as 8.
template <std::integral Integer>
void add_count(CLI::App& app, const std::string& name, Integer min, Integer max, const std::string& description,
               const std::function<void(Integer)>& use, const std::string& type = "N") {
  app.add_option_function<std::string>(
         name, [=](const std::string& text) { use(parse_count(name, text, min, max)); }, description)
      ->type_name(type);
}

// `list`: comma separated, no entry empty.
std::vector<std::string> split(const char* option, const std::string& list);

}  // namespace compare
