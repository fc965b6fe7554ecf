// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "measure.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

namespace evidence {
namespace {

constexpr std::size_t chunk = 256;  // between two looks at whether to stop

double checked_loss(std::span<const float> logits, std::span<const int> ids, std::size_t i) {
  const double loss = engine::loss_bits(logits, ids[i + 1]);
  if (!std::isfinite(loss)) throw std::runtime_error(fmt::format("the logits after token {} are not finite", i));
  return loss;
}

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

void read(const engine::model& model, const engine::session_config& config, std::span<const int> ids,
          const std::function<void(std::span<const float>)>& each, const progress& on_tokens) {
  engine::session session(model, config);
  for (std::size_t first = 0; first < ids.size(); first += chunk) {
    const auto tokens = ids.subspan(first, std::min(chunk, ids.size() - first));
    session.prefill(tokens, each);
    on_tokens(static_cast<index_t>(tokens.size()));
  }
}

std::vector<double> loss_by_prefill(const engine::model& model, const engine::session_config& config,
                                    std::span<const int> ids, const progress& on_tokens) {
  std::vector<double> bits;
  const auto score = [&](std::span<const float> logits) { bits.push_back(checked_loss(logits, ids, bits.size())); };
  read(model, config, ids.first(ids.size() - 1), score, on_tokens);
  return bits;
}

std::vector<double> loss_by_decode(const engine::model& model, const engine::session_config& config,
                                   std::span<const int> ids, const progress& on_tokens) {
  engine::session session(model, config);
  std::vector<double> bits;
  for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
    bits.push_back(checked_loss(session.decode(ids[i]), ids, i));
    on_tokens(1);
  }
  return bits;
}

std::vector<index_t> targets(index_t cache, index_t tokens, index_t count) {
  std::vector<index_t> all;
  for (index_t i = 0; i < count; ++i) all.push_back(cache + (tokens - cache) * (2 * i + 1) / (2 * count));
  return all;
}

std::vector<double> loss_recomputed(const engine::model& model, index_t cache, std::span<const int> ids,
                                    std::span<const index_t> targets, const progress& on_tokens) {
  engine::session session(model, {.window = cache});
  std::vector<double> bits;
  std::vector<int> context(static_cast<std::size_t>(cache));
  for (const index_t target : targets) {
    const auto i = static_cast<std::size_t>(target);
    const auto newest = ids.subspan(i + 2 - context.size(), context.size() - 1);
    context.front() = ids.front();
    std::copy(newest.begin(), newest.end(), context.begin() + 1);
    session.clear();
    bits.push_back(checked_loss(session.prefill(context), ids, i));
    on_tokens(cache);
  }
  return bits;
}

double ms_per_token(const engine::model& model, const engine::session_config& config, std::span<const int> ids,
                    index_t tokens, const progress& on_tokens) {
  engine::session session(model, config);
  const auto before = static_cast<std::size_t>(config.num_sink_tokens + config.window);
  session.prefill(ids.first(before));
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t i = 0; i < static_cast<std::size_t>(tokens); ++i) {
    session.decode(ids[before + i]);
    on_tokens(1);
  }
  return ms_since(start) / static_cast<double>(tokens);
}

double ms_per_pass(const engine::model& model, const engine::session_config& config, std::span<const int> ids,
                   index_t passes, const progress& on_tokens) {
  engine::session session(model, config);
  const auto start = std::chrono::steady_clock::now();
  for (index_t i = 0; i < passes; ++i) {
    session.clear();
    session.prefill(ids.first(static_cast<std::size_t>(config.window)));
    on_tokens(config.window);
  }
  return ms_since(start) / static_cast<double>(passes);
}

engine::matrix pinned_shares(const engine::model& model, engine::session_config config, std::span<const int> ids,
                             index_t tokens, const progress& on_tokens) {
  config.watches_sinks = true;
  engine::session session(model, config);
  const auto before = static_cast<std::size_t>(config.num_sink_tokens + config.window);
  session.prefill(ids.first(before));
  engine::matrix sum = engine::matrix::Zero(model.config().num_hidden_layers, model.config().num_attention_heads);
  for (std::size_t i = 0; i < static_cast<std::size_t>(tokens); ++i) {
    session.decode(ids[before + i]);
    sum += session.pinned_shares();
    on_tokens(1);
  }
  return sum / static_cast<float>(tokens);
}

std::size_t cache_bytes(const engine::model& model, const engine::session_config& config) {
  return engine::session(model, config).cache_bytes();
}

}  // namespace evidence
