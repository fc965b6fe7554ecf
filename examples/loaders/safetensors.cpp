#include "safetensors.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

namespace loaders {
namespace {

// Bits per value of every dtype of the format, so that one that is merely not read here is told from nonsense.
int dtype_bits(std::string_view dtype) {
  constexpr std::pair<std::string_view, int> known[] = {
      {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"BOOL", 8}, {"U8", 8},   {"I8", 8},    {"F8_E5M2", 8},
      {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"I16", 16},    {"U16", 16}, {"F16", 16}, {"BF16", 16}, {"I32", 32},
      {"U32", 32},    {"F32", 32},    {"I64", 64},    {"U64", 64}, {"F64", 64}, {"C64", 64}};
  for (const auto& [name, bits] : known) {
    if (name == dtype) return bits;
  }
  return 0;
}

bool is_read_here(std::string_view dtype) { return dtype == "F32" || dtype == "F16" || dtype == "BF16"; }

}  // namespace

// Takes the header's JSON piece by piece, so that whatever does not belong is refused where it begins: three levels of
// nesting are all the format has, and no tree is ever built.
class safetensors::header_reader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit header_reader(safetensors& to) : to_(to) {}

  bool start_object(std::size_t) override {
    if (at_ == place::start) {
      at_ = place::top;
    } else if (at_ == place::top) {
      at_ = key_ == "__metadata__" ? place::metadata : place::tensor;
      has_dtype_ = has_shape_ = has_offsets_ = false;
    } else {
      refuse("an object");
    }
    return true;
  }

  bool key(std::string& name) override {
    if (at_ == place::top) {
      key_ = name;
      if (name == "__metadata__") {
        if (std::exchange(has_metadata_, true)) fail("the header has '__metadata__' twice, must have it at most once");
        return true;
      }
      for (const char c : name) {
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
          fail(fmt::format("the name of tensor {} must not hold control characters", quote(name)));
        }
      }
      const auto [found, is_new] = to_.entries_.try_emplace(name);
      if (!is_new) fail(fmt::format("the header has tensor {} twice, its names must be unique", quote(name)));
      entry_ = &found->second;
    } else if (at_ == place::metadata) {
      const auto [found, is_new] = to_.metadata_.try_emplace(name);
      if (!is_new) fail(fmt::format("__metadata__ has {} twice, its keys must be unique", quote(name)));
      field_ = name;
      value_ = &found->second;
    } else {
      bool* const seen = name == "dtype"          ? &has_dtype_
                         : name == "shape"        ? &has_shape_
                         : name == "data_offsets" ? &has_offsets_
                                                  : nullptr;
      if (seen == nullptr) {
        fail(fmt::format("tensor {} has a field {}, must have dtype, shape and data_offsets only", quote(key_),
                         quote(name)));
      }
      if (std::exchange(*seen, true)) {
        fail(fmt::format("tensor {} has {} twice, must have it once", quote(key_), name));
      }
      field_ = name;
    }
    return true;
  }

  bool end_object() override {
    if (at_ == place::tensor) {
      for (const auto& [seen, field] :
           {std::pair{has_dtype_, "dtype"}, std::pair{has_shape_, "shape"}, std::pair{has_offsets_, "data_offsets"}}) {
        if (!seen) fail(fmt::format("tensor {} has no {}, must have one", quote(key_), field));
      }
    }
    at_ = place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (at_ != place::tensor || field_ == "dtype") refuse("an array");
    at_ = field_ == "shape" ? place::shape : place::offsets;
    num_offsets_ = 0;
    return true;
  }

  bool end_array() override {
    if (at_ == place::offsets && num_offsets_ != 2) {
      fail(fmt::format("data_offsets of tensor {} holds {} numbers, must hold 2", quote(key_), num_offsets_));
    }
    at_ = place::tensor;
    return true;
  }

  bool string(std::string& value) override {
    if (at_ == place::metadata) {
      *value_ = std::move(value);
    } else if (at_ == place::tensor && field_ == "dtype") {
      entry_->dtype = std::move(value);
    } else {
      refuse("the string " + quote(value));
    }
    return true;
  }

  bool number_unsigned(std::uint64_t value) override {
    if (at_ == place::shape) {
      if (entry_->shape.size() == max_dims) {
        fail(fmt::format("shape of tensor {} has more than {} dimensions, must have at most that", quote(key_),
                         max_dims));
      }
      if (value > std::uint64_t{max_dim}) {
        fail(fmt::format("shape of tensor {} holds {}, must hold at most {}", quote(key_), value, max_dim));
      }
      entry_->shape.push_back(static_cast<std::int64_t>(value));
    } else if (at_ == place::offsets) {
      if (num_offsets_ == 2) {
        fail(fmt::format("data_offsets of tensor {} holds more than 2 numbers, must hold 2", quote(key_)));
      }
      (num_offsets_++ == 0 ? entry_->begin : entry_->end) = value;
    } else {
      refuse(fmt::format("the number {}", value));
    }
    return true;
  }

  // Only numbers with a minus sign come here; those with a fraction, an exponent or too many digits come as floats.
  bool number_integer(std::int64_t value) override {
    refuse(fmt::format("the number {}", value == 0 ? "-0" : std::to_string(value)));
  }
  bool number_float(double, const std::string& text) override { refuse("the number " + printable(text)); }
  bool boolean(bool value) override { refuse(value ? "true" : "false"); }
  bool null() override { refuse("null"); }
  bool binary(nlohmann::json::binary_t&) override { refuse("binary data"); }

  bool parse_error(std::size_t position, const std::string& last_token, const nlohmann::json::exception&) override {
    fail(fmt::format("the header must be one JSON object in UTF-8, but cannot be read at its byte {}, after {}",
                     position, quote(last_token)));
  }

 private:
  enum class place { start, top, metadata, tensor, shape, offsets };

  [[noreturn]] void fail(const std::string& what) const { loaders::fail(to_.file_, what); }

  [[noreturn]] void refuse(const std::string& found) const {
    const std::string in_tensor = " of tensor " + quote(key_);
    switch (at_) {
      case place::metadata:
        fail(fmt::format("{} in __metadata__ is {}, must be a string", quote(field_), found));
      case place::tensor:
        fail(fmt::format("{}{} is {}, must be {}", field_, in_tensor, found,
                         field_ == "dtype" ? "a string" : "an array"));
      case place::shape:
        fail(fmt::format("shape{} holds {}, must hold non-negative integers only", in_tensor, found));
      case place::offsets:
        fail(fmt::format("data_offsets{} holds {}, must hold non-negative integers only", in_tensor, found));
      default:
        fail(fmt::format("the header's entry {} is {}, must be an object", quote(key_), found));
    }
  }

  safetensors& to_;
  place at_ = place::start;
  std::string key_, field_;
  entry* entry_ = nullptr;
  std::string* value_ = nullptr;
  bool has_metadata_ = false, has_dtype_ = false, has_shape_ = false, has_offsets_ = false;
  int num_offsets_ = 0;
};

safetensors::safetensors(const std::string& file, byte_source source) : file_(file), source_(std::move(source)) {
  const std::uint64_t file_bytes = source_.size;
  std::array<std::byte, 8> length;
  if (file_bytes < length.size()) {
    fail(file_,
         fmt::format("is {} bytes long, must be at least {}: the length of its header", file_bytes, length.size()));
  }
  source_.read(0, length);
  const std::uint64_t header_bytes = little_endian<std::uint64_t>(length.data());
  if (header_bytes > max_header_bytes) {
    fail(file_, fmt::format("header length is {}, must be at most {}: not a safetensors file?", header_bytes,
                            max_header_bytes));
  }
  if (header_bytes > file_bytes - length.size()) {
    fail(file_, fmt::format("header length is {}, must be at most the {} bytes that follow it: is the file truncated?",
                            header_bytes, file_bytes - length.size()));
  }
  std::string header(static_cast<std::size_t>(header_bytes), '\0');
  source_.read(length.size(), std::as_writable_bytes(std::span(header)));
  if (!header.starts_with('{')) {
    fail(file_, fmt::format("header begins with {}, must begin with '{{'", quote(header.substr(0, 1))));
  }
  // The JSON parser would take a NUL for the end and never see what follows.
  if (const std::size_t nul = header.find('\0'); nul != std::string::npos) {
    fail(file_, fmt::format("header has a NUL at its byte {}, must have none", nul + 1));
  }
  header_reader reader(*this);
  nlohmann::json::sax_parse(header, &reader);

  data_start_ = length.size() + header_bytes;
  const std::uint64_t data_bytes = file_bytes - data_start_;
  for (const auto& [name, e] : entries_) check_entry(name, e, data_bytes);
  check_layout(data_bytes);
}

void safetensors::check_entry(const std::string& name, const entry& e, std::uint64_t data_bytes) const {
  const int bits = dtype_bits(e.dtype);
  if (!is_read_here(e.dtype)) {
    fail(file_, fmt::format("tensor {} has dtype {}{}, must be F32, F16 or BF16", quote(name), quote(e.dtype),
                            bits == 0 ? "" : fmt::format(" ({} bits, not supported)", bits)));
  }
  if (e.begin > e.end) {
    fail(file_,
         fmt::format("data_offsets of tensor {} is [{}, {}], must not run backwards", quote(name), e.begin, e.end));
  }
  if (e.end > data_bytes) {
    fail(file_,
         fmt::format(
             "data_offsets of tensor {} ends at {}, must end within the {} bytes of data: is the file truncated?",
             quote(name), e.end, data_bytes));
  }
  // A dimension of 0 must not hide an overflow of the others: whoever multiplies them in another order would meet it.
  std::int64_t bytes = bits / 8;
  bool is_empty = false;
  for (const std::int64_t dim : e.shape) {
    is_empty |= dim == 0;
    if (__builtin_mul_overflow(bytes, std::max<std::int64_t>(dim, 1), &bytes)) {
      fail(file_,
           fmt::format("shape {} of tensor {} overflows, its bytes must fit in 63 bits", listed(e.shape), quote(name)));
    }
  }
  if (is_empty) bytes = 0;
  if (static_cast<std::uint64_t>(bytes) != e.end - e.begin) {
    fail(file_,
         fmt::format(
             "tensor {} takes {} bytes as {} of shape {}, but its data_offsets [{}, {}] hold {}: they must agree",
             quote(name), bytes, e.dtype, listed(e.shape), e.begin, e.end, e.end - e.begin));
  }
}

void safetensors::check_layout(std::uint64_t data_bytes) const {
  using item = std::pair<const std::string, entry>;
  std::vector<const item*> order;
  order.reserve(entries_.size());
  for (const item& i : entries_) order.push_back(&i);
  std::sort(order.begin(), order.end(), [](const item* a, const item* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  std::uint64_t at = 0;
  for (const item* i : order) {
    if (i->second.begin != at) {
      fail(file_,
           fmt::format("tensor {} begins at {} of the data, must begin at {}, where the one before ends: {}",
                       quote(i->first), i->second.begin, at, i->second.begin < at ? "they overlap" : "there is a gap"));
    }
    at = i->second.end;
  }
  if (at != data_bytes) {
    fail(file_,
         fmt::format("the tensors end at {} of the data, must end with it at {}: trailing bytes", at, data_bytes));
  }
}

safetensors safetensors::load(const std::string& path) { return safetensors(path, open_source(path)); }

safetensors safetensors::parse(std::span<const std::byte> file, const std::string& name) {
  return safetensors(name, memory_source(file));
}

std::vector<std::string> safetensors::names() const {
  std::vector<std::string> all;
  for (const auto& [name, e] : entries_) all.push_back(name);
  return all;
}

tensor safetensors::read(const std::string& name) const {
  const entry& e = find(name);
  std::vector<std::byte> bytes;
  if (e.end - e.begin > bytes.max_size()) fail(file_, fmt::format("tensor {} exceeds the address space", quote(name)));
  bytes.resize(static_cast<std::size_t>(e.end - e.begin));
  source_.read(data_start_ + e.begin, bytes);
  const std::size_t width = e.dtype == "F32" ? 4 : 2;
  tensor out{e.shape, std::vector<float>(bytes.size() / width)};
  for (std::size_t i = 0; i < out.values.size(); ++i) {
    const std::byte* const from = bytes.data() + i * width;
    out.values[i] = e.dtype == "F32"   ? std::bit_cast<float>(little_endian<std::uint32_t>(from))
                    : e.dtype == "F16" ? f32_from_f16(little_endian<std::uint16_t>(from))
                                       : f32_from_bf16(little_endian<std::uint16_t>(from));
  }
  return out;
}

const safetensors::entry& safetensors::find(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) fail(file_, fmt::format("has no tensor {}", quote(name)));
  return found->second;
}

}  // namespace loaders
