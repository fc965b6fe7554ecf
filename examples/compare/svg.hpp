#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include <string>

#include "report.hpp"

namespace compare {

// The loss along the stream, a line a policy.
std::string to_svg(const setting&, const comparison&);

// The loss of each policy against the bytes of its caches, one point a format.
std::string to_front_svg(const setting&, const comparison&);

std::string bytes_text(double bytes);  // 12.9 MB

}  // namespace compare
