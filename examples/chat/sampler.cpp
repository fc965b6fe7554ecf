#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace chat {

int sampler::draw(std::span<const float> logits, const std::vector<bool>& banned) {
  const auto logit = [logits](int token) { return logits[static_cast<std::size_t>(token)]; };
  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (!std::isfinite(logits[i])) throw std::runtime_error("the model's logits are not finite");
    if (!banned[i]) candidates_.push_back(static_cast<int>(i));
  }
  if (candidates_.empty())
    throw std::runtime_error("no token may be drawn: all that the model has are special or unused");
  // Equal logits by their number, so that no sort decides between them.
  const auto likelier = [&](int a, int b) { return logit(a) != logit(b) ? logit(a) > logit(b) : a < b; };
  if (config_.temperature == 0) return *std::min_element(candidates_.begin(), candidates_.end(), likelier);
  if (config_.top_k > 0 && config_.top_k < candidates_.size()) {
    const auto end = candidates_.begin() + static_cast<std::ptrdiff_t>(config_.top_k);
    std::partial_sort(candidates_.begin(), end, candidates_.end(), likelier);
    candidates_.erase(end, candidates_.end());
  }
  const float max = logit(*std::min_element(candidates_.begin(), candidates_.end(), likelier));
  weights_.clear();
  double sum = 0;
  for (const int token : candidates_) {
    weights_.push_back(std::exp((static_cast<double>(logit(token)) - max) / config_.temperature));
    sum += weights_.back();
  }
  // Not by std::discrete_distribution, which is another one in every standard library.
  double left = static_cast<double>(random_() >> 11) * 0x1p-53 * sum;
  for (std::size_t i = 0; i < candidates_.size(); ++i) {
    left -= weights_[i];
    if (left < 0) return candidates_[i];
  }
  return candidates_.front();  // only where the sum was rounded
}

}  // namespace chat
