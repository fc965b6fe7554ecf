#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "evaluate.hpp"

namespace compare {

// One subject's runs, in the order of its policies.
class comparison {
 public:
  comparison(std::span<const run> runs, index_t cache);

  std::span<const run> runs() const { return runs_; }
  const compare::subject& subject() const { return *runs_.front().subject; }
  const loss_summary& summary(std::size_t i) const { return summaries_[i]; }
  const run* recompute() const { return recompute_; }

  // The least loss after the first eviction among the policies that scored every token; `none` where there is none.
  static constexpr std::size_t none = static_cast<std::size_t>(-1);
  std::size_t best() const { return best_; }
  std::size_t find(policy::kind) const;  // the first of its kind
  // The fewest pinned tokens that come within 0.5% of the best sinks:N.
  std::size_t best_pinned() const;

  // Bits after the first eviction relative to the best's, less 1; recompute's at the tokens that it sampled.
  double cost(std::size_t i) const;
  index_t tokens_sampled() const;
  bool sampled() const { return tokens_sampled() > 0 && tokens_sampled() < tokens_ - cache_; }  // not all of them
  index_t cache() const { return cache_; }
  bool evicted() const { return tokens_ > cache_; }

  // What the numbers mean, in clauses that make one sentence; the first is the main finding.
  std::vector<std::string> findings() const;

 private:
  // With the formats of the first run: findings about policies are of these.
  bool usual(const run& r) const { return r.policy.formats == runs_.front().policy.formats; }
  bool is_same_policy(std::size_t i, std::size_t j) const;  // whatever it stores its rows in

  // Each nothing where the policies that it speaks of were not run.
  std::optional<std::string> format_finding() const;
  std::optional<std::string> window_finding() const;
  std::optional<std::string> scored_finding() const;
  std::optional<std::string> recompute_finding() const;
  std::optional<std::string> full_finding() const;

  std::size_t best_of(const std::function<bool(const policy&)>& is_one) const;
  double gap() const;  // of the window over the pinned tokens, relative; 0 where they were not both run

  std::span<const run> runs_;
  std::vector<loss_summary> summaries_;
  const run* recompute_ = nullptr;
  std::size_t best_ = none;
  index_t cache_, tokens_;
};

std::string sentence(const std::vector<std::string>& clauses);
std::string percent(double ratio);         // without its sign: 28%, 2.3%, 0.41%
std::string signed_percent(double ratio);  // +28%
std::string grouped(index_t);              // 20,480
std::string tokens_text(index_t);          // 1 token, 20,480 tokens

}  // namespace compare
