// Infinities mean something here.
// flags: -ffast-math
// expect: lse is -inf where nothing is visible; compile without -ffast-math and -ffinite-math-only, in a file of its own to which only plain pointers cross

#include <sinkcache/sinkcache.hpp>
