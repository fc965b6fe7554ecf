#pragma once

// What every test file would compile for itself, once: headers, and the kernel for each pair of the library's formats.

#include <sinkcache/sinkcache.hpp>

#include "catch.hpp"
#include "oracle.hpp"

#define SINKCACHE_TEST_KERNEL(linkage, K, V)                                             \
  linkage template void sinkcache::detail::absorb<sinkcache::K, sinkcache::V>(           \
      const sinkcache::segment&, const sinkcache::query_rows&, const sinkcache::extent*, \
      const sinkcache::detail::running_states&, const sinkcache::tile_scratch&) noexcept;
#define SINKCACHE_TEST_KERNELS(linkage)     \
  SINKCACHE_TEST_KERNEL(linkage, f32, f32)  \
  SINKCACHE_TEST_KERNEL(linkage, f32, f16)  \
  SINKCACHE_TEST_KERNEL(linkage, f32, bf16) \
  SINKCACHE_TEST_KERNEL(linkage, f16, f32)  \
  SINKCACHE_TEST_KERNEL(linkage, f16, f16)  \
  SINKCACHE_TEST_KERNEL(linkage, f16, bf16) \
  SINKCACHE_TEST_KERNEL(linkage, bf16, f32) \
  SINKCACHE_TEST_KERNEL(linkage, bf16, f16) \
  SINKCACHE_TEST_KERNEL(linkage, bf16, bf16)

SINKCACHE_TEST_KERNELS(extern)
