#pragma once

// A Llama-style decoder on Eigen: all of a model but attention and its caches, which the library does. `model` holds
// the weights and is shared by threads; `session` holds one sequence.

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <sinkcache/sinkcache.hpp>
#include <span>
#include <string>
#include <vector>

#include <sinkcache/thread_pool.hpp>
#include "../loaders/weights.hpp"
#include "kernels.hpp"
#include "linear.hpp"

namespace engine {

using loaders::model_config;

// What the model says of a layer.
struct layer_info {
  sinkcache::cache_config cache;  // its heads and its rope; its window, or 0: it attends to all that its cache holds
  index_t num_qo_heads, layer, num_layers;
};

class model {
 public:
  // A safetensors or a GGUF file. Throws file_error as weights::open does, and unless the tensors are exactly those of
  // such a model.
  explicit model(const std::string& path);

  const model_config& config() const { return config_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  index_t num_parameters() const { return num_parameters_; }
  layer_info info(index_t layer_number) const;

 private:
  friend class session;

  struct layer {
    Eigen::RowVectorXf input_norm, post_attention_norm;  // [hidden_size]
    linear qkv;                // [(num_attention_heads + 2 num_key_value_heads) * head_dim, hidden_size]
    linear o;                  // [hidden_size, num_attention_heads * head_dim]
    linear gate_up;            // [2 intermediate_size, hidden_size]
    linear down;               // [hidden_size, intermediate_size]
    std::vector<float> sinks;  // [num_attention_heads], or empty
  };

  const linear& lm_head() const { return config_.tie_word_embeddings ? embed_ : lm_head_; }

  model_config config_;
  std::map<std::string, std::string> metadata_;
  sinkcache::rope rope_ = sinkcache::rope::none();
  index_t num_parameters_ = 0;
  linear embed_, lm_head_;  // [vocab_size, hidden_size]
  Eigen::RowVectorXf norm_;
  std::vector<layer> layers_;
};

// Makes the cache of one layer. What is kept is the factory's choice.
using cache_factory = std::function<std::unique_ptr<sinkcache::any_kv_cache>(const layer_info&)>;

struct session_config {
  std::optional<sinkcache::softmax_variant> softmax = {};  // instead of the model's own
  index_t threads = 1;                                     // with the caller's; no result depends on it
  bool watches_sinks = false;                              // see session::pinned_shares
};

// One sequence: its caches, one a layer, and its activations. The model must outlive it.
class session {
 public:
  session(const model&, const cache_factory&, const session_config& = {});

  // The logits of the next token, valid until the next call. decode allocates nothing.
  std::span<const float> decode(int token);
  std::span<const float> prefill(std::span<const int> tokens);
  // All of them: `each` gets the logits after every token, in order, valid during its call.
  void prefill(std::span<const int> tokens, const std::function<void(std::span<const float>)>& each);

  void clear();  // with caches as they were made
  std::size_t cache_bytes() const;
  const sinkcache::any_kv_cache& cache(index_t layer) const { return *layers_[static_cast<std::size_t>(layer)].cache; }

  // [num_hidden_layers, num_attention_heads] What each head gave to the pinned tokens of its attention for the token
  // decoded last. Only where the session watches sinks.
  const matrix& pinned_shares() const { return pinned_shares_; }

 private:
  struct layer_state {
    std::unique_ptr<sinkcache::any_kv_cache> cache;
    sinkcache::attention attention;
  };

  void reserve(index_t rows);
  void forward(std::span<const int> tokens);
  void run_layers(std::span<const int> tokens);
  void predict(index_t first_row, matrix& logits);
  void attend(layer_state&, index_t rows, sinkcache::weight_reader* weights = nullptr);

  const model* model_;
  cache_factory make_cache_;
  std::unique_ptr<sinkcache::thread_pool> pool_;  // null: the caller's thread alone
  std::vector<layer_state> layers_;
  sinkcache::workspace workspace_;
  matrix hidden_, normed_, qkv_, attended_, gate_up_;  // [rows, ...]
  matrix logits_;                                      // [1, vocab_size]
  matrix pinned_shares_;                               // empty unless they were asked for
  matrix all_logits_;                                  // [rows, vocab_size], only where they were asked for
};

// -log2 softmax(logits)[target]
double loss_bits(std::span<const float> logits, int target);

}  // namespace engine
