// Rounding is relied on. clang has no macro that tells.
// flags: -ffast-math -fno-finite-math-only
// not for: clang
// expect: exp relies on how sums round; compile without -ffast-math and -fassociative-math
// expect: compiles our caller without, as a file of its own to which plain pointers cross

#include <sinkcache/sinkcache.hpp>
