#pragma once

// Whether what is stored is finite: a format that cannot hold a value stores infinity, and append does not look.

#include <algorithm>
#include <cmath>
#include <vector>

#include "detail/macros_off.hpp"
#include "detail/part_rules.hpp"
#include "source.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// How many elements of the keys and values that the newest query sees are infinite or NaN, over all KV heads: what f16
// could not hold, from 65520 on, and what was so when it was appended. A few-bit row that could not be held counts with
// all its elements. Keys count as they are stored, rotated or transformed. Reads every row: call it to look into a
// fault, or once in a while; other calls pay nothing for it. Takes a cache, a view or any other source; may run beside
// const calls.
inline index_t num_not_finite(const kv_source& source) {
  const kv_geometry& of = source.geometry();
  const position_t query = source.seen() - 1;
  std::vector<kv_part> memory(static_cast<std::size_t>(source.max_parts()));
  std::vector<float> row(static_cast<std::size_t>(detail::round_up(std::max(of.head_dim, of.v_head_dim), 16)));
  index_t n = 0;
  for (index_t head = 0; head < of.num_kv_heads; ++head) {
    part_list parts(memory.data(), source.max_parts());
    source.plan(head, query, query, parts);
    for (const kv_part& part : parts)
      for (index_t i = 0; i < part.rows && part.k.reader != nullptr; ++i) {
        if (!detail::sees(part, query, part.position(i))) continue;
        const auto count = [&](kv_rows rows, index_t dim) {
          index_t at = part.row + i;
          if (!part.pages.empty()) {
            rows.base += part.pages[static_cast<std::size_t>(at / part.page_rows)] * rows.page;
            at %= part.page_rows;
          }
          rows.reader->load(rows, at, 1, dim, static_cast<index_t>(row.size()), row.data());
          n += std::count_if(row.begin(), row.begin() + dim, [](float x) { return !std::isfinite(x); });
        };
        count(part.k, of.head_dim);
        count(part.v, of.v_head_dim);
      }
  }
  return n;
}

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
