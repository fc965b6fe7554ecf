#pragma once

// The version, and the inline namespace that keeps differently compiled files apart: its name holds the version, and in
// hexadecimal the instruction sets and whether exceptions and RTTI are on, so the linker never joins two of our
// functions that differ.

#define SINKCACHE_VERSION_MAJOR 0
#define SINKCACHE_VERSION_MINOR 1
#define SINKCACHE_VERSION_PATCH 0

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "sinkcache: lse is -inf where nothing is visible; compile without -ffast-math and -ffinite-math-only"
#error "sinkcache: a host that needs it compiles our caller without, as a file of its own to which plain pointers cross"
#endif
#if defined(__ASSOCIATIVE_MATH__)
#error "sinkcache: exp relies on how sums round; compile without -ffast-math and -fassociative-math"
#error "sinkcache: a host that needs it compiles our caller without, as a file of its own to which plain pointers cross"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "sinkcache: 16-bit floats are read in pairs, which would swap; big-endian processors are not supported"
#endif
#if defined(__SIZEOF_POINTER__) && __SIZEOF_POINTER__ < 8
#error "sinkcache: sizes and positions take 64 bits; 32-bit targets are not supported"
#endif
#if defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2)
#error "sinkcache: exp relies on floats that round to 24 bits; compile without -mfpmath=387"
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

// A Zen 5, whatever a compiler calls it: no other has AVX-512 and AVX-VNNI without FP16.
#if defined(__AVX512DQ__) && defined(__AVXVNNI__) && !defined(__AVX512FP16__)
#define SINKCACHE_ZEN5 1
#else
#define SINKCACHE_ZEN5 0
#endif

// Whether the processor takes 512 bits in two halves, which the kernel is arranged for then: a Zen 4, which g++ 12
// calls a Zen 3, as it does a Zen 5. Where the compiler does not tell, define it, for other files too.
#if !defined(__AVX512F__) || !defined(__AVX512DQ__)
#undef SINKCACHE_AVX512_IN_HALVES
#define SINKCACHE_AVX512_IN_HALVES 0
#elif !defined(SINKCACHE_AVX512_IN_HALVES)
#if (defined(__znver4__) || defined(__znver3__)) && !SINKCACHE_ZEN5
#define SINKCACHE_AVX512_IN_HALVES 1
#else
#define SINKCACHE_AVX512_IN_HALVES 0
#endif
#endif

#if defined(__cpp_exceptions)
#define SINKCACHE_THROWS 1
#else
#define SINKCACHE_THROWS 0
#endif

// 1 where the compiler predefines the macro as 1, else 0: only then is SINKCACHE_ONE_... a comma, which moves the 1.
#define SINKCACHE_ONE_1 0,
#define SINKCACHE_SECOND_(first, second, ...) second
#define SINKCACHE_SECOND(...) SINKCACHE_SECOND_(__VA_ARGS__)
#define SINKCACHE_BIT_(value) SINKCACHE_SECOND(SINKCACHE_ONE_##value 1, 0, 0)
#define SINKCACHE_BIT(macro) SINKCACHE_BIT_(macro)

// Four such macros as a hexadecimal digit.
#define SINKCACHE_HEX_0000 0
#define SINKCACHE_HEX_0001 1
#define SINKCACHE_HEX_0010 2
#define SINKCACHE_HEX_0011 3
#define SINKCACHE_HEX_0100 4
#define SINKCACHE_HEX_0101 5
#define SINKCACHE_HEX_0110 6
#define SINKCACHE_HEX_0111 7
#define SINKCACHE_HEX_1000 8
#define SINKCACHE_HEX_1001 9
#define SINKCACHE_HEX_1010 a
#define SINKCACHE_HEX_1011 b
#define SINKCACHE_HEX_1100 c
#define SINKCACHE_HEX_1101 d
#define SINKCACHE_HEX_1110 e
#define SINKCACHE_HEX_1111 f
#define SINKCACHE_HEX_OF_(a, b, c, d) SINKCACHE_HEX_##a##b##c##d
#define SINKCACHE_HEX_OF(a, b, c, d) SINKCACHE_HEX_OF_(a, b, c, d)
#define SINKCACHE_HEX(a, b, c, d) \
  SINKCACHE_HEX_OF(SINKCACHE_BIT(a), SINKCACHE_BIT(b), SINKCACHE_BIT(c), SINKCACHE_BIT(d))

// Every instruction set that a compiler may use in plain code, whether or not the library asks for it, RTTI, which
// changes what a vtable holds, exceptions, and how AVX-512 is used.
#define SINKCACHE_PASTE_(a, b, c, d, e, f, g, h, i) a##b##c##d##e##f##g##h##i
#define SINKCACHE_PASTE(...) SINKCACHE_PASTE_(__VA_ARGS__)
#if defined(__SSE2__)
#define SINKCACHE_SETS                                                                                  \
  SINKCACHE_PASTE(SINKCACHE_HEX(__SSE3__, __SSSE3__, __SSE4_1__, __SSE4_2__),                           \
                  SINKCACHE_HEX(__POPCNT__, __AVX__, __F16C__, __FMA__),                                \
                  SINKCACHE_HEX(__AVX2__, __BMI__, __BMI2__, __LZCNT__),                                \
                  SINKCACHE_HEX(__MOVBE__, __AVX512F__, __AVX512CD__, __AVX512BW__),                    \
                  SINKCACHE_HEX(__AVX512DQ__, __AVX512VL__, __AVX512VBMI__, __AVX512VBMI2__),           \
                  SINKCACHE_HEX(__AVX512IFMA__, __AVX512VNNI__, __AVX512BITALG__, __AVX512VPOPCNTDQ__), \
                  SINKCACHE_HEX(__AVXVNNI__, __GFNI__, __FMA4__, __XOP__),                              \
                  SINKCACHE_HEX(__TBM__, __AVX512FP16__, __APX_F__, __GXX_RTTI),                        \
                  SINKCACHE_HEX(0, 0, SINKCACHE_THROWS, SINKCACHE_AVX512_IN_HALVES))
#else
#define SINKCACHE_SETS                                                                                               \
  SINKCACHE_PASTE(                                                                                                   \
      SINKCACHE_HEX(__ARM_FEATURE_SVE, __ARM_FEATURE_SVE2, __ARM_FEATURE_DOTPROD, __ARM_FEATURE_MATMUL_INT8),        \
      SINKCACHE_HEX(__ARM_FEATURE_ATOMICS, __ARM_FEATURE_FP16_VECTOR_ARITHMETIC, __ARM_FEATURE_COMPLEX, __GXX_RTTI), \
      SINKCACHE_HEX(0, 0, SINKCACHE_THROWS, 0), , , , , , )
#endif

#define SINKCACHE_JOIN_(major, minor, patch, isa, sets) v##major##_##minor##_##patch##_##isa##_##sets
#define SINKCACHE_JOIN(...) SINKCACHE_JOIN_(__VA_ARGS__)
#define SINKCACHE_TAG                                                                                      \
  SINKCACHE_JOIN(SINKCACHE_VERSION_MAJOR, SINKCACHE_VERSION_MINOR, SINKCACHE_VERSION_PATCH, SINKCACHE_ISA, \
                 SINKCACHE_SETS)
#define SINKCACHE_STRING_(text) #text
#define SINKCACHE_STRING(text) SINKCACHE_STRING_(text)

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// The instruction set that the including file was compiled for: "avx512", "avx2", "neon", "sse2", ...
constexpr const char* isa() noexcept { return SINKCACHE_STRING(SINKCACHE_ISA); }

// The same, beside the best of these names that the processor has: where they differ, the file wants other flags.
struct instruction_sets {
  const char *file, *processor;
};
inline instruction_sets built_for() noexcept {
#if defined(__SSE2__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return {isa(), "avx512"};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {isa(), "avx2"};  // which all have F16C
  if (__builtin_cpu_supports("avx")) return {isa(), "avx"};
  return {isa(), __builtin_cpu_supports("sse4.1") ? "sse4" : "sse2"};
#else
  return {isa(), isa()};
#endif
}

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache
