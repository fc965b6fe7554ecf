#pragma once

// Rows of a cache whose formats spare some tokens, in one allocation: whole rows of the spared, then rows of the
// others; and which tokens those are.

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <utility>

#include "any_kv_cache.hpp"
#include "detail/macros_off.hpp"
#include "policy.hpp"
#include "storage.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

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

  placed place(position_t position) const { return place_of(policy, position); }

  // How many tokens may come so that the first still sees what it has to; 64 at most.
  index_t room(position_t seen) const {
    return room_after(policy, seen, std::min<index_t>(64, recent > 0 ? rollback + 1 : 64));
  }

  // Whether what was visible after `back` tokens is still stored where it was, in a stream that got as far as `high`.
  bool can_go_back(position_t back, position_t seen, position_t high) const {
    const position_t newest = first_recent(back);
    if (recent > 0 && newest < back && newest + spared() < high) return false;
    return detail::can_go_back(policy, back, seen, high);
  }
  // The smallest count down to which every count can be gone back to.
  position_t min_truncate(position_t seen, position_t high) const {
    for (position_t n = seen; n > 0; --n) {
      if (policy.visible(n).num_tokens() == n && (recent == 0 || high <= full_rows())) return 0;
      if (!can_go_back(n - 1, n, high)) return n;
    }
    return 0;
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
  constexpr position_t min_truncate(position_t seen, position_t high) const {
    const bool overwritten =
        (spared() > 0 && pinned() + spared() < high) || (few() > 0 && pinned() + few() < high - recent);
    return overwritten ? std::min(high - rollback, seen) : 0;
  }
};

// Whether formats that spare tokens, or that transform rows, make a cache a tiered one.
constexpr bool in_tiers(bool spares, const row_transform* of_k, const row_transform* of_v) noexcept {
  return spares || of_k != nullptr || of_v != nullptr;
}

// Formats of tokens, and of those that are spared.
struct tier_formats {
  row_format k, v, whole_k, whole_v;
  const row_transform *k_transform, *v_transform;
  bool spares;  // whether either spares any
};
template <kv_format K, kv_format V>
inline constexpr tier_formats tier_formats_of{
    row_format_of<K>,  row_format_of<V>,  row_format_of<spared_format<K>>,     row_format_of<spared_format<V>>,
    transform_of<K>(), transform_of<V>(), tiered_format<K> || tiered_format<V>};

// [num_kv_heads, rows] blocks of keys and of values of the spared tokens, then of the others; each of the four begins a
// line, and a head's rows lie together.
class tiered_storage {
 public:
  struct shape {
    index_t num_kv_heads, head_dim, v_head_dim, full_rows, few_rows;
  };

  // Holds no memory where the resource had none, and exceptions are off.
  tiered_storage(const tier_formats& formats, const shape& of, std::pmr::memory_resource* resource)
      : whole_k_(formats.whole_k, of.head_dim, of.full_rows),
        whole_v_(formats.whole_v, of.v_head_dim, of.full_rows),
        k_(formats.k, of.head_dim, of.few_rows),
        v_(formats.v, of.v_head_dim, of.few_rows) {
    status found;
    const std::size_t bytes = required_bytes(found, formats, of);
    found.or_fail();
    index_t at = 0;
    for (section* s : {&whole_k_, &whole_v_, &k_, &v_}) {
      s->offset = at;
      at += round_up(of.num_kv_heads * s->rows * s->block, alignment);
    }
    memory_ = take_memory(bytes, resource);
  }

  static std::size_t required_bytes(status& found, const tier_formats& formats, const shape& of) noexcept {
    index_t bytes = 0;
    const auto add = [&](const row_format& format, index_t dim, index_t rows) {
      const index_t block = checked_block_bytes(found, *format.reader, dim);
      const index_t all = checked_product(found, "num_kv_heads * tokens", of.num_kv_heads, rows);
      const index_t size = checked_product(found, "bytes of the cache", all, block);
      const index_t padded = checked_sum(found, "bytes of the cache", size, alignment - 1) & -alignment;
      bytes = checked_sum(found, "bytes of the cache", bytes, padded);
    };
    add(formats.whole_k, of.head_dim, of.full_rows);
    add(formats.whole_v, of.v_head_dim, of.full_rows);
    add(formats.k, of.head_dim, of.few_rows);
    add(formats.v, of.v_head_dim, of.few_rows);
    return static_cast<std::size_t>(bytes);
  }

  void encode_whole(index_t kv_head, index_t row, const float* key, const float* value) const noexcept {
    whole_k_.encode(key, data() + whole_k_.at(kv_head, row));
    whole_v_.encode(value, data() + whole_v_.at(kv_head, row));
  }
  void encode(index_t kv_head, index_t row, const float* key, const float* value) const noexcept {
    k_.encode(key, data() + k_.at(kv_head, row));
    v_.encode(value, data() + v_.at(kv_head, row));
  }
  // A whole row becomes one of the others, from what is stored.
  void encode_stored(index_t kv_head, index_t whole, index_t row) const noexcept {
    alignas(64) float key[max_head_dim], value[max_head_dim];
    whole_k_.load(whole_rows_k(kv_head), whole, key);
    whole_v_.load(whole_rows_v(kv_head), whole, value);
    encode(kv_head, row, key, value);
  }

  // As parts name them.
  kv_rows whole_rows_k(index_t kv_head) const { return whole_k_.of_head(data(), kv_head); }
  kv_rows whole_rows_v(index_t kv_head) const { return whole_v_.of_head(data(), kv_head); }
  kv_rows k_rows(index_t kv_head) const { return k_.of_head(data(), kv_head); }
  kv_rows v_rows(index_t kv_head) const { return v_.of_head(data(), kv_head); }

  std::size_t nbytes() const { return memory_ ? memory_.get_deleter().bytes : 0; }
  std::byte* data() const { return memory_.get(); }
  std::pmr::memory_resource* resource() const { return memory_.get_deleter().resource; }

 private:
  static constexpr index_t alignment = cache_alignment;

  struct section {
    row_format format;
    index_t dim, rows, block, offset = 0;

    section(const row_format& of, index_t of_dim, index_t n)
        : format(of), dim(of_dim), rows(n), block(of.reader->block_bytes(of_dim)) {}

    index_t at(index_t kv_head, index_t row) const { return offset + (kv_head * rows + row) * block; }
    void encode(const float* row, std::byte* to) const noexcept { format.encode(row, dim, to); }
    void load(const kv_rows& from, index_t row, float* to) const noexcept {
      format.reader->load(from, row, 1, dim, round_up(dim, 16), to);
    }
    kv_rows of_head(const std::byte* data, index_t kv_head) const {
      return {.reader = format.reader, .base = data + at(kv_head, 0), .block = block, .head = rows * block};
    }
  };

  section whole_k_, whole_v_, k_, v_;
  cache_memory memory_;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
