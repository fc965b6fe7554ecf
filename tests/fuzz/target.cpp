// The functions of targets.hpp as fuzzers, one in each program of its name: `tests/fuzz/run` compiles this once and
// links to it under all names; or, with -DFUZZ_CACHES, that of cache_target.hpp.

#include <cstddef>
#include <cstdint>
#include <cstdio>

#if defined(FUZZ_CACHES)
#include "cache_target.hpp"
namespace {
constexpr auto run = fuzz::cache_target;
}
#else
#include <string_view>

#include "targets.hpp"
namespace {
void (*run)(fuzz::bytes) = nullptr;
}

extern "C" int LLVMFuzzerInitialize(int*, char*** argv) {
  const std::string_view path = (*argv)[0], name = path.substr(path.rfind('/') + 1);
  for (const fuzz::target& each : fuzz::targets)
    if (each.name == name) run = each.run;
  if (run == nullptr) std::fprintf(stderr, "no target is called %s\n", path.data());
  return run == nullptr;
}
#endif

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run(std::as_bytes(std::span(data, size)));
  return 0;
}
