#pragma once

// Formats chosen at run time, by their names.

#include <algorithm>
#include <concepts>
#include <iterator>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "detail/macros_off.hpp"
#include "format.hpp"
#include "quantized.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

namespace detail {

// Of these, chosen by name.
template <named_format... Formats>
struct format_choice {
  static status validate(std::string_view k, std::string_view v) noexcept {
    status found;
    require(found, "the format of keys", k);
    require(found, "the format of values", v);
    return found;
  }
  template <class F>
  static decltype(auto) call(std::string_view k, std::string_view v, F&& f) {
    return call_with<Formats...>(k, [&](auto k_format) -> decltype(auto) {
      return call_with<Formats...>(v, [&](auto v_format) -> decltype(auto) { return f(k_format, v_format); });
    });
  }

 private:
  static void require(status& found, const char* argument, std::string_view name) noexcept {
    std::string_view names[] = {Formats::name...};
    auto last = std::begin(names);  // a name given twice counts once
    for (const std::string_view each : names)
      if (std::find(std::begin(names), last, each) == last) *last++ = each;
    if (std::find(std::begin(names), last, name) != last) return;
    char text[128];
    std::size_t length = 0;
    const auto add = [&](std::string_view more) { length += more.copy(text + length, sizeof text - length); };
    for (auto each = std::begin(names); each != last; ++each) {
      add(each == std::begin(names) ? "" : each + 1 == last ? " or " : ", ");
      add(*each);
    }
    found.refuse("{} was '{}', had to be {}", argument, name.substr(0, 32), std::string_view(text, length));
  }

  // Calls f with the format of that name, which is there.
  template <class First, class... Rest, class F>
  static decltype(auto) call_with(std::string_view name, F&& f) {
    if constexpr (sizeof...(Rest) > 0) {
      if (name != std::string_view(First::name)) return call_with<Rest...>(name, f);
    }
    return f(First());
  }
};

template <class Formats>
struct choice_of;
template <class... Formats>
struct choice_of<std::tuple<Formats...>> {
  using type = format_choice<Formats...>;
};

// Of those that f takes.
template <class F, named_format... Formats>
using taken_formats = typename choice_of<decltype(std::tuple_cat(
    std::conditional_t<std::invocable<F&, Formats, Formats>, std::tuple<Formats>, std::tuple<>>()...))>::type;

template <class F, named_format... Own>
using formats_for = taken_formats<F, f32, f16, bf16, q8, q6, q4, q2, Own...>;

}  // namespace detail

// Returns f(K(), V()) for the formats of these names: f32, f16, bf16, q8, q6, q4, q2, or `Own`, formats of yours, each
// with a `name`. Those that f cannot be called with are refused as names that are not known: one for views takes
// `viewed_format auto`.
//   auto cache = with_formats("q8", "q4", [&](auto k, auto v) -> std::unique_ptr<any_kv_cache> {
//     return std::make_unique<kv_cache<decltype(k), decltype(v)>>(config);
//   });
template <detail::named_format... Own, class F>
decltype(auto) with_formats(std::string_view k, std::string_view v, F&& f) {
  using choice = detail::formats_for<F, Own...>;
  choice::validate(k, v).or_fail();
  return choice::call(k, v, f);
}

// The same for an f that returns a status, or nothing: a wrong name is a status, and throws only what f throws.
template <detail::named_format... Own, class F>
status try_with_formats(std::string_view k, std::string_view v, F&& f) {
  using choice = detail::formats_for<F, Own...>;
  status found = choice::validate(k, v);
  if (!found) return found;
  if constexpr (std::same_as<decltype(choice::call(k, v, f)), status>)
    return choice::call(k, v, f);
  else
    choice::call(k, v, f);
  return found;
}

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
