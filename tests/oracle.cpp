#include "oracle.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace oracle {
namespace {

constexpr double two_pi = 6.283185307179586477, none = -std::numeric_limits<double>::infinity();

// Phases of far positions are whole numbers of 2^-64 turns, floor(inv_freq * 2^64 / 2 pi) a position, by the library's
// definition: only so is it said what "position 2^62" means, where a float inv_freq has no digits left.
double far_angle(position by, float inv_freq) {
  __extension__ typedef unsigned __int128 wide;
  int exponent = 0;
  const auto mantissa = static_cast<std::uint64_t>(std::ldexp(std::frexp(inv_freq, &exponent), 24));
  const wide low = wide{0x7f09d5f47d4d3770u} * mantissa;  // 1 / 2 pi = 0.28be60db9391054a 7f09d5f47d4d3770
  const wide high = wide{0x28be60db9391054au} * mantissa + (low >> 64);
  const auto turns = static_cast<std::uint64_t>(high >> (24 - exponent));  // inv_freq < 2^24, > 2^-80
  const auto phase = static_cast<std::int64_t>(static_cast<std::uint64_t>(by) * turns);
  return static_cast<double>(phase) * (two_pi / 0x1p64);
}

double angle(position by, float inv_freq) {
  const bool near = by > -(1 << 27) && by < (1 << 27);
  return near || inv_freq == 0 ? static_cast<double>(by) * static_cast<double>(inv_freq) : far_angle(by, inv_freq);
}

void turn_pairs(const layer& layer, const std::vector<double>& cos, const std::vector<double>& sin, double* row) {
  const std::size_t pairs = layer.inv_freq.size();
  for (std::size_t i = 0; i < pairs; ++i) {
    double& x = row[layer.interleaved ? 2 * i : i];
    double& y = row[layer.interleaved ? 2 * i + 1 : i + pairs];
    const double a = x, b = y;
    x = a * cos[i] - b * sin[i];
    y = b * cos[i] + a * sin[i];
  }
}

// Rows of `heads` heads as doubles, turned by so many positions, times `factor` where they turn.
std::vector<double> turned(const layer& layer, const float* row, std::size_t heads, position by, double factor) {
  std::vector<double> cos, sin, result(row, row + heads * layer.head_dim);
  for (float inv_freq : layer.inv_freq) {
    cos.push_back(factor * std::cos(angle(by, inv_freq)));
    sin.push_back(factor * std::sin(angle(by, inv_freq)));
  }
  for (std::size_t head = 0; head < heads; ++head) turn_pairs(layer, cos, sin, result.data() + head * layer.head_dim);
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

struct turned_rows {
  std::vector<double> q;               // [num_qo_heads * head_dim]
  std::vector<std::vector<double>> k;  // one row [num_kv_heads * head_dim] for each visible token
};

turned_rows turn_all(const layer& layer, const float* q, position query, const std::vector<position>& visible,
                     const float* keys) {
  const auto by = [&](position at, std::size_t index, bool turned_before) {
    return place(layer, at, index) - (turned_before ? layer.first_position + at : 0);
  };
  const double factor = static_cast<double>(layer.attention_factor);
  turned_rows rows;
  rows.q = turned(layer, q, layer.num_qo_heads, by(query, visible.empty() ? 0 : visible.size() - 1, layer.q_turned),
                  layer.q_turned ? 1 : factor);
  for (std::size_t i = 0; i < visible.size(); ++i)
    rows.k.push_back(turned(layer, keys + static_cast<std::size_t>(visible[i]) * layer.num_kv_heads * layer.head_dim,
                            layer.num_kv_heads, by(visible[i], i, layer.k_turned), layer.k_turned ? 1 : factor));
  return rows;
}

}  // namespace

void turn(const layer& layer, position by, double* row) {
  std::vector<double> cos, sin;
  for (float inv_freq : layer.inv_freq) {
    cos.push_back(std::cos(angle(by, inv_freq)));
    sin.push_back(std::sin(angle(by, inv_freq)));
  }
  turn_pairs(layer, cos, sin, row);
}

std::vector<answer> attend(const layer& layer, const float* q, position query, const std::vector<position>& visible,
                           const float* keys, const float* values) {
  const std::size_t n = visible.size(), dim = layer.head_dim, v_dim = layer.v_head_dim;
  const turned_rows rows = turn_all(layer, q, query, visible, keys);
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
  const turned_rows rows = turn_all(layer, q, query, visible, keys);
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
