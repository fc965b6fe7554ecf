// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "scored_policies.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <sinkcache/named_policies.hpp>
#include <stdexcept>
#include <string_view>

#include "../loaders/numbers.hpp"
#include "options.hpp"

namespace compare {
namespace {

constexpr const char* common =
    "sinks=4 pin= recent=32 interval=16 layers=uniform|pyramid beta=20 heads=uniform|ada|duo alpha=0.2 short= "
    "newest=RECENT";

std::vector<own_policy>& registry() {
  static std::vector<own_policy> policies;
  return policies;
}

const own_policy* find_own(std::string_view name) {
  for (const own_policy& p : registry())
    if (p.name == name) return &p;
  return nullptr;
}

const sinkcache::named_policy* find_named(std::string_view name) {
  for (const sinkcache::named_policy& p : sinkcache::named_policies)
    if (p.name == name) return &p;
  return nullptr;
}

std::string own_parameters(std::string_view name) {
  std::string all;
  if (const sinkcache::named_policy* const p = find_named(name)) {
    all = p->parameters;
    // The layer is ours to know.
    if (const std::size_t at = all.find(" layer=0"); at != std::string::npos) all.erase(at, 8);
  } else if (const own_policy* const q = find_own(name)) {
    for (const auto& [parameter, value] : q->parameters)
      all += fmt::format("{}{}={}", all.empty() ? "" : " ", parameter, value);
  }
  return all;
}

// What "name=default" or "name=default|other" says is the default; nothing where it names no such parameter.
std::optional<std::string_view> default_of(std::string_view parameters, std::string_view name) {
  while (!parameters.empty()) {
    const std::string_view one = parameters.substr(0, parameters.find(' '));
    const std::size_t equals = one.find('=');
    if (one.substr(0, equals) == name) {
      const std::string_view values = one.substr(equals + 1);
      return values.substr(0, values.find('|'));
    }
    parameters.remove_prefix(std::min(parameters.size(), one.size() + 1));
  }
  return {};
}

[[noreturn]] void refuse(const std::string& policy, const std::string& parameter, const std::string& value,
                         const std::string& had_to_be) {
  throw usage_error(fmt::format("--policies: {}'s {} is '{}', had to be {}", policy, parameter, value, had_to_be));
}

double number(const std::string& policy, const std::string& name, const std::string& text, double min, double max) {
  double value{};
  const char* const end = text.data() + text.size();
  const std::from_chars_result r = std::from_chars(text.data(), end, value);
  if (r.ec != std::errc() || r.ptr != end || !(value >= min && value <= max))
    refuse(policy, name, text,
           std::isfinite(max) ? fmt::format("a number from {} to {}", min, max) : std::string("a number"));
  return value;
}

// Which of these it is.
std::size_t word(const std::string& policy, const std::string& name, const std::string& text,
                 const std::vector<std::string>& words) {
  const auto at = std::find(words.begin(), words.end(), text);
  if (at == words.end()) refuse(policy, name, text, fmt::format("{}", fmt::join(words, " or ")));
  return static_cast<std::size_t>(at - words.begin());
}

// What "1+2" lists, each as it is.
std::vector<std::string> listed(const std::string& text) {
  std::vector<std::string> all;
  for (std::size_t first = 0, last = 0; last != std::string::npos; first = last + 1) {
    last = text.find('+', first);
    all.push_back(text.substr(first, last - first));
  }
  return all;
}

// "0+2.1": head 0 of every layer, and head 1 of layer 2.
std::vector<short_head> short_heads(const std::string& policy, const std::string& text) {
  constexpr index_t most = 1 << 20;
  std::vector<short_head> heads;
  for (const std::string& one : listed(text)) {
    const std::size_t dot = one.find('.');
    const auto layer = loaders::whole_number<index_t>(one.substr(0, std::min(dot, one.size())), 0, most);
    const auto head = loaders::whole_number<index_t>(dot == std::string::npos ? one : one.substr(dot + 1), 0, most);
    if (!layer || !head) refuse(policy, "short", text, "HEAD or LAYER.HEAD, several as in 0+2.1");
    heads.push_back({dot == std::string::npos ? std::nullopt : layer, *head});
  }
  return heads;
}

// "17+42": each once, in order.
std::vector<index_t> positions(const std::string& policy, const std::string& text) {
  std::vector<index_t> all;
  for (const std::string& one : listed(text)) {
    const auto position = loaders::whole_number<index_t>(one, 0, most_tokens);
    if (!position) refuse(policy, "pin", text, "POSITION, several as in 17+42");
    all.push_back(*position);
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

// Whether it is a parameter of all policies, and then what it asks for.
class common_parameters {
 public:
  explicit common_parameters(scored_policy& to) : to_(to) {}

  bool take(const std::string& name, const std::string& value) {
    constexpr index_t most = index_t{1} << 20;
    const auto count = [&](index_t min, index_t& to) {
      const std::optional<index_t> n = loaders::whole_number<index_t>(value, min, most);
      if (!n) refuse(to_.name, name, value, fmt::format("a whole number from {} to {}", min, most));
      to = *n;
    };
    if (name == "sinks")
      count(0, to_.sinks);
    else if (name == "pin")
      to_.pins = positions(to_.name, value);
    else if (name == "recent")
      count(0, to_.recent);
    else if (name == "interval")
      count(1, to_.interval);
    else if (name == "layers")
      pyramid_ = word(to_.name, name, value, {"uniform", "pyramid"}) == 1;
    else if (name == "heads")
      heads_ = word(to_.name, name, value, {"uniform", "ada", "duo"});
    else if (name == "short")
      to_.duo = short_heads(to_.name, value);
    else if (name == "newest")
      count(1, to_.newest.emplace());
    else if (name == "beta")
      beta_ = number(to_.name, name, value, 1, 1e9);
    else if (name == "alpha")
      alpha_ = number(to_.name, name, value, 0, 1);
    else
      return false;
    return true;
  }

  void end() {
    if (beta_ && !pyramid_) throw usage_error(fmt::format("--policies: {}'s beta needs layers=pyramid", to_.name));
    if (alpha_ && heads_ != ada) throw usage_error(fmt::format("--policies: {}'s alpha needs heads=ada", to_.name));
    if ((heads_ == duo) != !to_.duo.empty())
      throw usage_error(fmt::format("--policies: {}'s heads=duo and short=HEADS need each other", to_.name));
    if (to_.newest && heads_ != duo)
      throw usage_error(fmt::format("--policies: {}'s newest needs heads=duo", to_.name));
    if (pyramid_) to_.pyramid = beta_.value_or(20);
    if (heads_ == ada) to_.ada = alpha_.value_or(0.2);
  }

 private:
  scored_policy& to_;
  static constexpr std::size_t ada = 1, duo = 2;

  bool pyramid_ = false;
  std::size_t heads_ = 0;
  std::optional<double> beta_, alpha_;
};

std::string message(const sinkcache::status& found) {
  return std::string(found.message().substr(std::string_view("sinkcache: ").size()));
}

}  // namespace

void register_policy(own_policy p) {
  const bool is_name = !p.name.empty() && p.name.find_first_of(",:= ") == std::string::npos;
  const bool taken = find_named(p.name) || find_own(p.name) || p.name == "full" || p.name == "window" ||
                     p.name == "sinks" || p.name == "recompute";
  if (!is_name || taken || !p.make)
    throw std::invalid_argument(fmt::format("the policy's name was '{}', had to be {}", p.name,
                                            taken     ? "one that is not taken"
                                            : is_name ? "that of one that can be made"
                                                      : "without commas, colons, = and blanks, and not empty"));
  registry().push_back(std::move(p));
}

std::vector<std::string> registered_policies() {
  std::vector<std::string> names;
  for (const own_policy& p : registry()) names.push_back(p.name);
  return names;
}

std::string scored_policy::shown() const {
  const scored_policy usual;
  std::vector<std::string> parts;
  const auto add = [&parts](const char* parameter, const auto& value) {
    parts.push_back(fmt::format("{}={}", parameter, value));
  };
  for (const auto& [parameter, value] : own) add(parameter.c_str(), value);
  if (sinks != usual.sinks) add("sinks", sinks);
  if (!pins.empty()) add("pin", fmt::format("{}", fmt::join(pins, "+")));
  if (recent != usual.recent) add("recent", recent);
  if (interval != usual.interval) add("interval", interval);
  if (pyramid) add("layers", "pyramid");
  if (pyramid && *pyramid != 20) add("beta", *pyramid);
  if (ada) add("heads", "ada");
  if (ada && *ada != 0.2) add("alpha", *ada);
  if (!duo.empty()) {
    std::vector<std::string> heads;
    for (const short_head& s : duo)
      heads.push_back(s.layer ? fmt::format("{}.{}", *s.layer, s.head) : fmt::format("{}", s.head));
    add("heads", "duo");
    add("short", fmt::format("{}", fmt::join(heads, "+")));
    if (newest && *newest != recent) add("newest", *newest);
  }
  return parts.empty() ? name : fmt::format("{}:{}", name, fmt::join(parts, ","));
}

index_t scored_policy::kept() const {
  const auto pinned = std::count_if(pins.begin(), pins.end(), [&](index_t position) { return position >= sinks; });
  return sinks + static_cast<index_t>(pinned) + std::max(recent, scorer(0)->needs().window);
}

std::shared_ptr<const sinkcache::token_scorer> scored_policy::scorer(index_t layer) const {
  if (const own_policy* const p = find_own(name)) {
    numbers parameters = p->parameters;
    for (const auto& [parameter, value] : own)
      parameters.at(parameter) = number(name, parameter, value, -HUGE_VAL, HUGE_VAL);
    std::shared_ptr<const sinkcache::token_scorer> made = p->make(parameters);
    if (!made) throw std::runtime_error(fmt::format("the policy {} made no scorer", name));
    return made;
  }
  std::vector<sinkcache::policy_parameter> given(own.begin(), own.end());
  const std::string of_layer = std::to_string(layer);
  if (name == "random") given.emplace_back("layer", of_layer);
  sinkcache::status found;
  std::shared_ptr<const sinkcache::token_scorer> made = sinkcache::make_policy(name, given, found);
  if (!made) throw usage_error("--policies: " + message(found));
  return made;
}

scored_policy parse_scored(const std::string& name, const std::vector<std::string>& parameters) {
  scored_policy p;
  p.name = name;
  if (!find_named(name) && !find_own(name)) {
    std::string known = "full, window, sinks:N, recompute";
    for (const sinkcache::named_policy& each : sinkcache::named_policies) known += fmt::format(", {}", each.name);
    for (const own_policy& each : registry()) known += fmt::format(", {}", each.name);
    throw usage_error(fmt::format("--policies: '{}' had to be one of: {}", name, known));
  }
  common_parameters shared(p);
  const std::string its_own = own_parameters(name);
  std::vector<std::string> seen;
  for (const std::string& each : parameters) {
    const std::size_t equals = std::min(each.find('='), each.size());
    const std::string parameter = each.substr(0, equals), value = each.substr(std::min(equals + 1, each.size()));
    if (std::find(seen.begin(), seen.end(), parameter) != seen.end())
      throw usage_error(fmt::format("--policies: {} has {} twice", name, parameter));
    seen.push_back(parameter);
    if (equals < each.size() && shared.take(parameter, value)) continue;
    const std::optional<std::string_view> usual = default_of(its_own, parameter);
    if (!usual || equals == each.size())
      throw usage_error(fmt::format("--policies: {}'s parameter '{}' had to be one of: {}{}{}", name, each, its_own,
                                    its_own.empty() ? "" : " ", common));
    if (value != *usual) p.own.emplace_back(parameter, value);
  }
  shared.end();
  p.scorer(0);  // refuses values that it cannot have
  return p;
}

std::string listed_policies() {
  std::string out =
      "full                nothing is evicted\n"
      "window              the newest tokens\n"
      "sinks:N             the first N tokens for ever, and the newest (Xiao et al. 2024, arXiv 2309.17453)\n"
      "recompute           a fresh pass over the first token and the newest, at sampled tokens\n"
      "\nBy score, at events:\n";
  const auto add = [&out](std::string_view name, std::string_view keeps, std::string_view source) {
    const std::string parameters = own_parameters(name);
    out += fmt::format("{:19} {}{}{}\n", name, keeps, source.empty() ? "" : fmt::format(" ({})", source),
                       parameters.empty() ? "" : fmt::format("; {}", parameters));
  };
  for (const sinkcache::named_policy& p : sinkcache::named_policies) add(p.name, p.keeps, p.source);
  for (const own_policy& p : registry()) add(p.name, p.keeps, "this program's own");
  return out + fmt::format(
                   "\nParameters of all of these: {}\n"
                   "sinks: the first tokens, pinned; pin: others, too, by position, as in 17+42; recent: the newest "
                   "never leave;\n"
                   "interval: tokens from event to event;\n"
                   "layers=pyramid: budgets that fall from layer to layer (PyramidKV, Cai et al. 2024, arXiv "
                   "2406.02069);\n"
                   "heads=ada: budgets shared out over the heads of a layer by score (Ada-KV, Feng et al. 2024, arXiv "
                   "2407.11550);\n"
                   "heads=duo: heads named in short=, as in 0+2.1 (head 0 of every layer, head 1 of layer 2), keep the "
                   "first tokens\n"
                   "and the newest= alone, and leave their rows to the others (DuoAttention, Xiao et al. 2024, arXiv "
                   "2410.10819).\n"
                   "An event leaves the cache's rows less the interval. Defaults come first. Example: "
                   "window,h2o:sinks=4,recent=32,tova\n",
                   common);
}

}  // namespace compare
