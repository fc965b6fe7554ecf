// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "ranking.hpp"

namespace evidence {

std::string ranking_svg(const std::vector<setting>&, const std::vector<results>&) { return ""; }

}  // namespace evidence
