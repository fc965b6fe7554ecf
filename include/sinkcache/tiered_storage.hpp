#pragma once

// Rows of a cache whose formats spare some tokens, in one allocation: whole rows of the spared, then rows of the
// others; and which tokens those are.

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <utility>

#include "detail/macros_off.hpp"
#include "policy.hpp"
#include "storage.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// Which tokens lie where. Those spared: the pinned ones in rows [0, pinned), the newest `recent` in a ring of `spared`
// rows after them. The others lie where the policy says, as it would have them `recent` tokens earlier.
template <eviction_policy Policy>
struct tier_shape {
  Policy policy;
  index_t recent, rollback;

  tier_shape(Policy of, index_t newest, index_t kept) : policy(std::move(of)), recent(newest), rollback(kept) {}

  index_t pinned() const { return num_pinned(policy); }
  index_t spared() const { return recent > 0 ? recent + rollback : 0; }
  index_t few() const { return policy.capacity(); }
  index_t full_rows() const { return pinned() + spared(); }

  // The first position that is among the newest after so many tokens.
  position_t first_recent(position_t seen) const { return std::max<position_t>(pinned(), seen - recent); }

  placed place(position_t position) const { return policy.place(position); }

  // How many tokens may come so that the first still sees what it has to; 64 at most.
  index_t room(position_t seen) const {
    const index_t most = std::min<index_t>(64, recent > 0 ? rollback + 1 : 64);
    span_list kept = policy.visible(seen + 1);
    index_t n = 1;
    for (; n < most && !stored_over(policy, kept, seen + n); ++n) kept.push_back({seen + n, seen + n + 1});
    return n;
  }

  // Whether what was visible after `back` tokens is still stored where it was, in a stream that got as far as `high`.
  bool can_go_back(position_t back, position_t seen, position_t high) const {
    const position_t newest = first_recent(back);
    if (recent > 0 && newest < back && newest + spared() < high) return false;
    return detail::can_go_back(policy, back, seen, high);
  }
  // The smallest count, not below `lowest`, down to which every count can be gone back to.
  position_t min_truncate(position_t seen, position_t high, position_t lowest = 0) const {
    for (position_t n = seen; n > lowest; --n) {
      if (policy.visible(n).num_tokens() == n && (recent == 0 || high <= full_rows())) return lowest;
      if (!can_go_back(n - 1, n, high)) return n;
    }
    return std::min(lowest, seen);
  }
};

// A window: the others lie in a ring of the window less the newest. A ring without tokens has no rows.
template <>
struct tier_shape<sink_window> {
  sink_window policy;
  index_t recent, rollback = policy.rollback;

  constexpr tier_shape(const sink_window& of, index_t newest, index_t)
      : policy(of), recent(std::min(newest, of.window)) {}

  constexpr index_t pinned() const { return policy.num_sink_tokens; }
  constexpr index_t spared() const { return recent > 0 ? recent + rollback : 0; }
  constexpr index_t few() const { return policy.window > recent ? policy.window - recent + rollback : 0; }
  constexpr index_t full_rows() const { return pinned() + spared(); }

  // The first positions that are among the newest `recent`, and that are visible at all, after so many tokens.
  constexpr position_t first_recent(position_t seen) const { return std::max<position_t>(pinned(), seen - recent); }
  constexpr position_t first_visible(position_t seen) const {
    return std::max<position_t>(pinned(), seen - policy.window);
  }

  constexpr placed place(position_t position) const {
    const auto slot = static_cast<index_t>((position - pinned()) % few());
    return {slot, few() - 1 - slot};
  }

  constexpr index_t room(position_t seen) const {
    position_t n = max_position;
    if (spared() > 0) n = spared() + first_recent(seen + 1) - seen;
    if (few() > 0) n = std::min(n, few() + first_visible(seen + 1) - (seen - recent));
    return static_cast<index_t>(std::max<position_t>(1, n));
  }

  constexpr bool can_go_back(position_t back, position_t, position_t high) const {
    const position_t newest = first_recent(back), middle = first_visible(back);
    if (newest < back && newest + spared() < high) return false;
    return middle >= newest || middle + few() >= high - recent;
  }
  constexpr position_t min_truncate(position_t seen, position_t high, position_t = 0) const {
    const bool overwritten =
        (spared() > 0 && pinned() + spared() < high) || (few() > 0 && pinned() + few() < high - recent);
    return overwritten ? std::min(high - rollback, seen) : 0;
  }
};

// [num_kv_heads, rows] blocks of keys and of values of the spared tokens, then of the others; each of the four begins a
// line, and a head's rows lie together.
template <kv_format K, kv_format V>
class tiered_storage {
 public:
  using full_k = spared_format<K>;
  using full_v = spared_format<V>;

  struct shape {
    index_t num_kv_heads, head_dim, v_head_dim, full_rows, few_rows;
  };

  // Holds no memory where the resource had none, and exceptions are off.
  tiered_storage(const shape& of, std::pmr::memory_resource* resource)
      : full_k_{0, full_k::block_bytes(of.head_dim), of.full_rows},
        full_v_{0, full_v::block_bytes(of.v_head_dim), of.full_rows},
        few_k_{0, K::block_bytes(of.head_dim), of.few_rows},
        few_v_{0, V::block_bytes(of.v_head_dim), of.few_rows} {
    status found;
    const std::size_t bytes = required_bytes(found, of);
    found.or_fail();
    index_t at = 0;
    for (section* s : {&full_k_, &full_v_, &few_k_, &few_v_}) {
      s->offset = at;
      at += round_up(of.num_kv_heads * s->rows * s->block, alignment);
    }
    memory_ = take_memory(bytes, resource);
  }

  static std::size_t required_bytes(status& found, const shape& of) noexcept {
    index_t bytes = 0;
    const auto add = [&](index_t block, index_t rows) {
      const index_t all = checked_product(found, "num_kv_heads * tokens", of.num_kv_heads, rows);
      const index_t size = checked_product(found, "bytes of the cache", all, block);
      const index_t padded = checked_sum(found, "bytes of the cache", size, alignment - 1) & -alignment;
      bytes = checked_sum(found, "bytes of the cache", bytes, padded);
    };
    add(checked_block_bytes<full_k>(found, of.head_dim), of.full_rows);
    add(checked_block_bytes<full_v>(found, of.v_head_dim), of.full_rows);
    add(checked_block_bytes<K>(found, of.head_dim), of.few_rows);
    add(checked_block_bytes<V>(found, of.v_head_dim), of.few_rows);
    return static_cast<std::size_t>(bytes);
  }

  std::byte* spared_k(index_t kv_head, index_t row) const { return data() + full_k_.at(kv_head, row); }
  std::byte* spared_v(index_t kv_head, index_t row) const { return data() + full_v_.at(kv_head, row); }
  std::byte* k(index_t kv_head, index_t row) const { return data() + few_k_.at(kv_head, row); }
  std::byte* v(index_t kv_head, index_t row) const { return data() + few_v_.at(kv_head, row); }
  // As parts name them.
  kv_rows spared_k_rows(index_t kv_head) const { return rows_of<full_k>(full_k_, kv_head); }
  kv_rows spared_v_rows(index_t kv_head) const { return rows_of<full_v>(full_v_, kv_head); }
  kv_rows k_rows(index_t kv_head) const { return rows_of<K>(few_k_, kv_head); }
  kv_rows v_rows(index_t kv_head) const { return rows_of<V>(few_v_, kv_head); }

  std::size_t nbytes() const { return memory_ ? memory_.get_deleter().bytes : 0; }
  std::byte* data() const { return memory_.get(); }
  std::pmr::memory_resource* resource() const { return memory_.get_deleter().resource; }

 private:
  static constexpr index_t alignment = cache_alignment;

  struct section {
    index_t offset, block, rows;

    index_t at(index_t kv_head, index_t row) const { return offset + (kv_head * rows + row) * block; }
  };

  template <kv_format F>
  kv_rows rows_of(const section& s, index_t kv_head) const {
    return {.reader = &reader_of<F>, .base = data() + s.at(kv_head, 0), .block = s.block, .head = s.rows * s.block};
  }

  section full_k_, full_v_, few_k_, few_v_;
  cache_memory memory_;
};

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "detail/macros_on.hpp"
