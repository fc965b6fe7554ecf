#pragma once

// How a cache that evicts by score learns from calls of attention.

#include <algorithm>
#include <cmath>

#include "../attention.hpp"
#include "macros_off.hpp"
#include "scored_state.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// As std::atomic_ref, which libc++ has only from 19 on.
template <class T>
T load_relaxed(const T& from) noexcept {
  T value;
  __atomic_load(&from, &value, __ATOMIC_RELAXED);
  return value;
}
template <class T>
void store_relaxed(T& to, T value) noexcept {
  __atomic_store(&to, &value, __ATOMIC_RELAXED);
}

class scored_learner : public weight_reader {
 public:
  scored_learner(scored_state& state, const any_kv_cache* of) noexcept : cache(of), s_(state) {}

  const any_kv_cache* cache;  // whose learner it is

  // Whether queries older than the last event are asked for: over what is kept now.
  bool looks_back() const noexcept { return load_relaxed(looking_back_) > 0; }

  // One by one those that may be taken back or are the last before an event; of the others sums will do.
  bool wants(position_t query) const noexcept override {
    return (s_.needs.sums && query >= one_by_one()) || is_last(own(query));
  }
  bool wants_sums(position_t first, position_t last) const noexcept override {
    return s_.needs.sums && last < one_by_one() && own(first) >= s_.log.learned();
  }
  index_t num_queries_again() const noexcept override { return s_.needs.window; }
  void read_sums(const weight_sums& sums) noexcept override {
    if (!s_.holds(*sums.part, sums.kv_head) || own(sums.query) < s_.log.learned(sums.kv_head)) return;
    s_.log.add_sums(s_.rows.sums(sums.kv_head) + sums.part->mark + sums.first, sums.sums);
  }

  void read(const weight_tile& tile) noexcept override {
    const index_t h = tile.kv_head;
    const position_t query = own(tile.query);
    if (query < s_.log.learned(h) || !s_.holds(*tile.part, h)) return;
    const index_t row = tile.part->mark + tile.first, in_pool = s_.rows.head(h).first + row;
    if (s_.needs.sums && tile.query >= one_by_one()) s_.log.add(s_.rows.sums(h) + row, query, in_pool, tile);
    if (!is_last(query)) return;
    if (s_.needs.last_query) over_group(tile, nullptr, s_.log.window(0) + in_pool);
    if (s_.of.rules.accounts)
      for (index_t g = 0; g < tile.num_qo_heads; ++g)
        for (index_t j = 0; j < tile.n; ++j)
          s_.log.last((tile.first_qo_head + g) % s_.log.group())[in_pool + j] = tile.weight(j, g);
  }

  void require(status& found, const attention_call& call) const noexcept override {
    found.require(call.keys.ends_with(*cache), "keys", "another source", "one that ends with the cache that learns");
    found.require(call.params.num_qo_heads == s_.of.rules.num_qo_heads, "num_qo_heads", call.params.num_qo_heads,
                  "that of the cache's eviction,", s_.of.rules.num_qo_heads);
    if (!found) return;
    const position_t first = call.first - (call.keys.seen() - cache->seen());
    for (index_t h = call.first_kv_head; h < call.first_kv_head + call.num_kv_heads; ++h)
      if (first > s_.log.learned(h))
        return found.refuse("the first query was that of token {}, had to be at most {}: {} learns from all of them",
                            first, s_.log.learned(h), s_.of.scorer->name());
  }

  void begin(const attention_call& call) noexcept override {
    // What calls for other heads write too is the same.
    store_relaxed(shift_, call.keys.seen() - cache->seen());
    const float scale = call.params.sm_scale.value_or(1 / std::sqrt(static_cast<float>(s_.of.geometry.head_dim)));
    store_relaxed(s_.sm_scale, scale);
    const position_t end = call.first + call.q.rows();
    store_relaxed(one_by_one_, end + std::min<position_t>(0, call.following - s_.of.rollback));
    const index_t kept = s_.log.num_queries(), columns = s_.log.group() * s_.of.geometry.head_dim;
    for (index_t i = std::max<index_t>(0, call.q.rows() - kept); i < call.q.rows(); ++i)
      if (own(call.first + i) >= 0)  // not of a cache that is empty
        std::copy_n(call.q.row(i) + call.first_kv_head * columns, call.num_kv_heads * columns,
                    s_.log.q(own(call.first + i)) + call.first_kv_head * columns);
  }

  void end(const attention_call& call, const attention& by, workspace& memory) noexcept override {
    const position_t learned = own(call.first) + call.q.rows();
    if (s_.needs.window > 0 && learned == cache->seen() && s_.is_due(learned) && s_.is_over_budget(0) &&
        !look_back(call, by, memory))
      return;
    for (index_t h = call.first_kv_head; h < call.first_kv_head + call.num_kv_heads; ++h)
      s_.log.set_learned(h, std::max(s_.log.learned(h), learned));
  }

 private:
  // Reads what the newest queries give what is kept now.
  class window_reader final : public weight_reader {
   public:
    window_reader(scored_learner& of, position_t first) noexcept : of_(of), first_(first) {}

    bool wants(position_t) const noexcept override { return !of_.s_.needs.together; }
    bool wants_sums(position_t, position_t) const noexcept override { return of_.s_.needs.together; }
    void read_sums(const weight_sums& sums) noexcept override {
      if (!of_.s_.holds(*sums.part, sums.kv_head)) return;
      const scored_state& s = of_.s_;
      const auto queries = static_cast<float>(std::min<position_t>(s.needs.window, of_.cache->seen()) * s.log.group());
      float* const to = s.log.window(0) + s.rows.head(sums.kv_head).first + sums.part->mark + sums.first;
      for (std::size_t j = 0; j < sums.sums.size(); ++j) to[j] += sums.sums[j] / queries;
    }
    void read(const weight_tile& tile) noexcept override {
      if (!of_.s_.holds(*tile.part, tile.kv_head)) return;
      const scored_state& s = of_.s_;
      const auto w = static_cast<index_t>(tile.query - first_);
      of_.over_group(tile, s.log.window_lse() + w * s.of.rules.num_qo_heads,
                     s.log.window(w) + s.rows.head(tile.kv_head).first + tile.part->mark + tile.first);
    }

   private:
    scored_learner& of_;
    position_t first_;
  };

  position_t one_by_one() const noexcept { return load_relaxed(one_by_one_); }
  position_t own(position_t query) const noexcept { return query - load_relaxed(shift_); }
  bool is_last(position_t query) const noexcept {
    return (s_.needs.last_query || s_.of.rules.accounts) && s_.is_due(query + 1);
  }

  // What a query gave rows, over the group as the scorer wants it.
  void over_group(const weight_tile& tile, const float* lse, float* to) const noexcept {
    using over = scorer_needs::over_group;
    const index_t group = s_.log.group();
    const bool first = tile.first_qo_head % group == 0;
    for (index_t j = 0; j < tile.n; ++j) {
      float sum = 0, most = -std::numeric_limits<float>::infinity();
      for (index_t g = 0; g < tile.num_qo_heads; ++g) {
        const float w = tile.weight(j, g);
        if (w == w) sum += w;
        most = std::max(most, s_.needs.group == over::max_logits ? std::log(w) + lse[tile.first_qo_head + g] : w);
      }
      if (s_.needs.group == over::mean)
        to[j] = (first ? 0.f : to[j]) + sum / static_cast<float>(group);
      else
        to[j] = first ? most : std::max(to[j], most);
    }
  }

  // Attends with the newest queries again, over what is kept now.
  bool look_back(const attention_call& call, const attention& by, workspace& memory) noexcept {
    const kv_geometry& of = s_.of.geometry;
    const auto n = static_cast<index_t>(std::min<position_t>(s_.needs.window, cache->seen()));
    const index_t q_dim = s_.of.rules.num_qo_heads * of.head_dim;
    const index_t columns = s_.log.group() * of.head_dim;
    for (index_t w = 0; w < n; ++w)
      std::copy_n(s_.log.q(cache->seen() - n + w) + call.first_kv_head * columns, call.num_kv_heads * columns,
                  s_.log.window_q() + w * q_dim + call.first_kv_head * columns);
    window_reader reader(*this, call.keys.seen() - n);
    float unseen = 0;
    if (s_.needs.group == scorer_needs::over_group::max_logits) unseen = -std::numeric_limits<float>::infinity();
    for (index_t w = 0; w < (s_.needs.together ? 1 : n); ++w)
      for (index_t h = call.first_kv_head; h < call.first_kv_head + call.num_kv_heads; ++h)
        std::fill_n(s_.log.window(w) + s_.rows.head(h).first, s_.rows.head(h).n, unseen);
    __atomic_fetch_add(&looking_back_, 1, __ATOMIC_RELAXED);
    const status done =
        by.try_attend(const_matrix_view(s_.log.window_q(), n, q_dim), call.keys, matrix_view(nullptr, 0, 0), memory,
                      {.lse = {s_.log.window_lse(), static_cast<std::size_t>(n * s_.of.rules.num_qo_heads)},
                       .weights = &reader,
                       .out = false},
                      {.first_kv_head = call.first_kv_head, .num_kv_heads = call.num_kv_heads});
    __atomic_fetch_sub(&looking_back_, 1, __ATOMIC_RELAXED);
    return done.ok();
  }

  scored_state& s_;
  mutable position_t shift_ = 0;       // tokens of other sources in front
  mutable position_t one_by_one_ = 0;  // queries from here on may be taken back
  mutable index_t looking_back_ = 0;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
