#pragma once

// Runs a text through a model under each policy and keeps what every token cost.

#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../engine/model.hpp"
#include "../engine/tokenizer.hpp"
#include "options.hpp"

namespace compare {

// A model as it is evaluated: with its own softmax, or with its remedy removed.
struct subject {
  const engine::model* model;
  std::string name;
  bool remedy_removed = false;                    // plain softmax in place of softmax1 or of the sink logits
  const engine::tokenizer* tokenizer = nullptr;   // null: a token is a byte
  std::optional<int> first_token = std::nullopt;  // before the text, where the model has no BOS of its own
};

// One policy on one subject.
struct run {
  const compare::subject* subject;
  compare::policy policy;
  index_t window;
  // [tokens] Bits that ids[i + 1] cost given the cache after ids[0..i]; NaN where recompute took no sample.
  std::vector<double> loss_bits;
  std::size_t cache_bytes;
  double us_per_token;
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

// What a subject reads: BOS, if it begins with one, and the text.
struct token_stream {
  std::vector<int> ids, bytes;  // bytes: of the text, that each stands for
};
token_stream read_by(const subject&, const std::string& text);

// All policies on all subjects, subject by subject, `threads` at a time, over the first `tokens` that each subject's
// stream has to predict. `on_token` is called from any of them.
std::vector<run> evaluate(std::span<const subject>, std::span<const policy>, std::span<const token_stream>,
                          index_t cache, index_t tokens, std::size_t threads, const std::function<void()>& on_token);

// How often evaluate calls on_token.
index_t work(std::span<const subject>, std::span<const policy>, index_t cache, index_t tokens);

// `recompute`: the same subject's run of that policy, or null.
loss_summary summarise(const run&, const run* recompute, index_t cache);

// Segments grow with the distance from the start, by half a doubling each; one begins at the first eviction.
std::vector<segment_loss> loss_by_segment(const run&, index_t cache);

}  // namespace compare
