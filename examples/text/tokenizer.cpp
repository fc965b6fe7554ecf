#include "tokenizer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <queue>
#include <tuple>
#include <utility>

#include "unicode_ranges.hpp"

namespace text {
namespace {

using loaders::gguf, loaders::quote;

constexpr std::size_t none = std::numeric_limits<std::size_t>::max();

// ---- bytes as the file spells them ----------------------------------------------------------------------------------

// GPT-2's alphabet: printable Latin-1 stands for itself, all other bytes, in order, for what follows U+00FF.
bool stands_for_itself(int byte) {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xff && byte != 0xad);
}

// [code point] The byte that it stands for, or -1.
std::vector<int> byte_alphabet() {
  std::vector<int> bytes(256, -1);
  for (int byte = 0; byte < 256; ++byte) {
    if (stands_for_itself(byte))
      bytes[static_cast<std::size_t>(byte)] = byte;
    else
      bytes.push_back(byte);
  }
  return bytes;
}

// Nothing where a character is not of the alphabet.
std::optional<std::string> spelled_bytes(std::string_view text, const std::vector<int>& alphabet) {
  std::string bytes;
  while (!text.empty()) {
    const decoded c = first_character(text);
    if (c.code_point >= alphabet.size() || alphabet[c.code_point] < 0) return {};
    bytes += static_cast<char>(alphabet[c.code_point]);
    text.remove_prefix(c.bytes);
  }
  return bytes;
}

// Spellings of `tokens`, to find them by. Sorted, not hashed: no choice of names makes it slow.
class spelling_index {
 public:
  spelling_index(const gguf& file, const std::vector<std::string_view>& spellings, std::vector<int> tokens)
      : spellings_(spellings), sorted_(std::move(tokens)) {
    std::stable_sort(sorted_.begin(), sorted_.end(), [this](int a, int b) { return spelling(a) < spelling(b); });
    const auto twice =
        std::adjacent_find(sorted_.begin(), sorted_.end(), [this](int a, int b) { return spelling(a) == spelling(b); });
    if (twice != sorted_.end())
      file.fail(fmt::format("tokenizer.ggml.tokens {} and {} are both {}, they must be unique", twice[0], twice[1],
                            quote(spelling(*twice))));
  }

  std::optional<int> find(std::string_view wanted) const {
    const auto found = std::lower_bound(sorted_.begin(), sorted_.end(), wanted,
                                        [this](int token, std::string_view text) { return spelling(token) < text; });
    if (found == sorted_.end() || spelling(*found) != wanted) return {};
    return *found;
  }

 private:
  std::string_view spelling(int token) const { return spellings_[static_cast<std::size_t>(token)]; }

  const std::vector<std::string_view>& spellings_;
  std::vector<int> sorted_;
};

// ---- words ----------------------------------------------------------------------------------------------------------

enum class character { letter, number, space, other, end };

template <std::size_t N>
constexpr bool holds(const unicode::code_point_range (&ranges)[N], char32_t c) {
  const auto after = std::upper_bound(std::begin(ranges), std::end(ranges), c,
                                      [](char32_t value, const auto& range) { return value < range.first; });
  return after != std::begin(ranges) && c <= std::prev(after)->last;
}

constexpr character classify(char32_t c) {
  if (holds(unicode::letters, c)) return character::letter;
  if (holds(unicode::numbers, c)) return character::number;
  if (holds(unicode::spaces, c)) return character::space;
  return character::other;
}

constexpr std::array<character, 128> ascii_classes = [] {
  std::array<character, 128> classes{};
  for (std::size_t c = 0; c < classes.size(); ++c) classes[c] = classify(static_cast<char32_t>(c));
  return classes;
}();

// Takes valid UTF-8 apart as two pre-tokenizers in sequence do: first every number is a piece of its own, then what
// lies between them is split by GPT-2's expression,
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
class word_splitter {
 public:
  explicit word_splitter(std::string_view text) : text_(text) {}

  // The next word; empty at the end.
  std::string_view next() {
    end_ = first_;
    const std::string_view rest = text_.substr(first_);
    switch (look()) {
      case character::end:
        break;
      case character::number:
        take();
        break;
      case character::space:
        take_spaces();
        break;
      default:
        if (const std::size_t bytes = contraction(rest))
          end_ += bytes;
        else
          take_all(look());
    }
    const std::string_view word = rest.substr(0, end_ - first_);
    first_ = end_;
    return word;
  }

 private:
  static std::size_t contraction(std::string_view text) {
    for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
      if (text.starts_with(ending)) return ending.size();
    return 0;
  }

  // The class of the character at end_, whose bytes take() would add.
  character look() {
    if (end_ == text_.size()) return character::end;
    const auto byte = static_cast<unsigned char>(text_[end_]);
    if (byte < 0x80) {
      bytes_ = 1;
      return ascii_classes[byte];
    }
    const decoded c = first_character(text_.substr(end_));
    bytes_ = c.bytes;
    return classify(c.code_point);
  }
  void take() { end_ += bytes_; }
  void take_all(character kind) {
    while (look() == kind) take();
  }

  // A run of spaces leaves its last one to the word that follows, unless that is a number. Only U+0020 becomes part of
  // the word; any other space is a word then.
  void take_spaces() {
    std::size_t last = end_;
    for (; look() == character::space; take()) last = end_;
    const character following = look();
    if (following == character::end || following == character::number) return;
    if (last > first_)
      end_ = last;
    else if (text_[first_] == ' ')
      take_all(following);
  }

  std::string_view text_;
  std::size_t first_ = 0, end_ = 0, bytes_ = 0;
};

}  // namespace

// Joins the pair of least rank, the leftmost of equals, until no neighbours are a pair. A linked list and a heap: a
// word of n bytes takes n log n, however long it is.
class tokenizer::word_merger {
 public:
  explicit word_merger(const tokenizer& of) : of_(of) {}

  void append(std::string_view word) {
    symbols_.clear();
    for (const char c : word) {
      const int token = of_.byte_tokens_[static_cast<unsigned char>(c)];
      if (token < 0) continue;
      const std::size_t i = symbols_.size();
      symbols_.push_back({token, i - 1, i + 1});
    }
    if (symbols_.empty()) return;
    symbols_.front().previous = symbols_.back().next = none;
    for (std::size_t i = 0; i + 1 < symbols_.size(); ++i) offer(i);
    while (!candidates_.empty()) {
      const candidate best = candidates_.top();
      candidates_.pop();
      join(best);
    }
    for (const symbol& s : symbols_)
      if (s.token >= 0) tokens.push_back(s.token);
  }

  std::vector<int> tokens;

 private:
  struct symbol {
    int token;  // -1: was joined to the one before
    std::size_t previous, next;
  };
  struct candidate {
    merge rule;
    std::size_t left;
    bool operator<(const candidate& other) const {  // the top of the heap is the first of all
      return std::tie(rule.rank, left) > std::tie(other.rule.rank, other.left);
    }
  };

  void offer(std::size_t left) {
    const std::size_t right = symbols_[left].next;
    if (right == none) return;
    if (const merge* const rule = of_.find_merge(symbols_[left].token, symbols_[right].token))
      candidates_.push({*rule, left});
  }

  void join(const candidate& c) {
    symbol& left = symbols_[c.left];
    // One of the two may have been joined to something else meanwhile.
    if (left.token != c.rule.left || left.next == none || symbols_[left.next].token != c.rule.right) return;
    symbol& right = symbols_[left.next];
    left.token = c.rule.merged;
    left.next = right.next;
    right.token = -1;
    if (left.next != none) symbols_[left.next].previous = c.left;
    if (left.previous != none) offer(left.previous);
    offer(c.left);
  }

  const tokenizer& of_;
  std::vector<symbol> symbols_;
  std::priority_queue<candidate> candidates_;
};

tokenizer::tokenizer(const gguf& file) {
  const auto demand = [&file](const std::string& key, std::string_view value) {
    if (file.string(key) != value) file.refuse(key, quote(value));
  };
  demand("tokenizer.ggml.model", "gpt2");
  demand("tokenizer.ggml.pre", "smollm");
  if (file.flag("tokenizer.ggml.add_space_prefix").value_or(false))
    file.refuse("tokenizer.ggml.add_space_prefix", "false");
  read_tokens(file);
  read_merges(file);
  bos_ = file.integer("tokenizer.ggml.bos_token_id", 0, size() - 1);
  eos_ = file.integer("tokenizer.ggml.eos_token_id", 0, size() - 1);
  adds_bos_ = file.flag("tokenizer.ggml.add_bos_token").value_or(false);
  chat_template_ = file.string("tokenizer.chat_template").value_or("");
  if (adds_bos_ && !bos_) file.refuse("tokenizer.ggml.bos_token_id", "given, as add_bos_token is true");
}

void tokenizer::read_tokens(const gguf& file) {
  const auto spellings = file.strings("tokenizer.ggml.tokens");
  const auto types = file.integers("tokenizer.ggml.token_type");
  if (!spellings || spellings->empty() || spellings->size() > max_tokens)
    file.refuse("tokenizer.ggml.tokens", fmt::format("1 to {} strings", max_tokens));
  if (!types || types->size() != spellings->size())
    file.refuse("tokenizer.ggml.token_type", fmt::format("{} integers, one a token", spellings->size()));

  const std::vector<int> alphabet = byte_alphabet();
  byte_tokens_.assign(256, -1);
  tokens_.reserve(spellings->size());
  for (std::size_t i = 0; i < spellings->size(); ++i) {
    const std::string_view spelling = (*spellings)[i];
    const auto fail = [&](const std::string& what) {
      file.fail(fmt::format("tokenizer.ggml.tokens {}, {}, {}", i, quote(spelling), what));
    };
    if ((*types)[i] < 1 || (*types)[i] > 5 || (*types)[i] == 2)
      fail(fmt::format("has the type {}, must have 1 (normal), 3 (control), 4 (user defined) or 5 (unused)",
                       (*types)[i]));
    const auto type = static_cast<kind>((*types)[i]);
    kinds_.push_back(type);
    if (type == kind::unused) {  // whatever it is called
      tokens_.emplace_back();
      continue;
    }
    if (spelling.empty() || spelling.size() > max_token_bytes)
      fail(fmt::format("has {} bytes, must have 1 to {}", spelling.size(), max_token_bytes));
    if (type != kind::normal) {
      if (valid_utf8(spelling) != spelling) fail("must be UTF-8");
      parsed_.push_back(static_cast<int>(i));
      if (type == kind::user_defined) added_.push_back(static_cast<int>(i));
      tokens_.emplace_back(spelling);
      continue;
    }
    std::optional<std::string> bytes = spelled_bytes(spelling, alphabet);
    if (!bytes) fail("must be of characters that stand for bytes");
    if (bytes->size() == 1) byte_tokens_[static_cast<unsigned char>(bytes->front())] = static_cast<int>(i);
    tokens_.push_back(std::move(*bytes));
  }
  for (std::vector<int>* found : {&parsed_, &added_})
    std::sort(found->begin(), found->end(), [this](int a, int b) { return bytes(a) < bytes(b); });
}

void tokenizer::read_merges(const gguf& file) {
  const std::vector<std::string_view> spellings = *file.strings("tokenizer.ggml.tokens");
  const auto rules = file.strings("tokenizer.ggml.merges");
  if (!rules || rules->size() > max_tokens)
    file.refuse("tokenizer.ggml.merges", fmt::format("at most {} strings", max_tokens));

  std::vector<int> used;
  for (int token = 0; token < size(); ++token)
    if (!is_unused(token)) used.push_back(token);
  const spelling_index index(file, spellings, std::move(used));
  for (std::size_t i = 0; i < rules->size(); ++i) {
    const std::string_view rule = (*rules)[i];
    const auto fail = [&](const std::string& what) {
      file.fail(fmt::format("tokenizer.ggml.merges {}, {}, {}", i, quote(rule), what));
    };
    const std::size_t space = rule.find(' ');
    if (space == std::string_view::npos || rule.find(' ', space + 1) != std::string_view::npos)
      fail("must be two tokens with a space between them");
    const auto token = [&](const std::string& spelling) {
      const std::optional<int> found = index.find(spelling);
      if (!found || kinds_[static_cast<std::size_t>(*found)] != kind::normal)
        fail(fmt::format("needs {}, which must be a normal token", quote(spelling)));
      return *found;
    };
    const std::string left(rule.substr(0, space)), right(rule.substr(space + 1));
    merges_.push_back({token(left), token(right), token(left + right), static_cast<int>(i)});
  }

  std::sort(merges_.begin(), merges_.end(), [](const merge& a, const merge& b) {
    return std::tie(a.left, a.right, a.rank) < std::tie(b.left, b.right, b.rank);
  });
  const auto twice = std::adjacent_find(merges_.begin(), merges_.end(), [](const merge& a, const merge& b) {
    return a.left == b.left && a.right == b.right;
  });
  if (twice != merges_.end())
    file.fail(fmt::format("tokenizer.ggml.merges {} and {} are both {}, they must be unique", twice[0].rank,
                          twice[1].rank, quote((*rules)[static_cast<std::size_t>(twice->rank)])));
}

// Null where the two are no pair.
const tokenizer::merge* tokenizer::find_merge(int left, int right) const {
  const auto found = std::lower_bound(
      merges_.begin(), merges_.end(), std::pair(left, right),
      [](const merge& m, const std::pair<int, int>& wanted) { return std::pair(m.left, m.right) < wanted; });
  return found != merges_.end() && found->left == left && found->right == right ? &*found : nullptr;
}

// In the sorted texts, those that begin with the first n bytes of `text` are neighbours, the one of n bytes before all.
std::optional<int> tokenizer::longest_at(std::string_view text, const std::vector<int>& sorted) const {
  std::optional<int> longest;
  auto first = sorted.begin(), last = sorted.end();
  for (std::size_t n = 0; first != last; ++n) {
    if (bytes(*first).size() == n) longest = *first++;
    if (n == text.size()) break;
    const auto byte = [this, n](int token) { return static_cast<unsigned char>(bytes(token)[n]); };
    const auto wanted = static_cast<unsigned char>(text[n]);
    first = std::lower_bound(first, last, wanted, [&](int token, unsigned char c) { return byte(token) < c; });
    last = std::upper_bound(first, last, wanted, [&](unsigned char c, int token) { return c < byte(token); });
  }
  return longest;
}

std::optional<int> tokenizer::find_special(std::string_view text) const {
  const std::optional<int> found = longest_at(text, parsed_);
  return found && is_special(*found) && bytes(*found) == text ? found : std::nullopt;
}

std::vector<int> tokenizer::encode(std::string_view text, special mode) const {
  const std::string whole = valid_utf8(text);
  const std::string_view valid = whole;
  word_merger merger(*this);
  const std::vector<int>& whole_tokens = mode == special::parsed ? parsed_ : added_;
  std::size_t first = 0;  // of what was not encoded yet
  for (std::size_t i = 0; !whole_tokens.empty() && i < valid.size();) {
    const std::optional<int> token = longest_at(valid.substr(i), whole_tokens);
    if (!token) {
      ++i;
      continue;
    }
    encode_text(valid.substr(first, i - first), merger);
    merger.tokens.push_back(*token);
    first = i += bytes(*token).size();
  }
  encode_text(valid.substr(first), merger);
  return std::move(merger.tokens);
}

void tokenizer::encode_text(std::string_view valid, word_merger& merger) const {
  word_splitter words(valid);
  for (std::string_view word = words.next(); !word.empty(); word = words.next()) merger.append(word);
}

std::string tokenizer::decode(std::span<const int> tokens) const {
  std::string all;
  for (const int token : tokens) all += bytes(token);
  return valid_utf8(all);
}

}  // namespace text
