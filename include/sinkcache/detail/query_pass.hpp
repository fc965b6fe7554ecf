#pragma once

// A block of query rows goes over the keys that it sees: each run of neighbours behind a gap meets the queries turned
// for that gap (StreamingLLM's cache order, without touching a key).

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

#include "../attention_params.hpp"
#include "macros_off.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// One worker's memory, for up to `rows` query rows of a head_dim and v_head_dim up to these.
struct worker_scratch {
  struct shape {
    index_t rows, head_dim, v_head_dim;

    index_t k_dim() const { return round_up(head_dim, 16); }
    index_t v_dim() const { return round_up(v_head_dim, 16); }
  };

  worker_scratch(const shape& of, std::byte* memory) {
    auto* at = reinterpret_cast<float*>(memory);
    const auto take = [&](index_t floats) { return std::exchange(at, at + floats); };
    const index_t rows = of.rows, v_dim = of.v_dim();
    q = take(rows * of.k_dim());
    state = {{take(rows), take(rows), take(rows * v_dim), v_dim}, take(rows), take(rows * v_dim)};
    tile = {take(tile_scratch::k_floats(of.k_dim())), take(tile_scratch::v_floats(v_dim)),
            take(tile_scratch::logits_floats), take(tile_scratch::q_floats(of.k_dim()))};
  }

  static index_t bytes(const shape& of) {
    return index_t{sizeof(float)} *
           (of.rows * (of.k_dim() + 2 * of.v_dim() + 3) + tile_scratch::k_floats(of.k_dim()) +
            tile_scratch::v_floats(of.v_dim()) + tile_scratch::logits_floats + tile_scratch::q_floats(of.k_dim()));
  }

  float* q;
  running_states state;
  tile_scratch tile;
};

// How many of so many query rows a work item takes: whole panels.
inline constexpr index_t max_item_rows = 384;
inline index_t rows_of_an_item(index_t rows) {
  return std::min(max_item_rows, round_up(rows, std::max<index_t>(16, query_rows::panel)));
}

// Neighbouring query tokens over one source of keys and values. Its query rows are, for each KV head, [tokens, group].
struct query_block {
  const attention_params& params;
  const cache_config& config;
  const segment_source& source;
  const_matrix_view q;
  index_t first_row;  // of q
  position_t first;   // position of the first token
  index_t group;      // query heads a KV head
  bool in_panels;     // see query_rows

  index_t token(index_t row) const { return row / group; }
  index_t head(index_t kv_head, index_t row) const { return kv_head * group + row % group; }

  // What the rows [row, row + count) of a KV head see, of the visible tokens number [from, to) only, into the scratch's
  // state. From and to are moved back to where a tile ends.
  void absorb(index_t kv_head, index_t row, index_t count, position_t from, position_t to,
              const worker_scratch& scratch) const noexcept {
    extent extents[max_item_rows];
    logit_terms terms[max_item_rows];
    const bool has_terms = !params.alibi_slopes.empty() || !params.sink_bias.empty();
    const query_rows rows{scratch.q,
                          count,
                          config.head_dim,
                          config.v_head_dim,
                          in_panels,
                          has_terms ? terms : nullptr,
                          config.num_sink_tokens,
                          params.logits_soft_cap * log2_e};
    const index_t padded = in_panels ? round_up(count, query_rows::panel) : count;
    scratch.state.clear(padded);
    // Tokens with as many gaps behind them share a pass: the k-th span of every row, with the query turned for its gap.
    index_t num_spans = 1;
    for (index_t k = 0; k < num_spans; ++k) {
      position_t lo = max_position, hi = 0;
      for (index_t r = 0, end; r < count; r = end) {
        const extent seen = extent_of(token(row + r), k, from, to, num_spans);
        end = std::min(count, r + group - (row + r) % group);
        std::fill(extents + r, extents + end, seen);
        if (seen.lo >= seen.hi) continue;
        lo = std::min(lo, seen.lo);
        hi = std::max(hi, seen.hi);
      }
      if (lo >= hi) continue;
      if (in_panels)
        for (index_t r = 0; r < count; r += query_rows::panel)
          to_panel(kv_head, row + r, std::min(query_rows::panel, count - r), extents + r, scratch.tile.k,
                   scratch.q + r * round_up(config.head_dim, 16));
      else
        turn_queries(kv_head, row, count, extents, scratch.q);
      if (has_terms) set_terms(kv_head, row, count, terms);
      while (lo < hi) {
        segment next = source.segment_at(kv_head, lo, hi);
        if (!in_panels && next.last - lo >= 16)  // fewer leave no time to bring others in
          next.next_keys = keys_after(kv_head, token(row + count - 1), k, next.last);
        next.absorb(next, rows, extents, scratch.state, scratch.tile);
        lo = next.last;
      }
    }
    scratch.state.settle(count);
  }

 private:
  // The k-th span that a token sees, cut to the visible tokens number [from, to), moved back to where a tile ends.
  extent extent_of(index_t token, index_t k, position_t from, position_t to, index_t& num_spans) const noexcept {
    const position_t seen = first + token + 1;
    const span_list visible = source.visible(seen);
    num_spans = std::max(num_spans, visible.size());
    if (k >= visible.size()) return {0, 0, 0};
    position_t before = 0;
    for (index_t i = 0; i < k; ++i) before += visible[i].size();
    const position_span span = visible[k];
    const position_t gap = config.positions == positions::in_cache ? visible.gap(k, seen) : 0;
    const auto cut = [&](position_t number) {
      const position_t at = span.first + number - before;
      return at < span.last ? std::max(at - at % tile_scratch::keys, span.first) : span.last;
    };
    return {cut(from), cut(to), gap};
  }

  // Where the keys lie that are likely to be read after those of the k-th span before position `last`: what the token
  // sees behind them, or the next head's newest.
  const std::byte* keys_after(index_t kv_head, index_t token, index_t k, position_t last) const noexcept {
    const span_list visible = source.visible(first + token + 1);
    if (k >= visible.size()) return nullptr;
    if (last >= visible[k].last) {
      const bool more = k + 1 < visible.size();
      if (!more && ++kv_head == config.num_kv_heads) return nullptr;
      last = visible[more ? k + 1 : k].first;
    }
    const segment at = source.segment_at(kv_head, last, last + 1);
    return at.k + at.row * at.k_block;
  }

  // Copies query rows, turned to their position less the gap, and scaled.
  void turn_queries(index_t kv_head, index_t row, index_t count, const extent* extents, float* to) const noexcept {
    const index_t dim = config.head_dim, padded = round_up(dim, 16);
    const float scale = log2_e * params.sm_scale.value_or(1.f / std::sqrt(static_cast<float>(dim)));
    const bool raw = config.inputs == inputs::raw;
    rope::angles angles;
    for (index_t r = 0; r < count; ++r, to += padded) {
      if (extents[r].lo >= extents[r].hi) {
        std::fill_n(to, padded, 0.f);
        continue;
      }
      const float* const row_q = q.row(first_row + token(row + r)) + head(kv_head, row + r) * dim;
      constexpr index_t ahead = 8;  // tokens: hardware brings in no rows that lie so far apart
      if (first_row + token(row + r) + ahead < q.rows())
        for (index_t i = 0; i < dim; i += 16) __builtin_prefetch(row_q + ahead * q.stride() + i);
      const position_t gap = extents[r].gap;
      if (config.rope && config.rope->width() > 0 && (raw || gap != 0)) {
        if (r == 0 || (row + r) % group == 0)
          config.rope->angles_at(raw ? config.first_position + first + token(row + r) - gap : -gap, raw, angles);
        config.rope->turn(angles, row_q, dim, to);
      } else {
        std::copy_n(row_q, dim, to);
      }
      std::fill(to + dim, to + padded, 0.f);
      for (index_t i = 0; i < padded; i += lanes) store(to + i, load(to + i) * scale);
    }
  }

  // The same as a panel [dim, panel], with rows of zeros behind the last.
  void to_panel(index_t kv_head, index_t row, index_t count, const extent* extents, float* scratch,
                float* to) const noexcept {
    constexpr index_t panel = query_rows::panel;
    const index_t dim = round_up(config.head_dim, 16);
    turn_queries(kv_head, row, count, extents, scratch);
    std::fill(scratch + count * dim, scratch + panel * dim, 0.f);
    for (index_t d = 0; d < dim; d += lanes)
      for (index_t r = 0; r < panel; r += lanes) {
        vfloat block[lanes];
#pragma GCC unroll 16
        for (index_t i = 0; i < lanes; ++i) block[i] = load(scratch + (r + i) * dim + d);
        transpose(block);
#pragma GCC unroll 16
        for (index_t i = 0; i < lanes; ++i) store(to + (d + i) * panel + r, block[i]);
      }
  }

  void set_terms(index_t kv_head, index_t row, index_t count, logit_terms* terms) const noexcept {
    const auto of_head = [](const std::vector<float>& values, index_t head) {
      return values.empty() ? 0.f : values[static_cast<std::size_t>(head)] * log2_e;
    };
    for (index_t r = 0; r < count; ++r) {
      const index_t h = head(kv_head, row + r);
      terms[r] = {first + token(row + r), of_head(params.alibi_slopes, h), of_head(params.sink_bias, h)};
    }
  }
};

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "macros_on.hpp"
