#pragma once

// Ranges that were dropped from the middle of a cache. Rows stay where they are; plans leave them out.

#include <algorithm>
#include <concepts>
#include <exception>
#include <vector>

#include "../any_kv_cache.hpp"
#include "macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

class erased_spans {
 public:
  index_t size() const noexcept { return static_cast<index_t>(spans_.size()); }
  void clear() noexcept { spans_.clear(); }

  // Adds what is not erased yet. Of a window, of which `seen` is the smallest count that can be gone back to, older
  // spans are forgotten that nobody sees again: neither pinned nor in the window of any query since.
  template <class Policy>
  void add(status& found, position_span span, const Policy& policy, position_t seen) noexcept {
    if (span.first >= span.last || !reserve(found, spans_.size() + 1)) return;
    if constexpr (std::same_as<Policy, sink_window>)
      std::erase_if(spans_, [&](const position_span& old) {
        return old.first >= policy.num_sink_tokens && old.last <= seen - policy.window;
      });
    const auto begin = std::partition_point(spans_.begin(), spans_.end(),
                                            [&](const position_span& old) { return old.last < span.first; });
    const auto end =
        std::partition_point(begin, spans_.end(), [&](const position_span& old) { return old.first <= span.last; });
    if (begin != end) {  // those that it touches become one with it
      span = {std::min(span.first, begin->first), std::max(span.last, (end - 1)->last)};
      spans_.erase(begin + 1, end);
      *begin = span;
    } else {
      spans_.insert(begin, span);
    }
  }

  // Forgets what lies at `seen` and after: those positions are taken by other tokens next.
  void truncate(position_t seen) noexcept {
    while (!spans_.empty() && spans_.back().first >= seen) spans_.pop_back();
    if (!spans_.empty()) spans_.back().last = std::min(spans_.back().last, seen);
  }

  void assign(status& found, const erased_spans& from) noexcept {
    if (reserve(found, from.spans_.size())) spans_.assign(from.spans_.begin(), from.spans_.end());
  }

  // How many of these positions are not erased.
  index_t num_left(const span_list& of) const noexcept {
    index_t n = 0;
    for (const position_span& span : of) for_each_kept(span, [&](const position_span& kept) { n += kept.size(); });
    return n;
  }

  // Calls f with each stretch of these positions that is not erased, in order.
  template <class F>
  void for_each_kept(position_span of, const F& f) const noexcept {
    auto span = std::partition_point(spans_.begin(), spans_.end(),
                                     [&](const position_span& old) { return old.last <= of.first; });
    for (; span != spans_.end() && span->first < of.last; ++span) {
      if (of.first < span->first) f(position_span{of.first, span->first});
      of.first = span->last;
    }
    if (of.first < of.last) f(of);
  }

 private:
  bool reserve(status& found, std::size_t size) noexcept {
#if defined(__cpp_exceptions)
    try {
      spans_.reserve(size);
    } catch (const std::exception&) {
      found.refuse_memory("ranges that were erased were {}, had to be at most what the system has memory for", size);
    }
#else
    spans_.reserve(size);
#endif
    return found.ok();
  }

  std::vector<position_span> spans_;  // in order, none touches another
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
