#pragma once

// Attention over a cache by its literal definition: slow, in double, plain loops, nothing shared with the library.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace oracle {

using position = std::int64_t;

struct layer {
  std::size_t num_qo_heads = 1, num_kv_heads = 1, head_dim = 1, v_head_dim = 1;

  std::vector<float> inv_freq;  // none: nothing turns
  bool interleaved = false;
  float attention_factor = 1;   // on the rotated dimensions of raw queries and keys
  bool in_cache = true;         // tokens count their places among the visible tokens; false: true positions
  bool q_rotated = false;       // queries come rotated at their true positions
  bool k_rotated = true;        // keys do: as a cache stores them
  position first_position = 0;  // the stream's first token, among true positions

  double sm_scale = 1, soft_cap = 0;                        // soft_cap 0: none
  std::vector<float> alibi_slopes, sink_bias, sink_logits;  // per query head, or empty
  position num_sink_tokens = 0;                             // tokens below take sink_bias
};

struct answer {
  std::vector<double> out;
  double lse = 0;
  double a = 0;                 // the largest sm_scale * |q| |k|
  double v_max = 0;             // the largest |v|
  std::vector<double> weights;  // of the visible tokens
};

// How far one position turns, in 2^-64 of a full turn: floor(inv_freq * 2^64 / 2 pi) modulo 2^64. Only so is it said
// what "position 2^62" means, where a float inv_freq has no digits left.
std::uint64_t turns_per_position(float inv_freq);

// Turns `dim` doubles by so many positions.
void rotate(const layer& layer, position by, double* row);

// One query token at `query` (counted from the stream's start), all heads: q [num_qo_heads * head_dim]; keys and values
// of the whole stream, [tokens, num_kv_heads * head_dim] and [tokens, num_kv_heads * v_head_dim].
std::vector<answer> attend(const layer& layer, const float* q, position query, const std::vector<position>& visible,
                           const float* keys, const float* values);

// The same in float32, as one writes it down without a thought for rounding. Only out and lse are filled in.
std::vector<answer> attend_naively(const layer& layer, const float* q, position query,
                                   const std::vector<position>& visible, const float* keys, const float* values);

}  // namespace oracle
