// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "loaded_model.hpp"

#include <filesystem>
#include <stdexcept>

#include "known_models.hpp"

namespace compare {

loaded_model::loaded_model(const std::string& file) : name_(std::filesystem::path(file).stem().string()) {
  offer_missing_model(file);
  model_ = std::make_unique<engine::model>(file);
  if (!loaders::gguf::is_gguf(file)) return;
  tokenizer_ = std::make_unique<text::tokenizer>(loaders::gguf::load(file));
  if (tokenizer_->size() > model_->config().vocab_size)
    throw std::runtime_error(fmt::format("{}: has {} tokens, had to have at most the {} rows of its embedding", file,
                                         tokenizer_->size(), model_->config().vocab_size));
}

subject loaded_model::subject(bool bos) const {
  compare::subject s{model_.get(), name_, false, tokenizer_.get()};
  if (bos && !model_->config().bos_token_id) {
    s.first_token = tokenizer_ ? tokenizer_->bos() : std::nullopt;
    if (!s.first_token) throw usage_error(fmt::format("--bos: {} has no BOS token", name_));
  }
  return s;
}

}  // namespace compare
