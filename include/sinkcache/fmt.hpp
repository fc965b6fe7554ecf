#pragma once

// fmt::print("{}", cache) gives kv_cache<bf16>{sinks 0-3 | window 998980-999999, 4.2 MB}. Spans of positions, statuses
// and configurations print too.
//
// The only header that needs fmt (https://fmt.dev, 9 or newer): link fmt::fmt, or define FMT_HEADER_ONLY.

#include "detail/macros_off.hpp"

#include <fmt/format.h>

#include <concepts>
#include <string_view>
#include <vector>

#include "kv_cache.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// What has no options after the colon.
struct plain_formatter {
  constexpr auto parse(fmt::format_parse_context& context) { return context.begin(); }
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

// "ok", or the message.
template <>
struct fmt::formatter<sinkcache::status> : sinkcache::detail::plain_formatter {
  auto format(const sinkcache::status& found, fmt::format_context& context) const {
    return fmt::format_to(context.out(), "{}", found ? "ok" : found.message());
  }
};

// First and last position, as in "4-9"; "empty".
template <>
struct fmt::formatter<sinkcache::position_span> : sinkcache::detail::plain_formatter {
  auto format(const sinkcache::position_span& span, fmt::format_context& context) const {
    if (span.first >= span.last) return fmt::format_to(context.out(), "empty");
    return fmt::format_to(context.out(), "{}-{}", span.first, span.last - 1);
  }
};

template <>
struct fmt::formatter<sinkcache::span_list> : sinkcache::detail::plain_formatter {
  auto format(const sinkcache::span_list& spans, fmt::format_context& context) const {
    auto out = fmt::format_to(context.out(), "{}", spans.size() == 0 ? "empty" : "");
    for (sinkcache::index_t i = 0; i < spans.size(); ++i)
      out = fmt::format_to(out, "{}{}", i > 0 ? " | " : "", spans[i]);
    return out;
  }
};

// All that is set, and what v_head_dim stands for.
template <>
struct fmt::formatter<sinkcache::cache_config> : sinkcache::detail::plain_formatter {
  auto format(const sinkcache::cache_config& c, fmt::format_context& context) const {
    auto out = fmt::format_to(context.out(), "cache_config{{{} KV heads of {}", c.num_kv_heads, c.head_dim);
    if (c.v_head_dim != 0 && c.v_head_dim != c.head_dim) out = fmt::format_to(out, ", values of {}", c.v_head_dim);
    out = fmt::format_to(out, ", {} sink tokens, window {}", c.num_sink_tokens, c.window);
    out = fmt::format_to(out, ", rollback {}", c.rollback);
    out = fmt::format_to(out, ", positions {}, inputs {}",
                         c.positions == sinkcache::positions::in_cache ? "in_cache" : "absolute",
                         c.inputs == sinkcache::inputs::raw ? "raw" : "rotated");
    if (c.rope) out = fmt::format_to(out, ", rope of width {}", c.rope->width());
    if (c.recent != sinkcache::cache_config{}.recent) out = fmt::format_to(out, ", recent {}", c.recent);
    if (c.first_position != 0) out = fmt::format_to(out, ", first_position {}", c.first_position);
    return fmt::format_to(out, "}}");
  }
};

// Pinned tokens, then the others, as the newest query of KV head 0 sees them: spans of positions, or how many of how
// wide a span where they are scattered; and their formats where not all are stored in the cache's own:
// kv_cache<q4>{sinks 0-3 bf16 | 4-959 q4 | 960-1023 bf16, 1.3 MB}.
template <std::derived_from<sinkcache::any_kv_cache> Cache>
struct fmt::formatter<Cache> : sinkcache::detail::plain_formatter {
  auto format(const Cache& cache, fmt::format_context& context) const {
    using sinkcache::index_t, sinkcache::kv_part;
    const sinkcache::cache_kind kind = cache.kind();
    auto out = fmt::format_to(context.out(), "kv_cache<{}", kind.k_format);
    if (kind.v_format != kind.k_format) out = fmt::format_to(out, ", {}", kind.v_format);
    out = fmt::format_to(out, ">{{");
    std::vector<kv_part> memory(static_cast<std::size_t>(cache.max_parts()));
    sinkcache::part_list parts(memory.data(), cache.max_parts());
    cache.plan(0, cache.seen() - 1, cache.seen() - 1, parts);
    const auto alike = [&](index_t i, index_t j) {
      return parts[i].k.reader == parts[j].k.reader && parts[i].v.reader == parts[j].v.reader;
    };
    const auto is_of = [&](const kv_part& part) {
      return part.k.reader == nullptr || (part.k.reader->name == kind.k_format && part.v.reader->name == kind.v_format);
    };
    bool any = false, tiers = false;
    for (index_t i = 0; i < parts.size(); ++i) tiers = tiers || !alike(0, i) || !is_of(parts[i]);
    for (index_t i = 0, next; i < parts.size(); i = next) {
      sinkcache::position_span span{parts[i].first, parts[i].end()};
      bool pinned = parts[i].pinned == parts[i].rows;
      for (next = i + 1; next < parts.size() && parts[next].first == span.last && alike(i, next); ++next) {
        span.last = parts[next].end();
        pinned = pinned && parts[next].pinned == parts[next].rows;
      }
      const bool is_window = any && !tiers && parts[i].seen_until != kv_part::always;
      out = fmt::format_to(out, "{}{}", any ? " | " : "",
                           pinned && next < parts.size() ? "sinks "
                           : is_window                   ? "window "
                           : any                         ? ""
                                                         : "tokens ");
      if (!parts[i].at.empty()) out = fmt::format_to(out, "{} of ", parts[i].rows);
      out = fmt::format_to(out, "{}", span);
      any = true;
      if (!tiers || parts[i].k.reader == nullptr) continue;
      out = fmt::format_to(out, " {}", parts[i].k.reader->name);
      if (parts[i].v.reader->name != parts[i].k.reader->name)
        out = fmt::format_to(out, " and {}", parts[i].v.reader->name);
    }
    return fmt::format_to(out, "{}, {:.1f} MB}}", any ? "" : "empty", static_cast<double>(cache.nbytes()) * 1e-6);
  }
};

#include "detail/macros_on.hpp"
