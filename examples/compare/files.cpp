// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "files.hpp"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <vector>

namespace compare {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t largest_text = std::size_t{1} << 30;

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error(fmt::format("{}: {}", path, what));
}

// Beside `path`, so that the rename stays on one file system.
fs::path write_temporary(const std::string& path, const std::string& content) {
  if (const auto status = fs::status(path); fs::exists(status) && !fs::is_regular_file(status))
    fail(path, "cannot be written: it is not a regular file");
  const fs::path temporary = fmt::format("{}.{:08x}.tmp", path, std::random_device{}());
  errno = 0;
  std::ofstream file(temporary, std::ios::binary);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  file.close();
  if (file) return temporary;
  const int error = errno;
  std::error_code ignored;
  fs::remove(temporary, ignored);
  fail(path, fmt::format("cannot be written: {}", std::strerror(error)));
}

}  // namespace

std::string read_file(const std::string& path) {
  std::error_code error;
  if (!fs::exists(path, error)) fail(path, "no such file");
  if (fs::is_directory(path, error)) fail(path, "is a directory");
  std::ifstream file(path, std::ios::binary);
  std::string content;
  std::vector<char> block(std::size_t{1} << 20);
  while (file.read(block.data(), static_cast<std::streamsize>(block.size())), file.gcount() > 0) {
    content.append(block.data(), static_cast<std::size_t>(file.gcount()));
    if (content.size() > largest_text)
      fail(path, fmt::format("has more than {} bytes, the most it may have", largest_text));
  }
  if (!file.eof()) fail(path, "cannot be read");
  return content;
}

void check_writable(const std::string& path) { fs::remove(write_temporary(path, "")); }

void write_atomically(const std::string& path, const std::string& content) {
  const fs::path temporary = write_temporary(path, content);
  std::error_code error;
  fs::rename(temporary, path, error);
  if (!error) return;
  fs::remove(temporary);
  fail(path, fmt::format("cannot be written: {}", error.message()));
}

std::string shown_path(const std::string& path) {
  constexpr std::string_view sources = SINKCACHE_SOURCE_DIR "/";
  return path.starts_with(sources) ? path.substr(sources.size()) : path;
}

}  // namespace compare
