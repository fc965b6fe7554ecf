#pragma once

// A block of query rows goes over the parts of a plan: each part meets the queries rotated for the tokens that were
// evicted after it (StreamingLLM's cache order, without touching a key).

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "../attention_params.hpp"
#include "absorb_unrotated.hpp"
#include "macros_off.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// Neighbouring query tokens over one source of keys and values. Its query rows are, for each KV head, [tokens, group].
// One plan holds for all of them.
struct query_block {
  const attention_params& params;
  const kv_source& source;
  const float* q;    // of the block's first row
  index_t q_stride;  // floats from token to token
  index_t tokens;    // of the block
  position_t first;  // position of the first token
  index_t group;     // query heads per KV head
  bool in_panels;    // see query_rows
  bool wants_values;

  index_t token(index_t row) const { return row / group; }
  index_t head(index_t kv_head, index_t row) const { return kv_head * group + row % group; }
  position_t query(index_t row) const { return first + token(row); }
  index_t v_head_dim() const { return wants_values ? source.geometry().v_head_dim : 0; }

  // What the rows [row, row + count) of a KV head see, of the visible tokens number [from, to) only, into the scratch's
  // state. From and to are moved back to where a tile ends; they are for a single token. Logits are kept if asked for.
  // `bound` is what logits are taken to be below from the start.
  void absorb(index_t kv_head, index_t row, index_t count, position_t from, position_t to,
              const worker_scratch& scratch, kept_logits kept = {}, float bound = no_logit) const noexcept {
    const kv_geometry& of = source.geometry();
    part_list parts(scratch.parts, source.max_parts());
    // Sums are over all queries: rows of parts have to be the same for all of them.
    const position_t last = first + tokens - 1;
    const plan_end holds = kept.sums != nullptr ? source.plan(kv_head, first, last, parts)
                                                : source.plan(kv_head, query(row), query(row + count - 1), parts);
    extent extents[max_item_rows];
    logit_terms terms[max_item_rows];
    position_t later[max_item_rows], rotated_for[max_item_rows];
    const bool has_terms = !params.alibi_slopes.empty() || !params.sink_bias.empty();
    query_rows rows{.q = scratch.q,
                    .rows = count,
                    .head_dim = of.head_dim,
                    .v_head_dim = v_head_dim(),
                    .in_panels = in_panels,
                    .terms = has_terms ? terms : nullptr,
                    .num_sink_tokens = 0,
                    .soft_cap = params.logits_soft_cap * log2_e};
    if (kept.sums == nullptr) scratch.state.clear(in_panels ? round_up(count, query_rows::panel) : count, bound);
    const bool in_cache = of.positions == positions::in_cache;
    if (in_cache) count_visible(parts, row, count, later);
    std::fill_n(rotated_for, count, -1);  // no gap
    position_t before = 0;
    bool last_rotated = false;
    for (index_t i = 0; i < parts.size(); ++i) {
      const kv_part& part = parts[i];
      const bool rotated = !part.rank_angles.empty();
      bool any = false, all = true;
      position_span span;
      for (index_t r = 0, end; r < count; r = end) {
        const position_t at = query(row + r);
        end = std::min(count, r + group - (row + r) % group);
        const position_span of_query = span_of(part, at);
        if (r == 0) span = of_query;
        position_t gap = part.placeless ? extent::placeless : 0;
        if (in_cache && !part.placeless) {
          const index_t seen_here = num_seen(part, at, of_query);
          later[r] -= seen_here;
          gap = at + 1 - later[r] - (part.at.empty() ? of_query.last : seen_here);
        }
        const extent seen = extent_of(of_query, gap, from - before, to - before);
        std::fill(extents + r, extents + end, seen);
        any = any || seen.lo < seen.hi;
        all = all && (part.at.empty() || rotated || sees_all(part, at));
      }
      if (kept.sums != nullptr) span = span_of(part, first, last);
      kept.first = static_cast<index_t>(before - (span.first - first_of(part)));
      before += span.size();
      if (kept.stride > 0 && before > kept.stride) broken_source("a query's parts have more rows than capacity()");
      if (in_cache && !part.at.empty() && part.seen_until != kv_part::always && !part.placeless)
        broken_source("rows with positions of their own, in cache order, have to be seen for ever");
      if (rotated) require_rotatable(part);
      if (!any || part.k.reader == nullptr) continue;
      rows.num_sink_tokens = first_of(part) + part.pinned;
      if (has_terms) set_terms(part, kv_head, row, count, terms);
      if (of.k_transform != nullptr && rotated != last_rotated) std::fill_n(rotated_for, count, -1);
      last_rotated = rotated;
      if (rotated) {
        absorb_rotated(part, rows, kv_head, row, extents, rotated_for, scratch, kept);
      } else if (all && (part.at.empty() || (of.positions == positions::absolute && params.alibi_slopes.empty()))) {
        rotate_queries(kv_head, row, count, extents, 0, of.k_transform, rotated_for, scratch);
        const std::byte* const next =
            in_panels ? nullptr : keys_after(parts, i, query(row + count - 1), holds.kv_heads);
        detail::absorb(part, rows, extents, scratch.state, scratch.tile, next, kept);
      } else {
        for (index_t r = 0, end; r < count; r = end) {
          end = std::min({count, r + group - (row + r) % group, r + tile_scratch::max_rows});
          absorb_scattered(part, rows, kv_head, row, r, end - r, extents[r], scratch, kept);
        }
      }
    }
    if (kept.sums != nullptr) return;
    scratch.state.settle(count);
    if (of.v_transform != nullptr && wants_values)
      for (index_t r = 0; r < count; ++r)
        of.v_transform->undo(scratch.state.o + r * scratch.state.o_stride, of.v_head_dim);
  }

 private:
  // How many tokens of all parts each row's query sees, at the first row of each token.
  void count_visible(const part_list& parts, index_t row, index_t count, position_t* visible) const noexcept {
    for (index_t r = 0; r < count; r += group - (row + r) % group) {
      visible[r] = 0;
      for (const kv_part& part : parts)
        if (!part.placeless) visible[r] += num_seen(part, query(row + r), span_of(part, query(row + r)));
    }
  }

  // What a query sees of a part, cut to the tokens number [from, to) of it, moved back to where a tile ends.
  static extent extent_of(const position_span& span, position_t gap, position_t from, position_t to) noexcept {
    const auto cut = [&](position_t number) {
      const position_t at = span.first + number;
      return at < span.last ? std::max(at - at % tile_scratch::keys, span.first) : span.last;
    };
    return {cut(from), cut(to), gap};
  }

  // Where the keys lie that are likely to be read after those of part number i: what the query sees of the next one, or
  // the next head's first.
  static const std::byte* keys_after(const part_list& parts, index_t i, position_t query, index_t heads) noexcept {
    const auto address = [&](const kv_part& part, index_t head) {
      index_t row = part.row + static_cast<index_t>(span_of(part, query).first - first_of(part)), page = 0;
      if (!part.pages.empty()) {
        page = part.pages[static_cast<std::size_t>(row / part.page_rows)];
        row %= part.page_rows;
      }
      return part.k.base + head * part.k.head + page * part.k.page + row * part.k.block;
    };
    for (++i; i < parts.size(); ++i)
      if (parts[i].k.reader != nullptr && span_of(parts[i], query).size() > 0) return address(parts[i], 0);
    if (heads <= 1 || parts[0].k.reader == nullptr || span_of(parts[0], query).size() == 0) return nullptr;
    return address(parts[0], 1);
  }

  // The queries of all rows for the gaps of these extents and `more`, in the scratch. What they were rotated for last
  // is rotated_for.
  void rotate_queries(index_t kv_head, index_t row, index_t count, const extent* extents, position_t more,
                      const row_transform* transform, position_t* rotated_for,
                      const worker_scratch& scratch) const noexcept {
    bool done = true;
    for (index_t r = 0; r < count; ++r)
      done = done && (extents[r].lo >= extents[r].hi || extents[r].gap + more == rotated_for[r]);
    if (done) return;
    for (index_t r = 0; r < count; ++r) rotated_for[r] = extents[r].gap + more;
    const index_t dim = source.geometry().head_dim;
    if (!in_panels) return rotate_rows(kv_head, row, count, rotated_for, transform, scratch.q);
    for (index_t r = 0; r < count; r += query_rows::panel)
      to_panel(kv_head, row + r, std::min(query_rows::panel, count - r), rotated_for + r, transform, scratch.tile.k,
               scratch.q + r * round_up(dim, 16));
  }

  // Copies query rows, rotated to their position less the gap of each, and scaled.
  void rotate_rows(index_t kv_head, index_t row, index_t count, const position_t* gaps, const row_transform* transform,
                   float* to) const noexcept {
    const kv_geometry& of = source.geometry();
    const index_t dim = of.head_dim, padded = round_up(dim, 16);
    const float scale = log2_e * params.sm_scale.value_or(1.f / std::sqrt(static_cast<float>(dim)));
    const bool raw = of.inputs == inputs::raw;
    rope::angles angles;
    for (index_t r = 0; r < count; ++r, to += padded) {
      const index_t of_token = token(row + r);
      const float* const row_q = q + of_token * q_stride + head(kv_head, row + r) * dim;
      constexpr index_t ahead = 8;  // tokens: hardware prefetches no rows that lie so far apart
      if (of_token + ahead < tokens)
        for (index_t i = 0; i < dim; i += 16) __builtin_prefetch(row_q + ahead * q_stride + i);
      // A query that meets tokens without positions has none: a raw one as it is, a rotated one rotated back.
      const bool placeless = gaps[r] == extent::placeless;
      const position_t at = of.first_position + first + of_token, by = raw ? at - gaps[r] : placeless ? -at : -gaps[r];
      if (of.rotates() && (raw ? !placeless : by != 0)) {
        if (r == 0 || (row + r) % group == 0) of.rope->angles_at(by, raw, angles);
        of.rope->rotate(angles, row_q, dim, to);
        if (placeless)
          for (index_t i = 0; i < of.rope->width(); ++i) to[i] /= of.rope->attention_factor();
      } else {
        std::copy_n(row_q, dim, to);
      }
      if (transform != nullptr) transform->apply(to, dim);
      std::fill(to + dim, to + padded, 0.f);
      for (index_t i = 0; i < padded; i += lanes) store(to + i, load(to + i) * scale);
    }
  }

  // The same as a panel [dim, panel], with rows of zeros after the last.
  void to_panel(index_t kv_head, index_t row, index_t count, const position_t* gaps, const row_transform* transform,
                float* scratch, float* to) const noexcept {
    constexpr index_t panel = query_rows::panel;
    const index_t dim = round_up(source.geometry().head_dim, 16);
    rotate_rows(kv_head, row, count, gaps, transform, scratch);
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

  void set_terms(const kv_part& part, index_t kv_head, index_t row, index_t count, logit_terms* terms) const noexcept {
    const auto of_head = [](const std::vector<float>& values, index_t head) {
      return values.empty() ? 0.f : values[static_cast<std::size_t>(head)] * log2_e;
    };
    for (index_t r = 0; r < count; ++r) {
      const index_t h = head(kv_head, row + r);
      terms[r] = {query(row + r), part.placeless ? 0.f : of_head(params.alibi_slopes, h), of_head(params.sink_bias, h)};
    }
  }

  void require_rotatable(const kv_part& part) const noexcept {
    const kv_geometry& of = source.geometry();
    if (!of.rotates() || static_cast<index_t>(part.rank_angles.size()) != of.rope->rank_angles_size())
      broken_source("rank_angles have to be those of the geometry's rope");
    if (of.positions != positions::in_cache || part.placeless)
      broken_source("keys with rank_angles need positions in cache order");
    if (!part.rank.empty()) broken_source("keys with rank_angles lie in the order of their age: they have no rank");
  }

  // A part whose keys are stored as they were before rope. Queries are rotated to where they count as being: by as much
  // more as their first_position, which no place has.
  void absorb_rotated(const kv_part& part, const query_rows& rows, index_t kv_head, index_t row, const extent* extents,
                      position_t* rotated_for, const worker_scratch& scratch, const kept_logits& kept) const noexcept {
    const key_rotations rotations{*source.geometry().rope, part.rank_angles.data(), source.geometry().k_transform};
    const position_t more = source.geometry().first_position;
    if (in_panels) {
      rotate_queries(kv_head, row, rows.rows, extents, more, nullptr, rotated_for, scratch);
      return detail::absorb(part, rows, extents, scratch.state, scratch.tile, nullptr, kept, &rotations);
    }
    absorb_unrotated(part, rotations, rows, extents, scratch.state, scratch.tile, kept,
                     [&](index_t r, index_t count, position_t base, float* to) {
                       position_t gaps[tile_scratch::max_rows];
                       for (index_t i = 0; i < count; ++i) gaps[i] = extents[r + i].gap + more + base;
                       rotate_rows(kv_head, row + r, count, gaps, nullptr, to);
                     });
  }

  // `count` rows of one token, from number r of the block's on, over a part whose rows have positions of their own:
  // whatever the order of those, whatever it sees of them, with a copy of the queries for every run of rows that stand
  // as far from it in the cache as in the stream.
  void absorb_scattered(const kv_part& part, const query_rows& rows, index_t kv_head, index_t row, index_t r,
                        index_t count, const extent& seen, const worker_scratch& scratch,
                        const kept_logits& kept) const noexcept {
    const tile_scratch& memory = scratch.tile;
    const position_t at = query(row + r), shown_at = at - seen.gap;  // where the query counts as being
    const bool in_cache = source.geometry().positions == positions::in_cache;
    const index_t dim = round_up(rows.head_dim, 16);
    const auto place = [&](index_t i) -> position_t {
      if (!in_cache || part.placeless) return part.position(i);
      return part.rank.empty() ? i : part.rank[static_cast<std::size_t>(i)];
    };
    const row_loader keys(part.k, rows.head_dim, memory.k), values(part.v, rows.v_head_dim, memory.v);
    query_rows capped = rows;
    capped.terms = nullptr;
    for (position_t tile = seen.lo, end; tile < seen.hi; tile = end) {
      end = std::min(seen.hi, tile - tile % tile_scratch::keys + tile_scratch::keys);
      index_t number[tile_scratch::keys];
      tile_runs lie;
      for (position_t i = tile, next; i < end; i = next) {
        for (next = i; next < end && sees(part, at, part.position(static_cast<index_t>(next))); ++next)
          number[lie.num_rows() + next - i] = static_cast<index_t>(next);
        if (next > i)
          lie.add(part, static_cast<index_t>(i), static_cast<index_t>(next - i));
        else
          ++next;
      }
      const index_t n = lie.num_rows();
      if (n == 0) continue;
      const loaded_rows k = keys.load(lie), v = rows.v_head_dim > 0 ? values.load(lie) : k;
      for (index_t j = 0, run; j < n; j = run) {
        const position_t by = part.position(number[j]) - place(number[j]);
        run = j + 1;
        while (run < n && part.position(number[run]) - place(number[run]) == by) ++run;
        position_t gaps[tile_scratch::max_rows];
        std::fill_n(gaps, count, part.placeless ? extent::placeless : seen.gap - by);
        rotate_rows(kv_head, row + r, count, gaps, source.geometry().k_transform, memory.rotated);
        const float* const packed = k.reader->pack(memory.rotated, count, dim, memory.q);
        in_groups(count, [&]<int Rows>(index_t of, index_t number_of_group) {
          k.reader->dots(packed + of * dim, Rows, dim, k.rows.from_row(j), run - j, v.rows,
                         logits_of(memory.logits, number_of_group) + j * Rows);
        });
      }
      in_groups(count, [&]<int Rows>(index_t of, index_t number_of_group) {
        float* const logits = logits_of(memory.logits, number_of_group);
        if (rows.soft_cap > 0) adjust_logits<Rows>(capped, r + of, nullptr, 0, n, logits);
        for (index_t j = 0; j < n; ++j) {
          const auto distance = static_cast<float>(place(number[j]) - shown_at);
          for (int i = 0; i < Rows && rows.terms != nullptr; ++i) {
            const logit_terms& terms = rows.terms[r + of + i];
            logits[j * Rows + i] += (part.placeless ? 0.f : terms.alibi_slope * distance);
            if (number[j] < part.pinned) logits[j * Rows + i] += terms.sink_bias;
          }
          if (kept.to != nullptr) kept.keep<Rows>(logits + j * Rows, r + of, number[j], 1);
          for (int i = 0; i < Rows && kept.sums != nullptr; ++i)
            kept.sums->to[kept.first + number[j]] += kept.sums->of(r + of + i, logits[j * Rows + i]);
        }
      });
      if (kept.sums != nullptr) continue;
      absorb_values(rows, r, count, v, 0, n, k.rows.from_row(n), scratch.state, memory.logits);
    }
  }
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
