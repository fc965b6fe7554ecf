// The corpus of the fuzz target for caches, without a fuzzer; and as many scripts of chance.

#include "fuzz/cache_target.hpp"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "catch.hpp"

TEST_CASE("what a fuzzer tried with caches once is right or refused") {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(SINKCACHE_SOURCE_DIR "/tests/fuzz/corpus/caches")) {
    std::ifstream stream(entry.path(), std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
    INFO(entry.path());
    CHECK_NOTHROW(fuzz::cache_target(std::as_bytes(std::span(bytes))));
    ++files;
  }
  CHECK(files > 3);
}

TEST_CASE("any history of calls keeps what caches promise") {
  for (int seed = 0; seed < effort::cases(300); ++seed) {
    effort::dice dice(static_cast<std::uint64_t>(seed));
    std::vector<std::byte> script(static_cast<std::size_t>(dice.from_to(20, 120)));
    for (std::byte& b : script) b = static_cast<std::byte>(dice.from_to(0, dice.one_in(30) ? 255 : 199));
    INFO("seed " << seed);
    REQUIRE_NOTHROW(fuzz::cache_target(script));
  }
}
