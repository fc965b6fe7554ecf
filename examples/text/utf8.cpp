#include "utf8.hpp"

#include <fmt/format.h>

#include <utility>

namespace text {
namespace {

bool controls_terminal(char32_t u) {
  const bool is_c0 = u < 0x20 && u != '\n' && u != '\t', is_c1 = u >= 0x7f && u < 0xa0;
  return is_c0 || is_c1 || (u >= 0x202a && u <= 0x202e) || (u >= 0x2066 && u <= 0x2069);
}

}  // namespace

decoded first_character(std::string_view text) {
  const auto byte = [text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {lead, 1, false};
  if (lead < 0xc2 || lead > 0xf4) return {replacement_character, 1, false};
  const std::size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  // The second byte's bounds leave out overlong forms, surrogates, and what lies beyond U+10FFFF.
  unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  char32_t value = lead & (0x7fu >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {replacement_character, i, true};
    if (byte(i) < low || byte(i) > high) return {replacement_character, i, false};
    value = value << 6 | (byte(i) & 0x3fu);
    low = 0x80;
    high = 0xbf;
  }
  return {value, length, false};
}

std::string utf8_stream::push(std::string_view bytes) {
  rest_ += bytes;
  std::string out;
  std::string_view left = rest_;
  while (!left.empty()) {
    const decoded c = first_character(left);
    if (c.is_cut) break;
    // A U+FFFD that stands in the text is copied like any other character.
    const bool is_valid = c.code_point != replacement_character || left.starts_with("\xef\xbf\xbd");
    out += is_valid ? left.substr(0, c.bytes) : std::string_view("\xef\xbf\xbd");
    left.remove_prefix(c.bytes);
  }
  rest_ = std::string(left);
  return out;
}

std::string utf8_stream::finish() { return std::exchange(rest_, "").empty() ? "" : "\xef\xbf\xbd"; }

std::string valid_utf8(std::string_view bytes) {
  utf8_stream stream;
  std::string out = stream.push(bytes);
  return out += stream.finish();
}

std::string without_controls(std::string_view valid) {
  std::string out;
  while (!valid.empty()) {
    const decoded c = first_character(valid);
    if (!controls_terminal(c.code_point)) out += valid.substr(0, c.bytes);
    valid.remove_prefix(c.bytes);
  }
  return out;
}

std::string harmless(std::string_view message) {
  std::string out;
  while (!message.empty()) {
    const decoded c = first_character(message);
    const std::string_view bytes = message.substr(0, c.bytes);
    const bool is_valid = c.code_point != replacement_character || bytes == "\xef\xbf\xbd";
    if (is_valid && !controls_terminal(c.code_point))
      out += bytes;
    else
      for (const char byte : bytes) out += fmt::format("\\x{:02x}", static_cast<unsigned char>(byte));
    message.remove_prefix(c.bytes);
  }
  return out;
}

}  // namespace text
