// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "comparison.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>

#include "scored_policies.hpp"

namespace compare {
namespace {

constexpr double nothing = 0.0005;  // relative differences below this are called none

// "costs 28% more bits per byte (2.157 against 1.686)"
std::string compared(double loss, double reference) {
  const double ratio = loss / reference - 1;
  const std::string values = fmt::format("({:.3f} against {:.3f})", loss, reference);
  if (std::abs(ratio) < nothing) return fmt::format("changes nothing {}", values);
  return fmt::format("{} {} {} bits per byte {}", ratio > 0 ? "costs" : "saves", percent(ratio),
                     ratio > 0 ? "more" : "of the", values);
}

}  // namespace

std::string percent(double ratio) {
  const double value = 100 * std::abs(ratio);
  return fmt::format("{:.{}f}%", value, value < 0.995 ? 2 : value < 9.95 ? 1 : 0);
}

std::string signed_percent(double ratio) { return fmt::format("{}{}", ratio < 0 ? "-" : "+", percent(ratio)); }

std::string grouped(index_t n) {
  std::string digits = std::to_string(n);
  for (std::size_t i = digits.size(); i > 3; i -= 3) digits.insert(i - 3, 1, ',');
  return digits;
}

std::string tokens_text(index_t n) { return fmt::format("{} token{}", grouped(n), n == 1 ? "" : "s"); }

std::string sentence(const std::vector<std::string>& clauses) {
  std::string all;
  for (const std::string& clause : clauses) all += (all.empty() ? "" : "; ") + clause;
  return all + ".";
}

comparison::comparison(std::span<const run> runs, index_t cache)
    : runs_(runs), cache_(cache), tokens_(static_cast<index_t>(runs.front().loss_bits.size())) {
  if (const std::size_t i = find(policy::kind::recompute); i != none) recompute_ = &runs_[i];
  for (const run& r : runs_) summaries_.push_back(summarise(r, recompute_, cache));
  for (std::size_t i = 0; i < runs_.size(); ++i)
    if (&runs_[i] != recompute_ && (best_ == none || summaries_[i].after < summaries_[best_].after)) best_ = i;
}

std::size_t comparison::find(policy::kind kind) const {
  const auto it =
      std::find_if(runs_.begin(), runs_.end(), [&](const run& r) { return usual(r) && r.policy.is == kind; });
  return it == runs_.end() ? none : static_cast<std::size_t>(it - runs_.begin());
}

std::size_t comparison::best_pinned() const {
  double least = std::numeric_limits<double>::infinity();
  std::size_t found = none;
  for (std::size_t i = 0; i < runs_.size(); ++i)
    if (usual(runs_[i]) && runs_[i].policy.is == policy::kind::sinks) least = std::min(least, summaries_[i].after);
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    if (!usual(runs_[i]) || runs_[i].policy.is != policy::kind::sinks || !(summaries_[i].after <= 1.005 * least))
      continue;
    if (found == none || runs_[i].policy.num_sink_tokens < runs_[found].policy.num_sink_tokens) found = i;
  }
  return found;
}

double comparison::cost(std::size_t i) const {
  if (best_ == none) return std::numeric_limits<double>::quiet_NaN();
  if (&runs_[i] == recompute_) return summaries_[i].after_sampled / summaries_[best_].after_sampled - 1;
  return summaries_[i].after / summaries_[best_].after - 1;
}

index_t comparison::tokens_sampled() const {
  if (!recompute_ || !evicted()) return 0;
  return summaries_[static_cast<std::size_t>(recompute_ - runs_.data())].tokens_scored - cache_;
}

std::vector<std::string> comparison::findings() const {
  std::vector<std::string> clauses;
  if (!evicted()) {
    clauses = {fmt::format("nothing was evicted: {} fit a cache of {}, so the policies cannot differ",
                           tokens_text(tokens_), grouped(cache_))};
  } else {
    for (const auto& finding :
         {format_finding(), window_finding(), scored_finding(), recompute_finding(), full_finding()})
      if (finding) clauses.push_back(*finding);
  }
  if (clauses.empty()) {
    const std::size_t i = best_ == none ? 0 : best_;
    clauses = {fmt::format("{} needs {:.3f} bits per byte after the first {}, {:.3f} before", runs_[i].policy.name,
                           summaries_[i].after, tokens_text(cache_), summaries_[i].before)};
  }
  clauses.front()[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(clauses.front()[0])));
  return clauses;
}

double comparison::gap() const {
  const std::size_t window = find(policy::kind::window), pinned = best_pinned();
  return window == none || pinned == none ? 0 : summaries_[window].after / summaries_[pinned].after - 1;
}

std::optional<std::string> comparison::window_finding() const {
  const std::size_t window = find(policy::kind::window), pinned = best_pinned();
  if (window == none || pinned == none) return {};
  const index_t n = runs_[pinned].policy.num_sink_tokens;
  return fmt::format("evicting the first {} {}", n == 1 ? "token" : tokens_text(n),
                     compared(summaries_[window].after, summaries_[pinned].after));
}

std::size_t comparison::best_of(const std::function<bool(const policy&)>& is_one) const {
  std::size_t found = none;
  for (std::size_t i = 0; i < runs_.size(); ++i)
    if (usual(runs_[i]) && is_one(runs_[i].policy) && (found == none || summaries_[i].after < summaries_[found].after))
      found = i;
  return found;
}

std::optional<std::string> comparison::format_finding() const {
  constexpr double little = 0.01;  // more bits
  const std::size_t whole = best_of([](const policy& p) { return p.is != policy::kind::recompute; });
  if (whole == none) return {};
  // Of the other formats the one of fewest bytes that costs little, or else the one that costs least.
  std::size_t found = none;
  const auto costs = [&](std::size_t i) { return summaries_[i].after / summaries_[whole].after - 1; };
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    if (usual(runs_[i]) || !is_same_policy(i, whole)) continue;
    const bool cheaper =
        found == none || (costs(i) < little && costs(found) < little ? runs_[i].cache_bytes < runs_[found].cache_bytes
                                                                     : costs(i) < costs(found));
    if (cheaper) found = i;
  }
  if (found == none) return {};
  const double bytes = static_cast<double>(runs_[found].cache_bytes) / static_cast<double>(runs_[whole].cache_bytes);
  const std::string loss = std::abs(costs(found)) < nothing ? "as many bits as"
                                                            : fmt::format("{} {} bits than", percent(costs(found)),
                                                                          costs(found) > 0 ? "more" : "fewer");
  const index_t tokens = runs_[found].policy.cache;  // at equal bytes
  return fmt::format("{} needs {} {}, in {}", runs_[found].policy.name, loss, runs_[whole].policy.name,
                     tokens > 0 ? fmt::format("as many bytes: {} instead of {}", tokens_text(tokens),
                                              grouped(runs_[whole].policy.cache))
                                : percent(bytes) + " of its bytes");
}

bool comparison::is_same_policy(std::size_t i, std::size_t j) const {
  const policy &a = runs_[i].policy, &b = runs_[j].policy;
  return a.is == b.is && a.num_sink_tokens == b.num_sink_tokens && a.scored == b.scored;
}

std::optional<std::string> comparison::scored_finding() const {
  const auto is_random = [](const policy& p) { return p.scored && p.scored->name == "random"; };
  const std::size_t scored = best_of([&](const policy&p) { return p.is == policy::kind::scored && !is_random(p); }),
                    chance = best_of(is_random), rolling = best_of([](const policy&p) {
                                                   return p.is == policy::kind::window || p.is == policy::kind::sinks;
                                                 });
  const std::size_t own = scored != none ? scored : chance;
  if (own == none || rolling == none) return {};
  const auto against = [&](std::size_t i, std::size_t j) {
    const double ratio = summaries_[i].after / summaries_[j].after - 1;
    if (std::abs(ratio) < nothing) return fmt::format("ties with {}", runs_[j].policy.name);
    return fmt::format("needs {} {} bits than {}", percent(ratio), ratio > 0 ? "more" : "fewer", runs_[j].policy.name);
  };
  std::string out = fmt::format("{}{} {}", scored != none ? "of the policies that score tokens " : "",
                                runs_[own].policy.name, against(own, rolling));
  if (scored != none && chance != none) out += fmt::format(", chance {}", against(chance, rolling));
  return out;
}

std::optional<std::string> comparison::recompute_finding() const {
  const std::size_t pinned = best_pinned(), other = pinned != none ? pinned : find(policy::kind::window);
  if (!recompute_ || other == none) return {};
  const std::size_t recomputed = find(policy::kind::recompute);
  const double rest = summaries_[other].after_sampled / summaries_[recomputed].after_sampled - 1;
  const std::string which =
      pinned != none ? fmt::format("pinning {}", tokens_text(runs_[pinned].policy.num_sink_tokens)) : "a plain window";
  const std::string recomputing = "recomputing the cache for every token";
  if (gap() > nothing && std::abs(rest) < gap())
    return fmt::format("{} brings it back to within {} of {}", which, percent(std::max(std::abs(rest), 1e-4)),
                       recomputing);
  if (std::abs(rest) < nothing) return fmt::format("{} does as well as {}", which, recomputing);
  return fmt::format("{} needs {} {} bits than {}", which, percent(rest), rest > 0 ? "more" : "fewer", recomputing);
}

std::optional<std::string> comparison::full_finding() const {
  const std::size_t full = find(policy::kind::full);
  const std::size_t small =
      best_of([](const policy& p) { return p.is != policy::kind::full && p.is != policy::kind::recompute; });
  if (full == none || small == none) return {};
  const double ratio = summaries_[full].after / summaries_[small].after - 1;
  const std::string keeping = fmt::format("keeping all {}", tokens_text(tokens_));
  const std::string& other = runs_[small].policy.name;
  if (std::abs(ratio) < nothing) return fmt::format("{} gains nothing over {}", keeping, other);
  if (ratio < 0) return fmt::format("{} saves {} of the bits of {}", keeping, percent(ratio), other);
  const std::optional<index_t> trained = subject().model->config().max_position_embeddings;
  const bool too_long = trained && tokens_ > *trained;
  return fmt::format("{} costs {} more than {}{}", keeping, percent(ratio), other,
                     too_long ? fmt::format(": the model was trained on contexts of {}", grouped(*trained)) : "");
}

}  // namespace compare
