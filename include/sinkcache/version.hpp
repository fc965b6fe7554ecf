#pragma once

// The version, and the inline namespace that keeps differently compiled files apart: its name holds the version, the
// instruction set and whether exceptions are on, so the linker never joins two of our inline functions that differ.

#define SINKCACHE_VERSION_MAJOR 0
#define SINKCACHE_VERSION_MINOR 1
#define SINKCACHE_VERSION_PATCH 0

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "sinkcache: lse is -inf where nothing is visible; compile without -ffast-math, or add -fno-finite-math-only"
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define SINKCACHE_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SINKCACHE_ISA avx2
#elif defined(__AVX__)
#define SINKCACHE_ISA avx
#elif defined(__SSE4_1__)
#define SINKCACHE_ISA sse4
#elif defined(__SSE2__)
#define SINKCACHE_ISA sse2
#elif defined(__ARM_NEON)
#define SINKCACHE_ISA neon
#else
#define SINKCACHE_ISA portable
#endif

#if defined(__cpp_exceptions)
#define SINKCACHE_EXCEPTIONS throws
#else
#define SINKCACHE_EXCEPTIONS aborts
#endif

#define SINKCACHE_JOIN_(major, minor, patch, isa, exceptions) v##major##_##minor##_##patch##_##isa##_##exceptions
#define SINKCACHE_JOIN(major, minor, patch, isa, exceptions) SINKCACHE_JOIN_(major, minor, patch, isa, exceptions)
#define SINKCACHE_TAG                                                                                      \
  SINKCACHE_JOIN(SINKCACHE_VERSION_MAJOR, SINKCACHE_VERSION_MINOR, SINKCACHE_VERSION_PATCH, SINKCACHE_ISA, \
                 SINKCACHE_EXCEPTIONS)
#define SINKCACHE_STRING_(text) #text
#define SINKCACHE_STRING(text) SINKCACHE_STRING_(text)

namespace sinkcache::inline SINKCACHE_TAG {

// The instruction set that the including file was compiled for: "avx512", "avx2", "neon", "sse2", ...
constexpr const char* isa() noexcept { return SINKCACHE_STRING(SINKCACHE_ISA); }

}  // namespace sinkcache::inline SINKCACHE_TAG
