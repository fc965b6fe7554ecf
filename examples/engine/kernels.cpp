#include "kernels.hpp"

EXAMPLES_KERNELS()
