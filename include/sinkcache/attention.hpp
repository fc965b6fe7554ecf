#pragma once

// Attention of query rows over a cache. Every query reads what decode would read: prefill encodes its tokens first and
// attends to cache and block, so any chunking of a stream gives the same.
//
// Work is cut by positions into items (KV head, block of query rows, slice of the visible tokens), never by threads or
// slots, and partial states merge in item order: the result is the same to the bit for any number of threads.

#include <vector>

#include "attention_params.hpp"
#include "kv_cache.hpp"
#include "workspace.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

// Attention of one layer. Query head h reads KV head h / (num_qo_heads / num_kv_heads). Calls are const and may run
// concurrently, each with a workspace of its own; no output may overlap an input.
//
// A try_ function returns why it refused, and then has changed nothing; an executor that throws ends the program in it.
class attention {
 public:
  explicit attention(attention_params params) : params_(std::move(params)) { validate(params_).or_fail(); }

  const attention_params& params() const { return params_; }

  // Attention of the newest token, already appended: q [1, num_qo_heads * head_dim], out [1, num_qo_heads *
  // v_head_dim], lse [num_qo_heads] if given. Allocates nothing beyond what `workspace` says.
  void decode(const_matrix_view q, const any_kv_cache& cache, matrix_view out, workspace& workspace,
              float* lse = nullptr) const {
    detail::check_decode(params_, q, cache, out).or_fail();
    workspace.reserve(workspace_bytes(cache, 1, workspace.concurrency()));
    decode_checked(q, cache, out, workspace, lse);
  }
  status try_decode(const_matrix_view q, const any_kv_cache& cache, matrix_view out, workspace& workspace,
                    float* lse = nullptr) const noexcept {
    status found = detail::check_decode(params_, q, cache, out);
    make_room(found, cache, 1, workspace);
    if (found) decode_checked(q, cache, out, workspace, lse);
    return found;
  }

  // As decode, but merges the partial result into `state`, without the sink: for tokens that are split over several
  // caches. `state.finish` completes it.
  void attend(const_matrix_view q, const any_kv_cache& cache, attention_state& state, workspace& workspace) const {
    detail::check_attend(params_, q, cache, state).or_fail();
    workspace.reserve(workspace_bytes(cache, 1, workspace.concurrency()));
    attend_checked(q, cache, state, workspace);
  }
  status try_attend(const_matrix_view q, const any_kv_cache& cache, attention_state& state,
                    workspace& workspace) const noexcept {
    status found = detail::check_attend(params_, q, cache, state);
    make_room(found, cache, 1, workspace);
    if (found) attend_checked(q, cache, state, workspace);
    return found;
  }

  // Attends with and appends any number of tokens: q [tokens, num_qo_heads * head_dim], k and v as in append, out
  // [tokens, num_qo_heads * v_head_dim], lse [tokens, num_qo_heads] if given. Each token sees what it would see in
  // decode. Allocates only where the workspace has seen no chunk as long.
  void prefill(const_matrix_view q, const_matrix_view k, const_matrix_view v, any_kv_cache& cache, matrix_view out,
               workspace& workspace, float* lse = nullptr) const {
    detail::check_prefill(params_, q, k, v, cache, out).or_fail();
    workspace.reserve(workspace_bytes(cache, q.rows(), workspace.concurrency()));
    prefill_checked(q, k, v, cache, out, workspace, lse);
  }
  status try_prefill(const_matrix_view q, const_matrix_view k, const_matrix_view v, any_kv_cache& cache,
                     matrix_view out, workspace& workspace, float* lse = nullptr) const noexcept {
    status found = detail::check_prefill(params_, q, k, v, cache, out);
    make_room(found, cache, q.rows(), workspace);
    if (found) prefill_checked(q, k, v, cache, out, workspace, lse);
    return found;
  }

  // What a workspace needs for decode (tokens = 1) or prefill of so many tokens, with an executor of that concurrency.
  index_t workspace_bytes(const any_kv_cache& cache, index_t tokens, index_t concurrency = 1) const {
    status found;
    const index_t bytes = workspace_bytes(found, cache, tokens, concurrency);
    found.or_fail();
    return bytes;
  }

 private:
  static constexpr index_t rows_at_once = 64, slice_tokens = 512, stretch_tokens = 1024, max_slices = 16;
  static constexpr position_t everything = max_position;

  // One block of query tokens over one cache.
  struct query_block {
    const any_kv_cache& cache;
    const_matrix_view q;
    index_t first_row, tokens;  // rows of q
    position_t first;           // position of the first of them
    position_t cached;          // positions below are in the cache, the others in the staged block
    const std::byte* block;
  };

  // How a workspace's memory is shared out for one cache.
  struct memory_layout {
    memory_layout(const cache_config& of, const workspace& workspace)
        : config(of),
          scratch_bytes(worker_scratch::bytes(of)),
          memory(workspace.memory_.get()),
          shared(memory + workspace.concurrency_ * scratch_bytes) {}

    const cache_config& config;
    index_t scratch_bytes;
    std::byte *memory, *shared;  // a scratch for each worker, then staging or partial states
  };

  // One worker's memory, for up to rows_at_once rows.
  struct worker_scratch {
    worker_scratch(const memory_layout& layout, index_t worker) {
      const auto [k_dim, v_dim, keys] = sizes(layout.config);
      auto* at = reinterpret_cast<float*>(layout.memory + worker * layout.scratch_bytes);
      const auto take = [&](index_t floats) { return std::exchange(at, at + floats); };
      q = take(rows_at_once * k_dim);
      state = {take(rows_at_once), take(rows_at_once), take(rows_at_once * v_dim), v_dim};
      stretch = {take(rows_at_once), take(rows_at_once), take(rows_at_once * v_dim), v_dim};
      tile = {take(keys * k_dim), take(keys * v_dim), take(4 * tile_scratch::stride)};
    }
    static index_t bytes(const cache_config& config) {
      const auto [k_dim, v_dim, keys] = sizes(config);
      return index_t{sizeof(float)} *
             ((rows_at_once + keys) * (k_dim + v_dim) + rows_at_once * (v_dim + 4) + 4 * tile_scratch::stride);
    }
    // Padded head_dim and v_head_dim, and the keys of a tile.
    static std::array<index_t, 3> sizes(const cache_config& config) {
      return {detail::round_up(config.head_dim, 16), detail::round_up(config.v_head_dim, 16),
              tile_scratch::keys(config.head_dim, config.v_head_dim)};
    }

    float* q;
    detail::states state, stretch;
    tile_scratch tile;
  };

  static index_t state_floats(const cache_config& config) { return detail::round_up(config.v_head_dim, 16) + 16; }

  index_t group_size(const any_kv_cache& cache) const { return params_.num_qo_heads / cache.config().num_kv_heads; }

  index_t workspace_bytes(status& found, const any_kv_cache& cache, index_t tokens,
                          index_t concurrency) const noexcept {
    using detail::checked_product, detail::checked_sum;
    const cache_config& config = cache.config();
    const index_t block = std::min(tokens, config.prefill_block);
    const index_t staging = checked_product(found, "bytes of a block", block, cache.staged_token_bytes());
    const index_t head_states = checked_product(found, "bytes of partial states", params_.num_qo_heads,
                                                max_slices * state_floats(config) * index_t{sizeof(float)});
    const index_t scratch = checked_product(found, "bytes of scratch", concurrency, worker_scratch::bytes(config));
    return checked_sum(found, "bytes of the workspace", scratch, std::max(staging, head_states));
  }

  void make_room(status& found, const any_kv_cache& cache, index_t tokens, workspace& workspace) const noexcept {
    const index_t bytes = workspace_bytes(found, cache, tokens, workspace.concurrency());
    if (found) found = workspace.try_reserve(bytes);
  }

  void decode_checked(const_matrix_view q, const any_kv_cache& cache, matrix_view out, const workspace& workspace,
                      float* lse) const {
    const query_block call{cache, q, 0, 1, cache.seen() - 1, cache.seen(), nullptr};
    decode_slices(call, workspace, [&](index_t head, const detail::states& state) {
      finish(head, state, cache.config().v_head_dim, out.row(0), lse);
    });
  }

  void attend_checked(const_matrix_view q, const any_kv_cache& cache, attention_state& state,
                      const workspace& workspace) const {
    const query_block call{cache, q, 0, 1, cache.seen() - 1, cache.seen(), nullptr};
    decode_slices(call, workspace, [&](index_t head, const detail::states& partial) {
      detail::merge_state(state.row(head), partial, cache.config().v_head_dim);
    });
  }

  void prefill_checked(const_matrix_view q, const_matrix_view k, const_matrix_view v, any_kv_cache& cache,
                       matrix_view out, const workspace& workspace, float* lse) const {
    const cache_config& config = cache.config();
    const index_t tokens = q.rows(), block_tokens = std::min(tokens, config.prefill_block);
    const memory_layout layout(config, workspace);
    for (index_t first_row = 0; first_row < tokens; first_row += block_tokens) {
      const index_t n = std::min(block_tokens, tokens - first_row);
      workspace.run(config.num_kv_heads,
                    [&](index_t head, index_t) { cache.stage(head, k, v, first_row, n, layout.shared); });
      const query_block call{cache, q, first_row, n, cache.seen(), cache.seen(), layout.shared};
      const index_t rows = n * group_size(cache), blocks = (rows + rows_at_once - 1) / rows_at_once;
      workspace.run(config.num_kv_heads * blocks, [&](index_t item, index_t worker) {
        const index_t kv_head = item / blocks, row = item % blocks * rows_at_once;
        const index_t count = std::min(rows_at_once, rows - row);
        const worker_scratch scratch(layout, worker);
        scratch.state.clear(count);
        absorb(call, kv_head, row, count, 0, everything, scratch, scratch.state);
        for (index_t r = 0; r < count; ++r) {
          const index_t token = first_row + (row + r) / group_size(cache);
          const index_t head = kv_head * group_size(cache) + (row + r) % group_size(cache);
          finish(head, scratch.state.from_row(r), config.v_head_dim, out.row(token),
                 lse == nullptr ? nullptr : lse + token * params_.num_qo_heads);
        }
      });
      cache.commit(n, layout.shared);
    }
  }

  void finish(index_t head, const detail::states& state, index_t v_head_dim, float* out, float* lse) const noexcept {
    const float row_lse = detail::finish_state(state, params_.softmax.sink(head), v_head_dim, out + head * v_head_dim);
    if (lse != nullptr) lse[head] = row_lse;
  }

  // Attends with the call's one token, in slices of the visible tokens, and hands over each head's state.
  template <class Done>
  void decode_slices(const query_block& call, const workspace& workspace, const Done& done) const {
    const cache_config& config = call.cache.config();
    const index_t group = group_size(call.cache), size = call.cache.size();
    const index_t slice = std::max(slice_tokens, detail::round_up((size + max_slices - 1) / max_slices, 64));
    const index_t slices = std::max<index_t>(1, (size + slice - 1) / slice);
    const index_t blocks = (group + rows_at_once - 1) / rows_at_once;
    const memory_layout layout(config, workspace);
    const index_t floats = state_floats(config);
    // Partial states [num_qo_heads, slices]: m and d, then o on the next cache line.
    const auto partial = [&](index_t head, index_t i) {
      float* const at = reinterpret_cast<float*>(layout.shared) + (head * slices + i) * floats;
      return detail::states{at, at + 1, at + 16, floats - 16};
    };
    workspace.run(config.num_kv_heads * blocks * slices, [&](index_t item, index_t worker) {
      const index_t i = item % slices, row = item / slices % blocks * rows_at_once, kv_head = item / slices / blocks;
      const index_t count = std::min(rows_at_once, group - row);
      const worker_scratch scratch(layout, worker);
      scratch.state.clear(count);
      absorb(call, kv_head, row, count, i * slice, (i + 1) * slice, scratch, scratch.state);
      for (index_t r = 0; r < count; ++r) {
        const index_t head = kv_head * group + row + r;
        if (slices == 1) {
          done(head, scratch.state.from_row(r));
        } else {
          partial(head, i).clear(1);
          detail::merge_state(partial(head, i), scratch.state.from_row(r), floats - 16);
        }
      }
    });
    if (slices == 1) return;
    workspace.run(params_.num_qo_heads, [&](index_t head, index_t) {
      for (index_t i = 1; i < slices; ++i) detail::merge_state(partial(head, 0), partial(head, i), floats - 16);
      done(head, partial(head, 0));
    });
  }

  // What the query rows [row, row + count) of a KV head's group x tokens see, of the visible tokens number
  // [from, to) only, merged into `states`.
  void absorb(const query_block& call, index_t kv_head, index_t row, index_t count, position_t from, position_t to,
              const worker_scratch& scratch, const detail::states& states) const noexcept {
    const cache_config& config = call.cache.config();
    const index_t group = group_size(call.cache);
    extent extents[rows_at_once];
    logit_terms terms[rows_at_once];
    const bool has_terms = !params_.alibi_slopes.empty() || !params_.sink_bias.empty();
    const query_rows rows{scratch.q,
                          count,
                          config.head_dim,
                          config.v_head_dim,
                          has_terms ? terms : nullptr,
                          config.num_sink_tokens,
                          params_.logits_soft_cap * detail::log2_e};
    // Tokens with as many gaps behind them share a pass: the k-th span of every row, with the query turned for its gap.
    index_t num_spans = 1;
    for (index_t k = 0; k < num_spans; ++k) {
      position_t lo = everything, hi = 0;
      for (index_t r = 0; r < count; ++r) {
        const index_t token = (row + r) / group;
        extents[r] = r > 0 && (row + r) % group != 0 ? extents[r - 1] : extent_of(call, token, k, from, to, num_spans);
        if (extents[r].lo >= extents[r].hi) continue;
        lo = std::min(lo, extents[r].lo);
        hi = std::max(hi, extents[r].hi);
      }
      if (lo >= hi) continue;
      turn_queries(call, kv_head, row, count, extents, scratch.q);
      if (has_terms) set_terms(call, kv_head, row, count, terms);
      while (lo < hi) {
        // Long sums drift: a stretch of tokens is summed by itself, and added once.
        const position_t end = std::min(hi, lo + stretch_tokens);
        const segment next = lo < call.cached ? call.cache.segment_at(kv_head, lo, std::min(end, call.cached))
                                              : call.cache.staged_segment(kv_head, lo, end, call.tokens, call.block);
        scratch.stretch.clear(count);
        next.absorb(next, rows, extents, scratch.stretch, scratch.tile);
        for (index_t r = 0; r < count; ++r)
          detail::merge_state(states.from_row(r), scratch.stretch.from_row(r), states.o_stride);
        lo = next.last;
      }
    }
  }

  // The k-th span that a token sees, cut to the visible tokens number [from, to).
  static extent extent_of(const query_block& call, index_t token, index_t k, position_t from, position_t to,
                          index_t& num_spans) noexcept {
    const position_t seen = call.first + token + 1;
    const span_list visible = call.cache.visible(seen);
    num_spans = std::max(num_spans, visible.size());
    if (k >= visible.size()) return {0, 0, 0};
    position_t before = 0;
    for (index_t i = 0; i < k; ++i) before += visible[i].size();
    const position_span span = visible[k];
    const position_t gap = call.cache.config().positions == positions::in_cache ? visible.gap(k, seen) : 0;
    return {std::max(span.first, span.first + from - before), std::min(span.last, span.first + to - before), gap};
  }

  // Copies query rows, turned to their position less the gap, and scaled.
  void turn_queries(const query_block& call, index_t kv_head, index_t row, index_t count, const extent* extents,
                    float* to) const noexcept {
    const cache_config& config = call.cache.config();
    const index_t group = group_size(call.cache), dim = config.head_dim, padded = detail::round_up(dim, 16);
    const float scale =
        detail::log2_e * params_.sm_scale.value_or(1.f / std::sqrt(static_cast<float>(config.head_dim)));
    rope::angles angles;
    for (index_t r = 0; r < count; ++r, to += padded) {
      if (extents[r].lo >= extents[r].hi) continue;
      const index_t token = (row + r) / group, head = kv_head * group + (row + r) % group;
      const float* const q = call.q.row(call.first_row + token) + head * dim;
      const position_t gap = extents[r].gap;
      const bool raw = config.inputs == inputs::raw;
      if (config.rope && config.rope->width() > 0 && (raw || gap != 0)) {
        if (r == 0 || (row + r) % group == 0)
          config.rope->angles_at(raw ? config.first_position + call.first + token - gap : -gap, raw, angles);
        config.rope->turn(angles, q, dim, to);
      } else {
        std::copy_n(q, dim, to);
      }
      for (index_t i = 0; i < dim; ++i) to[i] *= scale;
      std::fill(to + dim, to + padded, 0.f);
    }
  }

  void set_terms(const query_block& call, index_t kv_head, index_t row, index_t count,
                 logit_terms* terms) const noexcept {
    const index_t group = group_size(call.cache);
    const auto of_head = [](const std::vector<float>& values, index_t head) {
      return values.empty() ? 0.f : values[static_cast<std::size_t>(head)] * detail::log2_e;
    };
    for (index_t r = 0; r < count; ++r) {
      const index_t head = kv_head * group + (row + r) % group;
      terms[r] = {call.first + (row + r) / group, of_head(params_.alibi_slopes, head),
                  of_head(params_.sink_bias, head)};
    }
  }

  attention_params params_;
};

}  // namespace sinkcache::inline SINKCACHE_TAG
