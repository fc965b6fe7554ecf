// Talks, or writes, for as long as it is let to, in constant memory: what a pinned sink token is worth, to be read
// live.

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "chat/options.hpp"
#include "chat/sampler.hpp"
#include "chat/terminal.hpp"
#include "compare/caches.hpp"
#include "compare/known_models.hpp"
#include "compare/options.hpp"
#include "engine/model.hpp"
#include "loaders/gguf.hpp"
#include "text/tokenizer.hpp"
#include "text/utf8.hpp"

namespace {

using chat::options, compare::usage_error;
using sinkcache::index_t;
using text::tokenizer;

// A model, and how its tokens stand for text: by the tokenizer of a GGUF file, or a byte a token.
class text_model {
 public:
  explicit text_model(const std::string& file) : model_(file) {
    if (!loaders::gguf::is_gguf(file)) return;
    const loaders::gguf metadata = loaders::gguf::load(file);
    tokenizer_.emplace(metadata);
    if (tokenizer_->size() != model_.config().vocab_size)
      metadata.fail(fmt::format("tokenizer.ggml.tokens has {} tokens, the model {}", tokenizer_->size(),
                                model_.config().vocab_size));
    chat_template_ = metadata.string("tokenizer.chat_template").value_or("");
  }

  const engine::model& model() const { return model_; }

  std::vector<int> encode(const std::string& text, tokenizer::special mode = tokenizer::special::as_text) const {
    if (tokenizer_) return tokenizer_->encode(text, mode);
    std::vector<int> tokens;
    for (const char c : text) {
      tokens.push_back(static_cast<unsigned char>(c));
      if (tokens.back() >= model_.config().vocab_size)
        throw std::runtime_error(
            fmt::format("byte {} is none of the model's {} tokens", tokens.back(), model_.config().vocab_size));
    }
    return tokens;
  }

  std::string bytes(int token) const {
    return tokenizer_ ? std::string(tokenizer_->bytes(token)) : std::string(1, static_cast<char>(token));
  }
  bool is_special(int token) const { return tokenizer_ ? tokenizer_->is_special(token) : token > 255; }

  // The file's template is a program in Jinja. It is not run, only searched for the marks of ChatML and for the message
  // that it puts first where there is none.
  std::string system_turn(const std::string& file) const {
    const std::string start = "<|im_start|>", end = "<|im_end|>", system = start + "system\n";
    if (!tokenizer_ || chat_template_.find(start) == std::string::npos || !tokenizer_->find_special(start) ||
        !tokenizer_->find_special(end))
      throw std::runtime_error(file + ": has no ChatML template, so it can only --write");
    const std::size_t first = chat_template_.find(system), last = chat_template_.find(end, first);
    return last == std::string::npos ? "" : chat_template_.substr(first, last - first) + end + "\n";
  }

 private:
  engine::model model_;
  std::optional<tokenizer> tokenizer_;
  std::string chat_template_;
};

// One endless stream of tokens, read or written.
class stream {
 public:
  stream(const text_model& text, const options& o, chat::terminal& terminal)
      : text_(text),
        terminal_(terminal),
        policy_(o.policy),
        capacity_(o.cache.value_or(o.policy == "full"
                                       ? text.model().config().max_position_embeddings.value_or(chat::default_cache)
                                       : chat::default_cache)),
        session_(text.model(), compare::sink_window(o.num_sink_tokens, capacity_ - o.num_sink_tokens),
                 {.threads = o.threads}),
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
    return fmt::format("{:.1f} tokens/s, {}: {:.1f} MB hold {} tokens, {} evicted", tokens_per_second_, policy_,
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
  index_t capacity_;
  engine::session session_;
  chat::sampler sampler_;
  std::optional<index_t> tokens_left_;
  std::span<const float> logits_;
  index_t seen_ = 0, measured_seen_ = 0;
  clock::time_point measured_at_ = clock::now();
  double tokens_per_second_ = 0;
  bool is_full_ = false;
};

std::vector<bool> special_tokens(const text_model& text) {
  std::vector<bool> special(static_cast<std::size_t>(text.model().config().vocab_size));
  for (std::size_t i = 0; i < special.size(); ++i) special[i] = text.is_special(static_cast<int>(i));
  return special;
}

void write_on(stream& s, const text_model& text, const std::string& prompt, chat::terminal& terminal) {
  std::vector<int> tokens = text.encode(prompt);
  if (const auto bos = text.model().config().bos_token_id) tokens.insert(tokens.begin(), *bos);
  if (tokens.empty()) throw usage_error("--write has none of the model's tokens");
  if (terminal.write(text::valid_utf8(prompt)) && s.read(tokens)) s.write(special_tokens(text));
}

void talk(stream& s, const text_model& text, const std::string& system_turn, chat::terminal& terminal) {
  constexpr auto parsed = tokenizer::special::parsed;
  const std::vector<bool> none_banned(static_cast<std::size_t>(text.model().config().vocab_size));
  std::vector<int> turn = text.encode(system_turn, parsed);
  while (const auto line = terminal.read_line("> ")) {
    if (line->empty()) continue;
    for (const std::vector<int>& part : {text.encode("<|im_start|>user\n", parsed), text.encode(*line),
                                         text.encode("<|im_end|>\n<|im_start|>assistant\n", parsed)})
      turn.insert(turn.end(), part.begin(), part.end());
    if (!s.read(turn) || !s.write(none_banned) || !terminal.write("\n")) return;
    turn = text.encode("<|im_end|>\n", parsed);
  }
}

void run(const options& o) {
  compare::offer_missing_model(o.model);
  std::string report;
  {
    chat::terminal terminal;
    const text_model text(o.model);
    stream s(text, o, terminal);
    if (o.prompt)
      write_on(s, text, *o.prompt, terminal);
    else
      talk(s, text, text.system_turn(o.model), terminal);
    if (terminal.has_status() && s.has_begun()) report = s.status() + "\n";
    if (s.is_full()) report += "stream_chat: the cache is full, and --policy full evicts nothing\n";
  }
  fmt::print(stderr, "{}", report);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (const auto options = chat::parse_options(argc, argv)) run(*options);
  } catch (const usage_error& error) {
    fmt::print(stderr, "stream_chat: {}\nstream_chat --help tells more\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "stream_chat: {}\n", error.what());
    return 1;
  }
}
