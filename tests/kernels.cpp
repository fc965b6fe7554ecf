#include "precompiled.hpp"

SINKCACHE_TEST_KERNELS()
