#pragma once

#include <functional>
#include <string>

#include "jobs.hpp"

namespace evidence {

// The page in Markdown, from what `keep` kept of each job of the plan. `command` is what made it.
std::string report(const setting&, const std::string& command, const std::function<const json&(const job&)>& kept);

}  // namespace evidence
