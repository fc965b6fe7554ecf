// Rounding is relied on. clang has no macro that tells.
// flags: -ffast-math -fno-finite-math-only
// not for: clang
// expect: exp relies on how sums round; compile without -ffast-math and -fassociative-math

#include <sinkcache/sinkcache.hpp>
