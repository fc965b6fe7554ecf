#include "measure.hpp"

#include <chrono>

namespace evidence {
namespace {

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

std::vector<index_t> targets(index_t cache, index_t tokens, index_t count) {
  std::vector<index_t> all;
  for (index_t i = 0; i < count; ++i) all.push_back(cache + (tokens - cache) * (2 * i + 1) / (2 * count));
  return all;
}

double ms_per_token(engine::session& session, index_t cache, std::span<const int> ids, index_t tokens,
                    const progress& on_tokens) {
  const auto before = static_cast<std::size_t>(cache);
  session.prefill(ids.first(before));
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t i = 0; i < static_cast<std::size_t>(tokens); ++i) {
    session.decode(ids[before + i]);
    on_tokens(1);
  }
  return ms_since(start) / static_cast<double>(tokens);
}

double ms_per_pass(engine::session& session, index_t cache, std::span<const int> ids, index_t passes,
                   const progress& on_tokens) {
  const auto start = std::chrono::steady_clock::now();
  for (index_t i = 0; i < passes; ++i) {
    session.clear();
    session.prefill(ids.first(static_cast<std::size_t>(cache)));
    on_tokens(cache);
  }
  return ms_since(start) / static_cast<double>(passes);
}

engine::matrix pinned_shares(engine::session& session, index_t cache, std::span<const int> ids, index_t tokens,
                             const progress& on_tokens) {
  const auto before = static_cast<std::size_t>(cache);
  session.prefill(ids.first(before));
  engine::matrix sum;
  for (std::size_t i = 0; i < static_cast<std::size_t>(tokens); ++i) {
    session.decode(ids[before + i]);
    if (i == 0)
      sum = session.pinned_shares();
    else
      sum += session.pinned_shares();
    on_tokens(1);
  }
  return sum / static_cast<float>(tokens);
}

}  // namespace evidence
