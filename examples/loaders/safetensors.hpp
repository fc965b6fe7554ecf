#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "file.hpp"

namespace loaders {

// A .safetensors file from anybody. The whole layout is checked before anything is handed out: afterwards every tensor
// lies inside the file, its shape and dtype give exactly its bytes, and no byte belongs to two tensors or to none.
// Values are not judged: NaN and inf are read like any other.
class safetensors {
 public:
  // The format allows 100 MB. The header of a 400 B model takes well under one, so a larger one is refused unread.
  static constexpr std::uint64_t max_header_bytes = std::uint64_t{16} << 20;
  static constexpr std::size_t max_dims = 8;
  static constexpr std::int64_t max_dim = std::int64_t{1} << 40;

  // Keeps the file open and reads a tensor's bytes when asked: a file that claims a terabyte costs nothing until then.
  static safetensors load(const std::string& path);
  // The same on a copy of `file`; `name` stands for the path in messages.
  static safetensors parse(std::span<const std::byte> file, const std::string& name);

  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool contains(const std::string& name) const { return entries_.contains(name); }
  std::vector<std::string> names() const;  // sorted
  const std::vector<std::int64_t>& shape(const std::string& name) const { return find(name).shape; }
  tensor read(const std::string& name) const;

 private:
  struct entry {
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::uint64_t begin = 0, end = 0;  // bytes from the start of the data
  };
  class header_reader;

  safetensors(const std::string& file, byte_source);
  void check_entry(const std::string& name, const entry&, std::uint64_t data_bytes) const;
  void check_layout(std::uint64_t data_bytes) const;
  const entry& find(const std::string& name) const;

  std::string file_;
  byte_source source_;
  std::uint64_t data_start_ = 0;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, entry> entries_;
};

}  // namespace loaders
