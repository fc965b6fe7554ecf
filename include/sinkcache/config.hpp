#pragma once

// Integer types, the checks that are always on, and the one place where the library gives up.

#include <fmt/core.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "version.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

using index_t = std::ptrdiff_t;   // sizes, counts, rows, columns
using position_t = std::int64_t;  // true index of a token in its stream

inline constexpr position_t max_position = position_t{1} << 62;  // streams and first positions end here
inline constexpr index_t max_head_dim = 512;

// What a failed check does with its message. Define it before the first include, in every file alike, to route
// errors elsewhere; it must not return.
#ifndef SINKCACHE_FAIL
#if defined(__cpp_exceptions)
#define SINKCACHE_FAIL(message) throw std::invalid_argument(message)
#else
#define SINKCACHE_FAIL(message) (std::fprintf(stderr, "%s\n", (message).c_str()), std::abort())
#endif
#endif

namespace detail {

[[noreturn, gnu::cold, gnu::noinline]] inline void fail(const std::string& message) {
  SINKCACHE_FAIL("sinkcache: " + message);
}

template <class T>
[[noreturn, gnu::cold, gnu::noinline]] void fail_check(const char* argument, const T& value, const char* had_to_be) {
  fail(fmt::format("{} was {}, had to be {}", argument, value, had_to_be));
}

template <class T, class U>
[[noreturn, gnu::cold, gnu::noinline]] void fail_check(const char* argument, const T& value, const char* had_to_be,
                                                       const U& bound) {
  fail(fmt::format("{} was {}, had to be {} {}", argument, value, had_to_be, bound));
}

// "`argument` was `value`, had to be `had_to_be`[ `bound`]"
template <class T, class... Bound>
constexpr void check(bool holds, const char* argument, const T& value, const char* had_to_be, const Bound&... bound) {
  if (!holds) [[unlikely]]
    fail_check(argument, value, had_to_be, bound...);
}

// Sizes of memory, each product checked.
inline index_t checked_product(const char* what, index_t a, index_t b) {
  index_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) fail(fmt::format("{} was {} * {}, had to fit 63 bits", what, a, b));
  return product;
}

inline index_t checked_sum(const char* what, index_t a, index_t b) {
  index_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) fail(fmt::format("{} was {} + {}, had to fit 63 bits", what, a, b));
  return sum;
}

constexpr index_t round_up(index_t n, index_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace detail
}  // namespace sinkcache::inline SINKCACHE_TAG
