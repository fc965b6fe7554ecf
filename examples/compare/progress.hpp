#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace compare {

// A bar and the time left on stderr, on a terminal only. It has no colours, so NO_COLOR has nothing to forbid.
class progress_bar {
 public:
  explicit progress_bar(std::ptrdiff_t steps) : steps_(steps), shown_(is_terminal()) {}
  progress_bar(const progress_bar&) = delete;
  progress_bar& operator=(const progress_bar&) = delete;
  ~progress_bar() { clear(); }

  // From any thread.
  void step(std::ptrdiff_t steps = 1) {
    if (!shown_) return;
    const std::scoped_lock lock(mutex_);
    done_ += steps;
    const auto now = std::chrono::steady_clock::now();
    if (now - last_drawn_ < std::chrono::milliseconds(100)) return;
    last_drawn_ = now;
    drawn_ = true;
    const std::ptrdiff_t done = std::min(done_, steps_);  // what a step is may have been an estimate
    const std::string bar(static_cast<std::size_t>(width * done / steps_), '#');
    const double seconds = std::chrono::duration<double>(now - start_).count();
    fmt::print(stderr, "\r[{:<{}}] {:3}% {:>{}}", bar, width, 100 * done / steps_,
               time_left(seconds * static_cast<double>(steps_ - done) / static_cast<double>(done)), time_width);
    std::fflush(stderr);
  }

  // A line that stays, on a terminal or not.
  void say(const std::string& line) {
    const std::scoped_lock lock(mutex_);
    clear();
    fmt::print(stderr, "{}\n", line);
  }

 private:
  static constexpr int width = 54, time_width = 14;

  static std::string time_left(double seconds) {
    if (seconds < 100) return fmt::format("{:.0f} s left", seconds);
    return fmt::format("{:.0f} min left", seconds / 60);
  }

  void clear() {
    if (drawn_) fmt::print(stderr, "\r{:{}}\r", "", width + 8 + time_width);
    drawn_ = false;
  }

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
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now(), last_drawn_ = start_;
  std::mutex mutex_;
};

}  // namespace compare
