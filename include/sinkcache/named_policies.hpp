#pragma once

// Scorers by name, with parameters as text: for command lines, other languages and configurations.

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "detail/decimal.hpp"
#include "detail/macros_off.hpp"
#include "eviction.hpp"
#include "key_policies.hpp"
#include "policies.hpp"
#include "redundancy_policies.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// A scorer that can be had by name: what it keeps, in a line; where it is from; its parameters, "name=default" with
// blanks between them.
struct named_policy {
  std::string_view name, keeps, source, parameters;
};

inline constexpr std::array<named_policy, 11> named_policies{{
    {"random", "tokens by chance, drawn anew at every event, or once for life", "for comparison",
     "draw=fresh|once seed=0 layer=0"},
    {"h2o", "what all queries gave most, in sum or per step of its life", "Zhang et al. 2023, arXiv 2306.14048",
     "normalise=none|lifetime"},
    {"tova", "what the newest query gave most, one set for all heads", "Oren et al. 2024, arXiv 2401.06104", ""},
    {"snapkv", "what the newest queries gave most, neighbours included", "Li et al. 2024, arXiv 2404.14469",
     "window=8 kernel=7 pool=max|avg form=snapkv|rkv pool_pinned=1"},
    {"knorm", "keys of small norm", "Devoto et al. 2024, arXiv 2406.11430", ""},
    {"keydiff", "keys unlike the mean direction", "Park et al. 2025, arXiv 2504.15364", ""},
    {"mean_key", "keys far from the mean key", "ManifoldKV, Datta et al. 2026, draft", ""},
    {"lagkv", "tokens that spread most in the range of those after them", "Liang et al. 2025, arXiv 2504.04704",
     "mode=rescore|fifo lag=0 v_ratio=1 ratio=0.5 cross=0"},
    {"expected_attention", "what queries to come will give most", "Devoto et al. 2025, arXiv 2510.00636",
     "T=512 covariance=1 vnorm=1 epsilon=0"},
    {"rkv", "what the newest queries gave most and is not said twice", "Cai et al. 2025, arXiv 2505.24133",
     "window=8 kernel=7 lambda=0.07"},
    {"gkv", "what queries gave most, fading from event to event", "microsoft/G-KV, 6db3b2e",
     "window=8 combine=max|mean|sum decay=0.8 kernel=1 redundancy=0 lambda=0.1"},
}};

using policy_parameter = std::pair<std::string_view, std::string_view>;

namespace detail {

// Takes parameters out of a list by name; what is left at the end, or is no such value, is an error.
class parameter_reader {
 public:
  // `shared`: parameters of all policies.
  parameter_reader(status& found, const named_policy& policy, std::span<const policy_parameter> given,
                   std::string_view shared = {}) noexcept
      : found_(found), policy_(policy), given_(given), shared_(shared) {}

  void number(std::string_view name, std::optional<double>& to) noexcept {
    double value = to.value_or(0);
    const std::size_t before = taken_;
    number(name, value);
    if (taken_ > before) to = value;
  }
  template <class T>
  void number(std::string_view name, T& to) noexcept {
    const policy_parameter* const p = take(name);
    if (p == nullptr) return;
    T value{};
    if (!read_decimal(p->second, value)) return refuse_number<T>(name, p->second.substr(0, 32));
    to = value;
  }
  void flag(std::string_view name, bool& to) noexcept {
    const policy_parameter* const p = take(name);
    if (p == nullptr) return;
    if (p->second != "0" && p->second != "1")
      return found_.refuse("{}'s {} was '{}', had to be 0 or 1", policy_.name, name, p->second.substr(0, 32));
    to = p->second == "1";
  }
  // The number of the word that is given, the first if none is.
  std::size_t word(std::string_view name, std::initializer_list<std::string_view> words) noexcept {
    const policy_parameter* const p = take(name);
    if (p == nullptr) return 0;
    std::size_t i = 0;
    for (const std::string_view w : words) {
      if (w == p->second) return i;
      ++i;
    }
    found_.refuse("{}'s {} was '{}', had to be one of its words: {}", policy_.name, name, p->second.substr(0, 32),
                  policy_.parameters);
    return 0;
  }
  void end() noexcept {
    if (taken_ == given_.size()) return;
    for (const policy_parameter& p : given_)
      if (!is_in(policy_.parameters, p.first) && !is_in(shared_, p.first))
        return found_.refuse("{}'s parameter was '{}', had to be one of: {}{}{}", policy_.name, p.first.substr(0, 32),
                             policy_.parameters.empty() && shared_.empty() ? "none" : policy_.parameters,
                             policy_.parameters.empty() || shared_.empty() ? "" : " ", shared_);
    found_.refuse("{}'s parameters were given twice, had to be given once each", policy_.name);
  }

 private:
  template <class T>
  void refuse_number(std::string_view name, std::string_view text) noexcept {
    if constexpr (std::is_floating_point_v<T>)
      found_.refuse("{}'s {} was '{}', had to be a number", policy_.name, name, text);
    else
      found_.refuse("{}'s {} was '{}', had to be a whole number from {} to {}", policy_.name, name, text,
                    std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
  }
  const policy_parameter* take(std::string_view name) noexcept {
    for (const policy_parameter& p : given_)
      if (p.first == name) {
        ++taken_;
        return &p;
      }
    return nullptr;
  }
  static bool is_in(std::string_view parameters, std::string_view name) noexcept {
    for (std::string_view rest = parameters; !rest.empty();) {
      if (rest.substr(0, rest.find('=')) == name) return true;
      const std::size_t next = rest.find(' ');
      rest = next == std::string_view::npos ? std::string_view() : rest.substr(next + 1);
    }
    return false;
  }

  status& found_;
  const named_policy& policy_;
  std::span<const policy_parameter> given_;
  std::string_view shared_;
  std::size_t taken_ = 0;
};

inline std::shared_ptr<const token_scorer> make_attention_scorer(parameter_reader& from, std::string_view name) {
  if (name == "random") {
    policies::random p;
    from.number("seed", p.seed);
    from.number("layer", p.layer);
    p.draw_once = from.word("draw", {"fresh", "once"}) == 1;
    return std::make_shared<const policies::random>(p);
  }
  if (name == "h2o") return std::make_shared<const policies::h2o>(from.word("normalise", {"none", "lifetime"}) == 1);
  if (name == "tova") return std::make_shared<const policies::tova>();
  if (name == "snapkv") {
    policies::snapkv p;
    from.number("window", p.window);
    from.number("kernel", p.kernel);
    p.average = from.word("pool", {"max", "avg"}) == 1;
    p.rkv_form = from.word("form", {"snapkv", "rkv"}) == 1;
    from.flag("pool_pinned", p.pool_pinned);
    return std::make_shared<const policies::snapkv>(p);
  }
  if (name == "rkv") {
    policies::rkv p;
    from.number("window", p.window);
    from.number("kernel", p.kernel);
    from.number("lambda", p.lambda);
    return std::make_shared<const policies::rkv>(p);
  }
  policies::gkv p;
  from.number("window", p.window);
  from.number("kernel", p.kernel);
  from.number("decay", p.decay);
  from.number("lambda", p.lambda);
  p.by = static_cast<policies::gkv::combine>(from.word("combine", {"max", "mean", "sum"}));
  from.flag("redundancy", p.redundancy);
  return std::make_shared<const policies::gkv>(p);
}

inline std::shared_ptr<const token_scorer> make_key_scorer(parameter_reader& from, std::string_view name) {
  if (name == "knorm") return std::make_shared<const policies::knorm>();
  if (name == "keydiff") return std::make_shared<const policies::keydiff>();
  if (name == "mean_key") return std::make_shared<const policies::mean_key>();
  if (name == "lagkv") {
    policies::lagkv p;
    p.fifo = from.word("mode", {"rescore", "fifo"}) == 1;
    from.number("lag", p.lag);
    from.number("v_ratio", p.v_ratio);
    from.number("ratio", p.ratio);
    from.flag("cross", p.cross);
    return std::make_shared<const policies::lagkv>(p);
  }
  if (name == "expected_attention") {
    policies::expected_attention p;
    from.number("T", p.horizon);
    from.flag("covariance", p.covariance);
    from.flag("vnorm", p.v_norm);
    from.number("epsilon", p.epsilon);
    return std::make_shared<const policies::expected_attention>(p);
  }
  return nullptr;
}

}  // namespace detail

namespace detail {

inline std::shared_ptr<const token_scorer> make_policy(std::string_view name, std::span<const policy_parameter> given,
                                                       eviction* rules, status& found) {
  found = status();
  for (const named_policy& policy : named_policies) {
    if (policy.name != name) continue;
    parameter_reader from(found, policy, given, rules != nullptr ? "budget= recent=32 interval=64 adaptive=" : "");
    std::shared_ptr<const token_scorer> scorer = make_key_scorer(from, name);
    if (scorer == nullptr) scorer = make_attention_scorer(from, name);
    if (rules != nullptr) {
      from.number("budget", rules->budget);
      from.number("recent", rules->recent);
      from.number("interval", rules->interval);
      from.number("adaptive", rules->adaptive);
    }
    from.end();
    return found ? scorer : nullptr;
  }
  found.refuse(
      "the policy was '{}', had to be one of: random h2o tova snapkv knorm keydiff mean_key lagkv "
      "expected_attention rkv gkv",
      name.substr(0, 32));
  return nullptr;
}

}  // namespace detail

// The scorer of that name with these parameters, the authors' defaults for those not given; or null, and in `found`
// why.
inline std::shared_ptr<const token_scorer> make_policy(std::string_view name, std::span<const policy_parameter> given,
                                                       status& found) {
  return detail::make_policy(name, given, nullptr, found);
}

// The same from one text, "h2o:normalise=lifetime,budget=512,recent=32", which may have four of the rules, too: budget,
// recent, interval, adaptive. Those not named stay as they are.
inline std::shared_ptr<const token_scorer> make_policy(std::string_view text, eviction& rules, status& found) {
  const std::size_t colon = text.find(':');
  const std::string_view name = text.substr(0, colon);
  std::vector<policy_parameter> given;
  for (std::size_t at = colon; at != std::string_view::npos;) {
    const std::size_t next = text.find(',', at + 1);
    const std::string_view one = text.substr(at + 1, next == std::string_view::npos ? next : next - at - 1);
    const std::size_t equals = one.find('=');
    if (equals == std::string_view::npos) {
      found = status();
      found.refuse("{}'s parameter was '{}', had to be name=value", name.substr(0, 32), one.substr(0, 32));
      return nullptr;
    }
    given.emplace_back(one.substr(0, equals), one.substr(equals + 1));
    at = next;
  }
  eviction with = rules;
  std::shared_ptr<const token_scorer> scorer = detail::make_policy(name, given, &with, found);
  if (scorer != nullptr) rules = std::move(with);
  return scorer;
}

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
