#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

// Runs one stream of tokens through a model, and says what each token cost.

#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../engine/model.hpp"
#include "../text/tokenizer.hpp"

namespace compare {

using sinkcache::index_t;

// A model as it is evaluated: with its own softmax, or with its remedy removed.
struct subject {
  const engine::model* model;
  std::string name;
  bool remedy_removed = false;                    // plain softmax in place of softmax1 or of the sink logits
  const text::tokenizer* tokenizer = nullptr;     // null: a token is a byte
  std::optional<int> first_token = std::nullopt;  // before the text, where the model has no BOS of its own
};

// What a subject reads: BOS, if it begins with one, and the text.
struct token_stream {
  std::vector<int> ids, bytes;  // bytes: of the text, that each stands for
};
token_stream read_by(const subject&, const std::string& text);

// Is called with the number of tokens that went through the model since the last call; may throw, to stop.
using progress = std::function<void(index_t)>;

// With the softmax that the subject is evaluated with.
engine::session_config config_of(const subject&, engine::session_config);

// One session that reads `ids` from the start. Every loss is the bits that ids[i + 1] costs given the cache after
// ids[0..i]; a loss that is not finite throws. The subject must outlive it.
class evaluator {
 public:
  evaluator(const subject&, const engine::cache_factory&, std::span<const int> ids, engine::session_config = {});

  // [tokens] Of the next so many, one by one.
  std::vector<double> by_decode(std::size_t tokens, const progress&);
  // The same by prefill in chunks, or with the logits after every token instead of the loss.
  std::vector<double> by_prefill(std::size_t tokens, const progress&);
  void prefill(std::size_t tokens, const std::function<void(std::span<const float>)>& each, const progress&);

  // Of ids[i + 1] after a fresh pass over the first token and the newest cache - 1 up to ids[i].
  double recomputed(std::size_t i, index_t cache);

  engine::session& session() { return session_; }

 private:
  double loss(std::span<const float> logits, std::size_t i) const;

  const subject* subject_;
  std::span<const int> ids_;
  engine::session session_;
  std::size_t seen_ = 0;
  std::vector<int> context_;  // of recomputed
};

// That the timed runs decode. Loss is not: prefill costs every token what decoding does, in a tenth of the time.
inline constexpr index_t decoded_tokens = 512;
inline constexpr index_t decode_work = 4;  // a decoded token takes about so many times as long as one of a chunk

// Of a decode step with a full cache of so many tokens, by a fresh session: the mean in milliseconds over `tokens` of
// them. A text that is too short begins again.
double ms_per_token(engine::session&, index_t cache, std::span<const int> ids, index_t tokens, const progress&);

// Of a fresh pass over a full cache: what a token costs where there is none.
double ms_per_pass(engine::session&, index_t cache, std::span<const int> ids, index_t passes, const progress&);

}  // namespace compare
