#pragma once

// What a check found, the one place where the library gives up, and integer types.
//
// A rule is written once, as a line that adds to a status. Functions throw what it found, or abort where exceptions are
// off; functions named try_... return it, after having changed nothing.

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "detail/macros_off.hpp"
#include "version.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

using index_t = std::ptrdiff_t;   // sizes, counts, rows, columns
using position_t = std::int64_t;  // true index of a token in its stream

// Positions [first, last), counted from the start of the stream.
struct position_span {
  position_t first = 0, last = 0;

  constexpr index_t size() const { return static_cast<index_t>(last - first); }
  constexpr bool operator==(const position_span&) const = default;
};

inline constexpr position_t max_position = position_t{1} << 62;  // streams and first positions end here
inline constexpr index_t max_head_dim = 576;

namespace detail {

// The count of tokens up to a query, itself included. A query before every stream counts as -1, one after all as last.
constexpr position_t seen_by(position_t query) { return std::clamp<position_t>(query, -1, max_position - 1) + 1; }

}  // namespace detail

// What a failed check does with its message. Define it before the first include, in every file alike, to route
// errors elsewhere; it must not return.
#ifndef SINKCACHE_FAIL
#if defined(__cpp_exceptions)
#define SINKCACHE_FAIL(message) throw std::invalid_argument(message)
#else
#define SINKCACHE_FAIL(message) (std::fprintf(stderr, "%s\n", (message).c_str()), std::abort())
#endif
#endif

// What a check found: nothing, or the first rule that was broken. The message lies inside: copies allocate nothing, and
// nothing but its length is touched where all is well.
class [[nodiscard]] status {
 public:
  status() noexcept {}  // NOLINT(modernize-use-equals-default): that would clear the text
  status(const status& other) noexcept { *this = other; }
  status& operator=(const status& other) noexcept {
    length_ = other.length_;
    lacks_memory_ = other.lacks_memory_;
    if (!ok() && this != &other) std::memcpy(text_, other.text_, length_ + 1);
    return *this;
  }

  bool ok() const noexcept { return length_ == 0; }
  // Whether no rule was broken but memory was missing: the same call may succeed later.
  bool lacks_memory() const noexcept { return lacks_memory_; }
  explicit operator bool() const noexcept { return ok(); }

  // What an exception says: "sinkcache: window was 0, had to be at least 1". Empty if ok.
  std::string_view message() const noexcept { return {c_str(), length_}; }
  const char* c_str() const noexcept { return ok() ? "" : text_; }

  // Throws the message as a std::invalid_argument, or does what SINKCACHE_FAIL says.
  void or_fail() const {
    if (!ok()) [[unlikely]]
      fail();
  }

  // Unless a rule was broken before: "`argument` was `value`, had to be `had_to_be`[ `bound`]".
  template <class T, class... Bound>
  void require(bool holds, const char* argument, T value, const char* had_to_be, Bound... bound) noexcept {
    if (!holds) [[unlikely]]
      refuse(sizeof...(bound) == 0 ? "{} was {}, had to be {}" : "{} was {}, had to be {} {}", argument, value,
             had_to_be, bound...);
  }

  // The same in any words, with a value for each "{}": a number, or text. What is too long is cut off.
  template <class... T>
  [[gnu::cold, gnu::noinline]] void refuse(const char* words, T... values) noexcept {
    if (!ok()) return;
    add("sinkcache: ");
    std::string_view rest = words;
    ((add_to_placeholder(rest), add(values)), ...);
    add(rest);
  }

  // The same where memory is missing.
  template <class... T>
  void refuse_memory(const char* words, T... values) noexcept {
    lacks_memory_ = lacks_memory_ || ok();
    refuse(words, values...);
  }

 private:
  static constexpr std::size_t max_length = 239;

  [[noreturn, gnu::cold, gnu::noinline]] void fail() const { SINKCACHE_FAIL(std::string(message())); }

  void add(std::string_view text) noexcept {
    length_ += text.copy(text_ + length_, max_length - length_);
    text_[length_] = '\0';
  }

  // The fewest digits that give the number again; with an exponent below 1e-4 and from 1e16 on.
  template <class T>
  requires std::is_arithmetic_v<T>
  [[gnu::cold, gnu::noinline]] void add(T number) noexcept {
    char digits[32];
    std::to_chars_result to{};
    if constexpr (std::is_floating_point_v<T>) {
      const T size = number < 0 ? -number : number;
      const bool plain = size == 0 || (size >= T(1e-4) && size < T(1e16));
      to = std::to_chars(digits, std::end(digits), number,
                         plain ? std::chars_format::fixed : std::chars_format::scientific);
    } else {
      to = std::to_chars(digits, std::end(digits), number);
    }
    add(std::string_view(digits, static_cast<std::size_t>(to.ptr - digits)));
  }

  // What comes before the next "{}", which is dropped with it.
  void add_to_placeholder(std::string_view& words) noexcept {
    const std::size_t at = words.find("{}");
    add(words.substr(0, at));
    words.remove_prefix(at == std::string_view::npos ? words.size() : at + 2);
  }

  std::size_t length_ = 0;
  bool lacks_memory_ = false;
  char text_[max_length + 1];  // with a 0 after it
};

namespace detail {

template <class... T>
[[gnu::cold, gnu::noinline]] void fail_check(T... broken) {
  status found;
  found.require(false, broken...);
  found.or_fail();
}

// One rule by itself, for code that throws at once.
template <class T, class... Bound>
constexpr void check(bool holds, const char* argument, T value, const char* had_to_be, Bound... bound) {
  if (!holds) [[unlikely]]
    fail_check(argument, value, had_to_be, bound...);
}

// A user-defined source that breaks the contract inside a noexcept call: no status could be returned.
[[noreturn, gnu::cold, gnu::noinline]] inline void broken_source(const char* how) noexcept {
  std::fprintf(stderr, "sinkcache: %s\n", how);
  std::abort();
}

// Sizes of memory, each product and sum checked. What does not fit is 0.
inline index_t checked_product(status& found, const char* what, index_t a, index_t b) noexcept {
  index_t product = 0;
  if (!__builtin_mul_overflow(a, b, &product)) return product;
  found.refuse("{} was {} * {}, had to fit 63 bits", what, a, b);
  return 0;
}
inline index_t checked_sum(status& found, const char* what, index_t a, index_t b) noexcept {
  index_t sum = 0;
  if (!__builtin_add_overflow(a, b, &sum)) return sum;
  found.refuse("{} was {} + {}, had to fit 63 bits", what, a, b);
  return 0;
}

// What `make` makes; or nothing, and in `found` why: what it says already, or that there was no memory.
template <class Make>
auto created(status& found, [[maybe_unused]] const char* what, const Make& make) noexcept
    -> std::optional<decltype(make())> {
  if (!found) return std::nullopt;
#if defined(__cpp_exceptions)
  try {
    return make();
  } catch (...) {
    found.refuse_memory("there was no memory for {}", what);
    return std::nullopt;
  }
#else
  return make();
#endif
}

// To a multiple of a power of two.
constexpr index_t round_up(index_t n, index_t multiple) { return (n + multiple - 1) & -multiple; }

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
