#include "precompiled.hpp"

#if !defined(SINKCACHE_TEST_PCH_OBJECT)
SINKCACHE_TEST_KERNELS()
#endif
