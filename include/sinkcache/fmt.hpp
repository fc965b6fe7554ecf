#pragma once

// fmt::print("{}", cache) gives kv_cache{sinks 0-3 | window 998980-999999, 4.2 MB}.

#include <fmt/format.h>

#include <concepts>

#include "kv_cache.hpp"

template <std::derived_from<sinkcache::any_kv_cache> Cache>
struct fmt::formatter<Cache> {
  constexpr auto parse(fmt::format_parse_context& context) { return context.begin(); }

  auto format(const Cache& cache, fmt::format_context& context) const {
    auto out = fmt::format_to(context.out(), "kv_cache{{");
    const auto spans = cache.visible(cache.seen());
    if (spans.size() == 0) out = fmt::format_to(out, "empty");
    for (sinkcache::index_t i = 0; i < spans.size(); ++i)
      out = fmt::format_to(out, "{}{} {}-{}", i > 0 ? " | " : "",
                           spans.size() == 1 ? "tokens" : (i + 1 < spans.size() ? "sinks" : "window"), spans[i].first,
                           spans[i].last - 1);
    return fmt::format_to(out, ", {:.1f} MB}}", static_cast<double>(cache.nbytes()) * 1e-6);
  }
};
