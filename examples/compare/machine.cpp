// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "machine.hpp"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string_view>

namespace compare {
namespace {

// What a shell command prints, without the last newline; empty if it fails.
std::string output_of(const std::string& command) {
  std::string output;
#if defined(__unix__) || defined(__APPLE__)
  if (std::FILE* pipe = popen(command.c_str(), "r")) {
    for (int c; (c = std::fgetc(pipe)) != EOF;) output += static_cast<char>(c);
    if (pclose(pipe) != 0) return {};
    while (!output.empty() && output.back() == '\n') output.pop_back();
  }
#endif
  return output;
}

}  // namespace

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("model name")) return line.substr(std::min(line.find(": ") + 2, line.size()));
#if defined(__APPLE__)
  if (const std::string name = output_of("sysctl -n machdep.cpu.brand_string 2>/dev/null"); !name.empty()) return name;
#endif
#if defined(__aarch64__)
  return "aarch64";
#elif defined(__x86_64__)
  return "x86_64";
#else
  return "unknown";
#endif
}

std::string compiler_name() {
#if defined(__clang__)
  return fmt::format("clang {}.{}.{}", __clang_major__, __clang_minor__, __clang_patchlevel__);
#elif defined(__GNUC__)
  return fmt::format("g++ {}.{}.{}", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#else
  return "unknown";
#endif
}

std::string git_commit() {
  // The directories are named, so that a checkout around an unpacked archive does not answer for it.
  constexpr std::string_view sources = SINKCACHE_SOURCE_DIR;
  if (sources.find('\'') != std::string_view::npos) return "unknown";
  const std::string commit = output_of(fmt::format(
      "git --git-dir='{0}/.git' --work-tree='{0}' describe --always --dirty --exclude='*' --abbrev=40 2>/dev/null",
      sources));
  return commit.empty() ? "unknown" : commit;
}

}  // namespace compare
