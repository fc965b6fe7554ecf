#include "oracle.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace oracle {
namespace {

constexpr double two_pi = 6.283185307179586477, none = -std::numeric_limits<double>::infinity();

// 2 pi, and angles below it: digits of 32 bits, the first in front of the point.
using radians = std::array<std::uint32_t, 8>;
constexpr radians full_turn = {6, 0x487ed511, 0x0b4611a6, 0x2633145c, 0x06e0e689, 0x48127044, 0x533e63a0, 0x105df531};

radians doubled(radians x) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = x[i] << 1 | (i + 1 < x.size() ? x[i + 1] >> 31 : 0);
  return x;
}

radians without_full_turn(radians x) {
  std::int64_t borrow = 0;
  for (std::size_t i = x.size(); i-- > 0;) {
    const std::int64_t digit = std::int64_t{x[i]} - full_turn[i] + borrow;
    x[i] = static_cast<std::uint32_t>(digit);
    borrow = digit < 0 ? -1 : 0;
  }
  return x;
}

std::vector<std::uint64_t> turns_of_pairs(const layer& layer) {
  std::vector<std::uint64_t> turns;
  for (float inv_freq : layer.inv_freq) turns.push_back(turns_per_position(inv_freq));
  return turns;
}

// Exact where a double holds the product; further away by whole numbers of 2^-64 turns.
double angle(position by, float inv_freq, std::uint64_t turns) {
  if (by > -(1 << 27) && by < (1 << 27)) return static_cast<double>(by) * static_cast<double>(inv_freq);
  const auto phase = static_cast<std::int64_t>(static_cast<std::uint64_t>(by) * turns);
  return static_cast<double>(phase) * (two_pi / 0x1p64);
}

void rotate_pairs(const layer& layer, const std::vector<double>& cos, const std::vector<double>& sin, double* row) {
  const std::size_t pairs = layer.inv_freq.size();
  for (std::size_t i = 0; i < pairs; ++i) {
    double& x = row[layer.interleaved ? 2 * i : i];
    double& y = row[layer.interleaved ? 2 * i + 1 : i + pairs];
    const double a = x, b = y;
    x = a * cos[i] - b * sin[i];
    y = b * cos[i] + a * sin[i];
  }
}

// Rows of `heads` heads as doubles, rotated by so many positions, times `factor` where they turn.
std::vector<double> rotated(const layer& layer, const std::vector<std::uint64_t>& turns, const float* row,
                            std::size_t heads, position by, double factor) {
  std::vector<double> cos, sin, result(row, row + heads * layer.head_dim);
  for (std::size_t i = 0; i < turns.size(); ++i) {
    cos.push_back(factor * std::cos(angle(by, layer.inv_freq[i], turns[i])));
    sin.push_back(factor * std::sin(angle(by, layer.inv_freq[i], turns[i])));
  }
  for (std::size_t head = 0; head < heads; ++head) rotate_pairs(layer, cos, sin, result.data() + head * layer.head_dim);
  return result;
}

double dot(const double* a, const double* b, std::size_t n) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Where a token counts as being, for rotation and ALiBi: its place in the cache, or its position in the stream.
position place(const layer& layer, position position_in_stream, std::size_t index_in_cache) {
  return layer.in_cache ? static_cast<position>(index_in_cache) : position_in_stream;
}

struct rotated_rows {
  std::vector<double> q;               // [num_qo_heads * head_dim]
  std::vector<std::vector<double>> k;  // one row [num_kv_heads * head_dim] for each visible token
};

rotated_rows rotate_all(const layer& layer, const float* q, position query, const std::vector<position>& visible,
                        const float* keys) {
  const auto by = [&](position at, std::size_t index, bool rotated_before) {
    return place(layer, at, index) - (rotated_before ? layer.first_position + at : 0);
  };
  const double factor = static_cast<double>(layer.attention_factor);
  const std::vector<std::uint64_t> turns = turns_of_pairs(layer);
  rotated_rows rows;
  rows.q = rotated(layer, turns, q, layer.num_qo_heads,
                   by(query, visible.empty() ? 0 : visible.size() - 1, layer.q_rotated), layer.q_rotated ? 1 : factor);
  for (std::size_t i = 0; i < visible.size(); ++i) {
    const float* const key = keys + static_cast<std::size_t>(visible[i]) * layer.num_kv_heads * layer.head_dim;
    rows.k.push_back(rotated(layer, turns, key, layer.num_kv_heads, by(visible[i], i, layer.k_rotated),
                             layer.k_rotated ? 1 : factor));
  }
  return rows;
}

}  // namespace

std::uint64_t turns_per_position(float inv_freq) {
  // Long division by 2 pi, as at school. An angle of at most 1 is doubled 64 times, and as often as inv_freq says; each
  // full turn that this makes is a digit of the quotient. What leaves the 64 digits are whole turns.
  int doublings = 0;
  const float fraction = std::frexp(inv_freq, &doublings);  // below 1
  radians rest{0, static_cast<std::uint32_t>(std::ldexp(fraction, 32))};
  std::uint64_t turns = 0;
  for (doublings += 64; doublings > 0; --doublings) {
    rest = doubled(rest);
    turns <<= 1;
    if (rest >= full_turn) {
      rest = without_full_turn(rest);
      ++turns;
    }
  }
  return turns;
}

void rotate(const layer& layer, position by, double* row) {
  const std::vector<std::uint64_t> turns = turns_of_pairs(layer);
  std::vector<double> cos, sin;
  for (std::size_t i = 0; i < turns.size(); ++i) {
    cos.push_back(std::cos(angle(by, layer.inv_freq[i], turns[i])));
    sin.push_back(std::sin(angle(by, layer.inv_freq[i], turns[i])));
  }
  rotate_pairs(layer, cos, sin, row);
}

std::vector<answer> attend(const layer& layer, const float* q, position query, const std::vector<position>& visible,
                           const float* keys, const float* values) {
  const std::size_t n = visible.size(), dim = layer.head_dim, v_dim = layer.v_head_dim;
  const rotated_rows rows = rotate_all(layer, q, query, visible, keys);
  std::vector<answer> answers(layer.num_qo_heads);
  for (std::size_t head = 0; head < layer.num_qo_heads; ++head) {
    answer& to = answers[head];
    const std::size_t kv_head = head / (layer.num_qo_heads / layer.num_kv_heads);
    const double* const q_head = rows.q.data() + head * dim;
    const auto value = [&](std::size_t i, std::size_t column) {
      const std::size_t row = static_cast<std::size_t>(visible[i]) * layer.num_kv_heads + kv_head;
      return static_cast<double>(values[row * v_dim + column]);
    };

    std::vector<double> logits(n + 1, none);  // the last column is the sink
    for (std::size_t i = 0; i < n; ++i) {
      const double* const k_head = rows.k[i].data() + kv_head * dim;
      double logit = layer.sm_scale * dot(q_head, k_head, dim);
      if (layer.soft_cap > 0) logit = layer.soft_cap * std::tanh(logit / layer.soft_cap);
      if (!layer.alibi_slopes.empty())
        logit += static_cast<double>(layer.alibi_slopes[head]) *
                 static_cast<double>(place(layer, visible[i], i) - place(layer, query, n - 1));
      if (!layer.sink_bias.empty() && visible[i] < layer.num_sink_tokens)
        logit += static_cast<double>(layer.sink_bias[head]);
      logits[i] = logit;
      to.a = std::max(to.a, std::abs(layer.sm_scale) * std::sqrt(dot(q_head, q_head, dim) * dot(k_head, k_head, dim)));
      for (std::size_t column = 0; column < v_dim; ++column) to.v_max = std::max(to.v_max, std::abs(value(i, column)));
    }
    if (!layer.sink_logits.empty()) logits[n] = static_cast<double>(layer.sink_logits[head]);

    const double largest = *std::max_element(logits.begin(), logits.end());
    to.out.assign(v_dim, 0);
    to.lse = none;
    if (largest == none) continue;  // nothing visible
    double sum = 0;
    for (double logit : logits) sum += std::exp(logit - largest);
    to.lse = largest + std::log(sum);
    for (std::size_t i = 0; i < n; ++i) {  // the sink's column is dropped: it has no value
      to.weights.push_back(std::exp(logits[i] - largest) / sum);
      for (std::size_t column = 0; column < v_dim; ++column) to.out[column] += to.weights[i] * value(i, column);
    }
  }
  return answers;
}

std::vector<answer> attend_naively(const layer& layer, const float* q, position query,
                                   const std::vector<position>& visible, const float* keys, const float* values) {
  const std::size_t n = visible.size(), dim = layer.head_dim, v_dim = layer.v_head_dim;
  const rotated_rows rows = rotate_all(layer, q, query, visible, keys);
  const float scale = static_cast<float>(layer.sm_scale);
  std::vector<answer> answers(layer.num_qo_heads);
  for (std::size_t head = 0; head < layer.num_qo_heads; ++head) {
    const std::size_t kv_head = head / (layer.num_qo_heads / layer.num_kv_heads);
    std::vector<float> logits(n), out(v_dim, 0.f);
    float largest = layer.sink_logits.empty() ? -std::numeric_limits<float>::infinity() : layer.sink_logits[head];
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t d = 0; d < dim; ++d)
        logits[i] += static_cast<float>(rows.q[head * dim + d]) * static_cast<float>(rows.k[i][kv_head * dim + d]);
      logits[i] *= scale;
      largest = std::max(largest, logits[i]);
    }
    float sum = layer.sink_logits.empty() ? 0.f : std::exp(layer.sink_logits[head] - largest);
    for (std::size_t i = 0; i < n; ++i) {
      const float weight = std::exp(logits[i] - largest);
      const float* const value = values + (static_cast<std::size_t>(visible[i]) * layer.num_kv_heads + kv_head) * v_dim;
      sum += weight;
      for (std::size_t column = 0; column < v_dim; ++column) out[column] += weight * value[column];
    }
    for (float x : out) answers[head].out.push_back(static_cast<double>(x / sum));
    answers[head].lse = static_cast<double>(largest + std::log(sum));
  }
  return answers;
}

}  // namespace oracle
