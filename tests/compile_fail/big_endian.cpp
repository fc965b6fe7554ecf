// The halves of a pair of bf16 would swap. The macro stands for s390x and the like.
// flags: -U__BYTE_ORDER__ -D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__
// expect: big-endian processors are not supported

#include <sinkcache/version.hpp>
