/* Any bytes as a GGUF file. From the repository's root, with clang and its compiler-rt:

  clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Iexamples -o build/fuzz_gguf \
    tests/fuzz/gguf.cpp examples/loaders/gguf.cpp examples/loaders/file.cpp -lfmt
  mkdir -p build/corpus && build/fuzz_gguf -max_len=4096 build/corpus tests/fuzz/corpus/gguf

The corpus is replayed by tests/gguf_test.cpp: add to it what the fuzzer finds. */

#include <cstddef>
#include <cstdint>

#include "gguf.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::read_gguf(std::as_bytes(std::span(data, size)));
  return 0;
}
