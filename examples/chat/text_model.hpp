#pragma once

#include <string>
#include <vector>

#include "../compare/loaded_model.hpp"

namespace chat {

// A model that is talked with, and how its tokens stand for text.
class text_model {
 public:
  explicit text_model(const std::string& file) : file_(file), loaded_(file) {}

  const engine::model& model() const { return loaded_.model(); }

  std::vector<int> encode(const std::string& text, text::tokenizer::special = text::tokenizer::special::as_text) const;
  std::string bytes(int token) const;
  bool is_special(int token) const;

  // [vocab_size] The tokens that are no text of the model's: those that nobody uses, and where it only writes the
  // special ones, at which a turn would end.
  std::vector<bool> banned(bool only_writes) const;

  // The tokens that a chat begins with: BOS, where the model expects it, and the message that its template puts first
  // where there is none. The template is a program in Jinja; it is not run, only searched for the marks of ChatML and
  // for that message. Throws where it has not these marks.
  std::vector<int> system_turn() const;

 private:
  std::string file_;
  compare::loaded_model loaded_;
};

}  // namespace chat
