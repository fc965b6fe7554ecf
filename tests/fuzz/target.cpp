// One of the functions of targets.hpp as a fuzzer: `tests/fuzz/run` compiles this with -DFUZZ_TARGET=NAME; or that of
// cache_target.hpp, with -DFUZZ_CACHES.

#include <cstddef>
#include <cstdint>

#if defined(FUZZ_CACHES)
#include "cache_target.hpp"
#define FUZZ_TARGET cache_target
#else
#include "targets.hpp"
#endif

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::FUZZ_TARGET(std::as_bytes(std::span(data, size)));
  return 0;
}
