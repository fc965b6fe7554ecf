#pragma once

// Attention of query rows over a cache, or over keys and values of the engine's own. Every query reads what decode
// would read: prefill encodes its tokens first and attends to cache and block, so any chunking of a stream gives the
// same.
//
// Work is cut by positions into items (KV head, block of query rows, slice of the visible tokens), never by threads or
// slots, and partial states merge in item order: the result is the same to the bit for any number of threads.

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

#include "attention_params.hpp"
#include "detail/macros_off.hpp"
#include "detail/query_pass.hpp"
#include "kv_cache.hpp"
#include "workspace.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

// One sequence of a batch: q [num_qo_heads * head_dim] of its newest token, already stored, out [num_qo_heads *
// v_head_dim], lse [num_qo_heads] or null.
struct decode_item {
  const float* q;
  const kv_source* keys;
  float* out;
  float* lse = nullptr;
};

// What one of several threads does of a call: its KV heads, each with its group of query heads, and its rows of q; none
// of them if a count is 0. What is not given goes to the end. Parts that do not overlap may run at the same time, each
// with its own workspace, and give the same bits as the whole.
struct call_part {
  static constexpr index_t rest = -1;

  index_t first_kv_head = 0, num_kv_heads = rest, first_row = 0, num_rows = rest;
};

// Attention of one layer. Query head h reads KV head h / (num_qo_heads / num_kv_heads). Calls are const and may run
// concurrently, each with a workspace of its own; no output may overlap an input. A try_ call returns what was wrong
// with its arguments, and then has changed nothing; the others throw it.
class attention {
 public:
  explicit attention(attention_params params) : params_(std::move(params)) { validate(params_).or_fail(); }

  const attention_params& params() const { return params_; }

  // Attention of the newest token, already stored: q [1, num_qo_heads * head_dim], out [1, num_qo_heads * v_head_dim],
  // lse [num_qo_heads] if given. Allocates nothing beyond what `workspace` says.
  void decode(const_matrix_view q, const kv_source& keys, matrix_view out, workspace& workspace,
              float* lse = nullptr) const {
    try_decode(q, keys, out, workspace, lse).or_fail();
  }
  status try_decode(const_matrix_view q, const kv_source& keys, matrix_view out, workspace& workspace,
                    float* lse = nullptr) const noexcept {  // NOLINT(readability-non-const-parameter)
    status found = detail::check_decode(params_, q, keys, out);
    if (!found) return found;
    const decode_item item{q.row(0), &keys, out.row(0), lse};
    decode_items({&item, 1}, {}, workspace, found);
    return found;
  }

  // The same for the newest token of each of several sequences, as one call of the executor. Every sequence gets the
  // bits that it would get by itself.
  void decode(std::span<const decode_item> batch, workspace& workspace) const {
    try_decode(batch, workspace).or_fail();
  }
  status try_decode(std::span<const decode_item> batch, workspace& workspace) const noexcept {
    status found;
    for (const decode_item& item : batch) detail::require_item(found, params_, item.q, item.keys, item.out);
    if (found && !batch.empty()) decode_items(batch, {}, workspace, found);
    return found;
  }

  // Attention of the newest q.rows() tokens, already stored: q [tokens, num_qo_heads * head_dim], out [tokens,
  // num_qo_heads * v_head_dim], lse [tokens, num_qo_heads] if given. Each token sees what it would see in decode.
  void attend(const_matrix_view q, const kv_source& keys, matrix_view out, workspace& workspace, float* lse = nullptr,
              const call_part& part = {}) const {
    try_attend(q, keys, out, workspace, lse, part).or_fail();
  }
  status try_attend(const_matrix_view q, const kv_source& keys, matrix_view out, workspace& workspace,
                    float* lse = nullptr, const call_part& part = {}) const noexcept {
    status found = detail::check_attend(params_, q, keys, out);
    const call_part whole = detail::whole_part(found, part, keys.config().num_kv_heads, q.rows());
    if (!found || whole.num_rows == 0 || whole.num_kv_heads == 0) return found;
    if (q.rows() == 1) {
      const decode_item item{q.row(0), &keys, out.row(0), lse};
      decode_items({&item, 1}, part, workspace, found);
      return found;
    }
    const index_t group = group_size(keys), rows = whole.num_rows * group;
    const layout memory(workspace, detail::rows_of_an_item(rows), shape_of(keys), found, 0);
    if (!found) return found;
    attend_rows({params_, keys.config(), keys, q, whole.first_row, keys.seen() - q.rows() + whole.first_row, group,
                 q.rows() * group >= query_rows::panel},
                whole, out, lse, workspace, memory);
    return found;
  }

  // As decode, but merges the partial result into `state`, without the sink: for tokens that are split over several
  // sources. `state.finish` completes it.
  void attend(const_matrix_view q, const kv_source& keys, attention_state& state, workspace& workspace) const {
    try_attend(q, keys, state, workspace).or_fail();
  }
  status try_attend(const_matrix_view q, const kv_source& keys, attention_state& state,
                    workspace& workspace) const noexcept {
    status found = detail::check_attend(params_, q, keys, state);
    if (!found) return found;
    const decode_item item{q.row(0), &keys, nullptr};
    decode_items({&item, 1}, {}, workspace, found, &state);
    return found;
  }

  // Attends with and appends any number of tokens: q [tokens, num_qo_heads * head_dim], k and v as in append, out
  // [tokens, num_qo_heads * v_head_dim], lse [tokens, num_qo_heads] if given. Each token sees what it would see in
  // decode. Allocates only where the workspace has seen no chunk as long.
  void prefill(const_matrix_view q, const_matrix_view k, const_matrix_view v, any_kv_cache& cache, matrix_view out,
               workspace& workspace, float* lse = nullptr) const {
    try_prefill(q, k, v, cache, out, workspace, lse).or_fail();
  }
  status try_prefill(const_matrix_view q, const_matrix_view k, const_matrix_view v, any_kv_cache& cache,
                     matrix_view out, workspace& workspace, float* lse = nullptr) const noexcept {
    status found = detail::check_prefill(params_, q, k, v, cache, out);
    const index_t tokens = q.rows(), block_tokens = std::min(tokens, cache.config().prefill_block);
    const index_t group = group_size(cache);
    const layout memory(workspace, detail::rows_of_an_item(block_tokens * group), shape_of(cache), found,
                        staging_bytes(found, cache, block_tokens));
    if (!found) return found;
    for (index_t first_row = 0; first_row < tokens; first_row += block_tokens) {
      const index_t n = std::min(block_tokens, tokens - first_row);
      workspace.run(cache.config().num_kv_heads,
                    [&](index_t head, index_t) { cache.stage(head, k, v, first_row, n, memory.shared); });
      const staged_source both(cache, n, memory.shared);
      attend_rows({params_, cache.config(), both, q, first_row, cache.seen(), group, n * group >= query_rows::panel},
                  {0, cache.config().num_kv_heads, first_row, n}, out, lse, workspace, memory);
      cache.commit(n, memory.shared);
    }
    return found;
  }

  // What a workspace needs for decode (tokens = 1), or attend or (of a cache) prefill of so many tokens, with an
  // executor of that concurrency.
  index_t workspace_bytes(const any_kv_cache& cache, index_t tokens, index_t concurrency = 1) const {
    status found;
    const index_t staging = staging_bytes(found, cache, std::min(tokens, cache.config().prefill_block));
    return workspace_bytes(found, cache, tokens, concurrency, staging);
  }
  index_t workspace_bytes(const kv_source& keys, index_t tokens, index_t concurrency = 1) const {
    status found;
    return workspace_bytes(found, keys, tokens, concurrency, 0);
  }

 private:
  using shape = detail::worker_scratch::shape;

  static constexpr index_t slice_tokens = 512, max_slices = 16;

  // How a workspace's memory is shared out: a scratch for each worker, then what they share.
  struct layout {
    layout(workspace& workspace, index_t rows, shape of, status& found, index_t shared_bytes) noexcept
        : scratch{rows, of.head_dim, of.v_head_dim} {
      const index_t total = bytes(found, workspace.concurrency(), scratch, shared_bytes);
      if (found) found = workspace.try_reserve(total);
      memory = workspace.memory_.get();
      shared = memory + workspace.concurrency() * stride();
    }
    static index_t bytes(status& found, index_t concurrency, const shape& of, index_t shared_bytes) noexcept {
      const index_t scratch =
          detail::checked_product(found, "bytes of scratch", concurrency, detail::worker_scratch::bytes(of));
      return detail::checked_sum(found, "bytes of the workspace", scratch, shared_bytes);
    }
    index_t stride() const { return detail::worker_scratch::bytes(scratch); }
    detail::worker_scratch worker(index_t i) const { return {scratch, memory + i * stride()}; }

    shape scratch;
    std::byte *memory, *shared;
  };

  // A cache, and behind it the block that is about to be appended.
  class staged_source final : public segment_source {
   public:
    staged_source(const any_kv_cache& cache, index_t tokens, const std::byte* block)
        : cache_(cache), tokens_(tokens), block_(block) {}

    span_list visible(position_t seen) const noexcept override { return cache_.visible(seen); }
    segment segment_at(index_t kv_head, position_t first, position_t last) const noexcept override {
      if (first < cache_.seen()) return cache_.segment_at(kv_head, first, std::min(last, cache_.seen()));
      return cache_.staged_segment(kv_head, first, last, tokens_, block_);
    }

   private:
    const any_kv_cache& cache_;
    index_t tokens_;
    const std::byte* block_;
  };

  // Where one sequence of a batch begins among the work items, and its part of the shared memory: for each KV head and
  // block of rows how many slices are missing, and partial states [num_qo_heads, slices].
  struct sequence {
    index_t first_item, slices, slice;
    int* missing;
    float* partials;
  };

  index_t workspace_bytes(status& found, const kv_source& keys, index_t tokens, index_t concurrency,
                          index_t staging) const {
    const index_t shared = std::max(staging, decode_bytes(found, keys));
    const index_t bytes = layout::bytes(found, concurrency, scratch_shape(keys, tokens), shared);
    found.or_fail();
    return bytes;
  }
  index_t group_size(const kv_source& keys) const { return params_.num_qo_heads / keys.config().num_kv_heads; }
  static shape shape_of(const kv_source& keys) { return {0, keys.config().head_dim, keys.config().v_head_dim}; }
  shape scratch_shape(const kv_source& keys, index_t tokens) const {
    return {detail::rows_of_an_item(tokens * group_size(keys)), keys.config().head_dim, keys.config().v_head_dim};
  }

  static index_t staging_bytes(status& found, const any_kv_cache& cache, index_t tokens) noexcept {
    return detail::checked_product(found, "bytes of a block", tokens, cache.staged_token_bytes());
  }

  // Row blocks of a KV head's group, floats of one partial state, and bytes that one sequence shares among workers.
  static index_t row_blocks(index_t group) { return (group + detail::max_item_rows - 1) / detail::max_item_rows; }
  static index_t state_floats(const kv_source& keys) { return detail::round_up(keys.config().v_head_dim, 16) + 16; }
  index_t decode_bytes(status& found, const kv_source& keys) const noexcept {
    const index_t slices = std::min(max_slices, (keys.capacity() + slice_tokens - 1) / slice_tokens);
    const index_t counters = keys.config().num_kv_heads * row_blocks(group_size(keys)) * index_t{sizeof(int)};
    const index_t partials = detail::checked_product(found, "bytes of partial states", params_.num_qo_heads,
                                                     slices * state_floats(keys) * index_t{sizeof(float)});
    return detail::checked_sum(found, "bytes of partial states", detail::round_up(counters, 64), partials);
  }

  // Attends with one token a sequence, in slices of the visible tokens. Whoever ends a head's last slice merges them
  // all, in their order.
  void decode_items(std::span<const decode_item> batch, const call_part& part, workspace& workspace, status& found,
                    attention_state* into = nullptr) const noexcept {
    const auto size = static_cast<index_t>(batch.size());
    index_t shared = detail::round_up(size * index_t{sizeof(sequence)}, 64);
    shape of{16, 1, 1};
    for (const decode_item& item : batch) {
      shared = detail::checked_sum(found, "bytes of a batch", shared, decode_bytes(found, *item.keys));
      const shape one = scratch_shape(*item.keys, 1);
      of = {std::max(of.rows, one.rows), std::max(of.head_dim, one.head_dim), std::max(of.v_head_dim, one.v_head_dim)};
    }
    const layout memory(workspace, of.rows, of, found, shared);
    if (!found) return;
    auto* const sequences = reinterpret_cast<sequence*>(memory.shared);
    std::byte* at = memory.shared + detail::round_up(size * index_t{sizeof(sequence)}, 64);
    index_t items = 0;
    for (index_t i = 0; i < size; ++i) {
      const kv_source& keys = *batch[static_cast<std::size_t>(i)].keys;
      const index_t heads = detail::whole_part(found, part, keys.config().num_kv_heads, 1).num_kv_heads;
      const index_t tokens = keys.size();
      const index_t slice = std::max(slice_tokens, detail::round_up((tokens + max_slices - 1) / max_slices, 64));
      const index_t slices = std::max<index_t>(1, (tokens + slice - 1) / slice);
      const index_t blocks = row_blocks(group_size(keys)), counters = keys.config().num_kv_heads * blocks;
      auto* const missing = reinterpret_cast<int*>(at);
      auto* const partials = reinterpret_cast<float*>(at + detail::round_up(counters * index_t{sizeof(int)}, 64));
      sequences[i] = {items, slices, slice, missing, partials};
      std::fill_n(missing, counters, static_cast<int>(slices));
      at += decode_bytes(found, keys);
      items += heads * blocks * slices;
    }
    workspace.run(items, [&](index_t item, index_t worker) {
      const sequence* const next = std::upper_bound(sequences, sequences + size, item,
                                                    [](index_t i, const sequence& s) { return i < s.first_item; });
      const index_t i = next - sequences - 1;
      decode_slice(batch[static_cast<std::size_t>(i)], sequences[i], item - sequences[i].first_item, part.first_kv_head,
                   memory.worker(worker), into);
    });
  }

  void decode_slice(const decode_item& item, const sequence& of, index_t number, index_t first_kv_head,
                    const detail::worker_scratch& scratch, attention_state* into) const noexcept {
    const kv_source& keys = *item.keys;
    const index_t group = group_size(keys), blocks = row_blocks(group), floats = state_floats(keys);
    const index_t i = number % of.slices, block = number / of.slices % blocks;
    const index_t kv_head = first_kv_head + number / of.slices / blocks, row = block * detail::max_item_rows;
    const index_t count = std::min(detail::max_item_rows, group - row);
    const detail::query_block call{
        params_, keys.config(),   keys,  {item.q, 1, params_.num_qo_heads * keys.config().head_dim},
        0,       keys.seen() - 1, group, group >= query_rows::panel};
    call.absorb(kv_head, row, count, i * of.slice, (i + 1) * of.slice, scratch);
    const auto done = [&](index_t head, const detail::states& state) {
      if (into != nullptr)
        detail::merge_state(into->row(head), state, keys.config().v_head_dim);
      else
        finish(head, state, keys.config().v_head_dim, item.out, item.lse);
    };
    // m and d, then o on the next cache line.
    const auto partial = [&](index_t head, index_t slice) {
      float* const at = of.partials + (head * of.slices + slice) * floats;
      return detail::states{at, at + 1, at + 16, floats - 16};
    };
    if (of.slices == 1) {
      for (index_t r = 0; r < count; ++r) done(call.head(kv_head, row + r), scratch.state.from_row(r));
      return;
    }
    for (index_t r = 0; r < count; ++r)
      detail::copy_state(partial(call.head(kv_head, row + r), i), scratch.state.from_row(r), floats - 16);
    if (__atomic_sub_fetch(of.missing + kv_head * blocks + block, 1, __ATOMIC_ACQ_REL) > 0) return;
    for (index_t r = 0; r < count; ++r) {
      const index_t head = call.head(kv_head, row + r);
      for (index_t slice = 1; slice < of.slices; ++slice)
        detail::merge_state(partial(head, 0), partial(head, slice), floats - 16);
      done(head, partial(head, 0));
    }
  }

  // Attends with the rows of a part, of which the block's first is the first.
  void attend_rows(const detail::query_block& call, const call_part& part, matrix_view out, float* lse,
                   const workspace& workspace, const layout& memory) const noexcept {
    const index_t rows = part.num_rows * call.group, rows_at_once = memory.scratch.rows;
    const index_t blocks = (rows + rows_at_once - 1) / rows_at_once;
    workspace.run(part.num_kv_heads * blocks, [&](index_t item, index_t worker) {
      const index_t kv_head = part.first_kv_head + item / blocks, row = item % blocks * rows_at_once;
      const index_t count = std::min(rows_at_once, rows - row);
      const detail::worker_scratch scratch = memory.worker(worker);
      call.absorb(kv_head, row, count, 0, max_position, scratch);
      for (index_t r = 0; r < count; ++r) {
        const index_t token = part.first_row + call.token(row + r);
        finish(call.head(kv_head, row + r), scratch.state.from_row(r), call.config.v_head_dim, out.row(token),
               lse == nullptr ? nullptr : lse + token * params_.num_qo_heads);
      }
    });
  }

  void finish(index_t head, const detail::states& state, index_t v_head_dim, float* out, float* lse) const noexcept {
    const float row_lse = detail::finish_state(state, params_.softmax.sink(head), v_head_dim, out + head * v_head_dim);
    if (lse != nullptr) lse[head] = row_lse;
  }

  attention_params params_;
};

}  // namespace sinkcache::inline SINKCACHE_TAG

#include "detail/macros_on.hpp"
