// A host whose platform defines macros by names that the library uses, after the standard headers, which do not survive
// all of them. They are as they were after the library's headers.

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <charconv>
#include <concepts>
#include <functional>
#include <limits>
#include <memory>
#include <memory_resource>
#include <new>
#include <numbers>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

// Unreal Engine, Apple's AssertMacros.h
#define check(assertion) assertion is checked
#define verify(assertion) assertion is verified
#define require(assertion, label) assertion is required
#define require_noerr(code, label) code is required
#define PI 3.14f
// windows.h
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define near
#define far
#define small char
#define IN
#define OUT
#define interface struct
#define ERROR 0
// Xlib.h
#define None 0L
#define Bool int
#define Status int
#define True 1
#define False 0
#define Always 2
#define Success 0
#define Complex 0
// Qt
#define signals public
#define slots
#define emit
#define foreach(a, b) for (a : b)
#define forever for (;;)
// complex.h, sysmacros.h, tests, other engines
#define I imaginary
#define major(x) x
#define minor(x) x
#define CHECK(x) x is checked
#define FAIL() failed
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define UNUSED(x) (void)(x)
#define CACHE_LINE_SIZE 64
#define likely(x) __builtin_expect(x, 1)
#define unlikely(x) __builtin_expect(x, 0)
#define always_inline inline __attribute__((__always_inline__))
#define noinline __attribute__((__noinline__))
#define cold __attribute__((__cold__))

#include <sinkcache/fmt.hpp>
#include <sinkcache/sinkcache.hpp>

#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...) TEXT_OF(__VA_ARGS__)

static_assert(std::string_view(TEXT(check(x), require(x, y), I)) == "x is checked, x is required, imaginary");
static_assert(min(2, 1) == 1 && max(2, 1) == 2);
static_assert(std::string_view(TEXT(cold)) == "__attribute__((__cold__))");
noinline static int one() { return 1; }

int main() {
  sinkcache::kv_cache<sinkcache::f16> cache(
      {.num_kv_heads = 1, .head_dim = 8, .window = 3, .rope = sinkcache::rope::none()});
  const sinkcache::matrix row = sinkcache::matrix::Constant(1, 8, 0.5f);
  sinkcache::matrix out(1, 8);
  sinkcache::workspace workspace;
  cache.append(row, row);
  sinkcache::attention({.num_qo_heads = one()}).decode(row, cache, out, workspace);
  return out.isConstant(0.5f) ? 0 : 1;
}
