// The executor has to outlive the workspace.
// expect: sequential

#include <sinkcache/workspace.hpp>

sinkcache::workspace workspace(sinkcache::sequential{});
