# Writes to ${TO} which commit the sources are of, "-dirty" where they differ from it; "unknown" outside a checkout. The
# directories are named, so that a checkout around an unpacked archive does not answer for it.
execute_process(
  COMMAND git "--git-dir=${SOURCES}/.git" "--work-tree=${SOURCES}" describe --always --dirty --exclude=* --abbrev=40
  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  set(commit unknown)
endif()
file(CONFIGURE OUTPUT "${TO}" @ONLY CONTENT [[
#include "compare/machine.hpp"

std::string compare::git_commit() { return "@commit@"; }
]])
