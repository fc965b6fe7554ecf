// Every host's loop, one after the other: docs/integrating.md says which file is whose.

#include <fmt/core.h>

#include <cmath>

#include "hosts.hpp"

namespace hosts {

using sinkcache::index_t;

float key(index_t token, index_t head, index_t dim) {
  return std::sin(static_cast<float>((token * num_kv_heads + head) * head_dim + dim) * 0.37f);
}

float value(index_t token, index_t head, index_t dim) { return key(token, head, dim + 11); }

sinkcache::matrix query(index_t token) {
  sinkcache::matrix q(1, num_heads * head_dim);
  for (index_t i = 0; i < q.size(); ++i) q(i) = std::cos(static_cast<float>(token + 3 * i) * 0.21f);
  return q;
}

std::uint16_t half(float x) {
  std::uint16_t block[32];
  sinkcache::f16::encode(&x, 1, reinterpret_cast<std::byte*>(block));
  return block[0];
}

bool report(const char* host, const sinkcache::matrix& query, const sinkcache::matrix& out, index_t tokens,
            const std::function<bool(index_t)>& sees) {
  double error = 0;
  for (index_t h = 0; h < num_heads; ++h) {
    const index_t kv_head = h / (num_heads / num_kv_heads);
    double sum = 0, exact[head_dim] = {};
    for (index_t t = 0; t < tokens; ++t) {
      if (!sees(t)) continue;
      double dot = 0;
      for (index_t d = 0; d < head_dim; ++d)
        dot += static_cast<double>(query(h * head_dim + d)) * static_cast<double>(key(t, kv_head, d));
      const double weight = std::exp(dot / std::sqrt(static_cast<double>(head_dim)));
      sum += weight;
      for (index_t d = 0; d < head_dim; ++d) exact[d] += weight * static_cast<double>(value(t, kv_head, d));
    }
    for (index_t d = 0; d < head_dim; ++d)
      error = std::max(error, std::abs(static_cast<double>(out(h * head_dim + d)) - exact[d] / sum));
  }
  const bool good = error < 2e-3;
  fmt::print("{:<12} {:>4} tokens, off by {:.1e}{}\n", host, tokens, error, good ? "" : "  WRONG");
  return good;
}

}  // namespace hosts

int main() {
  bool good = true;
  for (const auto host :
       {hosts::gemma_cpp, hosts::huggingface, hosts::llama_cpp, hosts::mlx, hosts::onnxruntime, hosts::vllm})
    good &= host();
  return good ? 0 : 1;
}
