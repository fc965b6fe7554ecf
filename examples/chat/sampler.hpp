#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace chat {

struct sampler_config {
  double temperature = 1;  // 0: always the likeliest
  std::size_t top_k = 40;  // of which one is drawn; 0: all
  std::uint64_t seed = 0;
};

// Draws tokens; the same ones for a seed, everywhere.
class sampler {
 public:
  explicit sampler(const sampler_config& config) : config_(config), random_(config.seed) {}

  // Of the tokens that are not `banned`, one flag a token. Throws where none is left, and where logits are NaN or inf.
  int draw(std::span<const float> logits, const std::vector<bool>& banned);

 private:
  sampler_config config_;
  std::mt19937_64 random_;
  std::vector<int> candidates_;
  std::vector<double> weights_;
};

}  // namespace chat
