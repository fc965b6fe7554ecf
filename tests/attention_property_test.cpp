// Attention over caches against the oracle, and what has to hold whatever the numbers are.

#include <fmt/format.h>

#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "random_case.hpp"

namespace proof {

namespace {

constexpr double u = 0x1p-24;
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int tie_period = 37;  // every so many tokens a query meets keys whose logits tie at the top

std::size_t as_size(index_t n) { return static_cast<std::size_t>(n); }

double normal(effort::dice& dice) {
  return std::sqrt(-2 * std::log(1 - dice.uniform())) * std::cos(6.283185307179586 * dice.uniform());
}

template <class T>
T one_of(effort::dice& dice, std::initializer_list<T> list) {
  return list.begin()[dice.from_to(0, static_cast<std::int64_t>(list.size()) - 1)];
}

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

std::string random_case::name() const {
  static constexpr const char* formats[] = {"f32", "f16", "bf16", "user's"};
  return fmt::format(
      "seed {}: {} + {} heads of {} and {}, {} sink tokens, window {}, rollback {}, from position {}, {} rotary "
      "pairs{}, "
      "{}, {}, formats {} and {}, logits of scale {}, soft cap {}, {} ALiBi slopes, {} sink biases, {} sink logits, "
      "blocks "
      "of {}, {} tokens{}{}",
      seed, layer.num_qo_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim, config.num_sink_tokens,
      config.window, config.rollback, config.first_position, layer.inv_freq.size(),
      layer.interleaved ? " interleaved" : "", layer.in_cache ? "in_cache" : "absolute",
      layer.q_turned ? "rotated" : "raw", formats[k_format], formats[v_format], logit_scale, layer.soft_cap,
      layer.alibi_slopes.size(), layer.sink_bias.size(), layer.sink_logits.size(), config.prefill_block, tokens,
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
  config.rollback = dice.one_in(3) ? dice.from_to(0, 40) : 0;
  config.positions = dice.one_in(3) ? positions::absolute : positions::in_cache;
  config.inputs = dice.one_in(3) ? inputs::rotated : inputs::raw;
  config.first_position = one_of<position_t>(dice, {0, 0, 0, 1000, 1 << 24, position_t{1} << 40, max_position});
  config.prefill_block = dice.one_in(3) ? dice.from_to(1, 700) : 512;
  draw_rope(c, dice);

  oracle::layer& layer = c.layer;
  layer.num_kv_heads = as_size(config.num_kv_heads);
  layer.num_qo_heads = as_size(config.num_kv_heads * group);
  layer.head_dim = as_size(config.head_dim);
  layer.v_head_dim = as_size(config.v_head_dim);
  layer.in_cache = config.positions == positions::in_cache;
  layer.q_turned = config.inputs == inputs::rotated;
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
  // Keys that tie: turned to the next query at a multiple of tie_period, they equal it but for a factor near 1.
  effort::dice anchors(c.seed + 1);
  std::vector<double> anchor(as_size(kv_heads * dim));
  for (double& x : anchor) x = spread * normal(anchors);
  const auto fill = [&](index_t head, bool tied, position_t by, float* to) {
    std::vector<double> row(as_size(dim));
    const double factor = 1 - one_of(dice, {0., 1e-7, 1e-5, 1e-3});
    for (std::size_t i = 0; i < row.size(); ++i)
      row[i] = tied ? factor * anchor[as_size(head * dim) + i] : spread * normal(dice);
    if (tied) oracle::turn(layer, by, row.data());
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
  if (layer.q_turned)
    for (index_t i = 0; i < count; ++i) {
      const auto turn = [&](float* row) {
        std::vector<double> turned(row, row + dim);
        for (std::size_t d = 0; d < 2 * layer.inv_freq.size(); ++d)
          turned[d] *= static_cast<double>(layer.attention_factor);
        oracle::turn(layer, layer.first_position + first + i, turned.data());
        std::transform(turned.begin(), turned.end(), row, [](double x) { return static_cast<float>(x); });
      };
      for (index_t head = 0; head < heads; ++head) turn(t.q.row(i).data() + head * dim);
      for (index_t head = 0; head < kv_heads; ++head) turn(t.k.row(i).data() + head * dim);
    }
  return t;
}

std::string far_from(const std::vector<oracle::answer>& expected, const float* out, const float* lse, nearness* near) {
  for (std::size_t head = 0; head < expected.size(); ++head) {
    const oracle::answer& e = expected[head];
    const double bound = 16 * u * (1 + e.a);
    for (double x : e.out) {
      const double error = std::abs(static_cast<double>(*out++) - x);
      if (!(error <= bound * e.v_max))
        return fmt::format("head {}: output {} instead of {}, {} times the bound; A {}, max|v| {}", head, out[-1], x,
                           error / (bound * e.v_max), e.a, e.v_max);
      if (near && e.v_max > 0) near->out = std::max(near->out, error / (bound * e.v_max));
    }
    const double error = static_cast<double>(lse[head]) == e.lse ? 0 : std::abs(static_cast<double>(lse[head]) - e.lse);
    if (!(error <= bound))
      return fmt::format("head {}: lse {} instead of {}, {} times the bound; A {}", head, lse[head], e.lse,
                         error / bound, e.a);
    if (near) near->lse = std::max(near->lse, error / bound);
  }
  return "";
}

namespace {

// A run of one random case: the cache under test, fed in chunks, and one fed token by token beside it.
class case_run {
 public:
  case_run(const random_case& c, const cache_maker& make, const plain_policy& policy, storage_error k, storage_error v,
           nearness* near)
      : case_(c),
        policy_(policy),
        k_error_(k),
        v_error_(v),
        near_(near),
        dice_(c.seed + 2),
        raw_layer_(c.layer),
        cache_(make(c.config)),
        token_by_token_(make(c.config)),
        attention_(c.params),
        owner_(as_size(policy.slots), -1) {
    raw_layer_.k_turned = raw_layer_.q_turned = false;
    // A query costs the oracle a sine and a cosine for each key and pair, and the products of every head.
    const auto visible = static_cast<double>(std::min<index_t>(policy.slots, c.tokens));
    const auto dims = static_cast<double>(c.layer.head_dim + c.layer.v_head_dim);
    const double cost = visible * (20 * static_cast<double>(c.layer.inv_freq.size()) +
                                   dims * static_cast<double>(c.layer.num_kv_heads + c.layer.num_qo_heads));
    check_rate_ = std::min(1., 5e6 / (cost * static_cast<double>(c.tokens)));
  }

  std::string run() {
    for (index_t fed = 0; fed < case_.tokens;) {
      index_t n = std::min(case_.tokens - fed, dice_.from_to(1, one_of<index_t>(dice_, {1, 1, 20, 100, 700})));
      if (case_.rewinds && dice_.one_in(4)) {
        if (std::string wrong = rewind(); !wrong.empty()) return wrong + at();
      }
      std::string wrong = n > 1 && dice_.one_in(4) ? append_all(n) : n > 1 ? prefill(n) : decode();
      if (wrong.empty() && seen() != cache_->get().seen()) wrong = "seen() is off";
      if (wrong.empty() && !std::equal(cache_->bytes().begin(), cache_->bytes().end(), token_by_token_->bytes().begin(),
                                       token_by_token_->bytes().end()))
        wrong = "bytes differ from those of appending token by token";
      if (wrong.empty() && cache_->get().size() != static_cast<index_t>(policy_.visible(seen()).size()))
        wrong = "size() is off";
      if (!wrong.empty()) return wrong + at();
      fed += n;
    }
    return "";
  }

 private:
  position_t seen() const { return static_cast<position_t>(keys_.size() / key_floats()); }
  std::size_t key_floats() const { return case_.layer.num_kv_heads * case_.layer.head_dim; }
  std::size_t value_floats() const { return case_.layer.num_kv_heads * case_.layer.v_head_dim; }
  std::string at() const { return fmt::format("; {} tokens seen", seen()); }

  // Appends to the cache beside, and notes what it stored.
  std::string note(const tokens& t, index_t count) {
    for (index_t i = 0; i < count; ++i) {
      const position_t p = seen();
      const index_t slot = policy_.slot(p);
      token_by_token_->append(t.k.row(i), t.v.row(i));
      owner_[as_size(slot)] = p;
      keys_.resize(keys_.size() + key_floats());
      values_.resize(values_.size() + value_floats());
      raw_keys_.insert(raw_keys_.end(), t.raw_k.row(i).data(), t.raw_k.row(i).data() + key_floats());
      for (index_t head = 0; head < case_.config.num_kv_heads; ++head) {
        const index_t k_at = head * case_.config.head_dim, v_at = head * case_.config.v_head_dim;
        float* const k = keys_.data() + keys_.size() - key_floats() + k_at;
        float* const v = values_.data() + values_.size() - value_floats() + v_at;
        token_by_token_->key(head, slot, k);
        token_by_token_->value(head, slot, v);
        if (!dice_.one_in(8)) continue;
        std::vector<double> to_store(t.k.row(i).data() + k_at, t.k.row(i).data() + k_at + case_.config.head_dim);
        double turning = 0;
        if (!case_.layer.q_turned && !case_.layer.inv_freq.empty()) {
          turning = 8 * u;
          for (std::size_t d = 0; d < 2 * case_.layer.inv_freq.size(); ++d)
            to_store[d] *= static_cast<double>(case_.layer.attention_factor);
          oracle::turn(case_.layer, case_.layer.first_position + p, to_store.data());
        }
        if (!stored(to_store, k, {k_error_.relative, k_error_.of_row + turning})) return "a key is not what was given";
        to_store.assign(t.v.row(i).data() + v_at, t.v.row(i).data() + v_at + case_.config.v_head_dim);
        if (!stored(to_store, v, v_error_)) return "a value is not what was given";
      }
    }
    return "";
  }

  static bool stored(const std::vector<double>& given, const float* found, storage_error allowed) {
    double largest = 0;
    for (double x : given) largest = std::max(largest, std::abs(x));
    for (std::size_t i = 0; i < given.size(); ++i)
      if (!(std::abs(static_cast<double>(found[i]) - given[i]) <=
            allowed.relative * std::abs(given[i]) + allowed.of_row * largest))
        return false;
    return true;
  }

  // One query token's outputs against the oracle on the stored rows and, where storing changed nothing, on the raw
  // ones.
  std::string compare(const tokens& t, index_t row, position_t query, const float* out, const float* lse) {
    const bool tie = query % tie_period == 0;
    if (dice_.uniform() >= check_rate_ * (tie ? 4 : 1)) return "";
    const std::vector<position_t> visible = policy_.visible(query + 1);
    std::string wrong =
        far_from(oracle::attend(case_.layer, t.q.row(row).data(), query, visible, keys_.data(), values_.data()), out,
                 lse, near_);
    if (wrong.empty() && case_.k_format == 0 && !case_.layer.q_turned && dice_.one_in(2)) {
      wrong =
          far_from(oracle::attend(raw_layer_, t.q.row(row).data(), query, visible, raw_keys_.data(), values_.data()),
                   out, lse, near_);
      if (!wrong.empty()) wrong = "against raw keys: " + wrong;
    }
    return wrong.empty() ? wrong : fmt::format("token {}, row {}: {}", query, row, wrong);
  }

  std::string decode() {
    const position_t query = seen();
    const tokens t = draw_tokens(case_, dice_, query, 1);
    cache_->append(t.k, t.v);
    return decode(t, 0);
  }
  std::string decode(const tokens& t, index_t row) {
    const position_t before = seen();
    std::string wrong = note(t, row + 1);
    matrix out = matrix::Constant(1, static_cast<index_t>(case_.layer.num_qo_heads * case_.layer.v_head_dim), infinity);
    std::vector<float> lse(case_.layer.num_qo_heads, infinity);
    attention_.decode(t.q.row(row), cache_->get(), out, workspace_, lse.data());
    return !wrong.empty() ? wrong : compare(t, row, before + row, out.data(), lse.data());
  }

  // Many tokens appended at once; only the last one's query is asked.
  std::string append_all(index_t n) {
    const tokens t = draw_tokens(case_, dice_, seen(), n);
    cache_->append(t.k, t.v);
    return decode(t, n - 1);
  }

  std::string prefill(index_t n) {
    const position_t first = seen();
    const tokens t = draw_tokens(case_, dice_, first, n);
    // All matrices are blocks of wider ones, and nothing is written beside them.
    const index_t heads = static_cast<index_t>(case_.layer.num_qo_heads);
    const auto in_wider = [](const matrix& m) {
      matrix wider = matrix::Constant(m.rows(), m.cols() + 3, std::numeric_limits<float>::quiet_NaN());
      wider.leftCols(m.cols()) = m;
      return wider;
    };
    const matrix q = in_wider(t.q), k = in_wider(t.k), v = in_wider(t.v);
    matrix out = matrix::Constant(n, heads * case_.config.v_head_dim + 3, infinity);
    std::vector<float> lse(as_size(n * heads) + 1, infinity);
    attention_.prefill(q.leftCols(t.q.cols()), k.leftCols(t.k.cols()), v.leftCols(t.v.cols()), cache_->get(),
                       out.leftCols(out.cols() - 3), workspace_, lse.data());
    if (!(out.rightCols(3).array() == infinity).all() || lse.back() != infinity) return "written beside the output";
    std::string wrong = note(t, n);
    for (index_t i = 0; i < n && wrong.empty(); ++i)
      wrong = compare(t, i, first + i, out.row(i).data(), lse.data() + i * heads);
    return wrong;
  }

  // Whether all that was visible after `back` tokens is still where it was.
  bool recoverable(position_t back) const {
    for (position_t p : policy_.visible(back))
      if (owner_[as_size(policy_.slot(p))] != p) return false;
    return true;
  }

  std::string rewind() {
    position_t back = seen() - std::min<position_t>(seen(), dice_.from_to(0, one_of<index_t>(dice_, {2, 20, 50, 500})));
    if (dice_.one_in(10)) back = dice_.from_to(0, std::min<position_t>(seen(), 10));
    if (dice_.one_in(40)) {
      back = 0;
      cache_->clear();
      token_by_token_->clear();
    } else {
      position_t smallest = seen();
      while (smallest > 0 && recoverable(smallest - 1)) --smallest;
      if (cache_->min_truncate() != smallest)
        return fmt::format("min_truncate() is {} instead of {}", cache_->min_truncate(), smallest);
      bool refused = false;
      try {
        cache_->truncate(back);
      } catch (const std::invalid_argument& e) {
        refused = true;
        const std::string message = e.what() + std::string(",");
        if (message.find(fmt::format("seen was {}, had to be at least {}", back, smallest)) != 11) return message;
      }
      if (refused == recoverable(back)) return fmt::format("{} a way back to {}", refused ? "refused" : "took", back);
      if (refused) return cache_->get().seen() == seen() ? "" : "a refused truncate changed seen()";
      token_by_token_->truncate(back);
    }
    keys_.resize(as_size(back) * key_floats());
    raw_keys_.resize(keys_.size());
    values_.resize(as_size(back) * value_floats());
    return cache_->get().seen() == back ? "" : "truncate left seen() wrong";
  }

  const random_case& case_;
  const plain_policy& policy_;
  storage_error k_error_, v_error_;
  nearness* near_;
  effort::dice dice_;
  oracle::layer raw_layer_;
  std::unique_ptr<open_cache> cache_, token_by_token_;
  attention attention_;
  workspace workspace_;
  double check_rate_ = 1;
  std::vector<float> keys_, raw_keys_, values_;  // of every token of the stream: as stored, and keys as given
  std::vector<position_t> owner_;                // which token lies in a slot
};

}  // namespace

std::string run_case(const random_case& c, const cache_maker& make, const plain_policy& policy, storage_error k,
                     storage_error v, nearness* near) {
  return case_run(c, make, policy, k, v, near).run();
}

std::unique_ptr<open_cache> make_cache(int k_format, int v_format, const cache_config& config) {
  const auto with_k = [&]<class K>(K) -> std::unique_ptr<open_cache> {
    if (v_format == 0) return std::make_unique<open_cache_of<K, f32>>(config);
    if (v_format == 1) return std::make_unique<open_cache_of<K, f16>>(config);
    return std::make_unique<open_cache_of<K, bf16>>(config);
  };
  return k_format == 0 ? with_k(f32{}) : k_format == 1 ? with_k(f16{}) : with_k(bf16{});
}

namespace {

std::string run_library_case(const random_case& c, nearness* near = nullptr) {
  // Half a unit in the last place; f16 has none below 2^-24, far below the largest number of any row here.
  static constexpr storage_error errors[] = {{0, 0}, {0x1p-11, 0x1p-20}, {0x1p-8, 0}};
  return run_case(
      c, [&](const cache_config& config) { return make_cache(c.k_format, c.v_format, config); },
      plain_sink_window(c.config.num_sink_tokens, c.config.window, c.config.rollback), errors[c.k_format],
      errors[c.v_format], near);
}

TEST_CASE("attention: random layers, caches and chunks against the oracle") {
  nearness near;
  for (int i = 0; i < effort::cases(400); ++i) {
    const random_case c = draw_case(1000 + static_cast<std::uint64_t>(i));
    INFO(c.name());
    CHECK(run_library_case(c, &near) == "");
  }
  if (std::getenv("SINKCACHE_SHOW")) std::printf("nearest to the bound: out %.2f lse %.2f\n", near.out, near.lse);
}

// One KV head of `dim`, plain rows, rope::none(): for numbers chosen by hand.
struct small_layer {
  explicit small_layer(index_t dim, index_t num_sink_tokens, index_t window) {
    c.config.num_kv_heads = 1;
    c.config.head_dim = dim;
    c.config.num_sink_tokens = num_sink_tokens;
    c.config.window = window;
    c.config.rope = rope::none();
    c.layer.head_dim = c.layer.v_head_dim = as_size(dim);
    c.layer.sm_scale = 1 / std::sqrt(static_cast<double>(dim));
    set_params(c);
  }
  // Prefills (or appends all but the last row and decodes that) and compares the last row.
  std::string wrong(const matrix& q, const matrix& k, const matrix& v, bool decode) {
    kv_cache<f32> cache(c.config);
    const attention attention(c.params);
    const index_t n = k.rows(), asked = decode ? 1 : q.rows();
    matrix out(asked, v.cols());
    std::vector<float> lse(as_size(asked));
    cache.append(k.topRows(n - asked), v.topRows(n - asked));
    if (decode) cache.append(k.bottomRows(1), v.bottomRows(1));
    if (decode)
      attention.decode(q.bottomRows(1), cache, out, w, lse.data());
    else
      attention.prefill(q, k.bottomRows(asked), v.bottomRows(asked), cache, out, w, lse.data());
    const std::vector<position_t> visible = plain_sink_window(c.config.num_sink_tokens, c.config.window).visible(n);
    return far_from(oracle::attend(c.layer, q.row(q.rows() - 1).data(), n - 1, visible, k.data(), v.data()),
                    out.row(asked - 1).data(), &lse.back());
  }

  random_case c;
  workspace w;
};

TEST_CASE("attention: sums of many equal numbers do not drift") {
  // Rounding errors of a sum of equal terms point the same way; random ones cancel and hide it.
  const index_t dim = 32;
  for (const index_t n : {64, 512, 2048, 8192, 32768})
    for (int i = 0; i < effort::cases(10) + 25; ++i) {
      effort::dice dice(static_cast<std::uint64_t>(i));
      small_layer layer(dim, 0, n);
      matrix q = matrix::Zero(i % 2 == 0 ? 8 : 40, dim), k = matrix::Zero(n, dim), v(n, dim);
      for (index_t j = 0; j < dim; ++j) v.col(j).setConstant(1 - 0.5f * static_cast<float>(dice.uniform()));
      if (i % 5 > 0) q.col(0).setConstant(std::sqrt(static_cast<float>(dim)));
      const auto step = static_cast<float>(dice.uniform());
      if (i % 5 == 1) k(0, 0) = step;
      if (i % 5 == 2)
        for (index_t row = 0; row < n; row += 2) k(row, 0) = 0.5f * step;
      if (i % 5 >= 3) k.col(0).setConstant(0.5f * step);
      if (i % 5 == 4) k(n - 7, 0) = 20;  // what was left over is rescaled too
      INFO(n << " tokens, seed " << i);
      CHECK(layer.wrong(q, k, v, true) == "");
      if (q.rows() <= n) CHECK(layer.wrong(q, k, v, false) == "");
    }
}

TEST_CASE("attention: full caches of every small size") {
  // Sanitizers see here whether a tile reads rows behind the last one.
  effort::dice dice(2);
  for (index_t n = 1; n <= 40; ++n) {
    small_layer layer(16, 0, n);
    matrix q(1, 16), k(n, 16), v(n, 16);
    for (matrix* m : {&q, &k, &v})
      for (index_t j = 0; j < m->size(); ++j) m->data()[j] = static_cast<float>(normal(dice));
    INFO(n << " tokens");
    CHECK(layer.wrong(q, k, v, true) == "");
    CHECK(layer.wrong(q, k, v, false) == "");
  }
}

TEST_CASE("attention: lse where a sink logit of any size meets small logits") {
  effort::dice dice(1);
  small_layer layer(4, 0, 64);
  for (int i = 0; i < effort::cases(5000); ++i) {
    const double size = dice.one_in(2) ? 100 : 20;
    layer.c.layer.sink_logits = {static_cast<float>(size * (2 * dice.uniform() - 1))};
    set_params(layer.c);
    matrix q(1, 4), k(40, 4), v(40, 4);
    const double spread = one_of(dice, {0.05, 1.});
    for (matrix* m : {&q, &k, &v})
      for (index_t j = 0; j < m->size(); ++j) m->data()[j] = static_cast<float>(spread * normal(dice));
    INFO("sink logit " << layer.c.layer.sink_logits[0]);
    CHECK(layer.wrong(q, k, v, true) == "");
  }
}

TEST_CASE("attention: a logit of -inf weighs nothing, wherever it lies") {
  // A key that overflowed its format. Tiles must not turn -inf - -inf into NaN where one softmax would not.
  for (const index_t sinks : {0, 1, 2, 4})
    for (const index_t at : {0, 1, 3, 9, 19}) {
      small_layer layer(4, sinks, 8);
      const matrix q = matrix::Ones(20, 4), v = matrix::Random(20, 4);
      matrix k = matrix::Ones(20, 4);
      k(at, 2) = -infinity;
      layer.c.layer.sm_scale = 0.5;
      INFO(sinks << " sink tokens, token " << at);
      for (index_t n = at + 2; n <= 20; ++n)
        for (const bool decode : {true, false}) {
          oracle::layer oracle = layer.c.layer;
          kv_cache<f32> cache(layer.c.config);
          const attention attention(layer.c.params);
          matrix out(n, 4);
          std::vector<float> lse(as_size(n));
          if (decode) {
            cache.append(k.topRows(n), v.topRows(n));
            attention.decode(q.topRows(1), cache, out.bottomRows(1), layer.w, &lse.back());
          } else {
            attention.prefill(q.topRows(n), k.topRows(n), v.topRows(n), cache, out, layer.w, lse.data());
          }
          auto expected =
              oracle::attend(oracle, q.data(), n - 1, plain_sink_window(sinks, 8).visible(n), k.data(), v.data());
          expected[0].a = 1;  // |k| is infinite
          CHECK(far_from(expected, out.row(n - 1).data(), &lse.back()) == "");
        }
    }
}

// Properties.

// What a stream of tokens gives, fed in chunks drawn from a seed: chunks of one are decoded, longer ones prefilled.
struct outputs {
  matrix out;
  std::vector<float> lse;

  bool same_bits(index_t token, index_t head, const outputs& other) const {
    const index_t heads = static_cast<index_t>(lse.size()) / out.rows(), v_dim = out.cols() / heads;
    const auto same = [](const float* a, const float* b, index_t n) {
      return std::memcmp(a, b, as_size(n) * sizeof(float)) == 0;
    };
    return same(&out(token, head * v_dim), &other.out(token, head * v_dim), v_dim) &&
           same(&lse[as_size(token * heads + head)], &other.lse[as_size(token * heads + head)], 1);
  }
  bool operator==(const outputs& other) const {
    return out.rows() == other.out.rows() && out.cols() == other.out.cols() && lse.size() == other.lse.size() &&
           std::memcmp(out.data(), other.out.data(), as_size(out.size()) * sizeof(float)) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

constexpr std::uint64_t decode_only = 0;

outputs feed(open_cache& cache, const attention& attention, const tokens& t, std::uint64_t chunks, workspace& w) {
  effort::dice dice(chunks);
  const bool decodes = chunks == decode_only;
  const index_t n = t.q.rows(), heads = attention.params().num_qo_heads;
  outputs all{matrix(n, heads * cache.get().config().v_head_dim), std::vector<float>(as_size(n * heads))};
  for (index_t first = 0, size = 0; first < n; first += size) {
    size = std::min<index_t>(n - first,
                             decodes || dice.one_in(2) ? 1 : dice.from_to(2, one_of<index_t>(dice, {4, 30, 200})));
    const matrix q = t.q.middleRows(first, size), k = t.k.middleRows(first, size), v = t.v.middleRows(first, size);
    float* const lse = all.lse.data() + first * heads;
    if (size == 1) {
      cache.append(k, v);
      attention.decode(q, cache.get(), all.out.middleRows(first, 1), w, lse);
    } else {
      attention.prefill(q, k, v, cache.get(), all.out.middleRows(first, size), w, lse);
    }
  }
  return all;
}
outputs feed(const random_case& c, const tokens& t, std::uint64_t chunks = 1) {
  workspace w;
  return feed(*make_cache(c.k_format, c.v_format, c.config), attention(c.params), t, chunks * c.seed, w);
}

// A random case for a property, and its tokens: small, but of every eight one is longer than a slice of decode, and two
// may have groups that make panels.
struct property_case {
  explicit property_case(std::uint64_t seed)
      : c(draw_case(seed, seed % 8 == 0   ? limits{.max_head_dim = 16, .max_group = 3, .max_window = 1200}
                          : seed % 8 <= 2 ? limits{.max_head_dim = 24, .max_group = 71, .max_window = 60}
                                          : limits{.max_head_dim = 96, .max_group = 9, .max_window = 60})) {
    if (seed % 8 == 0) {
      c.config.window += 600;
      c.tokens = c.config.window + 100;
    }
    c.config.first_position = std::min<position_t>(c.config.first_position, 1 << 24);
    c.layer.first_position = c.config.first_position;
    draw();
  }
  void draw() {
    effort::dice dice(c.seed + 3);
    t = draw_tokens(c, dice, 0, c.tokens);
  }
  void no_rope() {
    c.layer.inv_freq.clear();
    c.config.rope = rope::none();
  }

  random_case c;
  tokens t;
};

template <class Check>
void for_property_cases(int usual, const Check& check) {
  for (int i = 0; i < effort::cases(usual); ++i) {
    property_case p(50000 + static_cast<std::uint64_t>(i));
    INFO(p.c.name());
    check(p);
  }
}

TEST_CASE("attention: softmax1 is a sink logit of 0, softmax one of -inf, to the bit") {
  for_property_cases(40, [](property_case& p) {
    const auto with = [&](const softmax_variant& variant) {
      p.c.params.softmax = variant;
      return feed(p.c, p.t);
    };
    const std::vector<float> zeros(p.c.layer.num_qo_heads, 0.f), none(p.c.layer.num_qo_heads, -infinity);
    const outputs one = with(softmax_variant::softmax1()), standard = with(softmax_variant::standard());
    CHECK(one == with(softmax_variant::sink_logits(zeros)));
    CHECK(standard == with(softmax_variant::sink_logits(none)));
    CHECK(!(one == standard));
  });
}

// Every `step`-th token of both, within twice the bound of each other; keys are stored in whatever format.
std::string far_apart(const property_case& p, const outputs& one, const outputs& other, index_t step) {
  oracle::layer layer = p.c.layer;
  layer.k_turned = layer.q_turned;
  const plain_policy policy = plain_sink_window(p.c.config.num_sink_tokens, p.c.config.window);
  const index_t heads = p.c.params.num_qo_heads, v_dim = p.c.config.v_head_dim;
  for (index_t i = p.c.tokens - 1; i >= 0; i -= step) {
    const auto exact = oracle::attend(layer, p.t.q.row(i).data(), i, policy.visible(i + 1), p.t.k.data(), p.t.v.data());
    for (index_t head = 0; head < heads; ++head) {
      const oracle::answer& e = exact[as_size(head)];
      const double bound = 1.01 * 2 * 16 * u * (1 + e.a);
      const auto apart = [](float a, float b) { return a == b ? 0 : std::abs(static_cast<double>(a - b)); };
      const std::size_t lse = as_size(i * heads + head);
      bool near = apart(one.lse[lse], other.lse[lse]) <= bound;
      for (index_t d = head * v_dim; d < (head + 1) * v_dim; ++d)
        near &= apart(one.out(i, d), other.out(i, d)) <= bound * e.v_max;
      if (!near) return fmt::format("token {}, head {}", i, head);
    }
  }
  return "";
}

TEST_CASE("attention: query heads of a group are query heads with repeated keys and values") {
  // Decoded to the bit where the group is smaller than a panel; panels add in another order. Prefill makes panels of
  // several tokens, and more heads leave room for fewer: the same within the bound.
  for_property_cases(40, [](property_case& p) {
    property_case repeated = p;
    const index_t heads = p.c.params.num_qo_heads, kv_heads = p.c.config.num_kv_heads;
    const index_t dim = p.c.config.head_dim, v_dim = p.c.config.v_head_dim;
    repeated.c.config.num_kv_heads = heads;
    repeated.t.k.resize(p.c.tokens, heads * dim);
    repeated.t.v.resize(p.c.tokens, heads * v_dim);
    for (index_t head = 0; head < heads; ++head) {
      const index_t kv_head = head / (heads / kv_heads);
      repeated.t.k.middleCols(head * dim, dim) = p.t.k.middleCols(kv_head * dim, dim);
      repeated.t.v.middleCols(head * v_dim, v_dim) = p.t.v.middleCols(kv_head * v_dim, v_dim);
    }
    const outputs decoded = feed(p.c, p.t, decode_only), decoded_apart = feed(repeated.c, repeated.t, decode_only);
    if (heads / kv_heads < query_rows::panel) CHECK(decoded == decoded_apart);
    CHECK(far_apart(p, decoded, decoded_apart, 7) == "");
    CHECK(far_apart(p, feed(p.c, p.t), feed(repeated.c, repeated.t), 7) == "");
  });
}

TEST_CASE("attention: a cache larger than the stream is full attention") {
  for_property_cases(40, [](property_case& p) {
    p.c.config.window = p.c.tokens;
    p.c.config.rollback = 0;
    const outputs full = feed(p.c, p.t);
    p.c.config.window += 77;
    CHECK(full == feed(p.c, p.t));
    p.c.config.num_sink_tokens += p.c.tokens;  // all pinned
    if (p.c.params.sink_bias.empty()) CHECK(full == feed(p.c, p.t));
    // Nothing was evicted, so places in the cache are true positions.
    if (p.c.config.rope) {
      p.c.config.num_sink_tokens -= p.c.tokens;
      p.c.config.positions = p.c.layer.in_cache ? positions::absolute : positions::in_cache;
      CHECK(full == feed(p.c, p.t));
    }
  });
}

TEST_CASE("attention: streams may start anywhere") {
  const position_t starts[] = {0, 1 << 24, position_t{1} << 40, max_position};
  for_property_cases(24, [&](property_case& p) {
    p.no_rope();
    p.c.config.first_position = 0;
    const outputs from_zero = feed(p.c, p.t);
    for (const position_t start : starts) {
      p.c.config.first_position = start;
      CHECK(from_zero == feed(p.c, p.t));
    }
  });
  for (int i = 0; i < effort::cases(20); ++i)
    for (const position_t start : starts) {
      random_case c = draw_case(60000 + static_cast<std::uint64_t>(i), {.max_head_dim = 64, .max_window = 50});
      c.config.first_position = c.layer.first_position = start;
      INFO(c.name());
      CHECK(run_library_case(c) == "");
    }
}

TEST_CASE("attention: a NaN or infinity reaches the outputs that see it, and nothing else") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  enum class what { key_nan, key_infinite, value_nan, value_infinite, query_nan };
  for_property_cases(80, [](property_case& p) {
    const random_case& c = p.c;
    const plain_policy policy = plain_sink_window(c.config.num_sink_tokens, c.config.window, c.config.rollback);
    const index_t heads = c.params.num_qo_heads, group = heads / c.config.num_kv_heads;
    const index_t dim = c.config.head_dim, v_dim = c.config.v_head_dim;
    const outputs clean = feed(c, p.t);
    REQUIRE(clean.out.allFinite());
    effort::dice dice(c.seed);
    for (const what kind :
         {what::key_nan, what::key_infinite, what::value_nan, what::value_infinite, what::query_nan}) {
      tokens t = p.t;
      const index_t j = dice.one_in(3) ? dice.from_to(0, std::min<index_t>(c.tokens - 1, c.config.num_sink_tokens))
                                       : dice.from_to(0, c.tokens - 1);
      const index_t kv_head = dice.from_to(0, c.config.num_kv_heads - 1), column = dice.from_to(0, v_dim - 1);
      const index_t q_head = dice.from_to(0, heads - 1);
      if (kind == what::key_nan) t.k(j, kv_head * dim + dice.from_to(0, dim - 1)) = nan;
      if (kind == what::key_infinite) t.k(j, kv_head * dim + dice.from_to(0, dim - 1)) = infinity;
      if (kind == what::value_nan) t.v(j, kv_head * v_dim + column) = nan;
      if (kind == what::value_infinite) t.v(j, kv_head * v_dim + column) = -infinity;
      if (kind == what::query_nan) t.q(j, q_head * dim + dice.from_to(0, dim - 1)) = nan;
      const outputs hit = feed(c, t);
      std::string wrong;
      for (index_t i = 0; i < c.tokens && wrong.empty(); ++i) {
        const std::vector<position_t> visible = policy.visible(i + 1);
        const bool sees = std::binary_search(visible.begin(), visible.end(), j);
        for (index_t head = 0; head < heads && wrong.empty(); ++head) {
          const auto is_nan = [&] {
            return hit.out.row(i).segment(head * v_dim, v_dim).array().isNaN().all() &&
                   std::isnan(hit.lse[as_size(i * heads + head)]);
          };
          bool right = false;
          if (kind == what::query_nan) {
            right = i == j && head == q_head ? is_nan() : hit.same_bits(i, head, clean);
          } else if (!sees || head / group != kv_head) {
            right = hit.same_bits(i, head, clean);
          } else if (kind == what::key_nan) {
            right = is_nan();
          } else if (kind == what::key_infinite) {
            right = true;  // a logit of inf, -inf or NaN: by the query's signs
          } else {
            outputs repaired = hit;  // but for one column, nothing changed
            repaired.out(i, head * v_dim + column) = clean.out(i, head * v_dim + column);
            right = !std::isfinite(hit.out(i, head * v_dim + column)) && repaired.same_bits(i, head, clean);
          }
          if (!right)
            wrong = fmt::format("kind {} in token {}, KV head {}: token {}, head {}", static_cast<int>(kind), j,
                                kv_head, i, head);
        }
      }
      CHECK(wrong == "");
    }
  });
}

TEST_CASE("attention: what lies in unused rows and scratch is never read") {
  for_property_cases(60, [](property_case& p) {
    random_case& c = p.c;
    c.config.rollback = 25;
    const index_t n = c.tokens, first = n / 2;
    const auto part = [&](index_t from, index_t count) {
      return tokens{
          p.t.q.middleRows(from, count), p.t.k.middleRows(from, count), p.t.v.middleRows(from, count), {}, {}};
    };
    tokens junk = part(0, std::min<index_t>(first, 20));
    for (matrix* m : {&junk.q, &junk.k, &junk.v}) m->setConstant(std::numeric_limits<float>::quiet_NaN());
    const attention attention(c.params);
    workspace clean_scratch, used_scratch;
    const auto clean = make_cache(c.k_format, c.v_format, c.config),
               used = make_cache(c.k_format, c.v_format, c.config);
    const tokens head = part(0, first), tail = part(first, n - first);
    CHECK(feed(*clean, attention, head, c.seed, clean_scratch) == feed(*used, attention, head, c.seed, used_scratch));
    // Tokens of NaN come and are taken back: their rows, and the scratch, are full of it.
    feed(*used, attention, junk, c.seed + 1, used_scratch);
    used->truncate(first);
    CHECK(feed(*clean, attention, tail, c.seed, clean_scratch) == feed(*used, attention, tail, c.seed, used_scratch));
  });
}

TEST_CASE("attention: any split of the visible tokens over caches, merged in any order, is decode") {
  for_property_cases(60, [](property_case& p) {
    random_case& c = p.c;
    // Caches of arbitrary tokens know no positions: the engine has turned the rows, or nothing turns them.
    c.layer.alibi_slopes.clear();
    c.layer.sink_bias.clear();
    p.no_rope();
    set_params(c);
    const attention attention(c.params);
    workspace w;
    effort::dice dice(c.seed + 4);
    const auto all = make_cache(c.k_format, c.v_format, c.config);
    all->append(p.t.k, p.t.v);
    const matrix q = p.t.q.bottomRows(1);
    const index_t heads = c.params.num_qo_heads, v_dim = c.config.v_head_dim;
    matrix out(1, heads * v_dim);
    std::vector<float> lse(as_size(heads));
    attention.decode(q, all->get(), out, w, lse.data());

    // Which part takes which token; parts may stay empty.
    const std::vector<position_t> visible =
        plain_sink_window(c.config.num_sink_tokens, c.config.window).visible(c.tokens);
    const int num_parts = static_cast<int>(dice.from_to(1, 6));
    random_case part_case = c;
    part_case.config.num_sink_tokens = dice.from_to(0, 3);
    part_case.config.window = c.tokens;
    std::vector<std::unique_ptr<open_cache>> parts;
    for (int i = 0; i < num_parts; ++i) parts.push_back(make_cache(c.k_format, c.v_format, part_case.config));
    const bool runs = dice.one_in(2);
    for (std::size_t i = 0; i < visible.size(); ++i) {
      const std::size_t part = runs ? i * static_cast<std::size_t>(num_parts) / visible.size()
                                    : static_cast<std::size_t>(dice.from_to(0, num_parts - 1));
      parts[part]->append(p.t.k.row(visible[i]), p.t.v.row(visible[i]));
    }
    std::vector<attention_state> states;
    for (const auto& part : parts) {
      states.emplace_back(heads, v_dim);
      if (states.size() > 1 && dice.one_in(3)) std::swap(states[0], states.back());  // attend merges by itself
      attention.attend(q, part->get(), states.back(), w);
      if (dice.one_in(3)) states.emplace_back(heads, v_dim);  // the identity
    }
    while (states.size() > 1) {
      std::swap(states[as_size(dice.from_to(0, static_cast<index_t>(states.size()) - 1))], states.back());
      const attention_state last = states.back();
      states.pop_back();
      states[as_size(dice.from_to(0, static_cast<index_t>(states.size()) - 1))].merge(last);
    }

    // The oracle on what is stored.
    matrix k(p.t.k.rows(), p.t.k.cols()), v(p.t.v.rows(), p.t.v.cols());
    const plain_policy policy = plain_sink_window(c.config.num_sink_tokens, c.config.window, c.config.rollback);
    for (const position_t at : visible)
      for (index_t head = 0; head < c.config.num_kv_heads; ++head) {
        all->key(head, policy.slot(at), &k(at, head * c.config.head_dim));
        all->value(head, policy.slot(at), &v(at, head * v_dim));
      }
    const auto exact = oracle::attend(c.layer, q.data(), c.tokens - 1, visible, k.data(), v.data());
    CHECK(far_from(exact, out.data(), lse.data()) == "");
    for (index_t head = 0; head < heads; ++head) {  // m is a whole number: merging rounds nothing but the sums
      const float m = states[0].data()[as_size(head * (v_dim + 2))];
      CHECK(m == std::ceil(m));
    }
    for (index_t head = 0; head < heads; ++head)
      lse[as_size(head)] = states[0].finish(c.params.softmax, head, &out(0, head * v_dim));
    CHECK(far_from(exact, out.data(), lse.data()) == "");
  });
}

// Accuracy.

// Unit-normal q, k, v, one KV head and one query head, `n` tokens, all visible.
struct normal_layer {
  normal_layer(std::uint64_t seed, index_t dim, index_t n, bool with_rope) : layer(dim, 0, n) {
    effort::dice dice(seed);
    for (matrix* m : {&q, &k, &v}) {
      m->resize(m == &q ? 1 : n, dim);
      for (index_t i = 0; i < m->size(); ++i) m->data()[i] = static_cast<float>(normal(dice));
    }
    if (with_rope) {
      for (index_t i = 0; i < dim / 2; ++i)
        layer.c.layer.inv_freq.push_back(
            static_cast<float>(std::pow(10000., -2 * static_cast<double>(i) / static_cast<double>(dim))));
      layer.c.config.rope.emplace(layer.c.layer.inv_freq);
      layer.c.layer.k_turned = false;
    }
    for (index_t i = 0; i < n; ++i) visible.push_back(i);
  }
  // Output of the newest token's decode.
  matrix decode() {
    kv_cache<f32> cache(layer.c.config);
    matrix out(1, v.cols());
    cache.append(k, v);
    attention(layer.c.params).decode(q, cache, out, layer.w);
    return out;
  }
  oracle::answer exact() const {
    return oracle::attend(layer.c.layer, q.data(), k.rows() - 1, visible, k.data(), v.data())[0];
  }
  oracle::answer naive() const {
    return oracle::attend_naively(layer.c.layer, q.data(), k.rows() - 1, visible, k.data(), v.data())[0];
  }

  small_layer layer;
  matrix q, k, v;
  std::vector<position_t> visible;
};

template <class Row>
double distance(const Row& from, const std::vector<double>& to) {
  double sum = 0;
  for (std::size_t i = 0; i < to.size(); ++i) {
    const double error = static_cast<double>(from[i]) - to[i];
    sum += error * error;
  }
  return std::sqrt(sum);
}

TEST_CASE("attention: within 1e-6 norm-wise for unit-normal rows") {
  double worst = 0;
  for (int i = 0; i < effort::cases(200); ++i) {
    effort::dice dice(static_cast<std::uint64_t>(i));
    const index_t dim = 2 * dice.from_to(16, 64), n = dice.one_in(4) ? 1024 : dice.from_to(1, 1024);
    normal_layer layer(static_cast<std::uint64_t>(i), dim, n, dice.one_in(2));
    const oracle::answer exact = layer.exact();
    const std::vector<double> zero(exact.out.size());
    const double error = distance(layer.decode().data(), exact.out) / distance(zero, exact.out);
    INFO("seed " << i << ": head_dim " << dim << ", " << n << " tokens");
    CHECK(error < 1e-6);
    worst = std::max(worst, error);
  }
  if (std::getenv("SINKCACHE_SHOW")) std::printf("norm-wise error %.3g\n", worst);
}

TEST_CASE("attention: never worse than twice the naive float32 computation") {
  // One row may be lucky: 16 rows together are not.
  double worst = 0;
  for (const index_t dim : {1, 8, 64, 128})
    for (const index_t n : {3, 20, 100, 1500}) {
      double ours = 0, naive = 0;
      for (int i = 0; i < 16; ++i) {
        normal_layer layer(static_cast<std::uint64_t>(i), dim, n, false);
        const oracle::answer exact = layer.exact();
        ours += distance(layer.decode().data(), exact.out);
        naive += distance(layer.naive().out, exact.out);
      }
      INFO("head_dim " << dim << ", " << n << " tokens");
      CHECK(ours <= 2 * naive);
      worst = std::max(worst, ours / naive);
    }
  if (std::getenv("SINKCACHE_SHOW")) std::printf("times the naive error %.3g\n", worst);
}

TEST_CASE("attention: head_dim 512, and 32k visible keys") {
  for (const index_t n : {700, 32768}) {
    normal_layer wide(5, 512, n == 700 ? 700 : 33, false), deep(6, 16, n, false);
    for (normal_layer* layer : {&wide, &deep}) {
      CHECK(layer->layer.wrong(layer->q, layer->k, layer->v, true) == "");
      CHECK(layer->layer.wrong(layer->q, layer->k, layer->v, false) == "");
    }
  }
}

}  // namespace
}  // namespace proof
