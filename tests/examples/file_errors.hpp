#pragma once

#include <string>

// What every error about a file owes to whoever reads it on a terminal.
inline bool is_presentable(const std::string& error, const std::string& file_name) {
  if (error.rfind(file_name + ": ", 0) != 0 || error.size() > 600) return false;
  for (const char c : error) {
    if (c < 0x20 || c > 0x7e) return false;
  }
  return true;
}
