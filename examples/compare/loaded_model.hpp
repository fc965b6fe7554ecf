#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include <memory>
#include <string>

#include "evaluate.hpp"

namespace compare {

// A model and, of a GGUF file, its tokenizer; models in other files read bytes. Subjects of it point to it.
class loaded_model {
 public:
  // Offers to get the file where it can be got.
  explicit loaded_model(const std::string& file);

  // With `bos` it begins with the model's BOS token where it is not used to one; a usage_error where there is none.
  compare::subject subject(bool bos) const;

 private:
  std::string name_;
  std::unique_ptr<engine::model> model_;
  std::unique_ptr<text::tokenizer> tokenizer_;
};

}  // namespace compare
