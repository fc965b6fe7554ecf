#pragma once

// Ranges that were dropped from the middle of a cache. Rows stay where they are; plans leave them out.

#include <algorithm>
#include <exception>
#include <vector>

#include "../any_kv_cache.hpp"
#include "macros_off.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

class erased_spans {
 public:
  index_t size() const noexcept { return static_cast<index_t>(spans_.size()); }
  void clear() noexcept { spans_.clear(); }

  // Adds what is not erased yet. Of older spans those are forgotten that neither are of the first `pinned` positions
  // nor reach `from`: nobody sees them again.
  void add(status& found, position_span span, index_t pinned, position_t from) noexcept {
    if (span.first >= span.last || !reserve(found, spans_.size() + 1)) return;
    std::erase_if(spans_, [&](const position_span& old) { return old.first >= pinned && old.last <= from; });
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

  // How many of these positions are erased.
  index_t count(const position_span& of) const noexcept {
    index_t n = 0;
    for (const position_span& span : spans_)
      n += static_cast<index_t>(std::max<position_t>(0, std::min(span.last, of.last) - std::max(span.first, of.first)));
    return n;
  }
  index_t count(const span_list& of) const noexcept {
    index_t n = 0;
    for (const position_span& span : of) n += count(span);
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
      found.refuse("ranges that were erased were {}, had to be at most what the system has memory for", size);
    }
#else
    spans_.reserve(size);
#endif
    return found.ok();
  }

  std::vector<position_span> spans_;  // in order, none touches another
};

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "macros_on.hpp"
