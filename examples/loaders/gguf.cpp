#include "gguf.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

namespace loaders {
namespace {

std::uint8_t byte_of(std::byte b) { return std::to_integer<std::uint8_t>(b); }
std::int8_t low(std::byte b) { return static_cast<std::int8_t>(byte_of(b) & 15); }
std::int8_t high(std::byte b) { return static_cast<std::int8_t>(byte_of(b) >> 4); }
std::int8_t signed_byte(std::byte b) { return static_cast<std::int8_t>(byte_of(b)); }
std::int8_t less(std::int8_t code, int by) { return static_cast<std::int8_t>(code - by); }

constexpr const char* kind_names[] = {"uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
                                      "bool",  "string", "array",  "uint64", "int64",  "float64"};
constexpr std::uint64_t kind_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};  // at least 8 a string: its length

// Of the types that are not read here, so that one of them is told from nonsense.
std::string_view other_type(std::uint32_t id) {
  constexpr std::pair<std::uint32_t, std::string_view> known[] = {
      {4, "Q4_2"},        {5, "Q4_3"},      {9, "Q8_1"},   {15, "Q8_K"},  {16, "IQ2_XXS"},    {17, "IQ2_XS"},
      {18, "IQ3_XXS"},    {19, "IQ1_S"},    {21, "IQ3_S"}, {22, "IQ2_S"}, {23, "IQ4_XS"},     {24, "I8"},
      {25, "I16"},        {26, "I32"},      {27, "I64"},   {28, "F64"},   {29, "IQ1_M"},      {31, "Q4_0_4_4"},
      {32, "Q4_0_4_8"},   {33, "Q4_0_8_8"}, {34, "TQ1_0"}, {35, "TQ2_0"}, {36, "IQ4_NL_4_4"}, {37, "IQ4_NL_4_8"},
      {38, "IQ4_NL_8_8"}, {39, "MXFP4"},    {40, "NVFP4"}, {41, "Q1_0"},  {42, "Q2_0"}};
  for (const auto& [number, name] : known) {
    if (number == id) return name;
  }
  return "";
}

std::uint64_t padded(std::uint64_t bytes, std::uint64_t alignment) {
  return (bytes + alignment - 1) & ~(alignment - 1);
}

}  // namespace

// As ggml lays them out. A dequantised value is a product and, where there are offsets, a sum, each rounded to float32.
struct gguf::types {
  static float f32(const std::byte* from) { return std::bit_cast<float>(little_endian<std::uint32_t>(from)); }
  static float f16(const std::byte* from) { return f32_from_f16(little_endian<std::uint16_t>(from)); }
  static float bf16(const std::byte* from) { return f32_from_bf16(little_endian<std::uint16_t>(from)); }

  // 32 values: a scale, and for q4_1 a minimum; the low nibbles are the first half.
  static void q8_0(const std::byte* from, std::int8_t* codes, float* scale, float* offset) {
    *scale = f16(from), *offset = 0;
    for (int i = 0; i < 32; ++i) codes[i] = signed_byte(from[2 + i]);
  }
  static void q4_0(const std::byte* from, std::int8_t* codes, float* scale, float* offset) {
    *scale = f16(from), *offset = 0;
    for (int i = 0; i < 16; ++i) codes[i] = less(low(from[2 + i]), 8), codes[i + 16] = less(high(from[2 + i]), 8);
  }
  static void q4_1(const std::byte* from, std::int8_t* codes, float* scale, float* offset) {
    *scale = f16(from), *offset = f16(from + 2);
    for (int i = 0; i < 16; ++i) codes[i] = low(from[4 + i]), codes[i + 16] = high(from[4 + i]);
  }

  // As q4_0 and q4_1, with a fifth bit of each value in 4 bytes before the nibbles.
  static void fifth_bits(const std::byte* from, std::int8_t* codes, int less_by) {
    const std::uint32_t bits = little_endian<std::uint32_t>(from);
    for (int i = 0; i < 32; ++i) {
      const std::byte nibbles = from[4 + i % 16];
      codes[i] = less(i < 16 ? low(nibbles) : high(nibbles), less_by - 16 * static_cast<int>(bits >> i & 1));
    }
  }
  static void q5_0(const std::byte* from, std::int8_t* codes, float* scale, float* offset) {
    *scale = f16(from), *offset = 0;
    fifth_bits(from + 2, codes, 16);
  }
  static void q5_1(const std::byte* from, std::int8_t* codes, float* scale, float* offset) {
    *scale = f16(from), *offset = f16(from + 2);
    fifth_bits(from + 4, codes, 0);
  }

  // As q4_0, where a nibble is the place of a value in a table.
  static void iq4_nl(const std::byte* from, std::int8_t* codes, float* scale, float* offset) {
    constexpr std::int8_t table[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    *scale = f16(from), *offset = 0;
    for (int i = 0; i < 16; ++i) codes[i] = table[low(from[2 + i])], codes[i + 16] = table[high(from[2 + i])];
  }

  // 256 values in 8 groups of 32, each with a scale and a minimum of 6 bits: the first four of each in 4 bytes, the
  // upper two bits of which belong to the last four, whose lower four bits are in the 4 bytes after both.
  static void eight_scales(const std::byte* from, float* scales, float* offsets) {
    const float d = f16(from), d_min = f16(from + 2);
    const auto packed = [&](int i) { return unsigned{byte_of(from[4 + i])}; };
    for (int group = 0; group < 8; ++group) {
      const int i = group % 4;
      const unsigned scale = group < 4 ? packed(i) & 63 : (packed(8 + i) & 15) | (packed(i) >> 6 << 4);
      const unsigned min = group < 4 ? packed(4 + i) & 63 : packed(8 + i) >> 4 | (packed(4 + i) >> 6 << 4);
      scales[group] = d * static_cast<float>(scale), offsets[group] = -(d_min * static_cast<float>(min));
    }
  }
  // Two groups share 32 bytes.
  static std::int8_t nibble(const std::byte* from, int group, int i) {
    const std::byte both = from[group / 2 * 32 + i];
    return group % 2 == 0 ? low(both) : high(both);
  }
  static void q4_k(const std::byte* from, std::int8_t* codes, float* scales, float* offsets) {
    eight_scales(from, scales, offsets);
    for (int i = 0; i < 256; ++i) codes[i] = nibble(from + 16, i / 32, i % 32);
  }
  // The fifth bits of the i-th values of all groups are one byte.
  static void q5_k(const std::byte* from, std::int8_t* codes, float* scales, float* offsets) {
    eight_scales(from, scales, offsets);
    for (int i = 0; i < 256; ++i)
      codes[i] = less(nibble(from + 48, i / 32, i % 32), -16 * (byte_of(from[16 + i % 32]) >> (i / 32) & 1));
  }

  // 256 values in 16 groups. Four values, 32 apart, share a byte; each half of 128 has 32 of them.
  static int two_bits(const std::byte* from, int i) {
    return byte_of(from[i / 128 * 32 + i % 32]) >> (i % 128 / 32 * 2) & 3;
  }
  // A scale and a minimum of 4 bits in a byte, the values, and the scales of both.
  static void q2_k(const std::byte* from, std::int8_t* codes, float* scales, float* offsets) {
    const float d = f16(from + 80), d_min = f16(from + 82);
    for (int group = 0; group < 16; ++group) {
      scales[group] = d * static_cast<float>(low(from[group]));
      offsets[group] = -(d_min * static_cast<float>(high(from[group])));
    }
    for (int i = 0; i < 256; ++i) codes[i] = static_cast<std::int8_t>(two_bits(from + 16, i));
  }
  // The third bits, those of the i-th values of eight stretches of 32 a byte; the other two; scales of 6 bits, the low
  // four of scales i and i + 8 a byte, the high two of i, i + 4, i + 8 and i + 12 another; the scale of those.
  static void q3_k(const std::byte* from, std::int8_t* codes, float* scales, float* offsets) {
    const float d = f16(from + 108);
    for (int group = 0; group < 16; ++group) {
      const std::byte low_bits = from[96 + group % 8];
      const int high_bits = byte_of(from[104 + group % 4]) >> (group / 4 * 2) & 3;
      scales[group] = d * static_cast<float>((group < 8 ? low(low_bits) : high(low_bits)) + 16 * high_bits - 32);
      offsets[group] = 0;
    }
    for (int i = 0; i < 256; ++i)
      codes[i] = static_cast<std::int8_t>(two_bits(from + 32, i) - 4 + 4 * (byte_of(from[i % 32]) >> (i / 32) & 1));
  }

  // 256 values of 6 bits: the low four of two halves of 128, their high two, 16 scales of 8 bits, and the scale of
  // those.
  static void q6_k(const std::byte* from, std::int8_t* codes, float* scales, float* offsets) {
    const float d = f16(from + 208);
    for (int i = 0; i < 16; ++i) scales[i] = d * static_cast<float>(signed_byte(from[192 + i])), offsets[i] = 0;
    for (int i = 0; i < 256; ++i) {
      const int half = i / 128, in_half = i % 128;
      const std::byte low_bits = from[half * 64 + in_half % 64];
      const int high_bits = byte_of(from[128 + half * 32 + in_half % 32]) >> (in_half / 32 * 2) & 3;
      codes[i] = less(in_half < 64 ? low(low_bits) : high(low_bits), 32 - 16 * high_bits);
    }
  }

  static constexpr tensor_type all[] = {
      {0, "F32", 1, 4, f32, 0, nullptr},           {1, "F16", 1, 2, f16, 0, nullptr},
      {2, "Q4_0", 32, 18, nullptr, 32, q4_0},      {3, "Q4_1", 32, 20, nullptr, 32, q4_1},
      {6, "Q5_0", 32, 22, nullptr, 32, q5_0},      {7, "Q5_1", 32, 24, nullptr, 32, q5_1},
      {8, "Q8_0", 32, 34, nullptr, 32, q8_0},      {10, "Q2_K", 256, 84, nullptr, 16, q2_k},
      {11, "Q3_K", 256, 110, nullptr, 16, q3_k},   {12, "Q4_K", 256, 144, nullptr, 32, q4_k},
      {13, "Q5_K", 256, 176, nullptr, 32, q5_k},   {14, "Q6_K", 256, 210, nullptr, 16, q6_k},
      {20, "IQ4_NL", 32, 18, nullptr, 32, iq4_nl}, {30, "BF16", 1, 2, bf16, 0, nullptr}};
};

// Reads on only as far as the file and the limits go, whatever the file promises.
class gguf::header_reader {
 public:
  explicit header_reader(gguf& to) : to_(to) {}

  void read(const std::function<void(const gguf&)>& accepts) {
    within_ = "its first 24 bytes";
    const std::byte* const magic = take(4);
    if (std::string_view(reinterpret_cast<const char*>(magic), 4) != "GGUF")
      fail(fmt::format("begins with {}, must begin with 'GGUF'",
                       quote(std::string_view(reinterpret_cast<const char*>(magic), 4))));
    if (const std::uint32_t version = number<std::uint32_t>(); version != 3)
      fail(fmt::format("is of GGUF version {}, must be 3{}", version,
                       (version & 0xffff) == 0 && version != 0 ? ": is it big-endian?" : ""));
    const std::uint64_t num_tensors = count("tensors", max_tensors, 4 + 8 + 8 + 4 + 8);
    const std::uint64_t num_metadata = count("metadata", max_metadata, 8 + 1 + 4 + 1);
    for (std::uint64_t i = 0; i < num_metadata; ++i) read_metadata(i);
    read_alignment();
    if (accepts) accepts(to_);
    for (std::uint64_t i = 0; i < num_tensors; ++i) read_tensor(i);
    check_data();
    to_.header_.resize(static_cast<std::size_t>(at_));
    to_.header_.shrink_to_fit();
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { to_.fail(what); }

  std::uint64_t remaining() const { return to_.source_.size - at_; }

  const std::byte* take(std::uint64_t bytes) {
    if (bytes > remaining())
      fail(fmt::format(
          "has {} bytes, must have at least {} more than the {} up to here, within {}: is the file truncated?",
          to_.source_.size, bytes, at_, within_));
    if (bytes > max_header_bytes - at_)
      fail(fmt::format("has a header of more than {} bytes, must have at most that; this is within {}",
                       max_header_bytes, within_));
    const std::size_t end = static_cast<std::size_t>(at_ + bytes), have = to_.header_.size();
    if (end > have) {
      const std::uint64_t wanted = std::max<std::uint64_t>({end, 2 * have, std::uint64_t{1} << 16});
      to_.header_.resize(static_cast<std::size_t>(std::min({wanted, to_.source_.size, max_header_bytes})));
      to_.source_.read(have, std::as_writable_bytes(std::span(to_.header_)).subspan(have));
    }
    at_ = end;
    return to_.at(end - static_cast<std::size_t>(bytes));
  }

  template <class Unsigned>
  Unsigned number() {
    return little_endian<Unsigned>(take(sizeof(Unsigned)));
  }

  std::uint64_t count(const char* of, std::uint64_t max, std::uint64_t least_bytes) {
    const std::uint64_t n = number<std::uint64_t>();
    if (n > max) fail(fmt::format("has {} {}, must have at most {}", n, of, max));
    if (n > remaining() / least_bytes)
      fail(fmt::format("has {} {}, must have no more than fit into the {} bytes that follow: is the file truncated?", n,
                       of, remaining()));
    return n;
  }

  std::string_view string(std::uint64_t max) {
    const std::uint64_t bytes = number<std::uint64_t>();
    if (bytes > max) fail(fmt::format("has a string of {} bytes in {}, must be at most {}", bytes, within_, max));
    return {reinterpret_cast<const char*>(take(bytes)), static_cast<std::size_t>(bytes)};
  }

  std::string name(std::uint64_t max) {
    const std::string_view text = string(max);
    if (text.empty()) fail(fmt::format("{} has an empty name, must have a name", within_));
    if (std::any_of(text.begin(), text.end(), [](char c) { return c < 0x20 || c > 0x7e; }))
      fail(fmt::format("{} is called {}, must be called by printable ASCII", within_, quote(text)));
    return std::string(text);
  }

  kind read_kind() {
    const std::uint32_t id = number<std::uint32_t>();
    if (id >= std::size(kind_names))
      fail(fmt::format("{} has type {}, must have one from 0 to {}", within_, id, std::size(kind_names) - 1));
    return static_cast<kind>(id);
  }

  void read_metadata(std::uint64_t i) {
    within_ = fmt::format("metadata {}", i);
    const std::string key = name(max_key_bytes);
    within_ = fmt::format("metadata {}", quote(key));
    value v{read_kind(), false, 1, 0};
    if (v.type == kind::array) {
      v.is_array = true;
      v.type = read_kind();
      if (v.type == kind::array) fail(fmt::format("{} is an array of arrays, must not be nested", within_));
      v.count = number<std::uint64_t>();
      if (v.count > max_elements)
        fail(fmt::format("{} has {} elements, must have at most {}", within_, v.count, max_elements));
    }
    const std::uint64_t least_bytes = v.count * kind_bytes[static_cast<std::size_t>(v.type)];
    if (least_bytes > remaining())
      fail(fmt::format("{} takes at least {} bytes, must take no more than the {} that follow: is the file truncated?",
                       within_, least_bytes, remaining()));
    v.at = static_cast<std::size_t>(at_);
    if (v.type == kind::string) {
      for (std::uint64_t element = 0; element < v.count; ++element) string(max_string_bytes);
    } else {
      const std::byte* const bytes = take(least_bytes);
      if (v.type == kind::boolean) check_booleans(bytes, v.count);
    }
    if (!to_.metadata_.emplace(key, v).second) fail(fmt::format("has {} twice, must have it once", within_));
  }

  void check_booleans(const std::byte* bytes, std::uint64_t n) const {
    const std::byte* const bad = std::find_if(bytes, bytes + n, [](std::byte b) { return byte_of(b) > 1; });
    if (bad != bytes + n) fail(fmt::format("{} holds a bool of {}, must be 0 or 1", within_, byte_of(*bad)));
  }

  void read_alignment() {
    const auto found = to_.metadata_.find("general.alignment");
    if (found == to_.metadata_.end()) return;
    const value& v = found->second;
    alignment_ = v.type == kind::u32 && !v.is_array ? little_endian<std::uint32_t>(to_.at(v.at)) : 0;
    if (!std::has_single_bit(alignment_) || alignment_ > max_alignment)
      to_.refuse("general.alignment", fmt::format("a power of two up to {}, as uint32", max_alignment));
  }

  void read_tensor(std::uint64_t i) {
    within_ = fmt::format("tensor {}", i);
    const std::string tensor_name = name(max_name_bytes);
    within_ = fmt::format("tensor {}", quote(tensor_name));
    entry e{};
    const std::uint32_t dims = number<std::uint32_t>();
    if (dims < 1 || dims > max_dims)
      fail(fmt::format("{} has {} dimensions, must have 1 to {}", within_, dims, max_dims));
    std::int64_t values = 1;
    for (std::uint32_t d = 0; d < dims; ++d) {
      const std::uint64_t dim = number<std::uint64_t>();
      if (dim < 1 || dim > std::uint64_t{max_dim})
        fail(fmt::format("{} has a dimension of {}, must be 1 to {}", within_, dim, max_dim));
      e.shape.insert(e.shape.begin(), static_cast<std::int64_t>(dim));
      if (__builtin_mul_overflow(values, static_cast<std::int64_t>(dim), &values))
        fail(fmt::format("{} has dimensions whose product overflows, must fit in 63 bits", within_));
    }
    e.type = read_type();
    if (e.shape.back() % e.type->block_values != 0)
      fail(fmt::format("{} has rows of {}, must be of a multiple of {}, the block of {}", within_, e.shape.back(),
                       e.type->block_values, e.type->name));
    if (__builtin_mul_overflow(static_cast<std::uint64_t>(values / e.type->block_values), e.type->block_bytes,
                               &e.bytes) ||
        e.bytes > to_.source_.size)
      fail(fmt::format("{} is {} of shape {}, must take no more than the {} bytes of the file: is it truncated?",
                       within_, e.type->name, listed(e.shape), to_.source_.size));
    e.begin = number<std::uint64_t>();
    const std::uint64_t must_begin = padded(data_end_, alignment_);
    if (e.begin != must_begin)
      fail(fmt::format("{} begins at {} of the data, must begin at {}, after the one before", within_, e.begin,
                       must_begin));
    data_end_ = e.begin + e.bytes;
    if (data_end_ > to_.source_.size)  // so that the next sum does not overflow either
      fail(fmt::format("{} ends at {} of the data, must end within the file of {} bytes: is it truncated?", within_,
                       data_end_, to_.source_.size));
    if (!to_.tensors_.emplace(tensor_name, std::move(e)).second)
      fail(fmt::format("has {} twice, must have it once", within_));
  }

  const tensor_type* read_type() {
    const std::uint32_t id = number<std::uint32_t>();
    for (const tensor_type& type : types::all) {
      if (type.id == id) return &type;
    }
    const std::string_view known = other_type(id);
    std::string names;
    for (const tensor_type& type : types::all) names.append(names.empty() ? "" : ", ").append(type.name);
    fail(fmt::format(
        "{} has type {}, must be one of {}", within_,
        known.empty() ? fmt::format("{}, newer than this reader", id) : fmt::format("{}, not supported", known),
        names));
  }

  void check_data() {
    to_.data_start_ = to_.tensors_.empty() ? at_ : padded(at_, alignment_);
    const std::uint64_t end = to_.data_start_ + data_end_, bytes = to_.source_.size;
    if (end > bytes)
      fail(fmt::format("has {} bytes, must have {} for its tensors: is the file truncated?", bytes, end));
    if (bytes - end >= alignment_)
      fail(fmt::format("has {} bytes, must end with its tensors at {}, but for padding: trailing bytes", bytes, end));
  }

  gguf& to_;
  std::uint64_t at_ = 0;
  std::uint64_t alignment_ = 32;
  std::uint64_t data_end_ = 0;  // of the tensors up to now, from the start of the data
  std::string within_;
};

gguf::gguf(const std::string& file, byte_source source, const std::function<void(const gguf&)>& accepts)
    : file_(file), source_(std::move(source)) {
  header_reader(*this).read(accepts);
}

bool gguf::is_gguf(const std::string& path) {
  const byte_source file = open_source(path);
  std::array<std::byte, 4> magic{};
  if (file.size < magic.size()) return false;
  file.read(0, magic);
  return little_endian<std::uint32_t>(magic.data()) == 0x46554747;  // "GGUF"
}

gguf gguf::load(const std::string& path, const std::function<void(const gguf&)>& accepts) {
  return gguf(path, open_source(path), accepts);
}

gguf gguf::parse(std::span<const std::byte> file, const std::string& name) { return gguf(name, memory_source(file)); }

std::vector<std::string> gguf::keys() const {
  std::vector<std::string> all;
  for (const auto& [key, v] : metadata_) all.push_back(key);
  return all;
}

const gguf::value* gguf::find_value(const std::string& key, bool is_array) const {
  const auto found = metadata_.find(key);
  if (found == metadata_.end()) return nullptr;
  if (found->second.is_array != is_array) refuse(key, is_array ? "an array" : "a single value");
  return &found->second;
}

std::optional<std::string_view> gguf::string(const std::string& key) const {
  const value* const v = find_value(key, false);
  if (!v) return {};
  if (v->type != kind::string) refuse(key, "a string");
  return std::string_view(header_).substr(v->at + 8, static_cast<std::size_t>(little_endian<std::uint64_t>(at(v->at))));
}

// Nothing where it is no integer or fits in no int64.
std::optional<std::int64_t> gguf::integer_at(const value& v, std::uint64_t i) const {
  const std::byte* const from = at(v.at + static_cast<std::size_t>(i * kind_bytes[static_cast<std::size_t>(v.type)]));
  switch (v.type) {
    case kind::u8:
      return byte_of(*from);
    case kind::i8:
      return static_cast<std::int8_t>(byte_of(*from));
    case kind::u16:
      return little_endian<std::uint16_t>(from);
    case kind::i16:
      return static_cast<std::int16_t>(little_endian<std::uint16_t>(from));
    case kind::u32:
      return little_endian<std::uint32_t>(from);
    case kind::i32:
      return static_cast<std::int32_t>(little_endian<std::uint32_t>(from));
    case kind::i64:
      return static_cast<std::int64_t>(little_endian<std::uint64_t>(from));
    case kind::u64:
      if (const std::uint64_t n = little_endian<std::uint64_t>(from); std::in_range<std::int64_t>(n))
        return static_cast<std::int64_t>(n);
      return {};
    default:
      return {};
  }
}

std::optional<double> gguf::number_at(const value& v, std::uint64_t i) const {
  const std::byte* const from = at(v.at + static_cast<std::size_t>(i * kind_bytes[static_cast<std::size_t>(v.type)]));
  if (v.type == kind::f32) return std::bit_cast<float>(little_endian<std::uint32_t>(from));
  if (v.type == kind::f64) return std::bit_cast<double>(little_endian<std::uint64_t>(from));
  return {};
}

std::optional<std::int64_t> gguf::integer(const std::string& key, std::int64_t min, std::int64_t max) const {
  const value* const v = find_value(key, false);
  if (!v) return {};
  const std::optional<std::int64_t> n = integer_at(*v, 0);
  if (!n || *n < min || *n > max) refuse(key, fmt::format("a whole number from {} to {}", min, max));
  return n;
}

std::optional<double> gguf::number(const std::string& key, double min, double max) const {
  const value* const v = find_value(key, false);
  if (!v) return {};
  const std::optional<double> x = number_at(*v, 0);
  if (!x || !(*x >= min && *x <= max)) refuse(key, fmt::format("a number from {} to {}", min, max));
  return x;
}

std::optional<bool> gguf::flag(const std::string& key) const {
  const value* const v = find_value(key, false);
  if (!v) return {};
  if (v->type != kind::boolean) refuse(key, "a bool");
  return byte_of(*at(v->at)) == 1;
}

std::optional<std::vector<std::string_view>> gguf::strings(const std::string& key) const {
  const value* const v = find_value(key, true);
  if (!v) return {};
  if (v->type != kind::string) refuse(key, "an array of strings");
  std::vector<std::string_view> all;
  all.reserve(static_cast<std::size_t>(v->count));
  std::size_t from = v->at;
  for (std::uint64_t i = 0; i < v->count; ++i) {
    const auto bytes = static_cast<std::size_t>(little_endian<std::uint64_t>(at(from)));
    all.push_back(std::string_view(header_).substr(from + 8, bytes));
    from += 8 + bytes;
  }
  return all;
}

std::optional<std::vector<std::int64_t>> gguf::integers(const std::string& key) const {
  const value* const v = find_value(key, true);
  if (!v) return {};
  std::vector<std::int64_t> all;
  for (std::uint64_t i = 0; i < v->count; ++i) {
    const std::optional<std::int64_t> n = integer_at(*v, i);
    if (!n) refuse(key, "an array of whole numbers");
    all.push_back(*n);
  }
  return all;
}

std::optional<std::vector<double>> gguf::numbers(const std::string& key) const {
  const value* const v = find_value(key, true);
  if (!v) return {};
  std::vector<double> all;
  for (std::uint64_t i = 0; i < v->count; ++i) {
    const std::optional<double> x = number_at(*v, i);
    if (!x) refuse(key, "an array of floats");
    all.push_back(*x);
  }
  return all;
}

std::string gguf::described(const value& v) const {
  const char* const type = kind_names[static_cast<std::size_t>(v.type)];
  if (v.is_array) return fmt::format("an array of {} {}", v.count, type);
  if (v.type == kind::string)
    return quote(
        std::string_view(header_).substr(v.at + 8, static_cast<std::size_t>(little_endian<std::uint64_t>(at(v.at)))));
  if (v.type == kind::boolean) return byte_of(*at(v.at)) == 1 ? "true" : "false";
  if (const auto x = number_at(v, 0)) return fmt::format("{} ({})", *x, type);
  if (const auto n = integer_at(v, 0)) return fmt::format("{} ({})", *n, type);
  return fmt::format("{} ({})", little_endian<std::uint64_t>(at(v.at)), type);
}

std::string gguf::text(const std::string& key) const {
  const value& v = metadata_.at(key);
  if (!v.is_array && v.type == kind::string) return std::string(*string(key));
  const std::string all = described(v);
  return v.is_array ? all : all.substr(0, all.find(' '));
}

void gguf::refuse(const std::string& key, const std::string& had_to_be) const {
  const auto found = metadata_.find(key);
  if (found == metadata_.end()) fail(fmt::format("metadata: {} is missing, had to be {}", key, had_to_be));
  fail(fmt::format("metadata: {} is {}, had to be {}", key, described(found->second), had_to_be));
}

std::vector<std::string> gguf::names() const {
  std::vector<std::string> all;
  for (const auto& [name, e] : tensors_) all.push_back(name);
  return all;
}

std::vector<std::byte> gguf::bytes_of(const entry& e) const {
  std::vector<std::byte> bytes(static_cast<std::size_t>(e.bytes));
  source_.read(data_start_ + e.begin, bytes);
  return bytes;
}

coded_tensor gguf::read_coded(const std::string& name) const {
  const entry& e = find(name);
  if (!e.type->unpack) fail(fmt::format("tensor {} is {}, had to be quantised", quote(name), e.type->name));
  const std::vector<std::byte> bytes = bytes_of(e);
  const std::size_t blocks = bytes.size() / e.type->block_bytes,
                    block_values = static_cast<std::size_t>(e.type->block_values),
                    block_groups = static_cast<std::size_t>(e.type->block_values / e.type->group);
  coded_tensor out{e.shape, e.type->group, std::vector<std::int8_t>(blocks * block_values),
                   std::vector<float>(blocks * block_groups), std::vector<float>(blocks * block_groups)};
  for (std::size_t i = 0; i < blocks; ++i)
    e.type->unpack(bytes.data() + i * e.type->block_bytes, out.codes.data() + i * block_values,
                   out.scales.data() + i * block_groups, out.offsets.data() + i * block_groups);
  return out;
}

tensor gguf::read(const std::string& name) const {
  const entry& e = find(name);
  if (e.type->unpack) {
    const coded_tensor coded = read_coded(name);
    tensor out{e.shape, std::vector<float>(coded.codes.size())};
    for (std::size_t i = 0; i < out.values.size(); ++i) {
      const std::size_t group = i / static_cast<std::size_t>(coded.group);
      out.values[i] = coded.scales[group] * static_cast<float>(coded.codes[i]) + coded.offsets[group];
    }
    return out;
  }
  const std::vector<std::byte> bytes = bytes_of(e);
  tensor out{e.shape, std::vector<float>(bytes.size() / e.type->block_bytes)};
  for (std::size_t i = 0; i < out.values.size(); ++i)
    out.values[i] = e.type->value(bytes.data() + i * e.type->block_bytes);
  return out;
}

const gguf::entry& gguf::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail(fmt::format("has no tensor {}", quote(name)));
  return found->second;
}

}  // namespace loaders
