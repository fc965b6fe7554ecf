#include "measure.hpp"

namespace evidence {

std::vector<index_t> targets(index_t cache, index_t tokens, index_t count) {
  std::vector<index_t> all;
  for (index_t i = 0; i < count; ++i) all.push_back(cache + (tokens - cache) * (2 * i + 1) / (2 * count));
  return all;
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
