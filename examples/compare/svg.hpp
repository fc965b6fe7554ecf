#pragma once

#include <string>

#include "report.hpp"

namespace compare {

// The loss along the stream, a line a policy.
std::string to_svg(const setting&, const comparison&);

}  // namespace compare
