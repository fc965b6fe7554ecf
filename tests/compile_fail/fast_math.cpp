// Infinities mean something here.
// flags: -ffast-math
// expect: lse is -inf where nothing is visible; compile without -ffast-math and -ffinite-math-only
// expect: compiles our caller without, as a file of its own to which plain pointers cross

#include <sinkcache/sinkcache.hpp>
