#pragma once

#include <functional>
#include <string>

#include "jobs.hpp"

namespace evidence {

// The tables in Markdown, from what `keep` kept of each job of the plan. `command` is what made them.
std::string report(const setting&, const std::string& command, const std::function<const json&(const job&)>& kept);

// A page of the tables; what `old_page` says outside the lines <!-- `part` --> and <!-- end --> stays.
std::string page_with(const std::string& tables, const std::string& old_page, const std::string& part = "evidence");

}  // namespace evidence
