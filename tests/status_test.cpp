// What a status remembers and says.

#include <sinkcache/status.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "catch.hpp"

using namespace sinkcache;

namespace {

static_assert(std::is_nothrow_default_constructible_v<status> && std::is_nothrow_copy_constructible_v<status>);
static_assert(!std::is_convertible_v<status, bool> && std::is_constructible_v<bool, status>);
static_assert(noexcept(std::declval<status&>().require(true, "a", 1, "b", 2)));

TEST_CASE("status: is ok, until a rule is broken; the first one stays") {
  status found;
  CHECK((found.ok() && found));
  CHECK(found.message() == "");
  CHECK(std::string(found.c_str()) == "");
  CHECK_NOTHROW(found.or_fail());
  found.require(true, "window", 1, "at least 1");
  CHECK(found.ok());
  found.require(false, "window", 0, "at least 1");
  CHECK((!found.ok() && !found));
  CHECK(found.message() == "sinkcache: window was 0, had to be at least 1");
  CHECK(found.c_str() == std::string(found.message()));
  found.require(false, "head_dim", 513, "at most", 512);
  found.refuse("{} broke", "more");
  found.require(true, "window", 1, "at least 1");
  CHECK(found.message() == "sinkcache: window was 0, had to be at least 1");
  CHECK_THROWS_AS(found.or_fail(), std::invalid_argument);
  CHECK_THROWS_WITH(found.or_fail(), "sinkcache: window was 0, had to be at least 1");
}

TEST_CASE("status: values of all kinds") {
  const auto message = [](const auto& value, const auto&... bound) {
    status found;
    found.require(false, "x", value, "above", bound...);
    return std::string(found.message());
  };
  CHECK(message(-3) == "sinkcache: x was -3, had to be above");
  CHECK(message(position_t{1} << 62, 5) == "sinkcache: x was 4611686018427387904, had to be above 5");
  CHECK(message(1.5f) == "sinkcache: x was 1.5, had to be above");
  CHECK(message(std::nanf("")) == "sinkcache: x was nan, had to be above");
  CHECK(message(0.1f, 0.1) == "sinkcache: x was 0.1, had to be above 0.1");
  CHECK(message(-0.0001f, 0.00001) == "sinkcache: x was -0.0001, had to be above 1e-05");
  CHECK(message(1e15, 1e16) == "sinkcache: x was 1000000000000000, had to be above 1e+16");
  CHECK(message(500000.f, -std::numeric_limits<double>::infinity()) == "sinkcache: x was 500000, had to be above -inf");
  CHECK(message(0., std::numeric_limits<double>::denorm_min()) == "sinkcache: x was 0, had to be above 5e-324");
  CHECK(message(std::numeric_limits<double>::max()) == "sinkcache: x was 1.7976931348623157e+308, had to be above");
  CHECK(message(std::numeric_limits<position_t>::min(), std::numeric_limits<std::uint64_t>::max()) ==
        "sinkcache: x was -9223372036854775808, had to be above 18446744073709551615");
  CHECK(message("absent", "all") == "sinkcache: x was absent, had to be above all");
  CHECK(message(std::string_view("text {}")) == "sinkcache: x was text {}, had to be above");
}

TEST_CASE("status: each placeholder takes the next value") {
  const auto message = [](const char* words, const auto&... values) {
    status found;
    found.refuse(words, values...);
    return std::string(found.message());
  };
  CHECK(message("nothing") == "sinkcache: nothing");
  CHECK(message("{}{}", 1, "{}") == "sinkcache: 1{}");
  CHECK(message("a {} b", 1) == "sinkcache: a 1 b");
  CHECK(message("{} of {}: {}", 1, 2, "it") == "sinkcache: 1 of 2: it");
}

TEST_CASE("status: copies and assigns, ok or not") {
  status good, bad;
  bad.require(false, "a", 1, "b");
  const status copy_of_good = good, copy_of_bad = bad;
  CHECK(copy_of_good.ok());
  CHECK(copy_of_bad.message() == bad.message());
  status changes = bad;
  changes = good;
  CHECK((changes.ok() && changes.message() == ""));
  changes = bad;
  CHECK(changes.message() == bad.message());
  const status& same = changes;
  changes = same;
  CHECK(changes.message() == bad.message());
}

TEST_CASE("status: knows memory that was missing from a rule that was broken") {
  status memory, rule;
  memory.refuse_memory("bytes was {}, had to be less", 7);
  memory.refuse("another");
  CHECK(memory.message() == "sinkcache: bytes was 7, had to be less");
  rule.require(false, "a", 1, "b");
  rule.refuse_memory("another");
  CHECK(memory.lacks_memory());
  CHECK_FALSE(rule.lacks_memory());
  CHECK_FALSE(status().lacks_memory());
  const status copy = memory;
  CHECK(copy.lacks_memory());
  memory = rule;
  CHECK_FALSE(memory.lacks_memory());
  memory = copy;
  memory = status();
  CHECK_FALSE(memory.lacks_memory());
#if defined(__cpp_exceptions)
  CHECK_FALSE(detail::created(memory, "a thing", []() -> int { throw std::bad_alloc(); }));
  CHECK(memory.message() == "sinkcache: there was no memory for a thing");
  CHECK(memory.lacks_memory());
#endif
}

TEST_CASE("status: what is too long is cut off") {
  for (const std::size_t length : {100u, 215u, 216u, 227u, 228u, 229u, 1000u}) {
    const std::string text(length, 'x');
    status found;
    found.refuse("{}", text);
    const std::string whole = "sinkcache: " + text;
    CHECK(found.message().size() == std::min<std::size_t>(whole.size(), 239));
    CHECK(found.message() == whole.substr(0, 239));
    CHECK(std::strlen(found.c_str()) == found.message().size());
  }
}

TEST_CASE("sizes: what does not fit is refused, and 0") {
  constexpr index_t most = std::numeric_limits<index_t>::max();
  status found;
  CHECK(detail::checked_product(found, "bytes", 3, 5) == 15);
  CHECK(detail::checked_sum(found, "bytes", most - 1, 1) == most);
  CHECK(found.ok());
  CHECK(detail::checked_product(found, "bytes", most, 2) == 0);
  CHECK(detail::checked_sum(found, "rows", most, 1) == 0);
  CHECK(found.message() == "sinkcache: bytes was 9223372036854775807 * 2, had to fit 63 bits");
  status of_sum;
  CHECK(detail::checked_sum(of_sum, "rows", most, 1) == 0);
  CHECK(of_sum.message() == "sinkcache: rows was 9223372036854775807 + 1, had to fit 63 bits");
}

}  // namespace
