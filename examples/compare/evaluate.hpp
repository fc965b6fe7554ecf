#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

// Runs a text through a model under each policy and keeps what every token cost.

#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "evaluator.hpp"
#include "options.hpp"

namespace compare {

// One policy on one subject.
struct run {
  const compare::subject* subject;
  compare::policy policy;
  index_t window;
  // [tokens] Bits that ids[i + 1] cost given the cache after ids[0..i]; NaN where recompute took no sample.
  std::vector<double> loss_bits;
  std::size_t cache_bytes;
  double us_per_token;                // of tokens decoded one by one with a full cache
  std::vector<int> token_bytes = {};  // [tokens] of the text that ids[i + 1] stands for; empty: one each
};

// Bits per byte; NaN over nothing.
struct loss_summary {
  double all, before,
      after;             // the first eviction. `all` weighs the two by their bytes, also where `after` is sampled.
  double after_sampled;  // over the tokens that recompute sampled; NaN where it did not run
  index_t tokens_scored;
};

struct segment_loss {
  index_t first_token, tokens, tokens_scored;
  double loss_bits;
};

// All policies on all subjects, subject by subject, `threads` at a time, over the first `tokens` that each subject's
// stream has to predict; then the time that each takes, one by one with so many threads. `cache` is theirs that have no
// other. `on_tokens` is called from any of them.
std::vector<run> evaluate(std::span<const subject>, std::span<const policy>, std::span<const token_stream>,
                          index_t cache, index_t tokens, std::size_t threads, const progress& on_tokens);

// What evaluate tells on_tokens in all: tokens of prefill, and what takes about as long.
index_t work(std::span<const subject>, std::span<const policy>, index_t cache, index_t tokens);

// `recompute`: the same subject's run of that policy, or null.
loss_summary summarise(const run&, const run* recompute, index_t cache);

// Segments grow with the distance from the start, by half a doubling each; one begins at the first eviction.
std::vector<segment_loss> loss_by_segment(const run&, index_t cache);

}  // namespace compare
