#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include <string>

namespace compare {

std::string read_file(const std::string& path);

// Throws if a file cannot be made at `path`; leaves nothing behind. For before a long computation.
void check_writable(const std::string& path);

// A reader of `path` sees the old file or the whole new one.
void write_atomically(const std::string& path, const std::string& content);

// The path without the directory of the sources.
std::string shown_path(const std::string& path);

}  // namespace compare
