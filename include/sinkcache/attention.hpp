#pragma once

// Attention of query rows over a cache, or any other source of keys and values. Every query reads what decode would
// read: prefill appends a block of tokens and attends with it, so any chunking of a stream gives the same.

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

#include "attention_params.hpp"
#include "detail/call_bytes.hpp"
#include "detail/learning.hpp"
#include "detail/macros_off.hpp"
#include "detail/schedule.hpp"
#include "kv_cache.hpp"
#include "workspace.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Attention of one layer. Query head h reads KV head h / (num_qo_heads / num_kv_heads). Calls are const and may run
// concurrently, each with a workspace of its own; no output may overlap an input. A try_ call returns what was wrong
// with its arguments, and then has changed nothing; the others throw it.
//
// A moved-from attention refuses every call, and can be assigned to.
//
// A cache that is not const learns from the queries it wants (any_kv_cache::learner); a const one is only read.
class attention {
 public:
  explicit attention(attention_params params) : params_(std::move(params)) { validate(params_).or_fail(); }
  static std::optional<attention> try_create(attention_params params, status& found) noexcept {
    found = validate(params);
    return detail::created(found, "attention", [&] { return attention(std::move(params)); });
  }

  const attention_params& params() const { return params_; }

  // Attention of the newest token, already stored: q [1, num_qo_heads * head_dim], out [1, num_qo_heads * v_head_dim].
  // Allocates nothing beyond what `workspace` says.
  void decode(const_matrix_view q, const kv_source& keys, matrix_view out, workspace& workspace,
              const extra_outputs& extra = {}) const {
    try_decode(q, keys, out, workspace, extra).or_fail();
  }
  status try_decode(const_matrix_view q, const kv_source& keys, matrix_view out, workspace& workspace,
                    const extra_outputs& extra = {}) const noexcept {
    status found = detail::check_decode(params_, q, keys, out, extra);
    const attention_call call = call_of(q, keys, keys.seen() - 1);
    if (found && extra.weights != nullptr) extra.weights->require(found, call);
    if (!found) return found;
    if (extra.weights != nullptr) extra.weights->begin(call);
    decode_one({.q = q.row(0),
                .keys = &keys,
                .query = keys.seen() - 1,
                .out = extra.out ? out.row(0) : nullptr,
                .lse = lse_of(extra.lse),
                .weights = extra.weights},
               workspace, found);
    if (found && extra.weights != nullptr) extra.weights->end(call, *this, workspace);
    return found;
  }
  void decode(const_matrix_view q, any_kv_cache& cache, matrix_view out, workspace& workspace,
              const extra_outputs& extra = {}) const {
    try_decode(q, cache, out, workspace, extra).or_fail();
  }
  status try_decode(const_matrix_view q, any_kv_cache& cache, matrix_view out, workspace& workspace,
                    const extra_outputs& extra = {}) const noexcept {
    const detail::learning both(cache, extra.weights);
    return try_decode(q, std::as_const(cache), out, workspace, {extra.lse, both.reader(), extra.out});
  }

  // The same for the newest token of each of several sequences, as one call of the executor. Every sequence gets the
  // bits that it would get by itself. In a part by KV heads all sequences have to have equally many.
  void decode(std::span<const decode_item> batch, workspace& workspace, const call_part& part = {}) const {
    try_decode(batch, workspace, part).or_fail();
  }
  status try_decode(std::span<const decode_item> batch, workspace& workspace,
                    const call_part& part = {}) const noexcept {
    status found;
    for (const decode_item& item : batch) detail::require_item(found, params_, item.q, item.keys, item.out, item.lse);
    if (!found || batch.empty()) return found;
    const index_t kv_heads = batch.front().keys->geometry().num_kv_heads;
    const bool all_heads = part.first_kv_head == 0 && part.num_kv_heads == call_part::rest;
    for (const decode_item& item : batch)
      found.require(all_heads || item.keys->geometry().num_kv_heads == kv_heads, "a batch's num_kv_heads",
                    item.keys->geometry().num_kv_heads, "that of the first, in a part by KV heads,", kv_heads);
    const call_part whole = detail::whole_part(found, part, kv_heads, static_cast<index_t>(batch.size()));
    if (!found || whole.num_rows == 0 || whole.num_kv_heads == 0) return found;
    batch = batch.subspan(static_cast<std::size_t>(whole.first_row), static_cast<std::size_t>(whole.num_rows));
    const auto learners = [&](const auto& tell) {
      for (const decode_item& item : batch)
        if (item.weights != nullptr) {
          const const_matrix_view q(item.q.data(), 1, static_cast<index_t>(item.q.size()));
          attention_call call = call_of(q, *item.keys, item.keys->seen() - 1);
          if (!all_heads) call.first_kv_head = whole.first_kv_head, call.num_kv_heads = whole.num_kv_heads;
          tell(*item.weights, call);
        }
    };
    learners([&](const weight_reader& reader, const attention_call& call) { reader.require(found, call); });
    if (!found) return found;
    learners([](weight_reader& reader, const attention_call& call) { reader.begin(call); });
    const auto job = [&](index_t i) -> detail::decode_job {
      const decode_item& item = batch[static_cast<std::size_t>(i)];
      return {.q = item.q.data(),
              .keys = item.keys,
              .query = item.keys->seen() - 1,
              .out = item.out.data(),
              .lse = lse_of(item.lse),
              .weights = item.weights};
    };
    decode_all(static_cast<index_t>(batch.size()), job, workspace, found, whole.first_kv_head,
               all_heads ? call_part::rest : whole.num_kv_heads);
    if (found) learners([&](weight_reader& reader, const attention_call& call) { reader.end(call, *this, workspace); });
    return found;
  }

  // Attention of the newest q.rows() tokens, already stored: q [tokens, num_qo_heads * head_dim], out [tokens,
  // num_qo_heads * v_head_dim]. Each token sees what it would see in decode.
  void attend(const_matrix_view q, const kv_source& keys, matrix_view out, workspace& workspace,
              const extra_outputs& extra = {}, const call_part& part = {}) const {
    try_attend(q, keys, out, workspace, extra, part).or_fail();
  }
  status try_attend(const_matrix_view q, const kv_source& keys, matrix_view out, workspace& workspace,
                    const extra_outputs& extra = {}, const call_part& part = {}) const noexcept {
    status found = detail::check_attend(params_, q, keys, out, extra);
    const call_part whole = detail::whole_part(found, part, keys.geometry().num_kv_heads, q.rows());
    if (!found) return found;
    const const_matrix_view rows(q.row(whole.first_row), whole.num_rows, q.cols(), q.stride());
    const attention_call call{
        params_, keys, rows, keys.seen() - q.rows() + whole.first_row, whole.first_kv_head, whole.num_kv_heads};
    if (extra.weights != nullptr) extra.weights->require(found, call);
    if (!found || whole.num_rows == 0 || whole.num_kv_heads == 0) return found;
    if (extra.weights != nullptr) extra.weights->begin(call);
    attend_rows(q, keys, out, keys.seen() - q.rows(), workspace, extra, whole, found);
    if (found && extra.weights != nullptr) extra.weights->end(call, *this, workspace);
    return found;
  }
  void attend(const_matrix_view q, any_kv_cache& cache, matrix_view out, workspace& workspace,
              const extra_outputs& extra = {}, const call_part& part = {}) const {
    try_attend(q, cache, out, workspace, extra, part).or_fail();
  }
  status try_attend(const_matrix_view q, any_kv_cache& cache, matrix_view out, workspace& workspace,
                    const extra_outputs& extra = {}, const call_part& part = {}) const noexcept {
    const detail::learning both(cache, extra.weights);
    return try_attend(q, std::as_const(cache), out, workspace, {extra.lse, both.reader(), extra.out}, part);
  }

  // As decode, but merges the partial result into `state`, without the sink: for tokens that are split over several
  // sources. `state.finish` completes it.
  void attend(const_matrix_view q, const kv_source& keys, attention_state& state, workspace& workspace) const {
    try_attend(q, keys, state, workspace).or_fail();
  }
  status try_attend(const_matrix_view q, const kv_source& keys, attention_state& state,
                    workspace& workspace) const noexcept {
    status found = detail::check_attend(params_, q, keys, state);
    if (found) decode_one({.q = q.row(0), .keys = &keys, .query = keys.seen() - 1, .into = &state}, workspace, found);
    return found;
  }

  // Attends with and appends any number of tokens: q [tokens, num_qo_heads * head_dim], k and v as in append, out
  // [tokens, num_qo_heads * v_head_dim]. Each token sees what it would see in decode. Allocates only for a chunk longer
  // than the workspace has seen.
  void prefill(const_matrix_view q, const_matrix_view k, const_matrix_view v, any_kv_cache& cache, matrix_view out,
               workspace& workspace, const extra_outputs& extra = {}) const {
    try_prefill(q, k, v, cache, out, workspace, extra).or_fail();
  }
  status try_prefill(const_matrix_view q, const_matrix_view k, const_matrix_view v, any_kv_cache& cache,
                     matrix_view out, workspace& workspace, const extra_outputs& extra = {}) const noexcept {
    return try_prefill(q, k, v, cache, cache, out, workspace, extra);
  }

  // The same where queries see more than the cache that grows: `keys` is a source that ends with it (joined_source).
  void prefill(const_matrix_view q, const_matrix_view k, const_matrix_view v, any_kv_cache& cache,
               const kv_source& keys, matrix_view out, workspace& workspace, const extra_outputs& extra = {}) const {
    try_prefill(q, k, v, cache, keys, out, workspace, extra).or_fail();
  }
  status try_prefill(const_matrix_view q, const_matrix_view k, const_matrix_view v, any_kv_cache& cache,
                     const kv_source& keys, matrix_view out, workspace& workspace,
                     const extra_outputs& extra = {}) const noexcept {
    status found = detail::check_prefill(params_, q, k, v, cache, keys, out, extra);
    const index_t tokens = q.rows(), kv_heads = cache.geometry().num_kv_heads;
    const detail::learning both(cache, extra.weights);
    weight_reader* const reader = both.reader();
    if (found && reader != nullptr) reader->require(found, call_of(q, keys, keys.seen()));
    if (!found || tokens == 0) return found;
    detail::schedule schedule(params_, workspace);
    for (index_t row = 0, n; row < tokens; row += n) {
      if (row == 0 || reader != nullptr)  // a reader's own calls may have taken the memory
        found = reserve(schedule, keys, tokens, reader == nullptr ? -1 : detail::most_kept(keys, tokens));
      if (!found) return found;
      n = cache.next_block(tokens - row);
      workspace.run(kv_heads, [&](index_t head, index_t) { cache.write(head, 1, k, v, row, n); });
      cache.advance(n);
      const attention_call call =
          call_of(const_matrix_view(q.row(row), n, q.cols(), q.stride()), keys, keys.seen() - n, tokens - row - n);
      if (reader != nullptr) reader->begin(call);
      attend_block(schedule, q, keys, out, keys.seen() - n - row, {extra.lse, reader, extra.out}, {0, kv_heads, row, n},
                   n);
      if (reader != nullptr) reader->end(call, *this, workspace);
    }
    return found;
  }

  // The bytes that a workspace needs, exactly, for decode (tokens = 1), attend or prefill of this many tokens, with an
  // executor of this concurrency and, if given, a reader of weights. For a view, as long as it reads the same memory.
  // For a cache that learns, wherever in the stream the call comes: only one that evicts takes as much.
  index_t workspace_bytes(const kv_source& keys, index_t tokens, index_t concurrency = 1,
                          const weight_reader* weights = nullptr) const {
    status found;
    const index_t bytes = try_workspace_bytes(keys, tokens, found, concurrency, weights);
    found.or_fail();
    return bytes;
  }
  index_t workspace_bytes(any_kv_cache& cache, index_t tokens, index_t concurrency = 1,
                          weight_reader* weights = nullptr) const {
    const detail::learning both(cache, weights);
    return workspace_bytes(std::as_const(cache), tokens, concurrency, both.reader());
  }
  // For decode of a batch, of which keys and weights are read.
  index_t workspace_bytes(std::span<const decode_item> batch, index_t concurrency = 1) const {
    status found;
    const index_t bytes = try_workspace_bytes(batch, found, concurrency);
    found.or_fail();
    return bytes;
  }
  // The same; or 0, and in `found` why.
  index_t try_workspace_bytes(const kv_source& keys, index_t tokens, status& found, index_t concurrency = 1,
                              const weight_reader* weights = nullptr) const noexcept {
    found = detail::check_sizes(params_, &keys, tokens, concurrency);
    const index_t bytes = found ? detail::call_bytes(found, params_, keys, tokens, concurrency, weights != nullptr) : 0;
    const index_t again = found ? detail::bytes_again(found, params_, keys, concurrency, weights) : 0;
    return found ? std::max(bytes, again) : 0;
  }
  index_t try_workspace_bytes(any_kv_cache& cache, index_t tokens, status& found, index_t concurrency = 1,
                              weight_reader* weights = nullptr) const noexcept {
    const detail::learning both(cache, weights);
    return try_workspace_bytes(std::as_const(cache), tokens, found, concurrency, both.reader());
  }
  index_t try_workspace_bytes(std::span<const decode_item> batch, status& found,
                              index_t concurrency = 1) const noexcept {
    found = status();
    for (const decode_item& item : batch)
      if (found) found = detail::check_sizes(params_, item.keys, 1, concurrency);
    if (!found || batch.empty()) return 0;
    const auto item = [&](index_t i) { return batch[static_cast<std::size_t>(i)]; };
    const auto kept = [&](index_t i) { return item(i).weights != nullptr ? item(i).keys->capacity() : -1; };
    const auto [of, shared] = detail::batch_needs(found, params_, static_cast<index_t>(batch.size()), item, kept);
    index_t bytes = detail::schedule::bytes(found, concurrency, of, shared);
    for (const decode_item& each : batch)
      bytes = std::max(bytes, detail::bytes_again(found, params_, *each.keys, concurrency, each.weights));
    return found ? bytes : 0;
  }

 private:
  attention_call call_of(const_matrix_view q, const kv_source& keys, position_t first,
                         index_t following = 0) const noexcept {
    return {params_, keys, q, first, 0, keys.geometry().num_kv_heads, following};
  }
  static bool wants_any(const weight_reader& reader, position_t query) noexcept {
    return reader.wants(query) || reader.wants_sums(query, query);
  }
  static float* lse_of(std::span<float> lse) { return lse.empty() ? nullptr : lse.data(); }

  status reserve(detail::schedule& schedule, const kv_source& keys, index_t tokens, index_t kept) const noexcept {
    status found;
    const index_t shared = detail::shared_bytes(found, params_, keys, kept);
    return found ? schedule.reserve(detail::schedule::shape_of(params_, keys, tokens), shared) : found;
  }

  template <class Job>
  void decode_all(index_t size, const Job& job, workspace& workspace, status& found, index_t first_kv_head = 0,
                  index_t num_kv_heads = call_part::rest) const noexcept {
    const auto kept = [&](index_t i) {
      const detail::decode_job one = job(i);
      return one.weights != nullptr && wants_any(*one.weights, one.query) ? one.keys->capacity() : -1;
    };
    const auto [of, shared] = detail::batch_needs(found, params_, size, job, kept);
    detail::schedule schedule(params_, workspace);
    if (found) found = schedule.reserve(of, shared);
    if (found) schedule.decode(size, job, kept, first_kv_head, num_kv_heads);
  }
  void decode_one(const detail::decode_job& job, workspace& workspace, status& found) const noexcept {
    decode_all(
        1, [&](index_t) { return job; }, workspace, found);
  }

  // Rows of q, of which the first is the query at `first`.
  void attend_rows(const_matrix_view q, const kv_source& keys, matrix_view out, position_t first, workspace& workspace,
                   const extra_outputs& extra, const call_part& part, status& found) const noexcept {
    detail::schedule schedule(params_, workspace);
    found =
        reserve(schedule, keys, part.num_rows, extra.weights == nullptr ? -1 : detail::most_kept(keys, part.num_rows));
    if (found) attend_block(schedule, q, keys, out, first, extra, part, q.rows());
  }

  // One row at a time where its weights are wanted, else as many as one plan holds for; `together` is the rows of the
  // block that these may be a part of.
  void attend_block(detail::schedule& schedule, const_matrix_view q, const kv_source& keys, matrix_view out,
                    position_t first, const extra_outputs& extra, const call_part& part,
                    index_t together) const noexcept {
    const index_t group = params_.num_qo_heads / keys.geometry().num_kv_heads;
    const bool in_panels = together * group >= detail::query_rows::panel;
    const auto wanted = [&](index_t row) { return extra.weights != nullptr && extra.weights->wants(first + row); };
    for (index_t row = part.first_row, n, end = row + part.num_rows; row < end; row += n) {
      float* const lse = extra.lse.empty() ? nullptr : extra.lse.data() + row * params_.num_qo_heads;
      bool keeps = wanted(row), sums = false;
      n = 1;
      if (!keeps) {
        while (row + n < end && !wanted(row + n)) ++n;
        n = schedule.num_planned(keys, first + row, first + row + n - 1);
        const index_t some = std::min(n, in_panels ? detail::sum_queries : 1);
        sums = extra.weights != nullptr && extra.weights->wants_sums(first + row, first + row + some - 1);
        if (sums) n = some;
        keeps = sums && (!in_panels || together == 1);
      }
      if (keeps || together == 1) {
        const detail::decode_job job{.q = q.row(row),
                                     .keys = &keys,
                                     .query = first + row,
                                     .out = extra.out ? out.row(row) : nullptr,
                                     .lse = lse,
                                     .weights = extra.weights};
        schedule.decode(
            1, [&](index_t) { return job; }, [&](index_t) { return keeps ? keys.capacity() : -1; }, part.first_kv_head,
            part.num_kv_heads);
      } else {
        schedule.attend({.q = q.row(row),
                         .q_stride = q.stride(),
                         .tokens = n,
                         .keys = &keys,
                         .first = first + row,
                         .out = extra.out ? out.row(row) : nullptr,
                         .out_stride = out.stride(),
                         .lse = lse,
                         .first_kv_head = part.first_kv_head,
                         .num_kv_heads = part.num_kv_heads,
                         .in_panels = in_panels,
                         .sums = sums ? extra.weights : nullptr,
                         .kept = sums ? detail::most_kept(keys, n) : 0});
      }
    }
  }

  attention_params params_;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
