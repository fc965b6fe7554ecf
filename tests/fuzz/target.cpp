// One of the functions of targets.hpp as a fuzzer: `tests/fuzz/run` compiles this with -DFUZZ_TARGET=NAME.

#include <cstddef>
#include <cstdint>

#include "targets.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::FUZZ_TARGET(std::as_bytes(std::span(data, size)));
  return 0;
}
