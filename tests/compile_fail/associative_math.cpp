// Rounding is relied on. clang has no macro that tells.
// flags: -ffast-math -fno-finite-math-only
// not for: clang
// expect: exp relies on how sums round; compile without -ffast-math and -fassociative-math, in a file of its own to which only plain pointers cross

#include <sinkcache/sinkcache.hpp>
