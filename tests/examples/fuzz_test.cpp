// The corpora of the fuzz targets, without a fuzzer.

#include "../fuzz/targets.hpp"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "../catch.hpp"

TEST_CASE("what fuzzers found once is read or refused") {
  for (const fuzz::target& target : fuzz::targets) {
    int files = 0;
    for (const auto& entry :
         std::filesystem::directory_iterator(std::string(SINKCACHE_SOURCE_DIR "/tests/fuzz/corpus/") + target.name)) {
      std::ifstream stream(entry.path(), std::ios::binary);
      const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
      INFO(entry.path());
      CHECK_NOTHROW(target.run(std::as_bytes(std::span(bytes))));
      ++files;
    }
    INFO(target.name);
    CHECK(files > 3);
  }
}
