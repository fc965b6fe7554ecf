#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include <string>

namespace compare {

std::string cpu_name();
std::string compiler_name();
std::string git_commit();  // of the sources that this was built from: cmake/commit.cmake

}  // namespace compare
