// Infinities mean something here.
// flags: -ffast-math
// expect: lse is -inf where nothing is visible; compile without -ffast-math and -ffinite-math-only

#include <sinkcache/sinkcache.hpp>
