#include "weights.hpp"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <regex>
#include <string_view>
#include <utility>

#include "gguf.hpp"
#include "safetensors.hpp"

namespace loaders {
namespace {

using namespace std::string_view_literals;

std::string first_bytes(const byte_source& file, std::uint64_t most) {
  std::string bytes(static_cast<std::size_t>(std::min(most, file.size)), '\0');
  file.read(0, std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

// All of a model is read into memory, so what is larger is refused before anything of its size is asked for.
void require_memory(const std::string& path, std::uint64_t bytes) {
  const auto memory =
      static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  if (bytes > memory)
    fail(path, fmt::format("has {} bytes, must have at most the {} of this machine's memory", bytes, memory));
}

// The length of a header, and the brace that it begins with.
bool looks_like_safetensors(const std::string& begin) {
  return begin.size() > 8 && begin[8] == '{' &&
         little_endian<std::uint64_t>(std::as_bytes(std::span(begin)).data()) <= safetensors::max_header_bytes;
}

// "GGUX", "gguf": one letter is another, or the case is.
bool is_almost_gguf(std::string_view begin) {
  int same = 0;
  for (std::size_t i = 0; i < 4 && i < begin.size(); ++i)
    same += std::toupper(static_cast<unsigned char>(begin[i])) == "GGUF"[i];
  return same >= 3;
}

// What people meet in place of weights, by how it begins.
std::string_view known_as(std::string_view begin) {
  constexpr std::pair<std::string_view, std::string_view> known[] = {
      {"version https://git-lfs"sv, "a Git LFS pointer: `git lfs pull` gets the file that it stands for"sv},
      {"<"sv, "a web page: what was to be downloaded is an error, or needs a login"sv},
      {"PK\x03\x04"sv, "a zip archive, as PyTorch saves checkpoints"sv},
      {"\x80\x02"sv, "a pickle, as PyTorch saves checkpoints"sv},
      {"\x1f\x8b"sv, "compressed by gzip"sv},
      {"\x28\xb5\x2f\xfd"sv, "compressed by zstd"sv},
      {"\xfd"
       "7zXZ"sv,
       "compressed by xz"sv},
      {"BZh"sv, "compressed by bzip2"sv},
      {"7z\xbc\xaf"sv, "a 7z archive"sv},
      {"\x89HDF"sv, "an HDF5 file, as Keras saves weights"sv},
      {"{"sv, "JSON: an index or a configuration, not the weights"sv},
      {"FUGG"sv, "a GGUF file of the other byte order"sv},
      {"lmgg"sv, "in a format that llama.cpp had before GGUF (GGML)"sv},
      {"fmgg"sv, "in a format that llama.cpp had before GGUF (GGMF)"sv},
      {"tjgg"sv, "in a format that llama.cpp had before GGUF (GGJT)"sv}};
  for (const auto& [magic, what] : known)
    if (begin.starts_with(magic)) return what;
  return {};
}

// What servers answer where there is no such file, or no leave to have it: "Entry not found".
bool is_text(std::string_view begin) {
  return begin.size() > 8 && std::all_of(begin.begin(), begin.end(), [](char c) {
           return (c >= ' ' && c <= '~') || c == '\n' || c == '\r' || c == '\t';
         });
}

// By its name: model-00001-of-00002.safetensors. GGUF's shards say so themselves.
bool is_shard(const std::string& path) {
  static const std::regex shard(".*-[0-9]{5}-of-[0-9]{5}\\.safetensors");
  return std::regex_match(path, shard);
}

}  // namespace

void fail_rope(const std::string& path, const sinkcache::status& found) {
  constexpr auto whose = "sinkcache: "sv;
  std::string_view what = found.message();
  if (what.starts_with(whose)) what.remove_prefix(whose.size());
  fail(path, "metadata: " + printable(what, what.size()));
}

std::unique_ptr<weights> weights::open(const std::string& path) {
  const byte_source file = open_source(path);
  const std::string begin = first_bytes(file, 64);
  require_memory(path, file.size);
  if (begin.starts_with("GGUF")) return open_gguf_weights(path);
  if (is_shard(path)) fail(path, "is one shard of several, had to be a whole model");
  if (looks_like_safetensors(begin)) return open_safetensors_weights(path);
  if (begin.empty()) fail(path, "is empty, had to be a GGUF or safetensors file");
  std::string_view text = begin;
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  text.remove_prefix(std::min(text.find_first_not_of(" \t\r\n"), text.size()));
  if (const std::string_view what = known_as(text); !what.empty())
    fail(path, fmt::format("is {}; had to be a GGUF or safetensors file", what));
  if (is_text(text))
    fail(path, fmt::format("is text that begins with {}; had to be a GGUF or safetensors file",
                           quote(text.substr(0, text.find_first_of("\r\n")))));
  if (is_almost_gguf(begin) || path.ends_with(".gguf"))
    fail(path, fmt::format("begins with {}, had to begin with 'GGUF'", quote(std::string_view(begin).substr(0, 4))));
  return open_safetensors_weights(path);
}

}  // namespace loaders
