// The three programs read their arguments alike.

#include <functional>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "chat/options.hpp"
#include "compare/options.hpp"
#include "evidence/options.hpp"

namespace {

using arguments = std::vector<const char*>;

template <class Parse>
std::string refusal(const Parse& parse, arguments of) {
  of.insert(of.begin(), "program");
  try {
    parse(static_cast<int>(of.size()), of.data());
  } catch (const compare::usage_error& error) {
    return error.what();
  }
  return "accepted";
}

const auto parse_compare = [](int argc, const char* const* argv) { return compare::parse_options(argc, argv); };
const auto parse_chat = [](int argc, const char* const* argv) { return chat::parse_options(argc, argv); };
const auto parse_evidence = [](int argc, const char* const* argv) { return evidence::parse_options(argc, argv); };

template <class Parse>
auto parsed(const Parse& parse, arguments of) {
  of.insert(of.begin(), "program");
  return *parse(static_cast<int>(of.size()), of.data());
}

}  // namespace

TEST_CASE("numbers of a command line are decimal whatever program reads them") {
  CHECK(parsed(parse_compare, {"--cache", "010"}).cache == 10);
  CHECK(parsed(parse_chat, {"--cache", "010"}).cache == 10);
  CHECK(parsed(parse_evidence, {"--caches", "0100,0200"}).caches == std::vector<sinkcache::index_t>{100, 200});
  CHECK(parsed(parse_chat, {"--seed", "18446744073709551615"}).sampling.seed == 18446744073709551615u);
  CHECK(parsed(parse_chat, {"--temperature", "1.5"}).sampling.temperature == 1.5);
  CHECK(parsed(parse_chat, {"--top-k", "08"}).sampling.top_k == 8);

  CHECK(refusal(parse_chat, {"--seed", "18446744073709551616"}) ==
        "--seed is '18446744073709551616', had to be a whole number from 0 to 18446744073709551615");
  for (const char* number : {"0x10", "1e3", "12x", " 8", "+8", "8.0", "99999999999999999999", "", "1'000"}) {
    INFO(number);
    for (const char* option : {"--cache", "--tokens", "--threads"}) {
      CHECK_THAT(refusal(parse_compare, {option, number}), Catch::Contains(option));
      CHECK_THAT(refusal(parse_chat, {option, number}), Catch::Contains(option));
    }
    for (const char* option : {"--seed", "--top-k"})
      CHECK_THAT(refusal(parse_chat, {option, number}), Catch::Contains(option));
    for (const char* option : {"--caches", "--tokens", "--targets", "--facts", "--check", "--threads"})
      CHECK_THAT(refusal(parse_evidence, {option, number}), Catch::Contains(option));
  }
  for (const char* number : {"0x1p1", "nan", "inf", "1e", "-1", "101", ""})
    CHECK_THAT(refusal(parse_chat, {"--temperature", number}), Catch::Contains("--temperature"));
  CHECK_THAT(refusal(parse_evidence, {"--caches", "16,,32"}), Catch::Contains("has an empty entry"));
  CHECK(refusal(parse_evidence, {"--caches", "16,8"}) ==
        "--caches is '8', had to be a whole number from 16 to 1048576");
}

TEST_CASE("a program that is called without even its name takes its defaults") {
  const char* const none[] = {nullptr};
  CHECK(compare::parse_options(0, none)->cache == 128);
  CHECK_FALSE(chat::parse_options(0, none)->prompt.has_value());
  CHECK(evidence::parse_options(0, none)->tokens == 65536);
}
