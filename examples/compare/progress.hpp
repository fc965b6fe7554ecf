#pragma once

#include <fmt/core.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace compare {

// A bar on stderr, on a terminal only. It has no colours, so NO_COLOR has nothing to forbid.
class progress_bar {
 public:
  explicit progress_bar(std::ptrdiff_t steps) : steps_(steps), shown_(is_terminal()) {}
  progress_bar(const progress_bar&) = delete;
  progress_bar& operator=(const progress_bar&) = delete;
  ~progress_bar() {
    if (drawn_) fmt::print(stderr, "\r{:{}}\r", "", width + 7);
  }

  // From any thread.
  void step() {
    if (!shown_) return;
    const std::scoped_lock lock(mutex_);
    ++done_;
    const auto now = std::chrono::steady_clock::now();
    if (now - last_drawn_ < std::chrono::milliseconds(100)) return;
    last_drawn_ = now;
    drawn_ = true;
    const std::string bar(static_cast<std::size_t>(width * done_ / steps_), '#');
    fmt::print(stderr, "\r[{:<{}}] {:3}%", bar, width, 100 * done_ / steps_);
    std::fflush(stderr);
  }

 private:
  static constexpr int width = 60;

  static bool is_terminal() {
#if defined(__unix__) || defined(__APPLE__)
    const char* const term = std::getenv("TERM");
    return isatty(2) == 1 && term && std::string(term) != "dumb";
#else
    return false;
#endif
  }

  std::ptrdiff_t steps_, done_ = 0;
  bool shown_, drawn_ = false;
  std::chrono::steady_clock::time_point last_drawn_ = std::chrono::steady_clock::now();
  std::mutex mutex_;
};

}  // namespace compare
