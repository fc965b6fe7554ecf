#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include <memory>
#include <string>

#include "evaluate.hpp"

namespace compare {

// A model and how its tokens stand for text. A GGUF file needs a tokenizer with a row of the embedding for every token;
// it may have more rows, for padding. In any other file tokens are bytes. Subjects of it point to it.
class loaded_model {
 public:
  // Offers to get the file where it can be got. Throws where the vocabulary is neither.
  explicit loaded_model(const std::string& file);

  const engine::model& model() const { return *model_; }
  const text::tokenizer* tokenizer() const { return tokenizer_.get(); }  // null: a token is a byte

  // With `bos` it begins with the model's BOS token where it is not used to one; a usage_error where there is none.
  compare::subject subject(bool bos) const;

 private:
  std::string name_;
  std::unique_ptr<engine::model> model_;
  std::unique_ptr<text::tokenizer> tokenizer_;
};

}  // namespace compare
