#pragma once

// How a call of attention is cut into work items, and where they find memory: by positions into items (KV head, block
// of query rows, slice of the visible tokens), never by threads or rows of storage. Partial states merge in item order,
// so the result is the same to the bit for any number of threads.

#include <algorithm>
#include <cstddef>
#include <span>

#include "../workspace.hpp"
#include "macros_off.hpp"
#include "query_block.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

// One query token: all heads' rows, and where their results go. `into` instead of `out` takes partial states; without
// both no value is read.
struct decode_job {
  const float* q;
  const kv_source* keys;
  position_t query;
  float *out = nullptr, *lse = nullptr;
  weight_reader* weights = nullptr;
  attention_state* into = nullptr;
};

// Neighbouring query tokens, their results, and which KV heads.
struct rows_job {
  const float* q;
  index_t q_stride, tokens;
  const kv_source* keys;
  position_t first;
  float* out;  // null: no value is read
  index_t out_stride;
  float* lse;  // [tokens, num_qo_heads], or null
  index_t first_kv_head, num_kv_heads;
  bool in_panels;                 // see query_rows
  weight_reader* sums = nullptr;  // who wants sums of weights, with in_panels only
  index_t kept = 0;               // and the most rows of parts that these queries see
};

class schedule {
 public:
  using shape = worker_scratch::shape;

  schedule(const attention_params& params, workspace& workspace) noexcept : params_(params), workspace_(workspace) {}

  // What decode of one query token needs of the memory that workers share: counters of missing slices, partial states
  // [num_qo_heads, slices], and logits [num_qo_heads, kept] for those who ask for weights.
  static index_t decode_bytes(status& found, const attention_params& params, const kv_source& keys,
                              index_t kept) noexcept {
    constexpr const char* what = "bytes of partial states";
    const index_t slices = keys.capacity() <= 0 ? 0 : most_slices(keys);
    const index_t blocks =
        checked_product(found, what, keys.geometry().num_kv_heads, row_blocks(group_size(params, keys)));
    const index_t states =
        checked_sum(found, what, checked_product(found, what, slices, state_floats(keys)), std::max<index_t>(0, kept));
    const index_t floats = checked_product(found, what, params.num_qo_heads, states);
    // Counters, then floats, each in whole lines.
    const index_t counters = checked_sum(found, what, checked_product(found, what, blocks, sizeof(int)), 63) & -64;
    const index_t bytes = checked_sum(found, what, counters, checked_product(found, what, floats, sizeof(float)));
    return checked_sum(found, what, bytes, 63) & -64;
  }
  static shape shape_of(const attention_params& params, const kv_source& keys, index_t tokens) noexcept {
    const index_t group = std::min(group_size(params, keys), max_item_rows);  // an item has no more rows
    return {rows_of_an_item(std::min(tokens, max_item_rows) * group), keys.geometry().head_dim,
            keys.geometry().v_head_dim, keys.max_parts()};
  }
  static index_t batch_bytes(index_t size) noexcept { return round_up(size * index_t{sizeof(sequence)}, 64); }
  // Of all workers and what they share.
  static index_t bytes(status& found, index_t concurrency, const shape& of, index_t shared) noexcept {
    const index_t scratch = checked_product(found, "bytes of scratch", concurrency, worker_scratch::bytes(of));
    return checked_sum(found, "bytes of the workspace", scratch, shared);
  }

  // Takes the memory for the calls below.
  status reserve(const shape& of, index_t shared) noexcept {
    status found;
    const index_t total = bytes(found, workspace_.concurrency(), of, shared);
    if (found) found = workspace_.try_reserve(total);
    shape_ = of;
    shared_ = workspace_.memory_.get() + workspace_.concurrency() * worker_scratch::bytes(of);
    return found;
  }

  // For how many queries from `first` on, up to `last`, every KV head's plan holds. For what was reserved.
  index_t num_planned(const kv_source& keys, position_t first, position_t last) const noexcept {
    auto queries = static_cast<index_t>(last - first + 1);
    for (index_t head = 0; head < keys.geometry().num_kv_heads && queries > 1;) {
      part_list parts(worker(0).parts, keys.max_parts());
      const plan_end end = keys.plan(head, first, last, parts);
      queries = std::clamp<index_t>(end.queries, 1, queries);
      head += std::max<index_t>(1, end.kv_heads);
    }
    return queries;
  }

  // Attends with one token per sequence, in slices of the visible tokens. Whoever ends a head's last slice merges them
  // all, in their order. job(i) is the i-th of `size`, kept(i) how many logits are kept for it; -1: nobody wants any.
  template <class Job, class Kept>
  void decode(index_t size, const Job& job, const Kept& kept, index_t first_kv_head, index_t num_kv_heads) noexcept {
    auto* const sequences = reinterpret_cast<sequence*>(shared_);
    std::byte* at = shared_ + batch_bytes(size);
    index_t items = 0;
    for (index_t i = 0; i < size; ++i) {
      const decode_job one = job(i);
      const kv_source& keys = *one.keys;
      const auto tokens = static_cast<index_t>(std::clamp<position_t>(keys.num_visible(one.query), 0, max_position));
      const index_t slice = std::max(slice_tokens, round_up((tokens + max_slices - 1) / max_slices, 64));
      const index_t most = most_slices(keys);
      const index_t slices = std::clamp<index_t>((tokens + slice - 1) / slice, 1, most);
      const index_t blocks = row_blocks(group_size(params_, keys)), counters = keys.geometry().num_kv_heads * blocks;
      status fits;  // was found to fit when memory was reserved
      sequence& of = sequences[i];
      of = {items, slices, slice, kept(i), reinterpret_cast<int*>(at), nullptr, nullptr};
      of.partials = reinterpret_cast<float*>(at + round_up(counters * index_t{sizeof(int)}, 64));
      of.logits = of.partials + params_.num_qo_heads * most * state_floats(keys);
      std::fill_n(of.missing, counters, static_cast<int>(slices));
      if (of.kept >= 0) std::fill_n(of.logits, params_.num_qo_heads * of.kept, no_logit);
      at += decode_bytes(fits, params_, keys, of.kept);
      items += (num_kv_heads < 0 ? keys.geometry().num_kv_heads : num_kv_heads) * blocks * slices;
    }
    workspace_.run(items, [&](index_t item, index_t worker_number) {
      const sequence* const next = std::upper_bound(sequences, sequences + size, item,
                                                    [](index_t i, const sequence& s) { return i < s.first_item; });
      const index_t i = next - sequences - 1;
      decode_slice(job(i), sequences[i], item - sequences[i].first_item, first_kv_head, worker(worker_number));
    });
  }

  // Attends with rows of neighbouring tokens, for all of which one plan holds. Where sums are wanted, a KV head is one
  // item, so that they are added up in the same order whatever the threads.
  void attend(const rows_job& job) const noexcept {
    const index_t rows = job.tokens * group_size(params_, *job.keys), blocks = (rows + shape_.rows - 1) / shape_.rows;
    const index_t together = job.sums != nullptr ? blocks : 1, items = job.num_kv_heads * blocks / together;
    workspace_.run(items, [&](index_t item, index_t worker_number) {
      const worker_scratch scratch = worker(worker_number);
      const index_t head = item * together / blocks, kv_head = job.first_kv_head + head;
      const index_t row = item * together % blocks * shape_.rows;
      if (job.sums == nullptr) return attend_block(job, kv_head, row, std::min(shape_.rows, rows - row), scratch);
      auto* const sums = reinterpret_cast<float*>(shared_ + batch_bytes(1)) + head * job.kept;
      std::fill_n(sums, job.kept, 0.f);
      for (index_t first = 0; first < rows; first += shape_.rows)
        attend_block(job, kv_head, first, std::min(shape_.rows, rows - first), scratch, sums);
      tell_sums(*job.sums, *job.keys, kv_head, job.first, job.tokens, sums, scratch);
    });
  }

 private:
  static constexpr index_t slice_tokens = 512, max_slices = 16;

  // Where one sequence of a batch begins among the work items, and its part of the shared memory.
  struct sequence {
    index_t first_item, slices, slice, kept;
    int* missing;  // slices, of each KV head and block of rows
    float *partials, *logits;
  };

  static index_t group_size(const attention_params& params, const kv_source& keys) noexcept {
    return params.num_qo_heads / keys.geometry().num_kv_heads;
  }
  static index_t most_slices(const kv_source& keys) noexcept {
    const auto tokens = std::clamp<position_t>(keys.capacity(), 0, max_position);
    return static_cast<index_t>(std::clamp<position_t>((tokens + slice_tokens - 1) / slice_tokens, 1, max_slices));
  }
  // Row blocks of a KV head's group, and floats of one partial state: m and d, then o on the next cache line.
  static index_t row_blocks(index_t group) noexcept { return (group - 1) / max_item_rows + 1; }
  static index_t state_floats(const kv_source& keys) noexcept { return round_up(keys.geometry().v_head_dim, 16) + 16; }

  worker_scratch worker(index_t i) const noexcept {
    return {shape_, workspace_.memory_.get() + i * worker_scratch::bytes(shape_)};
  }

  // `count` rows of a KV head, and what they give each key, if that is asked for.
  void attend_block(const rows_job& job, index_t kv_head, index_t row, index_t count, const worker_scratch& scratch,
                    float* sums = nullptr) const noexcept {  // NOLINT(readability-non-const-parameter)
    const query_block block{.params = params_,
                            .source = *job.keys,
                            .q = job.q,
                            .q_stride = job.q_stride,
                            .tokens = job.tokens,
                            .first = job.first,
                            .group = group_size(params_, *job.keys),
                            .in_panels = job.in_panels,
                            .wants_values = job.out != nullptr};
    const index_t dim = block.v_head_dim();
    alignas(64) float m[max_item_rows], weight[max_item_rows];
    index_t unfit[max_item_rows], num_unfit = 0;
    block.absorb(kv_head, row, count, 0, max_position, scratch);
    for (index_t r = 0; r < count; ++r) {
      const index_t token = block.token(row + r), head = block.head(kv_head, row + r);
      const finished result = finish_state(scratch.state.from_row(r), params_.softmax.sink(head), dim,
                                           job.out + token * job.out_stride + head * dim);
      if (job.lse != nullptr) job.lse[token * params_.num_qo_heads + head] = result.lse;
      const bool any = scratch.state.m[r] != no_logit;
      m[r] = any ? scratch.state.m[r] : 0.f, weight[r] = any ? result.weight : 0.f;
      if (!result.finite) unfit[num_unfit++] = r;
    }
    for (index_t r : std::span(unfit, static_cast<std::size_t>(num_unfit)))
      mend(block, kv_head, row + r, m[r], scratch, job.out + block.token(row + r) * job.out_stride);
    if (sums == nullptr) return;
    const index_t padded = round_up(count, query_rows::panel);
    std::fill(m + count, m + padded, 0.f);
    std::fill(weight + count, weight + padded, 0.f);
    const row_weights weights{m, weight, sums};
    block.absorb(kv_head, row, count, 0, max_position, scratch, {.stride = job.kept, .sums = &weights});
  }

  // A row whose sums are infinite or NaN, perhaps because they did not fit: again, far below a bound. What is finite of
  // its token's output stays.
  [[gnu::cold, gnu::noinline]] void mend(const query_block& block, index_t kv_head, index_t row, float m,
                                         const worker_scratch& scratch, float* out,
                                         attention_state* into = nullptr) const noexcept {
    const index_t head = block.head(kv_head, row), dim = block.source.geometry().v_head_dim;
    block.absorb(kv_head, row, 1, 0, max_position, scratch, {}, m + headroom);
    const states again = scratch.state.states::from_row(0);
    if (into != nullptr) return into->merge(head, again);
    float mended[max_head_dim];
    finish_state(again, params_.softmax.sink(head), dim, mended);
    out += head * dim;
    for (index_t i = 0; i < dim; ++i)
      if (!std::isfinite(out[i])) out[i] = mended[i];
  }

  // Hands sums on, part by part.
  static void tell_sums(weight_reader& reader, const kv_source& keys, index_t kv_head, position_t first,
                        index_t queries, const float* sums, const worker_scratch& scratch) noexcept {
    part_list parts(scratch.parts, keys.max_parts());
    keys.plan(kv_head, first, first + queries - 1, parts);
    for (const kv_part& part : parts) {
      const position_span span = span_of(part, first, first + queries - 1);
      if (span.size() > 0)
        reader.read_sums({.kv_head = kv_head,
                          .query = first,
                          .num_queries = queries,
                          .part = &part,
                          .first = static_cast<index_t>(span.first - first_of(part)),
                          .n = span.size(),
                          .sums = std::span(sums, static_cast<std::size_t>(span.size()))});
      sums += span.size();
    }
  }

  void decode_slice(const decode_job& job, const sequence& of, index_t number, index_t first_kv_head,
                    const worker_scratch& scratch) const noexcept {
    const kv_source& keys = *job.keys;
    const index_t group = group_size(params_, keys), blocks = row_blocks(group), floats = state_floats(keys);
    const index_t i = number % of.slices, block = number / of.slices % blocks;
    const index_t kv_head = first_kv_head + number / of.slices / blocks, row = block * max_item_rows;
    const index_t count = std::min(max_item_rows, group - row);
    const query_block call{.params = params_,
                           .source = keys,
                           .q = job.q,
                           .q_stride = 0,
                           .tokens = 1,
                           .first = job.query,
                           .group = group,
                           .in_panels = group >= query_rows::panel && of.kept < 0,
                           .wants_values = job.out != nullptr || job.into != nullptr};
    const index_t first_head = call.head(kv_head, row);
    float* const logits = of.logits + first_head * std::max<index_t>(0, of.kept);
    call.absorb(kv_head, row, count, i * of.slice, i + 1 < of.slices ? (i + 1) * of.slice : max_position, scratch,
                {.to = of.kept >= 0 ? logits : nullptr, .stride = of.kept});
    const auto partial = [&](index_t head, index_t slice) {
      float* const at = of.partials + (head * of.slices + slice) * floats;
      return states{at, at + 1, at + 16, floats - 16};
    };
    const bool whole = of.slices == 1;
    if (!whole) {
      for (index_t r = 0; r < count; ++r)
        copy_state(partial(first_head + r, i), scratch.state.from_row(r), floats - 16);
      if (__atomic_sub_fetch(of.missing + kv_head * blocks + block, 1, __ATOMIC_ACQ_REL) > 0) return;
    }
    const index_t dim = call.v_head_dim();
    float bound[max_item_rows];
    index_t unfit[max_item_rows], num_unfit = 0;
    for (index_t r = 0; r < count; ++r) {
      const index_t head = first_head + r;
      if (!whole)
        for (index_t slice = 1; slice < of.slices; ++slice)
          merge_state(partial(head, 0), partial(head, slice), floats - 16);
      const states state = whole ? scratch.state.states::from_row(r) : partial(head, 0);
      bound[r] = *state.m;
      if (job.into != nullptr) {
        if (!all_finite(state.o, dim))
          unfit[num_unfit++] = r;
        else
          job.into->merge(head, state);
        continue;
      }
      const finished result = finish_state(state, params_.softmax.sink(head), dim, job.out + head * dim);
      if (job.lse != nullptr) job.lse[head] = result.lse;
      if (of.kept >= 0) to_weights(logits + r * of.kept, of.kept, *state.m, result.weight);
      if (!result.finite) unfit[num_unfit++] = r;
    }
    for (index_t r : std::span(unfit, static_cast<std::size_t>(num_unfit)))
      mend(call, kv_head, row + r, bound[r], scratch, job.out, job.into);
    if (of.kept >= 0) tell(job, kv_head, first_head, count, logits, of.kept, scratch);
  }

  // Hands a head's weights on, part by part in tiles, then their sums over rows, which take the place of the first.
  void tell(const decode_job& job, index_t kv_head, index_t first_head, index_t count, float* weights, index_t stride,
            const worker_scratch& scratch) const noexcept {
    if (job.weights->wants(job.query)) tell_weights(job, kv_head, first_head, count, weights, stride, scratch);
    if (!job.weights->wants_sums(job.query, job.query)) return;
    for_each_index(stride, [&](index_t i) { weights[i] = known_weight(weights[i]); });
    for (index_t r = 1; r < count; ++r) {
      const float* const of_row = weights + r * stride;
      for_each_index(stride, [&](index_t i) { weights[i] += known_weight(of_row[i]); });
    }
    tell_sums(*job.weights, *job.keys, kv_head, job.query, 1, weights, scratch);
  }
  void tell_weights(const decode_job& job, index_t kv_head, index_t first_head, index_t count, const float* weights,
                    index_t stride, const worker_scratch& scratch) const noexcept {
    part_list parts(scratch.parts, job.keys->max_parts());
    job.keys->plan(kv_head, job.query, job.query, parts);
    for (const kv_part& part : parts) {
      const position_span span = span_of(part, job.query);
      const auto floats = static_cast<std::size_t>((count - 1) * stride + span.size());
      if (span.size() > 0)
        job.weights->read({.kv_head = kv_head,
                           .query = job.query,
                           .part = &part,
                           .first = static_cast<index_t>(span.first - first_of(part)),
                           .n = span.size(),
                           .first_qo_head = first_head,
                           .num_qo_heads = count,
                           .stride = stride,
                           .w = std::span(weights, floats)});
      weights += span.size();
    }
  }

  const attention_params& params_;
  workspace& workspace_;
  shape shape_{};
  std::byte* shared_ = nullptr;
};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
