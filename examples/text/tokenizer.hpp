#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../loaders/gguf.hpp"
#include "utf8.hpp"

namespace text {

// Byte pair encoding of bytes as SmolLM and SmolLM2 use it ("gpt2" with the pre-tokenizer "smollm" in a GGUF file): the
// ids of Hugging Face's tokenizers, for any input. Bytes that are no UTF-8 are read as U+FFFD, see utf8.hpp. A byte for
// which the vocabulary has no token is left out, as there; SmolLM2's lacks six control characters, and what only
// unassigned code points above U+3FFFF need. All other valid UTF-8 decodes to what was encoded.
class tokenizer {
 public:
  static constexpr std::size_t max_tokens = std::size_t{1} << 20, max_token_bytes = 1024;

  // Throws file_error unless the metadata are a whole and consistent vocabulary of this kind.
  explicit tokenizer(const loaders::gguf& file);

  // What the text of a special token is read as, "<|im_end|>" say. Only a program's own text may be parsed: in text
  // from elsewhere it would let a stranger end the turn. Words that fine-tuning has added (user-defined tokens) are
  // found in any text, before it is split.
  enum class special { as_text, parsed };
  std::vector<int> encode(std::string_view text, special = special::as_text) const;

  // Valid UTF-8, special tokens as their text. A stream of tokens is decoded alike by a utf8_stream fed with `bytes`.
  std::string decode(std::span<const int> tokens) const;
  std::string_view bytes(int token) const { return tokens_.at(static_cast<std::size_t>(token)); }

  int size() const { return static_cast<int>(tokens_.size()); }
  bool is_special(int token) const { return kinds_.at(static_cast<std::size_t>(token)) == kind::control; }
  bool is_unused(int token) const { return kinds_.at(static_cast<std::size_t>(token)) == kind::unused; }  // padding
  std::optional<int> find_special(std::string_view text) const;
  const std::string& chat_template() const { return chat_template_; }  // empty where there is none
  // Of the metadata.
  std::optional<int> bos() const { return bos_; }
  std::optional<int> eos() const { return eos_; }
  bool adds_bos() const { return adds_bos_; }  // whether the model expects it in front of a text; encode never adds it

 private:
  // The format's own numbers; it has others, which are refused.
  enum class kind : std::uint8_t { normal = 1, control = 3, user_defined = 4, unused = 5 };
  struct merge {
    int left, right, merged, rank;
  };
  class word_merger;

  void read_tokens(const loaders::gguf& file);
  void read_merges(const loaders::gguf& file);
  void encode_text(std::string_view valid, word_merger&) const;
  // The longest of them that the text starts with.
  std::optional<int> longest_at(std::string_view text, const std::vector<int>& sorted) const;
  const merge* find_merge(int left, int right) const;

  std::vector<std::string> tokens_;  // as bytes, not in the alphabet of the file
  std::vector<kind> kinds_;
  std::vector<int> added_;        // user-defined ones, sorted by their text
  std::vector<int> parsed_;       // these and control ones, likewise
  std::vector<int> byte_tokens_;  // [256], -1 where there is none
  std::vector<merge> merges_;     // sorted by left, then by right
  std::optional<int> bos_, eos_;
  bool adds_bos_ = false;
  std::string chat_template_;
};

}  // namespace text
