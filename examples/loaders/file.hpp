#pragma once

// What the readers of weight files share: nothing in a file is believed, and what is quoted from it is made harmless.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace loaders {

// The message starts with the file's name; names taken from the file are made printable and cut short in it.
struct file_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct tensor {
  std::vector<std::int64_t> shape;
  std::vector<float> values;  // row-major, whatever the file's type
};

// Quantised: value i is scales[i / group] * codes[i] + offsets[i / group].
struct coded_tensor {
  std::vector<std::int64_t> shape;
  std::int64_t group;  // 16 or 32, a divisor of the rows' size
  std::vector<std::int8_t> codes;
  std::vector<float> scales, offsets;
};

// A file, or what stands for one in memory. It stays open; bytes are read when asked for, so that one that claims a
// terabyte costs nothing until then, and one that shrinks meanwhile is an error, not a signal.
struct byte_source {
  std::uint64_t size;
  std::function<void(std::uint64_t offset, std::span<std::byte> to)> read;  // within `size`; fills `to` or throws
};

byte_source open_source(const std::string& path);
byte_source memory_source(std::span<const std::byte> bytes);  // a copy of them

[[noreturn]] void fail(const std::string& file, const std::string& what);

// A hostile name must neither flood the terminal nor send it control sequences.
std::string printable(std::string_view text, std::size_t longest = 60);
std::string quote(std::string_view text);  // printable, between quotation marks

std::string listed(const std::vector<std::int64_t>& shape);  // [2, 3]

template <class Unsigned>
Unsigned little_endian(const std::byte* from) {
  Unsigned value = 0;
  for (std::size_t i = sizeof(Unsigned); i-- > 0;) value = static_cast<Unsigned>((value << 8) | Unsigned(from[i]));
  return value;
}

float f32_from_f16(std::uint16_t);
float f32_from_bf16(std::uint16_t);

}  // namespace loaders
