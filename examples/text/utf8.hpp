#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace text {

// What bytes that are no UTF-8 become: as many of them at once as began a character (the maximal subpart of the Unicode
// standard, section 3.9), as in Python's errors="replace", Rust's from_utf8_lossy and web browsers.
inline constexpr char32_t replacement_character = 0xfffd;

struct decoded {
  char32_t code_point;
  std::size_t bytes;
  bool is_cut;  // the text ends before the character does
};

// The first character of a text that has at least one byte.
decoded first_character(std::string_view text);

// Turns bytes that come in pieces into whole characters: what a stream of tokens needs, as a token may be part of one.
class utf8_stream {
 public:
  std::string push(std::string_view bytes);
  std::string finish();  // what never became a whole character

 private:
  std::string rest_;  // at most three bytes
};

// `bytes`, if they are UTF-8.
std::string valid_utf8(std::string_view bytes);

// Valid UTF-8 less what would control a terminal, whoever wrote it: C0 but for newline and tab, DEL, C1, and what
// changes the direction of the text that follows.
std::string without_controls(std::string_view valid);

// A message, which may quote an argument or the name of a file: the same written out, \x9b for each byte, and bytes
// that are no UTF-8 too.
std::string harmless(std::string_view message);

}  // namespace text
