#pragma once

// Numbers as text: decimal, whatever the program's locale.

#include <charconv>
#include <string_view>
#include <system_error>
#include <type_traits>

#include "../version.hpp"
#if !defined(__cpp_lib_to_chars)
#include <algorithm>
#include <clocale>
#include <cmath>
#include <cstdlib>
#endif

#include "macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// Whether all of the text is such a number, which is in `value` then.
template <class T>
bool read_decimal(std::string_view text, T& value) noexcept {
#if !defined(__cpp_lib_to_chars)
  // libc++ before 20 has from_chars of integers alone.
  if constexpr (std::is_floating_point_v<T>) {
    char copy[64] = {};
    if (text.empty() || text.size() >= sizeof copy || text.front() == '+' ||
        text.find_first_not_of("0123456789.eE+-") != text.npos)
      return false;
    std::replace_copy(text.begin(), text.end(), copy, '.', *std::localeconv()->decimal_point);
    char* end = copy;
    value = static_cast<T>(std::strtod(copy, &end));
    return end == copy + text.size() && std::isfinite(value);
  } else
#endif
  {
    const char* const last = text.data() + text.size();
    const std::from_chars_result parsed = std::from_chars(text.data(), last, value);
    return parsed.ec == std::errc() && parsed.ptr == last && !text.empty();
  }
}

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
