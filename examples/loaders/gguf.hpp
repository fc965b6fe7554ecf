#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "file.hpp"

namespace loaders {

// A .gguf file of version 3 from anybody. The whole layout is checked before anything is handed out: afterwards every
// value of the metadata lies inside the header, and every tensor inside the file, in the order and with the padding
// that the format prescribes, with exactly the bytes that its type and shape take. Values are not judged: NaN and inf
// are read like any other.
class gguf {
 public:
  // The format itself sets hardly any. A header of today's largest vocabularies takes under 20 MB.
  static constexpr std::uint64_t max_header_bytes = std::uint64_t{64} << 20;
  static constexpr std::uint64_t max_key_bytes = 256, max_name_bytes = 64, max_string_bytes = 1 << 20;
  static constexpr std::uint64_t max_metadata = 1 << 12, max_elements = 1 << 22, max_tensors = 1 << 16;
  static constexpr std::uint64_t max_alignment = 1 << 16;
  static constexpr std::uint32_t max_dims = 4;
  static constexpr std::int64_t max_dim = std::int64_t{1} << 40;

  static bool is_gguf(const std::string& path);  // by its first four bytes; file_error where it cannot be read
  // `accepts` is called with the metadata, before tensors are looked at: what it throws is told before anything about
  // them.
  static gguf load(const std::string& path, const std::function<void(const gguf&)>& accepts = {});
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
  std::string text(const std::string& key) const;  // of any kind, as one writes it; the key has to be there
  std::optional<std::vector<std::string_view>> strings(const std::string& key) const;
  std::optional<std::vector<std::int64_t>> integers(const std::string& key) const;
  std::optional<std::vector<double>> numbers(const std::string& key) const;

  // Shapes are row-major as everywhere here, the other way round than in the file.
  std::vector<std::string> names() const;  // sorted
  bool contains(const std::string& name) const { return tensors_.contains(name); }
  const std::vector<std::int64_t>& shape(const std::string& name) const { return find(name).shape; }
  std::string_view type(const std::string& name) const { return find(name).type->name; }
  tensor read(const std::string& name) const;  // dequantised
  bool is_coded(const std::string& name) const { return find(name).type->unpack != nullptr; }
  coded_tensor read_coded(const std::string& name) const;

  // "FILE: metadata: KEY is VALUE, had to be ..."; and "FILE: what".
  [[noreturn]] void refuse(const std::string& key, const std::string& had_to_be) const;
  [[noreturn]] void fail(const std::string& what) const { loaders::fail(file_, what); }
  const std::string& path() const { return file_; }

 private:
  enum class kind : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };
  struct value {
    kind type;  // that of the elements, where it is an array
    bool is_array;
    std::uint64_t count;  // 1 unless it is an array
    std::size_t at;       // where it begins in header_
  };
  struct tensor_type {
    std::uint32_t id;
    std::string_view name;
    std::int64_t block_values;
    std::uint64_t block_bytes;
    float (*value)(const std::byte* from);  // null where it is quantised, below where it is not
    std::int64_t group;                     // values per scale and offset
    void (*unpack)(const std::byte* block, std::int8_t* codes, float* scales, float* offsets);
  };
  struct entry {
    std::vector<std::int64_t> shape;
    const tensor_type* type;
    std::uint64_t begin, bytes;  // from the start of the data
  };
  class header_reader;
  struct types;

  gguf(const std::string& file, byte_source, const std::function<void(const gguf&)>& accepts = {});
  const entry& find(const std::string& name) const;
  const value* find_value(const std::string& key, bool is_array) const;
  const std::byte* at(std::size_t offset) const { return reinterpret_cast<const std::byte*>(header_.data()) + offset; }
  std::optional<std::int64_t> integer_at(const value&, std::uint64_t i) const;
  std::optional<double> number_at(const value&, std::uint64_t i) const;
  std::string described(const value&) const;
  std::vector<std::byte> bytes_of(const entry&) const;

  std::string file_;
  byte_source source_;
  std::string header_;
  std::uint64_t data_start_ = 0;
  std::map<std::string, value> metadata_;
  std::map<std::string, entry> tensors_;
};

}  // namespace loaders
