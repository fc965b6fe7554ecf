#include "terminal.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../text/utf8.hpp"

namespace chat {
namespace {

// What the handlers touch. A signal also puts a byte into a pipe, so that poll sees one that came just before it.
volatile std::sig_atomic_t end_asked = 0, stop_asked = 0;
std::array<int, 2> wake = {-1, -1};

extern "C" void on_signal(int signal) {
  const int error = errno;
  (signal == SIGTSTP ? stop_asked : end_asked) = 1;
  [[maybe_unused]] const auto written = ::write(wake[1], "", 1);  // a full pipe wakes too
  errno = error;
}

// What whoever started us wants ignored, as nohup does, stays so.
void handle(int signal, void (*handler)(int)) {
  struct sigaction action {};
  sigaction(signal, nullptr, &action);
  if (action.sa_handler == SIG_IGN) return;
  action = {};
  action.sa_handler = handler;
  sigaction(signal, &action, nullptr);
}

constexpr std::array ending_signals = {SIGINT, SIGTERM, SIGHUP};

bool is_terminal(int fd) {
  const char* const term = std::getenv("TERM");
  return isatty(fd) == 1 && term != nullptr && std::string_view(term) != "dumb";
}

std::runtime_error failure(const char* what) {
  return std::runtime_error(fmt::format("{}: {}", what, std::strerror(errno)));
}

// Whatever was asked meanwhile.
void write_now(int fd, std::string_view text) {
  [[maybe_unused]] const auto written = ::write(fd, text.data(), text.size());
}

}  // namespace

terminal::terminal()
    : input_is_terminal_(is_terminal(0)), output_is_terminal_(is_terminal(1)), has_status_(is_terminal(2)) {
  // A descriptor that is closed would be the next file's that is opened.
  for (const int fd : {0, 1, 2})
    if (fcntl(fd, F_GETFD) < 0) throw std::runtime_error("stdin, stdout and stderr have to be open");
  if (pipe(wake.data()) != 0) throw failure("a pipe cannot be made");
  for (const int fd : wake) {
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, O_NONBLOCK);
  }
  for (const int signal : ending_signals) handle(signal, on_signal);
  if (has_status_) handle(SIGTSTP, on_signal);
  handle(SIGPIPE, SIG_IGN);
}

terminal::~terminal() {
  end_status();
  if (output_is_terminal_ && column_ > 0) write_now(1, "\n");
  for (const int signal : ending_signals) handle(signal, SIG_DFL);
  if (has_status_) handle(SIGTSTP, SIG_DFL);
  for (const int fd : wake) ::close(fd);
}

bool terminal::interrupted() {
  std::array<char, 64> bytes;
  while (::read(wake[0], bytes.data(), bytes.size()) > 0) continue;
  if (stop_asked != 0) {
    stop_asked = 0;
    suspend();
  }
  return end_asked != 0;
}

// Ctrl-Z: the shell gets its last row back meanwhile.
void terminal::suspend() {
  end_status();
  handle(SIGTSTP, SIG_DFL);
  raise(SIGTSTP);
  handle(SIGTSTP, on_signal);
}

// Never blocks for long: what can be written at once after poll is at least PIPE_BUF bytes.
bool terminal::put(int fd, std::string_view text) {
  while (!text.empty()) {
    if (interrupted()) return false;
    std::array<pollfd, 2> fds = {pollfd{fd, POLLOUT, 0}, pollfd{wake[0], POLLIN, 0}};
    if (poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) throw failure("the output cannot be written");
    if (interrupted()) return false;
    if (fds[0].revents == 0) continue;
    const ssize_t written = ::write(fd, text.data(), std::min<std::size_t>(text.size(), PIPE_BUF));
    if (written >= 0)
      text.remove_prefix(static_cast<std::size_t>(written));
    else if (errno == EPIPE)
      return false;
    else if (errno != EINTR && errno != EAGAIN)
      throw failure("the output cannot be written");
  }
  return true;
}

bool terminal::write(std::string_view text) {
  if (!output_is_terminal_) return put(1, text);
  const std::string shown = text::without_controls(text);
  for (const char c : shown) {
    if (c == '\n')
      column_ = 0;
    else if ((c & 0xc0) != 0x80)  // else it goes on with a character
      ++column_;
  }
  return put(1, shown);
}

std::optional<std::string> terminal::read_line(std::string_view prompt) {
  constexpr std::size_t longest = 1 << 20;
  if (input_is_terminal_ && output_is_terminal_ && !write(prompt)) return {};
  for (;;) {
    if (const std::size_t end = input_.find('\n'); end != std::string::npos || (input_ended_ && !input_.empty())) {
      std::string line = input_.substr(0, end);
      input_.erase(0, end == std::string::npos ? end : end + 1);
      if (line.ends_with('\r')) line.pop_back();
      if (input_is_terminal_) column_ = 0;  // the terminal has shown the newline
      return line;
    }
    if (input_ended_) return {};
    if (input_.size() > longest)
      throw std::runtime_error(
          fmt::format("a line of the input has more than {} bytes, the most it may have", longest));
    std::array<pollfd, 2> fds = {pollfd{0, POLLIN, 0}, pollfd{wake[0], POLLIN, 0}};
    if (poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) throw failure("the input cannot be read");
    if (interrupted()) return {};
    if (fds[0].revents == 0) continue;
    std::array<char, 4096> bytes;
    const ssize_t got = ::read(0, bytes.data(), bytes.size());
    if (got > 0)
      input_.append(bytes.data(), static_cast<std::size_t>(got));
    else if (got == 0)
      input_ended_ = true;
    else if (errno != EINTR && errno != EAGAIN)
      throw failure("the input cannot be read");
  }
}

// Text scrolls above the last row from now on; where the cursor stands on it, all is moved up by one first.
void terminal::take_row(int rows) {
  put(2, fmt::format("\x1b"
                     "D\x1b[A\x1b"
                     "7\x1b[1;{}r\x1b"
                     "8",
                     rows - 1));
  rows_ = rows;
}

void terminal::show_status(const std::string& text) {
  winsize size{};
  if (!has_status_ || ioctl(2, TIOCGWINSZ, &size) != 0 || size.ws_row < 3 || size.ws_col < 2) return;
  const std::string shown = text.substr(0, size.ws_col - 1u);
  if (!output_is_terminal_) {
    put(2, fmt::format("\r{}\x1b[K", shown));
    rows_ = size.ws_row;
    return;
  }
  // Where a row has just been filled, some terminals forget that the next character begins another.
  if (column_ > 0 && column_ % size.ws_col == 0) return;
  if (rows_ != size.ws_row) take_row(size.ws_row);
  put(2, fmt::format("\x1b"
                     "7\x1b[{};1H\x1b[7m{}\x1b[0m\x1b[K\x1b"
                     "8",
                     rows_, shown));
}

void terminal::end_status() {
  if (rows_ == 0) return;
  const std::string end = output_is_terminal_ ? fmt::format(
                                                    "\x1b"
                                                    "7\x1b[r\x1b[{};1H\x1b[K\x1b"
                                                    "8",
                                                    rows_)
                                              : "\r\x1b[K";
  write_now(2, end);
  rows_ = 0;
}

}  // namespace chat
