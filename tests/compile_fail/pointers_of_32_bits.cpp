// Sizes would be cut off. The macro stands for -m32 and the like, whose headers are seldom there.
// flags: -U__SIZEOF_POINTER__ -D__SIZEOF_POINTER__=4
// expect: 32-bit targets are not supported

#include <sinkcache/version.hpp>
