#pragma once

#include <fmt/core.h>

#include <CLI/CLI.hpp>

#include "options.hpp"

namespace compare {

// Whether to go on: not where --help was asked for, and printed. Throws usage_error.
inline bool parse(CLI::App& app, int argc, const char* const* argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    fmt::print("{}", app.help());
    return false;
  } catch (const CLI::ParseError& error) {
    throw usage_error(error.what());
  }
  return true;
}

}  // namespace compare
