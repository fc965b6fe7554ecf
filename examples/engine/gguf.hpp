#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "file.hpp"

namespace engine {

// A .gguf file of version 3 from anybody. The whole layout is checked before anything is handed out: afterwards every
// value of the metadata lies inside the header, and every tensor inside the file, in the order and with the padding
// that the format prescribes, with exactly the bytes that its type and shape take. Values are not judged: NaN and inf
// are read like any other.
class gguf {
 public:
  // The format itself sets hardly any. A header of today's largest vocabularies takes under 20 MB.
  static constexpr std::uint64_t max_header_bytes = std::uint64_t{64} << 20;
  static constexpr std::uint64_t max_name_bytes = 256;
  static constexpr std::uint64_t max_metadata = 1 << 12, max_tensors = 1 << 16;
  static constexpr std::uint64_t max_alignment = 1 << 16;
  static constexpr std::uint32_t max_dims = 4;
  static constexpr std::int64_t max_dim = std::int64_t{1} << 40;

  static gguf load(const std::string& path);
  // The same on a copy of `file`; `name` stands for the path in messages.
  static gguf parse(std::span<const std::byte> file, const std::string& name);

  // Metadata. Nothing where the key is missing; file_error, naming the key, where the value is of another kind or out
  // of bounds. Integers of every width and sign are one kind, floats of both widths are another; views live as long as
  // this.
  bool has(const std::string& key) const { return metadata_.contains(key); }
  std::vector<std::string> keys() const;  // sorted
  std::optional<std::string_view> string(const std::string& key) const;
  std::optional<std::int64_t> integer(const std::string& key, std::int64_t min, std::int64_t max) const;
  std::optional<double> number(const std::string& key, double min, double max) const;
  std::optional<bool> flag(const std::string& key) const;
  std::optional<std::vector<std::string_view>> strings(const std::string& key) const;
  std::optional<std::vector<std::int64_t>> integers(const std::string& key) const;
  std::optional<std::vector<double>> numbers(const std::string& key) const;

  // Shapes are row-major as everywhere here, the other way round than in the file.
  std::vector<std::string> names() const;  // sorted
  bool contains(const std::string& name) const { return tensors_.contains(name); }
  const std::vector<std::int64_t>& shape(const std::string& name) const { return find(name).shape; }
  std::string_view type(const std::string& name) const;  // "F32", "Q4_K", ...
  // Dequantised; file_error where the type is none of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K.
  tensor read(const std::string& name) const;

  // "FILE: metadata: KEY is VALUE, had to be ..."; and "FILE: what".
  [[noreturn]] void refuse(const std::string& key, const std::string& had_to_be) const;
  [[noreturn]] void fail(const std::string& what) const { engine::fail(file_, what); }

 private:
  struct value {
    std::uint32_t type, element;  // as in the file; `element` of arrays only
    std::uint64_t count;          // elements, of arrays only
    std::size_t at;               // of the first byte of the value or of its elements in header_
  };
  struct entry {
    std::vector<std::int64_t> shape;
    std::uint32_t type;
    std::uint64_t begin, bytes;  // from the start of the data
  };
  class header_reader;

  gguf(const std::string& file, byte_source);
  const entry& find(const std::string& name) const;
  const value* find_value(const std::string& key) const;

  std::string file_;
  byte_source source_;
  std::string header_;
  std::uint64_t data_start_ = 0;
  std::map<std::string, value> metadata_;
  std::map<std::string, entry> tensors_;
};

}  // namespace engine
