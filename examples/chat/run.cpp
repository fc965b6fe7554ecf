#include "run.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../compare/caches.hpp"
#include "../compare/known_models.hpp"
#include "../compare/options.hpp"
#include "../engine/model.hpp"
#include "../text/utf8.hpp"
#include "sampler.hpp"
#include "terminal.hpp"
#include "text_model.hpp"

namespace chat {
namespace {

using compare::usage_error;
using text::tokenizer;

// One endless stream of tokens, read or written.
class stream {
 public:
  stream(const text_model& text, const options& o, index_t pinned, chat::terminal& terminal)
      : text_(text),
        terminal_(terminal),
        policy_(o.policy),
        pinned_(pinned),
        capacity_(o.cache.value_or(o.policy == "full"
                                       ? text.model().config().max_position_embeddings.value_or(default_cache)
                                       : default_cache)),
        session_(text.model(), compare::sink_window(pinned, capacity_ - pinned), {.threads = o.threads}),
        sampler_(o.sampling),
        tokens_left_(o.tokens) {}

  // Both are false where the stream has ended.
  bool read(std::span<const int> tokens) {
    start_clock();
    return feed(tokens);
  }

  // Up to a special token, or for ever where these are `banned`.
  bool write(const std::vector<bool>& banned) {
    start_clock();
    text::utf8_stream characters;
    while (!tokens_left_ || (*tokens_left_)-- > 0) {
      const int token = sampler_.draw(logits_, banned);
      if (text_.is_special(token)) return terminal_.write(characters.finish());
      if (!terminal_.write(characters.push(text_.bytes(token))) || !feed({&token, 1})) return false;
    }
    terminal_.write(characters.finish());
    return false;
  }

  bool has_begun() const { return seen_ > 0; }
  bool is_full() const { return is_full_; }

  std::string status() const {
    const std::string policy = policy_ == "sinks:system" ? fmt::format("{} ({})", policy_, pinned_) : policy_;
    return fmt::format("{:.1f} tokens/s, {}: {:.1f} MB hold {} tokens, {} evicted", tokens_per_second_, policy,
                       static_cast<double>(session_.cache_bytes()) / 1e6, std::min(seen_, capacity_),
                       std::max<index_t>(0, seen_ - capacity_));
  }

 private:
  using clock = std::chrono::steady_clock;

  bool feed(std::span<const int> tokens) {
    constexpr std::size_t block = 64;  // so that Ctrl-C ends it soon
    for (std::size_t first = 0; first < tokens.size(); first += block) {
      const auto some = tokens.subspan(first, std::min(block, tokens.size() - first));
      if (terminal_.interrupted()) return false;
      is_full_ = policy_ == "full" && seen_ + static_cast<index_t>(some.size()) > capacity_;
      if (is_full_) return false;
      logits_ = session_.prefill(some);
      seen_ += static_cast<index_t>(some.size());
      show_status();
    }
    return true;
  }

  // What the user's pauses take is not the model's.
  void start_clock() {
    measured_at_ = clock::now();
    measured_seen_ = seen_;
  }

  void show_status() {
    const double seconds = std::chrono::duration<double>(clock::now() - measured_at_).count();
    if (seconds < 0.5) return;
    tokens_per_second_ = static_cast<double>(seen_ - measured_seen_) / seconds;
    start_clock();
    terminal_.show_status(status());
  }

  const text_model& text_;
  chat::terminal& terminal_;
  std::string policy_;
  index_t pinned_, capacity_;
  engine::session session_;
  chat::sampler sampler_;
  std::optional<index_t> tokens_left_;
  std::span<const float> logits_;
  index_t seen_ = 0, measured_seen_ = 0;
  clock::time_point measured_at_ = clock::now();
  double tokens_per_second_ = 0;
  bool is_full_ = false;
};

void write_on(stream& s, const text_model& text, const std::string& prompt, chat::terminal& terminal) {
  std::vector<int> tokens = text.encode(prompt);
  if (const auto bos = text.model().config().bos_token_id) tokens.insert(tokens.begin(), *bos);
  if (tokens.empty()) throw usage_error("--write has none of the model's tokens");
  if (terminal.write(text::valid_utf8(prompt)) && s.read(tokens)) s.write(text.banned(true));
}

void talk(stream& s, const text_model& text, std::vector<int> turn, chat::terminal& terminal) {
  constexpr auto parsed = tokenizer::special::parsed;
  const std::vector<bool> banned = text.banned(false);
  while (const auto line = terminal.read_line("> ")) {
    if (line->empty()) continue;
    for (const std::vector<int>& part : {text.encode("<|im_start|>user\n", parsed), text.encode(*line),
                                         text.encode("<|im_end|>\n<|im_start|>assistant\n", parsed)})
      turn.insert(turn.end(), part.begin(), part.end());
    if (!s.read(turn) || !s.write(banned) || !terminal.write("\n")) return;
    turn = text.encode("<|im_end|>\n", parsed);
  }
}

}  // namespace

void run(const options& o) {
  compare::offer_missing_model(o.model);  // while Ctrl-C still ends the program
  std::string report;
  {
    chat::terminal terminal;
    const text_model text(o.model);
    const std::vector<int> system = o.prompt ? std::vector<int>() : text.system_turn();
    const auto system_tokens = static_cast<index_t>(system.size());
    stream s(text, o, pinned_tokens(o, system_tokens), terminal);
    if (const std::string hint = pinning_hint(o, system_tokens); !hint.empty())
      fmt::print(stderr, "stream_chat: {}\n", hint);
    if (o.prompt)
      write_on(s, text, *o.prompt, terminal);
    else
      talk(s, text, system, terminal);
    if (terminal.has_status() && s.has_begun()) report = s.status() + "\n";
    if (s.is_full()) report += "stream_chat: the cache is full, and --policy full evicts nothing\n";
  }
  fmt::print(stderr, "{}", report);
}

}  // namespace chat
