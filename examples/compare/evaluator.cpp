#include "evaluator.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

namespace compare {
namespace {

using clock = std::chrono::steady_clock;

constexpr std::size_t chunk = 256;  // between two reports of progress

double ms_since(clock::time_point start) {
  return std::chrono::duration<double, std::milli>(clock::now() - start).count();
}

}  // namespace

engine::session_config config_of(const subject& s, engine::session_config config) {
  if (s.remedy_removed) config.softmax = sinkcache::softmax_variant::standard();
  return config;
}

token_stream read_by(const subject& s, const std::string& text) {
  const loaders::model_config& config = s.model->config();
  token_stream stream;
  if (const std::optional<int> first = config.bos_token_id ? config.bos_token_id : s.first_token)
    stream = {{*first}, {0}};
  if (s.tokenizer) {
    for (const int id : s.tokenizer->encode(text)) {
      stream.ids.push_back(id);
      stream.bytes.push_back(static_cast<int>(s.tokenizer->bytes(id).size()));
    }
    return stream;
  }
  for (std::size_t i = 0; i < text.size(); ++i) {
    const int byte = static_cast<unsigned char>(text[i]);
    if (byte >= config.vocab_size)
      throw std::runtime_error(
          fmt::format("byte {} of the text is {}, the model's vocabulary ends at {}", i, byte, config.vocab_size - 1));
    stream.ids.push_back(byte);
    stream.bytes.push_back(1);
  }
  return stream;
}

evaluator::evaluator(const subject& s, const engine::cache_factory& caches, std::span<const int> ids,
                     engine::session_config config)
    : subject_(&s), ids_(ids), session_(*s.model, caches, config_of(s, std::move(config))) {}

double evaluator::loss(std::span<const float> logits, std::size_t i) const {
  const double loss = engine::loss_bits(logits, ids_[i + 1]);
  if (!std::isfinite(loss))
    throw std::runtime_error(fmt::format("{}: the logits after token {} are not finite", subject_->name, i));
  return loss;
}

std::vector<double> evaluator::by_decode(std::size_t tokens, const progress& on_tokens) {
  std::vector<double> bits;
  for (; bits.size() < tokens; ++seen_) {
    bits.push_back(loss(session_.decode(ids_[seen_]), seen_));
    on_tokens(1);
  }
  return bits;
}

void evaluator::prefill(std::size_t tokens, const std::function<void(std::span<const float>)>& each,
                        const progress& on_tokens) {
  for (const std::size_t end = seen_ + tokens; seen_ < end;) {
    const auto some = ids_.subspan(seen_, std::min(chunk, end - seen_));
    session_.prefill(some, each);
    seen_ += some.size();
    on_tokens(static_cast<index_t>(some.size()));
  }
}

std::vector<double> evaluator::by_prefill(std::size_t tokens, const progress& on_tokens) {
  std::vector<double> bits;
  const std::size_t first = seen_;
  prefill(
      tokens, [&](std::span<const float> logits) { bits.push_back(loss(logits, first + bits.size())); }, on_tokens);
  return bits;
}

double evaluator::recomputed(std::size_t i, index_t cache) {
  context_.resize(static_cast<std::size_t>(cache));
  const auto newest = ids_.subspan(i + 2 - context_.size(), context_.size() - 1);
  context_.front() = ids_.front();
  std::copy(newest.begin(), newest.end(), context_.begin() + 1);
  session_.clear();
  seen_ = i + 1;
  return loss(session_.prefill(context_), i);
}

double ms_per_token(engine::session& session, index_t cache, std::span<const int> ids, index_t tokens,
                    const progress& on_tokens) {
  for (index_t i = 0, n; i < cache; i += n) {
    const std::size_t at = static_cast<std::size_t>(i) % ids.size();
    n = std::min(cache - i, static_cast<index_t>(ids.size() - at));
    session.prefill(ids.subspan(at, static_cast<std::size_t>(n)));
  }
  const auto start = clock::now();
  for (index_t i = cache; i < cache + tokens; ++i) {
    session.decode(ids[static_cast<std::size_t>(i) % ids.size()]);
    on_tokens(1);
  }
  return ms_since(start) / static_cast<double>(tokens);
}

double ms_per_pass(engine::session& session, index_t cache, std::span<const int> ids, index_t passes,
                   const progress& on_tokens) {
  const auto start = clock::now();
  for (index_t i = 0; i < passes; ++i) {
    session.clear();
    session.prefill(ids.first(std::min(ids.size(), static_cast<std::size_t>(cache))));
    on_tokens(cache);
  }
  return ms_since(start) / static_cast<double>(passes);
}

}  // namespace compare
