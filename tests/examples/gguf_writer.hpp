#pragma once

// Writes GGUF files, good ones and bad ones: pieces of text that the tests put together.

#include <bit>
#include <cstdint>
#include <string>
#include <vector>

namespace gguf_writer {

template <class Unsigned>
std::string little_endian(Unsigned value) {
  std::string out;
  for (std::size_t i = 0; i < sizeof(Unsigned); ++i) out += static_cast<char>((value >> (8 * i)) & 255);
  return out;
}
inline std::string u8(unsigned value) { return std::string(1, static_cast<char>(value)); }
inline std::string u16(unsigned value) { return little_endian(static_cast<std::uint16_t>(value)); }
inline std::string u32(std::uint32_t value) { return little_endian(value); }
inline std::string u64(std::uint64_t value) { return little_endian(value); }
inline std::string f32(float value) { return u32(std::bit_cast<std::uint32_t>(value)); }
inline std::string f64(double value) { return u64(std::bit_cast<std::uint64_t>(value)); }
inline std::string string(const std::string& text) { return u64(text.size()) + text; }

enum kind : std::uint32_t {
  uint8,
  int8,
  uint16,
  int16,
  uint32,
  int32,
  float32,
  boolean,
  text,
  array,
  uint64,
  int64,
  float64
};

inline std::string metadata(const std::string& key, std::uint32_t type, const std::string& value) {
  return string(key) + u32(type) + value;
}
inline std::string metadata(const std::string& key, const std::string& value) {
  return metadata(key, text, string(value));
}
inline std::string metadata(const std::string& key, const char* value) { return metadata(key, std::string(value)); }
inline std::string metadata(const std::string& key, std::uint32_t value) { return metadata(key, uint32, u32(value)); }
inline std::string metadata(const std::string& key, float value) { return metadata(key, float32, f32(value)); }
inline std::string metadata(const std::string& key, bool value) { return metadata(key, boolean, u8(value)); }

enum type : std::uint32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ4_NL = 20,
  BF16 = 30
};

// `dims` as in the file: the rows' size first.
inline std::string tensor(const std::string& name, const std::vector<std::uint64_t>& dims, std::uint32_t type,
                          std::uint64_t offset) {
  std::string out = string(name) + u32(static_cast<std::uint32_t>(dims.size()));
  for (const std::uint64_t dim : dims) out += u64(dim);
  return out + u32(type) + u64(offset);
}

inline std::string padded(std::string bytes, std::size_t alignment = 32) {
  return bytes.append((alignment - bytes.size() % alignment) % alignment, '\0');
}

inline std::string header(std::uint64_t num_tensors, std::uint64_t num_metadata) {
  return "GGUF" + u32(3) + u64(num_tensors) + u64(num_metadata);
}

// A good file, piece by piece.
struct file {
  std::vector<std::string> metadata;
  std::string tensors, data;
  std::uint64_t num_tensors = 0;

  void add(const std::string& name, const std::vector<std::uint64_t>& dims, std::uint32_t type,
           const std::string& bytes) {
    tensors += tensor(name, dims, type, data.size());
    data += padded(bytes);
    ++num_tensors;
  }

  std::string bytes() const {
    std::string out = header(num_tensors, metadata.size());
    for (const std::string& each : metadata) out += each;
    out += tensors;
    return num_tensors == 0 ? out : padded(out) + data;
  }
};

}  // namespace gguf_writer
