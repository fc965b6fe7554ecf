#include "text_model.hpp"

#include <fmt/core.h>

#include <stdexcept>

namespace chat {

using text::tokenizer;

std::vector<int> text_model::encode(const std::string& text, tokenizer::special mode) const {
  if (loaded_.tokenizer()) return loaded_.tokenizer()->encode(text, mode);
  return {reinterpret_cast<const unsigned char*>(text.data()),
          reinterpret_cast<const unsigned char*>(text.data()) + text.size()};
}

std::string text_model::bytes(int token) const {
  const tokenizer* const t = loaded_.tokenizer();
  return t ? std::string(t->bytes(token)) : std::string(1, static_cast<char>(token));
}

bool text_model::is_special(int token) const {
  return loaded_.tokenizer() ? loaded_.tokenizer()->is_special(token) : token > 255;
}

std::vector<bool> text_model::banned(bool only_writes) const {
  std::vector<bool> all(static_cast<std::size_t>(model().config().vocab_size));
  for (std::size_t i = 0; i < all.size(); ++i) {
    const int token = static_cast<int>(i);
    const tokenizer* const t = loaded_.tokenizer();
    all[i] = (t && (token >= t->size() || t->is_unused(token))) || (only_writes && is_special(token));
  }
  return all;
}

std::vector<int> text_model::system_turn() const {
  const std::string start = "<|im_start|>", end = "<|im_end|>", system = start + "system\n";
  const tokenizer* const t = loaded_.tokenizer();
  const std::string chat_template = t ? t->chat_template() : "";
  if (!t || chat_template.find(start) == std::string::npos || !t->find_special(start) || !t->find_special(end))
    throw std::runtime_error(file_ + ": has no ChatML template, so it can only --write");
  const std::size_t first = chat_template.find(system), last = chat_template.find(end, first);
  std::vector<int> tokens;
  if (last != std::string::npos)
    tokens = t->encode(chat_template.substr(first, last - first) + end + "\n", tokenizer::special::parsed);
  if (const auto bos = model().config().bos_token_id) tokens.insert(tokens.begin(), *bos);
  return tokens;
}

}  // namespace chat
