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
  const index_t rows = model_->config().vocab_size;
  if (!loaders::gguf::is_gguf(file)) {
    if (rows != 256 && rows != 257)
      throw std::runtime_error(
          fmt::format("{}: has {} tokens and no tokenizer, had to have 256 (bytes) or 257 (bytes and BOS), or to be a "
                      "GGUF file with its tokenizer",
                      file, rows));
    return;
  }
  tokenizer_ = std::make_unique<text::tokenizer>(loaders::gguf::load(file));
  if (tokenizer_->size() > rows)
    throw std::runtime_error(
        fmt::format("{}: tokenizer.ggml.tokens has {} tokens, had to have at most {}, a row of token_embd.weight each",
                    file, tokenizer_->size(), rows));
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
