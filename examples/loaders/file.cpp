#include "file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <memory>
#include <system_error>

namespace loaders {
namespace {

struct open_file {
  explicit open_file(int descriptor) : fd(descriptor) {}
  open_file(const open_file&) = delete;
  open_file& operator=(const open_file&) = delete;
  ~open_file() { ::close(fd); }
  int fd;
};

}  // namespace

void fail(const std::string& file, const std::string& what) { throw file_error(file + ": " + what); }

std::string printable(std::string_view text, std::size_t longest) {
  std::string out;
  for (const char c : text.substr(0, longest)) {
    if (c >= 0x20 && c <= 0x7e) {
      out += c;
    } else {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  if (text.size() > longest) out += "...";
  return out;
}

std::string quote(std::string_view text) { return "'" + printable(text) + "'"; }

// Not by fmt::join, in which g++ 12 finds an overflow that is not there.
std::string listed(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) text.append(text.size() > 1 ? ", " : "").append(std::to_string(extent));
  return text.append("]");
}

float f32_from_f16(std::uint16_t h) {
  const std::uint32_t sign = std::uint32_t{h & 0x8000u} << 16;
  const std::uint32_t exponent = (h >> 10) & 31u;
  const std::uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wide_exponent = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | (wide_exponent << 23) | (mantissa << 13));
}

float f32_from_bf16(std::uint16_t h) { return std::bit_cast<float>(std::uint32_t{h} << 16); }

byte_source open_source(const std::string& path) {
  const auto fail_with_errno = [path](const char* what) {
    fail(path, fmt::format("{}: {}", what, std::generic_category().message(errno)));
  };
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  const int fd = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) fail_with_errno("cannot be opened");
  const auto file = std::make_shared<open_file>(fd);
  struct stat status {};
  if (::fstat(fd, &status) != 0) fail_with_errno("cannot be examined");
  if (S_ISDIR(status.st_mode)) fail(path, "is a directory, must be a regular file");
  if (!S_ISREG(status.st_mode)) fail(path, "is a pipe, socket or device, must be a regular file");

  const auto read = [path, file, fail_with_errno](std::uint64_t offset, std::span<std::byte> to) {
    while (!to.empty()) {
      constexpr std::size_t at_once = std::size_t{1} << 30;  // some systems refuse 2^31 and more
      const ssize_t got = ::pread(file->fd, to.data(), std::min(to.size(), at_once), static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail_with_errno("cannot be read");
      if (got == 0) {
        fail(path, fmt::format("ends at byte {}, must go on as when it was opened: has it changed?", offset));
      }
      offset += static_cast<std::uint64_t>(got);
      to = to.subspan(static_cast<std::size_t>(got));
    }
  };
  return {static_cast<std::uint64_t>(status.st_size), read};
}

byte_source memory_source(std::span<const std::byte> bytes) {
  const auto copy = std::make_shared<const std::vector<std::byte>>(bytes.begin(), bytes.end());
  return {copy->size(), [copy](std::uint64_t offset, std::span<std::byte> to) {
            std::copy_n(copy->begin() + static_cast<std::ptrdiff_t>(offset), to.size(), to.begin());
          }};
}

}  // namespace loaders
