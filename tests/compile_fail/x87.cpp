// Floats that are kept in 80 bits do not round where exp relies on it. The macro stands for -mfpmath=387.
// flags: -U__FLT_EVAL_METHOD__ -D__FLT_EVAL_METHOD__=2
// expect: compile without -mfpmath=387

#include <sinkcache/version.hpp>
