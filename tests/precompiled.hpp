#pragma once

// What every test file would compile for itself, once: headers, and the kernels of the library's formats.

#include <sinkcache/sinkcache.hpp>

#include "catch.hpp"
#include "oracle.hpp"

#define SINKCACHE_TEST_KERNEL(linkage, F)                                                                        \
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
#define SINKCACHE_TEST_INTEGERS(linkage, Bits)                                                                      \
  linkage template void sinkcache::detail::integer_dots<Bits>(const float*, sinkcache::index_t, sinkcache::index_t, \
                                                              sinkcache::tile_rows, sinkcache::index_t,             \
                                                              sinkcache::tile_rows, float*) noexcept;               \
  linkage template void sinkcache::detail::integer_add<Bits>(                                                       \
      const float*, sinkcache::index_t, sinkcache::tile_rows, sinkcache::index_t, sinkcache::index_t,               \
      sinkcache::index_t, const sinkcache::detail::running_states&, sinkcache::tile_rows) noexcept;
#else
#define SINKCACHE_TEST_INTEGERS(linkage, Bits)
#endif
#define SINKCACHE_TEST_KERNELS(linkage) \
  SINKCACHE_TEST_KERNEL(linkage, f32)   \
  SINKCACHE_TEST_KERNEL(linkage, f16)   \
  SINKCACHE_TEST_KERNEL(linkage, bf16)  \
  SINKCACHE_TEST_INTEGERS(linkage, 8)   \
  SINKCACHE_TEST_INTEGERS(linkage, 6)   \
  SINKCACHE_TEST_INTEGERS(linkage, 4)   \
  SINKCACHE_TEST_INTEGERS(linkage, 2)

SINKCACHE_TEST_KERNELS(extern)
