#pragma once

// Rotary positions from a model's own keys, as a file has them: Hugging Face's config.json, or GGUF's metadata. The
// engine reads the file, and hands over its keys and values as text. What frequencies cannot express (docs/rope.md),
// and unknown keys that would change the result, are refused by name.

#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "detail/decimal.hpp"
#include "detail/macros_off.hpp"
#include "rope.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// Key and value, such as {"rope_theta", "10000.0"}. Keys of an object within an object are joined by a dot,
// {"rope_scaling.factor", "8.0"}; words may keep their quotes; null counts as absent.
using model_keys = std::map<std::string, std::string, std::less<>>;

namespace detail {

inline constexpr const char* longrope = "longrope switches between two sets of frequencies as the sequence grows";
inline constexpr const char* m_rope = "M-RoPE gives each token three positions, and no single phase rotates it";
inline constexpr const char* dynamic_ntk = "dynamic NTK changes its frequencies with the length of the sequence";

// f(name, text) of all keys that begin so.
template <class F>
void for_each_under(const model_keys& keys, const std::string& prefix, const F& f) {
  for (auto at = keys.lower_bound(prefix); at != keys.end() && at->first.compare(0, prefix.size(), prefix) == 0; ++at)
    f(std::string_view(at->first), std::string_view(at->second));
}

// Values of keys that begin with `prefix`; remembers which were asked for.
class key_reader {
 public:
  key_reader(const model_keys& keys, std::string prefix, status& found)
      : keys_(keys), prefix_(std::move(prefix)), found_(found) {}

  // Null where it is absent.
  const std::string* find(std::string_view name) {
    const auto at = keys_.find(*asked_.insert(prefix_ + std::string(name)).first);
    return at == keys_.end() || at->second == "null" || at->second == "None" ? nullptr : &at->second;
  }
  std::string_view word(std::string_view name, std::string_view otherwise) {
    const std::string* text = find(name);
    if (text == nullptr) return otherwise;
    std::string_view word = *text;
    if (word.size() >= 2 && word.front() == '"' && word.back() == '"') word = word.substr(1, word.size() - 2);
    return word;
  }
  std::optional<double> number(std::string_view name) {
    const std::string* text = find(name);
    if (text == nullptr) return {};
    double value = 0;
    if (!read_decimal(*text, value) || !std::isfinite(value)) refuse(name, "a number");
    return value;
  }
  double required(std::string_view name) {
    const std::optional<double> value = number(name);
    if (!value) found_.refuse("{} is missing", std::string_view(prefix_ + std::string(name)));
    return value.value_or(0);
  }
  bool flag(std::string_view name, bool otherwise) {
    const std::string* text = find(name);
    if (text != nullptr && *text != "true" && *text != "false") refuse(name, "true or false");
    return text != nullptr ? *text == "true" : otherwise;
  }

  void refuse(std::string_view name, std::string_view had_to_be, std::string_view why = "") {
    found_.refuse("{}{} was {}, had to be {}{}", std::string_view(prefix_), name, word(name, ""), had_to_be, why);
  }

  // What begins with the prefix and `more`, and nobody asked for.
  void refuse_others(std::string_view more = "") {
    const std::string from = prefix_ + std::string(more);
    for_each_under(keys_, from, [&](std::string_view name, std::string_view text) {
      if (!asked_.contains(std::string(name)))
        found_.refuse("{} was {}, had to be absent: it is not known here", name, text);
    });
  }

 private:
  const model_keys& keys_;
  std::string prefix_;
  status& found_;
  std::set<std::string> asked_;
};

// What comes under several names has to be the same under all.
inline double read_theta(key_reader& whole, key_reader& from, status& found) {
  std::optional<double> theta;
  const auto read = [&](key_reader& of, const char* name) {
    const std::optional<double> given = of.number(name);
    if (given && theta && *given != *theta) of.refuse(name, "as rope_theta beside it");
    if (given) theta = given;
  };
  for (const char* name : {"rope_theta", "rotary_emb_base"}) read(whole, name);
  read(from, "rope_theta");
  if (!theta) found.refuse("rope_theta is missing");
  if (whole.number("rope_ratio").value_or(1) != 1) whole.refuse("rope_ratio", "1: multiply rope_theta by it instead");
  return theta.value_or(0);
}

// How many dimensions of a head rotate.
inline index_t read_width(key_reader& whole, key_reader& from, index_t head_dim, status& found) {
  std::optional<index_t> rotates;
  const auto read = [&](key_reader& of, const char* name, index_t times) {
    const std::optional<double> given = of.number(name);
    if (!given) return;
    const double dims = *given * static_cast<double>(times);
    const index_t n = *given > 0 && dims <= static_cast<double>(head_dim) ? static_cast<index_t>(dims) : 0;
    if (n != head_dim && (n < 2 || n % 2 != 0))
      found.refuse("{} was {}, had to be such that an even number of the {} dimensions of a head rotates", name, *given,
                   head_dim);
    if (rotates && *rotates != n)
      found.refuse("{} was {}, had to rotate as many dimensions as the keys beside it, {}", name, *given, *rotates);
    rotates = n;
  };
  read(from, "partial_rotary_factor", head_dim);
  for (const char* name : {"partial_rotary_factor", "rotary_pct", "rope_pct"}) read(whole, name, head_dim);
  read(whole, "rotary_dim", 1);
  const index_t width = rotates.value_or(head_dim);
  if (width == head_dim && width % 2 != 0)
    found.refuse("head_dim was {}, had to be even: its halves rotate together", width);
  return width;
}

inline std::optional<rope> read_config_rope(const model_keys& keys, index_t head_dim, rope_pairing pairing,
                                            status& found) {
  const auto has = [&](const std::string& prefix) {
    bool any = false;
    for_each_under(keys, prefix, [&](std::string_view, std::string_view) { any = true; });
    return any;
  };
  // rope_scaling before transformers 5, rope_parameters since.
  const bool newer = has("rope_parameters.");
  if (newer && has("rope_scaling.")) found.refuse("rope_scaling was given, had to be null beside rope_parameters");
  const std::string prefix = newer ? "rope_parameters." : "rope_scaling.";
  key_reader whole(keys, "", found), from(keys, prefix, found);
  // What a host may hand over with the rest of a file, and another rope than a layer's would come of.
  for (const char* name : {"rope_scaling", "rope_parameters"})
    if (const std::string* text = whole.find(name); text != nullptr && *text != "{}")
      found.refuse("{} was given as text, had to be its keys, each with '{}.' before it", name, name);
  for_each_under(keys, prefix, [&](std::string_view name, std::string_view text) {
    if (const std::size_t dot = name.rfind('.'); dot >= prefix.size())
      found.refuse("{} was {}, had to be that of one type of layer, as {}{}", name, text, std::string_view(prefix),
                   name.substr(dot + 1));
  });
  for (const char* name : {"rope_local_base_freq", "no_rope_layers"})
    if (whole.find(name) != nullptr) whole.refuse(name, "absent: ", "layers differ, so give each its own keys");

  for (const char* name : {"mrope_section", "mrope_interleaved"})
    if (from.find(name) != nullptr) from.refuse(name, "absent: ", m_rope);
  std::string_view type = "default";
  for (const char* name : {"type", "rope_type"}) {
    if (from.find(name) == nullptr) continue;
    type = from.word(name, "");
    if (type == "default" || type == "linear" || type == "llama3" || type == "yarn") continue;
    const std::string_view why = type == "dynamic"                    ? dynamic_ntk
                                 : type == "longrope" || type == "su" ? longrope
                                 : type == "mrope"                    ? m_rope
                                 : type == "proportional" ? "give rope(inv_freq) with zeros, see docs/rope.md"
                                                          : "";
    from.refuse(name, why.empty() ? "default, linear, llama3 or yarn" : "default, linear, llama3 or yarn: ", why);
  }

  const double theta = read_theta(whole, from, found);
  const index_t width = read_width(whole, from, head_dim, found);
  const auto original = [&] {
    std::optional<double> given = from.number("original_max_position_embeddings");
    for (const char* name : {"original_max_position_embeddings", "max_position_embeddings"})
      if (!given) given = whole.number(name);
    return given ? *given : from.required("original_max_position_embeddings");
  };
  rope::llama3_scaling llama3;
  rope::yarn_scaling yarn;
  double factor = 1;
  if (type != "default") factor = from.required("factor");
  if (type == "llama3")
    llama3 = {factor, from.required("low_freq_factor"), from.required("high_freq_factor"), original()};
  if (type == "yarn")
    yarn = {.factor = factor,
            .original_max_position_embeddings = original(),
            .beta_fast = from.number("beta_fast").value_or(32),
            .beta_slow = from.number("beta_slow").value_or(1),
            .truncate = from.flag("truncate", true),
            .mscale = from.number("mscale").value_or(0),
            .mscale_all_dim = from.number("mscale_all_dim").value_or(0),
            .attention_factor = from.number("attention_factor")};
  from.flag("finetuned", false);  // says nothing about what to compute
  from.refuse_others();
  if (!found) return {};
  if (type == "linear") return rope::try_linear(width, theta, factor, found, pairing);
  if (type == "llama3") return rope::try_llama3(width, theta, llama3, found, pairing);
  if (type == "yarn") return rope::try_yarn(width, theta, yarn, found, pairing);
  return rope::try_plain(width, theta, found, pairing);
}

// How llama.cpp rotates the heads of an architecture (its llama_model_rope_type), of those that are known here.
inline std::optional<rope_pairing> gguf_pairing(std::string_view architecture) {
  for (const char* name : {"llama", "baichuan", "command-r", "deepseek", "deepseek2", "granite", "internlm2", "minicpm",
                           "olmo", "smollm3", "starcoder", "xverse"})
    if (architecture == name) return rope_pairing::interleaved;
  for (const char* name : {"falcon", "gemma", "gemma2", "gpt-oss", "gptneox", "nemotron", "olmo2", "phi2", "phi3",
                           "qwen", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2"})
    if (architecture == name) return rope_pairing::half_split;
  return {};
}

inline std::optional<rope> read_gguf_rope(const model_keys& keys, index_t head_dim, std::span<const float> rope_freqs,
                                          std::optional<rope_pairing> pairing, status& found) {
  key_reader general(keys, "general.", found);
  const std::string architecture(general.word("architecture", ""));
  if (architecture.empty()) found.refuse("general.architecture is missing");
  if (!pairing) pairing = gguf_pairing(architecture);
  if (!pairing) general.refuse("architecture", "one whose pairing is known here: say which");
  key_reader from(keys, architecture + ".", found);

  if (from.find("rope.dimension_sections") != nullptr) from.refuse("rope.dimension_sections", "absent: ", m_rope);
  if (from.find("rope.scaling.alpha") != nullptr) from.refuse("rope.scaling.alpha", "absent: ", dynamic_ntk);
  for (const char* name : {"rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"})
    if (from.number(name).value_or(1) != 1) from.refuse(name, "1");
  const double dims = from.number("rope.dimension_count").value_or(static_cast<double>(head_dim));
  if (!(dims >= 2 && dims <= static_cast<double>(head_dim) && std::fmod(dims, 2) == 0))
    found.refuse("{}.rope.dimension_count was {}, had to be even and from 2 to head_dim, {}",
                 std::string_view(architecture), dims, head_dim);
  const double theta = from.number("rope.freq_base").value_or(10000);
  const std::string_view type = from.word("rope.scaling.type", "linear");
  if (type != "none" && type != "linear" && type != "yarn")
    from.refuse("rope.scaling.type", type == "longrope" ? "none, linear or yarn: " : "none, linear or yarn",
                type == "longrope" ? longrope : "");
  double factor = from.number("rope.scaling.factor").value_or(1);
  if (type == "none") factor = 1;
  const auto context = from.number("context_length"), original = from.number("rope.scaling.original_context_length");
  const rope::yarn_scaling yarn{.factor = factor,
                                .original_max_position_embeddings = original ? *original : context.value_or(0),
                                .beta_fast = from.number("rope.scaling.yarn_beta_fast").value_or(32),
                                .beta_slow = from.number("rope.scaling.yarn_beta_slow").value_or(1)};
  from.find("rope.scaling.finetuned");  // says nothing about what to compute
  from.refuse_others("rope.");
  if (!found) return {};
  const auto width = static_cast<index_t>(dims);
  if (!rope_freqs.empty()) {  // Llama 3.1's scaling comes as what frequencies are divided by
    if (type == "yarn" || factor != 1) found.refuse("rope_freqs was given, had to be absent beside a scaling of rope");
    found.require(static_cast<index_t>(rope_freqs.size()) == width / 2, "rope_freqs.size()", rope_freqs.size(),
                  "exactly", width / 2);
    std::vector<float> inv_freq(rope_freqs.begin(), rope_freqs.end());
    for (std::size_t i = 0; i < inv_freq.size(); ++i) {
      found.require(inv_freq[i] >= 1e-3f && inv_freq[i] <= 1e6f, "a number of rope_freqs", inv_freq[i],
                    "from 0.001 to 1e6");
      const double exponent = static_cast<double>(2 * i) / static_cast<double>(width);
      inv_freq[i] = static_cast<float>(1 / (std::pow(theta, exponent) * static_cast<double>(inv_freq[i])));
    }
    return found ? rope::try_create(inv_freq, found, *pairing) : std::nullopt;
  }
  if (type == "yarn") return rope::try_yarn(width, theta, yarn, found, *pairing);
  return factor == 1 ? rope::try_plain(width, theta, found, *pairing)
                     : rope::try_linear(width, theta, factor, found, *pairing);
}

}  // namespace detail

// Of config.json: rope_theta (rotary_emb_base), rope_scaling or rope_parameters, partial_rotary_factor (rotary_pct,
// rope_pct, rotary_dim), and original_max_position_embeddings or max_position_embeddings where a scaling wants it. Keys
// that say that layers differ are refused; others are not read. head_dim is the model's.
inline std::optional<rope> try_rope_of_config(const model_keys& keys, index_t head_dim, status& found,
                                              rope_pairing pairing = rope_pairing::half_split) noexcept {
  found = status();
  const auto made =
      detail::created(found, "a rope", [&] { return detail::read_config_rope(keys, head_dim, pairing, found); });
  return made ? *made : std::nullopt;
}
inline rope rope_of_config(const model_keys& keys, index_t head_dim, rope_pairing pairing = rope_pairing::half_split) {
  status found;
  const std::optional<rope> made = try_rope_of_config(keys, head_dim, found, pairing);
  found.or_fail();
  return *made;
}

// Of GGUF's metadata: general.architecture and that architecture's rope.* and context_length; `rope_freqs` are the
// values of the tensor of that name, where the file has one. The architecture says how dimensions are paired, unless
// `pairing` does.
inline std::optional<rope> try_rope_of_gguf(const model_keys& keys, index_t head_dim, std::span<const float> rope_freqs,
                                            status& found,
                                            std::optional<rope_pairing> pairing = std::nullopt) noexcept {
  found = status();
  const auto made = detail::created(found, "a rope",
                                    [&] { return detail::read_gguf_rope(keys, head_dim, rope_freqs, pairing, found); });
  return made ? *made : std::nullopt;
}
inline rope rope_of_gguf(const model_keys& keys, index_t head_dim, std::span<const float> rope_freqs = {},
                         std::optional<rope_pairing> pairing = std::nullopt) {
  status found;
  const std::optional<rope> made = try_rope_of_gguf(keys, head_dim, rope_freqs, found, pairing);
  found.or_fail();
  return *made;
}

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
