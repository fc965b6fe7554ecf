#pragma once

// The kernels of the library's formats are compiled in kernels.cpp, for all files of the examples and tests that
// include this: nothing else in them takes as long. Your own program has no need of it.

#include <sinkcache/sinkcache.hpp>

#define EXAMPLES_KERNEL(linkage, F)                                                                              \
  linkage template void sinkcache::detail::group_dots<sinkcache::F>(                                             \
      const float*, sinkcache::index_t, sinkcache::index_t, sinkcache::tile_rows, sinkcache::index_t,            \
      sinkcache::tile_rows, float*) noexcept;                                                                    \
  linkage template void sinkcache::detail::group_add<sinkcache::F>(                                              \
      const float*, sinkcache::index_t, sinkcache::tile_rows, sinkcache::index_t, sinkcache::index_t,            \
      sinkcache::index_t, const sinkcache::detail::running_states&, sinkcache::tile_rows) noexcept;              \
  linkage template void sinkcache::detail::rotated_group_dots<sinkcache::F>(                                     \
      const float*, sinkcache::index_t, sinkcache::index_t, const sinkcache::detail::key_rotations&,             \
      sinkcache::position_t, sinkcache::tile_rows, sinkcache::index_t, sinkcache::tile_rows, sinkcache::index_t, \
      float*) noexcept;
#if defined(SINKCACHE_INTEGER_KERNELS)
#define EXAMPLES_INTEGERS(linkage, Bits)                                                                            \
  linkage template void sinkcache::detail::integer_dots<Bits>(const float*, sinkcache::index_t, sinkcache::index_t, \
                                                              sinkcache::tile_rows, sinkcache::index_t,             \
                                                              sinkcache::tile_rows, float*) noexcept;               \
  linkage template void sinkcache::detail::integer_add<Bits>(                                                       \
      const float*, sinkcache::index_t, sinkcache::tile_rows, sinkcache::index_t, sinkcache::index_t,               \
      sinkcache::index_t, const sinkcache::detail::running_states&, sinkcache::tile_rows) noexcept;
#else
#define EXAMPLES_INTEGERS(linkage, Bits)
#endif
#define EXAMPLES_KERNELS(linkage) \
  EXAMPLES_KERNEL(linkage, f32)   \
  EXAMPLES_KERNEL(linkage, f16)   \
  EXAMPLES_KERNEL(linkage, bf16)  \
  EXAMPLES_INTEGERS(linkage, 8)   \
  EXAMPLES_INTEGERS(linkage, 6)   \
  EXAMPLES_INTEGERS(linkage, 4)   \
  EXAMPLES_INTEGERS(linkage, 2)

EXAMPLES_KERNELS(extern)
