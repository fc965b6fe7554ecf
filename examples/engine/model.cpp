#include "model.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <set>
#include <utility>

namespace engine {
namespace {

using loaders::attention_kind, loaders::coded_tensor, loaders::fail, loaders::listed, loaders::quote, loaders::weights;

constexpr index_t prefill_rows = 256;  // bounds the activations, whatever the prompt
constexpr index_t logits_rows = 64;    // and the logits, of which a vocabulary makes a row as large as a layer

// Hands out the tensors of a file, only in the shape asked for.
class tensor_reader {
  template <class F>
  auto with_memory(const std::string& own_name, const F& read) const {
    try {
      return read();
    } catch (const std::bad_alloc&) {
      fail(path_, fmt::format("tensor {} takes more memory than there is", own_name));
    }
  }

 public:
  tensor_reader(const std::string& path, const weights& file) : path_(path), file_(file) {}

  // A logit of -inf means that a head has no sink.
  std::vector<float> sinks(const std::string& name, index_t heads) {
    const std::string own_name = taken(name, {heads});
    std::vector<float> values = values_of(own_name);
    std::vector<float> others = values;
    std::erase(others, -std::numeric_limits<float>::infinity());
    check_values(own_name, others);
    return values;
  }

  Eigen::RowVectorXf vector(const std::string& name, index_t size) {
    const std::string own_name = taken(name, {size});
    const std::vector<float> values = values_of(own_name);
    check_values(own_name, values);
    return Eigen::Map<const Eigen::RowVectorXf>(values.data(), size);
  }

  // Tensors with the same input, one below the other, so that they are one product.
  linear stacked(const std::vector<std::string>& names, const std::vector<index_t>& rows, index_t cols) {
    for (std::size_t i = 0; i < names.size(); ++i) check_shape(names[i], {rows[i], cols});  // before taking memory
    linear all;
    for (std::size_t i = 0; i < names.size(); ++i) {
      const std::string own_name = taken(names[i], {rows[i], cols});
      if (std::optional<coded_tensor> coded = with_memory(own_name, [&] { return file_.read_coded(own_name); })) {
        check_values(own_name, coded->scales);
        check_values(own_name, coded->offsets);
        all.append(std::move(*coded));
      } else {
        const std::vector<float> values = values_of(own_name);
        check_values(own_name, values);
        all.append(matrix(Eigen::Map<const matrix>(values.data(), rows[i], cols)));
      }
    }
    return all;
  }

  linear whole(const std::string& name, index_t rows, index_t cols) { return stacked({name}, {rows}, cols); }

  // A file may have one twice, by two names.
  void require_equal(const std::string& copy, const std::string& name, const std::vector<std::int64_t>& shape) {
    if (!file_.contains(file_.own_name(copy))) return;
    check_shape(copy, shape);
    names_.insert(file_.own_name(copy));
    if (values_of(file_.own_name(copy)) != values_of(file_.own_name(name)))
      fail(path_, fmt::format("tensor {} had to equal {}, as tie_word_embeddings is true", copy, name));
  }

  // A tensor that nobody asked for, a bias say, would silently change the result.
  void refuse_others() const {
    for (const std::string& name : file_.own_names())
      if (!names_.contains(name))
        fail(path_, fmt::format("tensor {} is unexpected: no part of such a model", quote(name)));
  }

  index_t num_parameters() const { return num_parameters_; }

 private:
  // The file's own name for it.
  std::string taken(const std::string& name, const std::vector<std::int64_t>& shape) {
    check_shape(name, shape);
    num_parameters_ += std::accumulate(shape.begin(), shape.end(), index_t{1}, std::multiplies());
    const std::string own_name = file_.own_name(name);
    names_.insert(own_name);
    return own_name;
  }

  std::vector<float> values_of(const std::string& own_name) const {
    return with_memory(own_name, [&] { return file_.read(own_name).values; });
  }

  void check_values(const std::string& own_name, const std::vector<float>& values) const {
    for (const float value : values)
      if (!std::isfinite(value))
        fail(path_, fmt::format("tensor {} holds {}, had to hold finite numbers only", own_name, value));
  }

  void check_shape(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const std::string own_name = file_.own_name(name);
    if (!file_.contains(own_name))
      fail(path_, fmt::format("tensor {} is missing, had to be {}", own_name, listed(shape)));
    if (file_.shape(own_name) != shape)
      fail(path_, fmt::format("tensor {} is {}, had to be {}", own_name, listed(file_.shape(own_name)), listed(shape)));
  }

  const std::string& path_;
  const weights& file_;
  std::set<std::string> names_;
  index_t num_parameters_ = 0;
};

void rms_norm(const const_rows_view& x, const Eigen::RowVectorXf& weight, float eps, rows_view y) {
  for (index_t t = 0; t < x.rows(); ++t) {
    const float mean_square = x.row(t).squaredNorm() / static_cast<float>(x.cols());
    y.row(t) = x.row(t).cwiseProduct(weight) / std::sqrt(mean_square + eps);
  }
}

// The gate, in the left half, becomes silu(gate) * up.
void swiglu(rows_view gate_up) {
  const index_t size = gate_up.cols() / 2;
  rows_view gate = gate_up.leftCols(size), up = gate_up.rightCols(size);
  gate.array() *= up.array() / (1 + (-gate.array()).exp());
}

sinkcache::softmax_variant softmax_of(attention_kind kind, std::span<const float> sinks) {
  switch (kind) {
    case attention_kind::softmax1:
      return sinkcache::softmax_variant::softmax1();
    case attention_kind::sink:
      return sinkcache::softmax_variant::sink_logits(sinks);
    case attention_kind::softmax:
      break;
  }
  return sinkcache::softmax_variant::standard();
}

}  // namespace

model::model(const std::string& path) {
  const std::unique_ptr<const weights> file = weights::open(path);
  metadata_ = file->metadata;
  config_ = file->config;
  rope_ = file->rope;

  const model_config& c = config_;
  const index_t q_size = c.num_attention_heads * c.head_dim, kv_size = c.num_key_value_heads * c.head_dim;
  tensor_reader tensors(path, *file);
  embed_ = tensors.whole("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  if (c.tie_word_embeddings)
    tensors.require_equal("lm_head.weight", "model.embed_tokens.weight", {c.vocab_size, c.hidden_size});
  else
    lm_head_ = tensors.whole("lm_head.weight", c.vocab_size, c.hidden_size);
  norm_ = tensors.vector("model.norm.weight", c.hidden_size);
  for (index_t i = 0; i < c.num_hidden_layers; ++i) {
    const std::string prefix = fmt::format("model.layers.{}.", i);
    layer& l = layers_.emplace_back();
    l.input_norm = tensors.vector(prefix + "input_layernorm.weight", c.hidden_size);
    l.post_attention_norm = tensors.vector(prefix + "post_attention_layernorm.weight", c.hidden_size);
    l.qkv = tensors.stacked(
        {prefix + "self_attn.q_proj.weight", prefix + "self_attn.k_proj.weight", prefix + "self_attn.v_proj.weight"},
        {q_size, kv_size, kv_size}, c.hidden_size);
    l.o = tensors.whole(prefix + "self_attn.o_proj.weight", c.hidden_size, q_size);
    l.gate_up = tensors.stacked({prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"},
                                {c.intermediate_size, c.intermediate_size}, c.hidden_size);
    l.down = tensors.whole(prefix + "mlp.down_proj.weight", c.hidden_size, c.intermediate_size);
    if (c.attention == attention_kind::sink) l.sinks = tensors.sinks(prefix + "self_attn.sinks", c.num_attention_heads);
  }
  tensors.refuse_others();
  num_parameters_ = tensors.num_parameters();
}

layer_info model::info(index_t layer_number) const {
  const model_config& c = config_;
  return {{.num_kv_heads = c.num_key_value_heads, .head_dim = c.head_dim, .rope = rope_},
          c.num_attention_heads,
          layer_number,
          c.num_hidden_layers};
}

session::session(const model& m, const cache_factory& make_cache, const session_config& config)
    : model_(&m),
      make_cache_(make_cache),
      pool_(config.threads > 1 ? std::make_unique<sinkcache::thread_pool>(config.threads) : nullptr) {
  if (pool_) workspace_ = sinkcache::workspace(*pool_);
  const model_config& c = m.config_;
  layers_.reserve(m.layers_.size());
  for (const model::layer& layer : m.layers_) {
    layers_.push_back(
        {make_cache(m.info(static_cast<index_t>(layers_.size()))),
         sinkcache::attention({.num_qo_heads = c.num_attention_heads,
                               .softmax = config.softmax ? *config.softmax : softmax_of(c.attention, layer.sinks)})});
  }
  if (config.watches_sinks) pinned_shares_.resize(c.num_hidden_layers, c.num_attention_heads);
  logits_.resize(1, c.vocab_size);
  reserve(1);
}

void session::reserve(index_t rows) {
  if (hidden_.rows() >= rows) return;
  const model_config& c = model_->config_;
  hidden_.resize(rows, c.hidden_size);
  normed_.resize(rows, c.hidden_size);
  qkv_.resize(rows, (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim);
  attended_.resize(rows, c.num_attention_heads * c.head_dim);
  gate_up_.resize(rows, 2 * c.intermediate_size);
}

std::span<const float> session::decode(int token) {
  forward({&token, 1});
  return {logits_.data(), static_cast<std::size_t>(logits_.size())};
}

std::span<const float> session::prefill(std::span<const int> tokens) {
  reserve(std::min(static_cast<index_t>(tokens.size()), prefill_rows));
  for (std::size_t first = 0; first < tokens.size(); first += prefill_rows)
    forward(tokens.subspan(first, std::min<std::size_t>(prefill_rows, tokens.size() - first)));
  return {logits_.data(), static_cast<std::size_t>(logits_.size())};
}

void session::prefill(std::span<const int> tokens, const std::function<void(std::span<const float>)>& each) {
  reserve(std::min(static_cast<index_t>(tokens.size()), prefill_rows));
  for (std::size_t first = 0; first < tokens.size(); first += prefill_rows) {
    const auto block = tokens.subspan(first, std::min<std::size_t>(prefill_rows, tokens.size() - first));
    run_layers(block);
    for (index_t row = 0, rows = static_cast<index_t>(block.size()); row < rows; row += logits_rows) {
      all_logits_.resize(std::min(logits_rows, rows - row), model_->config_.vocab_size);
      predict(row, all_logits_);
      for (index_t i = 0; i < all_logits_.rows(); ++i)
        each({all_logits_.row(i).data(), static_cast<std::size_t>(all_logits_.cols())});
    }
  }
}

// Tokens -> logits of the last one.
void session::forward(std::span<const int> tokens) {
  run_layers(tokens);
  predict(static_cast<index_t>(tokens.size()) - 1, logits_);
}

// Of the rows from `first_row` on, as many as there are in `logits`.
void session::predict(index_t first_row, matrix& logits) {
  rows_view normed = normed_.topRows(logits.rows());
  rms_norm(hidden_.middleRows(first_row, logits.rows()), model_->norm_, model_->config_.rms_norm_eps, normed);
  model_->lm_head().multiply(normed, logits, pool_.get());
}

namespace {

// Adds up, per query head, what a query gives pinned tokens.
class pinned_reader final : public sinkcache::weight_reader {
 public:
  explicit pinned_reader(std::span<float> shares) : shares_(shares) { std::ranges::fill(shares, 0.f); }

  bool wants(sinkcache::position_t) const noexcept override { return true; }
  void read(const sinkcache::weight_tile& tile) noexcept override {
    for (index_t i = 0; i < tile.num_qo_heads; ++i)
      for (index_t j = 0; j < tile.n && tile.first + j < tile.part->pinned; ++j)
        shares_[static_cast<std::size_t>(tile.first_qo_head + i)] += tile.weight(j, i);
  }

 private:
  std::span<float> shares_;
};

}  // namespace

void session::run_layers(std::span<const int> tokens) {
  const model_config& c = model_->config_;
  const index_t n = static_cast<index_t>(tokens.size());
  rows_view hidden = hidden_.topRows(n), normed = normed_.topRows(n), gate_up = gate_up_.topRows(n);
  for (index_t t = 0; t < n; ++t) model_->embed_.row(tokens[static_cast<std::size_t>(t)], hidden.row(t).data());

  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const model::layer& layer = model_->layers_[i];
    rms_norm(hidden, layer.input_norm, c.rms_norm_eps, normed);
    layer.qkv.multiply(normed, qkv_.topRows(n), pool_.get());
    if (n == 1 && pinned_shares_.size() > 0) {
      pinned_reader reader(
          {pinned_shares_.row(static_cast<index_t>(i)).data(), static_cast<std::size_t>(pinned_shares_.cols())});
      attend(layers_[i], n, &reader);
    } else {
      attend(layers_[i], n);
    }
    layer.o.multiply(attended_.topRows(n), normed, pool_.get());
    hidden += normed;

    rms_norm(hidden, layer.post_attention_norm, c.rms_norm_eps, normed);
    layer.gate_up.multiply(normed, gate_up, pool_.get());
    swiglu(gate_up);
    layer.down.multiply(gate_up.leftCols(c.intermediate_size), normed, pool_.get());
    hidden += normed;
  }
}

void session::attend(layer_state& layer, index_t rows, sinkcache::weight_reader* weights) {
  const model_config& c = model_->config_;
  const index_t q_size = attended_.cols(), kv_size = c.num_key_value_heads * c.head_dim;
  const const_rows_view q = qkv_.block(0, 0, rows, q_size);
  const const_rows_view k = qkv_.block(0, q_size, rows, kv_size);
  const const_rows_view v = qkv_.block(0, q_size + kv_size, rows, kv_size);
  rows_view out = attended_.topRows(rows);
  if (rows == 1) {
    layer.cache->append(k, v);
    layer.attention.decode(q, *layer.cache, out, workspace_, {.weights = weights});
  } else {
    layer.attention.prefill(q, k, v, *layer.cache, out, workspace_, {.weights = weights});
  }
}

void session::clear() {
  index_t i = 0;
  for (layer_state& layer : layers_) {
    layer.cache.reset();  // or there would be two
    layer.cache = make_cache_(model_->info(i++));
  }
}

std::size_t session::cache_bytes() const {
  std::size_t bytes = 0;
  for (const layer_state& layer : layers_) bytes += layer.cache->nbytes();
  return bytes;
}

double loss_bits(std::span<const float> logits, int target) {
  const Eigen::Map<const Eigen::ArrayXf> all(logits.data(), static_cast<index_t>(logits.size()));
  const float max = all.maxCoeff();
  const Eigen::ArrayXf shares = (all - max).exp();
  return (std::log(shares.cast<double>().sum()) + static_cast<double>(max) - static_cast<double>(all[target])) /
         std::log(2.0);
}

}  // namespace engine
