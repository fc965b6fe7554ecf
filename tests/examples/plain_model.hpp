#pragma once

// Llama-style models as plain vectors: random ones, written to files, and run by plain loops in double.

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sinkcache/status.hpp>
#include <span>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../effort.hpp"
#include "compare/caches.hpp"
#include "engine/model.hpp"

namespace plain {

using sinkcache::index_t;

// To be written to a file, and to be run by the loops below.
struct plain_model {
  struct tensor {
    std::vector<std::int64_t> shape;
    std::vector<float> values;
  };

  std::map<std::string, std::string> metadata;
  std::map<std::string, tensor> tensors;
  std::vector<double> inv_freq;  // what the metadata ask for; none: theta^(-2i / head_dim)
  bool interleaved = false;
  double attention_factor = 1;

  index_t size(const std::string& key) const { return std::stoll(metadata.at(key)); }
  index_t head_dim() const {
    return metadata.contains("head_dim") ? size("head_dim") : size("hidden_size") / size("num_attention_heads");
  }
  const std::vector<float>& values(const std::string& name) const { return tensors.at(name).values; }

  void write(const std::string& path) const {
    nlohmann::json header = {{"__metadata__", metadata}};
    std::size_t offset = 0;
    for (const auto& [name, t] : tensors) {
      const std::size_t end = offset + 4 * t.values.size();
      header[name] = {{"dtype", "F32"}, {"shape", t.shape}, {"data_offsets", {offset, end}}};
      offset = end;
    }
    const std::string text = header.dump();
    const std::uint64_t length = text.size();
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), 8);
    file << text;
    for (const auto& [name, t] : tensors)
      file.write(reinterpret_cast<const char*>(t.values.data()), static_cast<std::streamsize>(4 * t.values.size()));
    REQUIRE(file.good());
  }
};

// A path of its own; the file goes with the object.
struct temporary_file {
  std::string path = (std::filesystem::temp_directory_path() / ("sinkcache_test_" + std::to_string(getpid()) + "_" +
                                                                std::to_string(reinterpret_cast<std::uintptr_t>(this))))
                         .string();
  ~temporary_file() { std::filesystem::remove(path); }
};

// Why the engine refuses a file as a model's, or "accepted".
inline std::string refusal(const temporary_file& file) {
  try {
    const engine::model model(file.path);
  } catch (const loaders::file_error& error) {
    return error.what();
  }
  return "accepted";
}

struct sizes {
  index_t layers, hidden, heads, kv_heads, head_dim /* 0: not in the metadata */, ff, vocab;
  bool tied;
  std::string attention;
};

inline plain_model random_model(const sizes& s, std::uint64_t seed) {
  effort::dice dice(seed);
  plain_model m;
  m.metadata = {{"num_hidden_layers", std::to_string(s.layers)},
                {"hidden_size", std::to_string(s.hidden)},
                {"num_attention_heads", std::to_string(s.heads)},
                {"num_key_value_heads", std::to_string(s.kv_heads)},
                {"intermediate_size", std::to_string(s.ff)},
                {"vocab_size", std::to_string(s.vocab)},
                {"rope_theta", "5000.0"},
                {"rms_norm_eps", "1e-05"},
                {"attention", s.attention},
                {"tie_word_embeddings", s.tied ? "true" : "false"}};
  if (s.head_dim != 0) m.metadata["head_dim"] = std::to_string(s.head_dim);
  const index_t head_dim = m.head_dim();

  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape, double scale, double mean = 0) {
    plain_model::tensor t{shape, {}};
    std::int64_t count = 1;
    for (const std::int64_t dim : shape) count *= dim;
    for (std::int64_t i = 0; i < count; ++i)
      t.values.push_back(static_cast<float>(mean + scale * static_cast<double>(dice.signed_unit())));
    m.tensors[name] = t;
  };
  const auto linear = [&](const std::string& name, index_t to, index_t from, double gain) {
    add(name + ".weight", {to, from}, gain * std::sqrt(3.0 / static_cast<double>(from)));
  };
  linear("model.embed_tokens", s.vocab, s.hidden, 8);
  if (!s.tied) linear("lm_head", s.vocab, s.hidden, 2);
  add("model.norm.weight", {s.hidden}, 0.3, 1);
  for (index_t i = 0; i < s.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    add(prefix + "input_layernorm.weight", {s.hidden}, 0.3, 1);
    add(prefix + "post_attention_layernorm.weight", {s.hidden}, 0.3, 1);
    linear(prefix + "self_attn.q_proj", s.heads * head_dim, s.hidden, 1.5);
    linear(prefix + "self_attn.k_proj", s.kv_heads * head_dim, s.hidden, 1.5);
    linear(prefix + "self_attn.v_proj", s.kv_heads * head_dim, s.hidden, 1);
    linear(prefix + "self_attn.o_proj", s.hidden, s.heads * head_dim, 1);
    linear(prefix + "mlp.gate_proj", s.ff, s.hidden, 1);
    linear(prefix + "mlp.up_proj", s.ff, s.hidden, 1);
    linear(prefix + "mlp.down_proj", s.hidden, s.ff, 1);
    if (s.attention == "sink") add(prefix + "self_attn.sinks", {s.heads}, 1);
  }
  return m;
}

using doubles = std::vector<double>;

// The same model in double and plain loops, a token at a time. Keys are stored unrotated, gathered from what the cache
// keeps, and rotated to their place in the cache, as StreamingLLM does it.
class plain_session {
 public:
  plain_session(const plain_model& m, index_t num_sink_tokens, index_t window)
      : m_(m), num_sink_tokens_(num_sink_tokens), window_(window), layers_(at(m.size("num_hidden_layers"))) {}

  doubles decode(int token) {
    const std::size_t hidden = at(m_.size("hidden_size"));
    doubles x(hidden);
    for (std::size_t i = 0; i < hidden; ++i) x[i] = m_.values("model.embed_tokens.weight")[at(token) * hidden + i];
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      const std::string prefix = "model.layers." + std::to_string(layer) + ".";
      const doubles attended = attend(layer, prefix, norm(x, prefix + "input_layernorm.weight"));
      add(x, linear(attended, prefix + "self_attn.o_proj.weight"));
      const doubles n = norm(x, prefix + "post_attention_layernorm.weight");
      doubles gate = linear(n, prefix + "mlp.gate_proj.weight");
      const doubles up = linear(n, prefix + "mlp.up_proj.weight");
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      add(x, linear(gate, prefix + "mlp.down_proj.weight"));
    }
    ++seen_;
    const bool tied = m_.metadata.at("tie_word_embeddings") == "true";
    return linear(norm(x, "model.norm.weight"), tied ? "model.embed_tokens.weight" : "lm_head.weight");
  }

 private:
  struct layer_state {
    std::vector<doubles> keys, values;  // of every token
  };

  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }
  static void add(doubles& to, const doubles& what) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += what[i];
  }

  doubles linear(const doubles& x, const std::string& name) const {
    const std::vector<float>& w = m_.values(name);
    doubles y(w.size() / x.size());
    for (std::size_t i = 0; i < y.size(); ++i)
      for (std::size_t j = 0; j < x.size(); ++j) y[i] += w[i * x.size() + j] * x[j];
    return y;
  }

  doubles norm(const doubles& x, const std::string& name) const {
    double mean_square = 0;
    for (const double value : x) mean_square += value * value / static_cast<double>(x.size());
    doubles y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] / std::sqrt(mean_square + 1e-5) * m_.values(name)[i];
    return y;
  }

  // One head of `row`, rotated to `position`.
  doubles rotated(const doubles& row, index_t head, index_t position) const {
    const std::size_t dim = at(m_.head_dim());
    const double* const in = row.data() + at(head) * dim;
    doubles inv_freq = m_.inv_freq, out(in, in + dim);
    for (std::size_t i = 0; m_.inv_freq.empty() && i < dim / 2; ++i)
      inv_freq.push_back(
          std::pow(std::stod(m_.metadata.at("rope_theta")), -2 * static_cast<double>(i) / static_cast<double>(dim)));
    for (std::size_t i = 0; i < inv_freq.size(); ++i) {
      const double angle = static_cast<double>(position) * inv_freq[i];
      const double cos = m_.attention_factor * std::cos(angle), sin = m_.attention_factor * std::sin(angle);
      const std::size_t a = m_.interleaved ? 2 * i : i, b = m_.interleaved ? a + 1 : a + inv_freq.size();
      out[a] = in[a] * cos - in[b] * sin;
      out[b] = in[b] * cos + in[a] * sin;
    }
    return out;
  }

  doubles attend(std::size_t layer, const std::string& prefix, const doubles& x) {
    layer_state& state = layers_[layer];
    const doubles q = linear(x, prefix + "self_attn.q_proj.weight");
    state.keys.push_back(linear(x, prefix + "self_attn.k_proj.weight"));
    state.values.push_back(linear(x, prefix + "self_attn.v_proj.weight"));
    std::vector<std::size_t> kept;
    for (index_t p = 0; p <= seen_; ++p)
      if (p < num_sink_tokens_ || p > seen_ - window_) kept.push_back(at(p));

    const index_t heads = m_.size("num_attention_heads"), group = heads / m_.size("num_key_value_heads");
    const std::size_t dim = at(m_.head_dim());
    const std::string& attention = m_.metadata.at("attention");
    doubles out(at(heads) * dim);
    for (index_t head = 0; head < heads; ++head) {
      const doubles query = rotated(q, head, static_cast<index_t>(kept.size()) - 1);
      doubles weights(kept.size());
      for (std::size_t i = 0; i < kept.size(); ++i) {
        const doubles key = rotated(state.keys[kept[i]], head / group, static_cast<index_t>(i));
        double score = 0;
        for (std::size_t d = 0; d < dim; ++d) score += query[d] * key[d];
        weights[i] = std::exp(score / std::sqrt(static_cast<double>(dim)));
      }
      double sum = attention == "softmax1" ? 1 : 0;
      if (attention == "sink") sum = std::exp(static_cast<double>(m_.values(prefix + "self_attn.sinks")[at(head)]));
      for (const double weight : weights) sum += weight;
      for (std::size_t i = 0; i < kept.size(); ++i)
        for (std::size_t d = 0; d < dim; ++d)
          out[at(head) * dim + d] += weights[i] / sum * state.values[kept[i]][at(head / group) * dim + d];
    }
    return out;
  }

  const plain_model& m_;
  index_t num_sink_tokens_, window_, seen_ = 0;
  std::vector<layer_state> layers_;
};

inline std::vector<int> random_tokens(index_t n, index_t vocab, std::uint64_t seed) {
  effort::dice dice(seed);
  std::vector<int> tokens;
  for (index_t i = 0; i < n; ++i) tokens.push_back(static_cast<int>(dice.from_to(0, vocab - 1)));
  return tokens;
}

inline double worst_difference(std::span<const float> a, const doubles& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (std::size_t i = 0; i < b.size(); ++i) worst = std::max(worst, std::abs(static_cast<double>(a[i]) - b[i]));
  return worst;
}

}  // namespace plain
