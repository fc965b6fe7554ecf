#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

namespace compare {

// All of compare_policies: what a main of it returns. Policies that were registered are among those it knows, and in
// the table where the command line names none.
int compare_policies(int argc, const char* const* argv);

}  // namespace compare
