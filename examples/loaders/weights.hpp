#pragma once

// A file of weights as a Llama-style decoder sees it, whatever its format.

#include <map>
#include <memory>
#include <optional>
#include <sinkcache/sinkcache.hpp>
#include <string>
#include <vector>

#include "file.hpp"

namespace loaders {

using sinkcache::index_t;

// All of a head is rotated in these models.
inline constexpr index_t max_head_dim = 2 * sinkcache::rope::max_pairs;

enum class attention_kind { softmax, softmax1, sink };

// Named as in Hugging Face's config.json.
struct model_config {
  index_t num_hidden_layers, hidden_size, num_attention_heads, num_key_value_heads, head_dim, intermediate_size;
  index_t vocab_size;
  double rope_theta;
  float rms_norm_eps;
  attention_kind attention;
  bool tie_word_embeddings;
  std::optional<int> bos_token_id;  // what every text begins with
  std::optional<index_t> max_position_embeddings;
};

// Tensors are asked for by Hugging Face's names for a Llama; `own_name` is what the file calls them.
class weights {
 public:
  // By the first bytes of the file. Throws file_error where it is neither format, saying what it is where that is
  // known, and where the metadata lack a size, give one out of bounds, or ask for what this decoder does not do.
  static std::unique_ptr<weights> open(const std::string& path);

  virtual ~weights() = default;

  virtual std::string own_name(const std::string& name) const = 0;
  virtual std::vector<std::string> own_names() const = 0;
  // By the file's own name.
  virtual bool contains(const std::string& own_name) const = 0;
  virtual const std::vector<std::int64_t>& shape(const std::string& own_name) const = 0;
  virtual tensor read(const std::string& own_name) const = 0;
  // Nothing where the file has no codes for it.
  virtual std::optional<coded_tensor> read_coded(const std::string& own_name) const = 0;

  model_config config{};
  sinkcache::rope rope = sinkcache::rope::none();
  std::map<std::string, std::string> metadata;  // a safetensors file's
};

// What the library found wrong with a file's rope.
[[noreturn]] void fail_rope(const std::string& path, const sinkcache::status& found);

std::unique_ptr<weights> open_safetensors_weights(const std::string& path);
std::unique_ptr<weights> open_gguf_weights(const std::string& path);

}  // namespace loaders
