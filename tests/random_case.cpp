#include "random_case.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace proof {

double normal(effort::dice& dice) {
  return std::sqrt(-2 * std::log(1 - dice.uniform())) * std::cos(6.283185307179586 * dice.uniform());
}

namespace {

index_t draw_dim(effort::dice& dice, index_t largest) {
  if (dice.one_in(3)) return std::min(largest, one_of<index_t>(dice, {16, 32, 64, 80, 96, 128}));
  return dice.from_to(1, dice.one_in(3) ? largest : std::min<index_t>(largest, 40));
}

void draw_rope(random_case& c, effort::dice& dice) {
  const index_t head_dim = c.config.head_dim;
  const int kind = static_cast<int>(dice.from_to(0, 3));
  const index_t pairs = kind == 0 ? 0 : kind == 1 ? head_dim / 2 : dice.from_to(0, head_dim / 2);
  const double theta = one_of(dice, {100., 10000., 500000.});
  for (index_t i = 0; i < pairs; ++i)
    c.layer.inv_freq.push_back(
        static_cast<float>(kind == 3 ? 4 * dice.uniform() * dice.uniform()
                                     : std::pow(theta, -static_cast<double>(i) / static_cast<double>(pairs))));
  c.layer.interleaved = dice.one_in(2);
  c.layer.attention_factor = dice.one_in(3) ? 1.25f : 1.f;
  c.config.rope.emplace(c.layer.inv_freq, c.layer.interleaved ? rope_pairing::interleaved : rope_pairing::half_split,
                        c.layer.attention_factor);
  if (c.config.positions == positions::absolute && c.config.inputs == inputs::rotated && dice.one_in(2))
    c.config.rope.reset();
}

void draw_logit_terms(random_case& c, effort::dice& dice) {
  oracle::layer& layer = c.layer;
  const int variant = static_cast<int>(dice.from_to(0, 3));
  const bool alibi = dice.one_in(4), bias = dice.one_in(4);
  layer.soft_cap = dice.one_in(4) ? static_cast<double>(one_of(dice, {1.f, 30.f, 50.f})) : 0;
  for (std::size_t head = 0; head < layer.num_qo_heads; ++head) {
    if (variant == 1) layer.sink_logits.push_back(0);
    if (variant == 2) layer.sink_logits.push_back(static_cast<float>(2 * normal(dice)));
    if (variant == 3) layer.sink_logits.push_back(one_of(dice, {-infinity, 100.f, -100.f, 1.f}));
    if (alibi) layer.alibi_slopes.push_back(static_cast<float>(std::exp2(-dice.uniform() * 8)));
    if (bias) layer.sink_bias.push_back(static_cast<float>(normal(dice)));
  }
  if (dice.one_in(3)) layer.sm_scale = static_cast<double>(static_cast<float>(0.01 + dice.uniform()));
}

}  // namespace

plain_policy plain_sink_window(index_t num_sink_tokens, index_t window, index_t rollback) {
  return {[=](position_t seen) {
            std::vector<position_t> list;
            for (position_t p = 0; p < std::min<position_t>(seen, num_sink_tokens); ++p) list.push_back(p);
            for (position_t p = std::max<position_t>(num_sink_tokens, seen - window); p < seen; ++p) list.push_back(p);
            return list;
          },
          [=](position_t p) {
            return p < num_sink_tokens ? p : num_sink_tokens + (p - num_sink_tokens) % (window + rollback);
          },
          num_sink_tokens + window + rollback};
}

std::unique_ptr<open_cache> make_cache(int k_format, int v_format, const cache_config& config) {
  const auto with_k = [&]<class K>(K) -> std::unique_ptr<open_cache> {
    if (v_format == 0) return std::make_unique<open_cache_of<K, f32>>(config);
    if (v_format == 1) return std::make_unique<open_cache_of<K, f16>>(config);
    return std::make_unique<open_cache_of<K, bf16>>(config);
  };
  return k_format == 0 ? with_k(f32{}) : k_format == 1 ? with_k(f16{}) : with_k(bf16{});
}

std::string random_case::name() const {
  static constexpr const char* formats[] = {"f32", "f16", "bf16", "user's"};
  return fmt::format(
      "seed {}: {} + {} heads of {} and {}, {} sink tokens, window {}, rollback {}, from position {}, {} rotary "
      "pairs{}, "
      "{}, {}, formats {} and {}, logits of scale {}, soft cap {}, {} ALiBi slopes, {} sink biases, {} sink logits, "
      "{} tokens{}{}",
      seed, layer.num_qo_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim, config.num_sink_tokens,
      config.window, config.rollback, config.first_position, layer.inv_freq.size(),
      layer.interleaved ? " interleaved" : "", layer.in_cache ? "in_cache" : "absolute",
      layer.q_rotated ? "rotated" : "raw", formats[k_format], formats[v_format], logit_scale, layer.soft_cap,
      layer.alibi_slopes.size(), layer.sink_bias.size(), layer.sink_logits.size(), tokens,
      constant_values ? ", constant values" : "", rewinds ? ", with rewinds" : "");
}

random_case draw_case(std::uint64_t seed, const limits& limits) {
  effort::dice dice(seed);
  random_case c;
  c.seed = seed;
  cache_config& config = c.config;
  config.num_kv_heads = dice.from_to(1, 3);
  const index_t group = dice.one_in(2)   ? dice.from_to(1, 4)
                        : dice.one_in(3) ? std::min(limits.max_group, one_of<index_t>(dice, {24, 40, 64, 71}))
                                         : dice.from_to(1, std::min<index_t>(limits.max_group, 16));
  config.head_dim = draw_dim(dice, limits.max_head_dim);
  config.v_head_dim = dice.one_in(2) ? config.head_dim : draw_dim(dice, limits.max_head_dim);
  config.num_sink_tokens = dice.one_in(4) ? 0 : dice.from_to(0, limits.max_sinks);
  config.window = dice.from_to(1, dice.one_in(2) ? limits.max_window : std::min<index_t>(limits.max_window, 40));
  config.rollback = dice.one_in(3) ? dice.from_to(0, 40) : dice.one_in(4) ? 0 : dice.from_to(0, 130);
  config.positions = dice.one_in(3) ? positions::absolute : positions::in_cache;
  config.inputs = dice.one_in(3) ? inputs::rotated : inputs::raw;
  config.first_position = one_of<position_t>(dice, {0, 0, 0, 1000, 1 << 24, position_t{1} << 40, max_position});
  draw_rope(c, dice);

  oracle::layer& layer = c.layer;
  layer.num_kv_heads = as_size(config.num_kv_heads);
  layer.num_qo_heads = as_size(config.num_kv_heads * group);
  layer.head_dim = as_size(config.head_dim);
  layer.v_head_dim = as_size(config.v_head_dim);
  layer.in_cache = config.positions == positions::in_cache;
  layer.q_rotated = config.inputs == inputs::rotated;
  layer.first_position = config.first_position;
  layer.num_sink_tokens = config.num_sink_tokens;
  layer.sm_scale = 1 / std::sqrt(static_cast<double>(config.head_dim));
  draw_logit_terms(c, dice);
  set_params(c);

  c.k_format = dice.one_in(2) ? 0 : static_cast<int>(dice.from_to(0, num_formats - 1));
  c.v_format = dice.one_in(2) ? c.k_format : static_cast<int>(dice.from_to(0, num_formats - 1));
  c.logit_scale = one_of(dice, {0.01, 1., 1., 10., 100., 1e3, 1e4});
  c.constant_values = dice.one_in(8);
  c.rewinds = dice.one_in(2);
  // Long enough for the window to move on, but wide shapes are not worth as many tokens.
  const index_t work =
      (config.num_sink_tokens + config.window) * config.num_kv_heads * group * (config.head_dim + config.v_head_dim);
  const index_t most = std::clamp<index_t>(80'000'000 / work, 40, limits.max_tokens);
  c.tokens = dice.from_to(1, std::min(most, 3 * (config.num_sink_tokens + config.window) + 20));
  return c;
}

void set_params(random_case& c) {
  attention_params& params = c.params;
  params.num_qo_heads = static_cast<index_t>(c.layer.num_qo_heads);
  if (c.layer.sink_logits.empty())
    params.softmax = softmax_variant::standard();
  else
    params.softmax = softmax_variant::sink_logits(c.layer.sink_logits);
  if (c.layer.sm_scale != 1 / std::sqrt(static_cast<double>(c.config.head_dim)))
    params.sm_scale = static_cast<float>(c.layer.sm_scale);
  params.logits_soft_cap = static_cast<float>(c.layer.soft_cap);
  params.alibi_slopes = c.layer.alibi_slopes;
  params.sink_bias = c.layer.sink_bias;
}

tokens draw_tokens(const random_case& c, effort::dice& dice, position_t first, index_t count) {
  const oracle::layer& layer = c.layer;
  const index_t dim = c.config.head_dim, v_dim = c.config.v_head_dim, kv_heads = c.config.num_kv_heads;
  const index_t heads = static_cast<index_t>(layer.num_qo_heads), group = heads / kv_heads;
  tokens t{matrix(count, heads * dim), matrix(count, kv_heads * dim), matrix(count, kv_heads * v_dim),
           matrix(count, heads * dim), matrix(count, kv_heads * dim)};
  // sm_scale * q . k of random vectors is of scale logit_scale.
  const double spread = std::sqrt(c.logit_scale / (layer.sm_scale * std::sqrt(static_cast<double>(dim))));
  // Keys that tie: rotated to the next query at a multiple of tie_period, they equal it but for a factor near 1.
  effort::dice anchors(c.seed + 1);
  std::vector<double> anchor(as_size(kv_heads * dim));
  for (double& x : anchor) x = spread * normal(anchors);
  const auto fill = [&](index_t head, bool tied, position_t by, float* to) {
    std::vector<double> row(as_size(dim));
    const double factor = 1 - one_of(dice, {0., 1e-7, 1e-5, 1e-3});
    for (std::size_t i = 0; i < row.size(); ++i)
      row[i] = tied ? factor * anchor[as_size(head * dim) + i] : spread * normal(dice);
    if (tied) oracle::rotate(layer, by, row.data());
    std::transform(row.begin(), row.end(), to, [](double x) { return static_cast<float>(x); });
  };
  for (index_t i = 0; i < count; ++i) {
    const position_t p = first + i, target = (p + tie_period - 1) / tie_period * tie_period;
    for (index_t head = 0; head < heads; ++head)
      fill(head / group, p == target && head % group == 0, 0, t.raw_q.row(i).data() + head * dim);
    for (index_t head = 0; head < kv_heads; ++head)
      fill(head, dice.one_in(4), target - p, t.raw_k.row(i).data() + head * dim);
    for (index_t j = 0; j < kv_heads * v_dim; ++j)
      t.v(i, j) =
          static_cast<float>(c.constant_values ? 0.5 + 0.5 / (1 + 0.37 * static_cast<double>(j)) : normal(dice));
  }
  t.q = t.raw_q;
  t.k = t.raw_k;
  if (layer.q_rotated)
    for (index_t i = 0; i < count; ++i) {
      const auto turn = [&](float* row) {
        std::vector<double> rotated(row, row + dim);
        for (std::size_t d = 0; d < 2 * layer.inv_freq.size(); ++d)
          rotated[d] *= static_cast<double>(layer.attention_factor);
        oracle::rotate(layer, layer.first_position + first + i, rotated.data());
        std::transform(rotated.begin(), rotated.end(), row, [](double x) { return static_cast<float>(x); });
      };
      for (index_t head = 0; head < heads; ++head) turn(t.q.row(i).data() + head * dim);
      for (index_t head = 0; head < kv_heads; ++head) turn(t.k.row(i).data() + head * dim);
    }
  return t;
}

}  // namespace proof
