#pragma once

// What the loops of this folder share: numbers to compute with, and a plain loop to check against.

#include <sinkcache/sinkcache.hpp>

#include <cstdint>
#include <functional>
#include <vector>

namespace hosts {

// A made-up engine's layer: 4 query heads over 2 KV heads of 64.
inline constexpr sinkcache::index_t num_heads = 4, num_kv_heads = 2, head_dim = 64;

// Keys and queries come rotated by the engine, at their true positions.
inline sinkcache::cache_config config() {
  return {.num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .positions = sinkcache::positions::absolute,
          .inputs = sinkcache::inputs::rotated};
}

// The engine's numbers: one of token, head and dimension.
float key(sinkcache::index_t token, sinkcache::index_t head, sinkcache::index_t dim);
float value(sinkcache::index_t token, sinkcache::index_t head, sinkcache::index_t dim);
sinkcache::matrix query(sinkcache::index_t token);

std::uint16_t half(float);  // as the engine would store it

// Prints how far `out` is from a plain loop over the tokens that `sees` names; false if further than f16 explains.
bool report(const char* host, const sinkcache::matrix& query, const sinkcache::matrix& out, sinkcache::index_t tokens,
            const std::function<bool(sinkcache::index_t)>& sees);

// One file each; false if the result is wrong.
bool gemma_cpp();
bool huggingface();
bool llama_cpp();
bool mlx();
bool onnxruntime();
bool vllm();

}  // namespace hosts
