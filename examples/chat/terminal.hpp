#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace chat {

// The program's three streams. On a terminal there is a status line on the last row, below the text; through a pipe
// there is nothing but text. One object at a time.
class terminal {
 public:
  // From here on Ctrl-C, SIGTERM and SIGHUP only make interrupted() true, and end what waits.
  terminal();
  terminal(const terminal&) = delete;
  terminal& operator=(const terminal&) = delete;
  ~terminal();  // leaves all as it was

  bool interrupted();

  // False when interrupted, or where nobody reads any more. Throws if the text cannot be written for another reason.
  bool write(std::string_view text);

  // A line of stdin without its end; nothing after the last one, or when interrupted. Only people see the prompt.
  std::optional<std::string> read_line(std::string_view prompt);

  void show_status(const std::string& text);
  void end_status();
  bool has_status() const { return has_status_; }

 private:
  bool put(int fd, std::string_view text);
  void take_row(int rows);
  void suspend();

  bool input_is_terminal_, output_is_terminal_, has_status_;
  int rows_ = 0;    // of the terminal whose last row is taken; 0: none is
  int column_ = 0;  // of the text, as if a line had no end and every character the same width
  std::string input_;
  bool input_ended_ = false;
};

}  // namespace chat
