#pragma once

// Numbers as people write them: decimal, nothing before or after. What strtol and strtod take besides (010 as 8, 0x10,
// " 1", nan) is refused.

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>
#include <system_error>

namespace loaders {

template <class Integer>
std::optional<Integer> whole_number(const std::string& text, Integer min, Integer max) {
  Integer value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < min || value > max) return {};
  return value;
}

inline std::optional<double> decimal_number(const std::string& text, double min, double max) {
  const std::size_t first = text.starts_with('-') ? 1 : 0;
  if (text.find_first_not_of("0123456789.eE+-") != std::string::npos || text.size() == first || text[first] < '0' ||
      text[first] > '9')
    return {};
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (end != text.data() + text.size() || !std::isfinite(value) || value < min || value > max) return {};
  return value;
}

}  // namespace loaders
