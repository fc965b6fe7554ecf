// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "ranking.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "../compare/caches.hpp"
#include "../compare/scored_policies.hpp"

namespace evidence {
namespace {

constexpr index_t block_tokens = 512;  // that the bootstrap draws as one, because neighbours are alike

constexpr std::pair<const char*, const char*> usual[] = {{"random", ""},
                                                         {"random", "draw=once"},
                                                         {"h2o", ""},
                                                         {"h2o", "normalise=lifetime"},
                                                         {"tova", ""},
                                                         {"snapkv", ""},
                                                         {"snapkv", "form=rkv"},
                                                         {"knorm", ""},
                                                         {"keydiff", ""},
                                                         {"mean_key", ""},
                                                         {"lagkv", ""},
                                                         {"lagkv", "mode=fifo"},
                                                         {"expected_attention", ""},
                                                         {"rkv", ""},
                                                         {"gkv", ""}};

compare::policy policy_of(const std::string& entry) {
  return compare::parse_policies(entry, compare::most_tokens).front();
}

job loss_job(const std::string& entry, index_t cache) { return {job::kind::loss, policy_of(entry), cache}; }

// What each block of the text cost after the first eviction; of chance the mean of its seeds. Empty: not run.
struct losses {
  std::vector<double> bits, bytes;
};

void add_blocks(const setting& s, const json& file, index_t cache, double weight, losses& to) {
  const auto loss = file.at("result").at("loss_bits").get<std::vector<double>>();
  const std::size_t first = static_cast<std::size_t>(cache),
                    blocks = (loss.size() - first + block_tokens - 1) / block_tokens;
  to.bits.resize(blocks);
  to.bytes.assign(blocks, 0);
  for (std::size_t i = first; i < loss.size(); ++i) {
    to.bits[(i - first) / block_tokens] += weight * loss[i];
    to.bytes[(i - first) / block_tokens] += s.stream.bytes[i + 1];
  }
}

losses losses_of(const setting& s, const contender& c, index_t sinks, index_t cache, const results& kept) {
  losses sum;
  const std::size_t seeds = c.is_random() ? std::size(random_seeds) : 1;
  for (std::size_t i = 0; i < seeds; ++i) {
    const json* const file = kept(loss_job(c.entry(sinks, random_seeds[i]), cache));
    if (!file) return {};
    add_blocks(s, *file, cache, 1 / static_cast<double>(seeds), sum);
  }
  return sum;
}

double drawn_sum(const std::vector<double>& of, std::span<const std::size_t> drawn) {
  return std::accumulate(drawn.begin(), drawn.end(), 0.0, [&](double sum, std::size_t i) { return sum + of[i]; });
}

}  // namespace

std::string contender::entry(index_t sinks, const std::string& seed) const {
  if (name == "window") return sinks == 0 ? "window" : fmt::format("sinks:{}", sinks);
  std::string all = fmt::format("{}:sinks={},recent={},interval={}", name, sinks, recent, interval);
  for (const std::string& each : {own, seed})
    if (!each.empty()) all += "," + each;
  return all;
}

std::string contender::shown() const { return own.empty() ? name : fmt::format("{}:{}", name, own); }

bool fits(const contender& c, index_t cache, index_t sinks) {
  return compare::least_cache(policy_of(c.entry(sinks))) <= cache;
}

std::vector<contender> contenders(const options& o, index_t cache) {
  std::vector<std::pair<index_t, index_t>> places;  // recent and interval
  for (const index_t interval : {16, 64})
    if (fits({"random", "", 32, interval}, cache, 4)) places.emplace_back(32, interval);
  if (places.empty()) places.emplace_back(cache / 4, std::max<index_t>(1, cache / 8));
  std::vector<contender> all;
  for (const auto& [recent, interval] : places)
    for (const auto& [name, own] : usual)
      if (o.only.empty() || std::find(o.only.begin(), o.only.end(), name) != o.only.end())
        all.push_back({name, own, recent, interval});
  return all;
}

std::vector<job> ranking_plan(const options& o, bool first) {
  std::vector<job> jobs;
  for (const index_t cache : o.caches) {
    for (const index_t sinks : pinned_by_all) {
      const compare::policy rolling = policy_of(contender{"window", "", 0, 0}.entry(sinks));
      jobs.push_back({job::kind::loss, rolling, cache});
      if (first && sinks != 1) jobs.push_back({job::kind::recall, rolling, cache});
      if (first) jobs.push_back({job::kind::decode, rolling, cache});
      for (const contender& c : contenders(o, cache)) {
        if (!fits(c, cache, sinks)) continue;
        for (const char* seed : random_seeds)
          if (*seed == '\0' || c.is_random()) jobs.push_back(loss_job(c.entry(sinks, seed), cache));
        if (!first || sinks != 4) continue;
        jobs.push_back({job::kind::recall, policy_of(c.entry(sinks)), cache});
        jobs.push_back({job::kind::decode, policy_of(c.entry(sinks)), cache});
      }
    }
  }
  std::stable_sort(jobs.begin(), jobs.end(), [](const job& a, const job& b) { return stage(a) < stage(b); });
  return jobs;
}

int stage(const job& j) {
  if (j.is == job::kind::decode) return stages - 1;
  if (j.is == job::kind::recall) return 1;
  return j.policy.num_sink_tokens == 4 || !j.policy.scored ? 0 : 2;
}

std::vector<standing> standings(const setting& s, index_t cache, const results& kept,
                                const std::vector<contender>& some) {
  const losses reference = losses_of(s, {"window", "", 0, 0}, 4, cache, kept);
  std::vector<standing> all;
  if (reference.bits.empty()) return all;
  for (const contender& c : some)
    for (const index_t sinks : pinned_by_all) {
      if (!fits(c, cache, sinks)) continue;
      const losses own = losses_of(s, c, sinks, cache, kept);
      if (own.bits.empty()) continue;
      const auto bits = [&](std::span<const std::size_t> drawn) {
        return drawn_sum(own.bits, drawn) / drawn_sum(own.bytes, drawn);
      };
      const auto more = [&](std::span<const std::size_t> drawn) {
        return (drawn_sum(own.bits, drawn) - drawn_sum(reference.bits, drawn)) / drawn_sum(own.bytes, drawn);
      };
      all.push_back({c, sinks, bootstrap(own.bits.size(), bits), bootstrap(own.bits.size(), more)});
    }
  std::stable_sort(all.begin(), all.end(),
                   [](const standing& a, const standing& b) { return a.bits.estimate < b.bits.estimate; });
  return all;
}

std::vector<contender> with_budgets(const std::vector<setting>& texts, index_t cache,
                                    const std::vector<results>& kept) {
  std::vector<std::pair<double, contender>> all;
  for (const contender& c : contenders(texts.front().options, cache)) {
    if (c.is_random() || c.interval != contenders(texts.front().options, cache).front().interval) continue;
    double more = 0;
    for (std::size_t i = 0; i < texts.size(); ++i) {
      const std::vector<standing> found = standings(texts[i], cache, kept[i], {c});
      const auto pinned = std::find_if(found.begin(), found.end(), [](const standing& s) { return s.sinks == 4; });
      more += pinned == found.end() ? HUGE_VAL : pinned->more.estimate;
    }
    if (std::isfinite(more)) all.emplace_back(more, c);
  }
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<contender> changed;
  for (std::size_t i = 0; i < std::min<std::size_t>(3, all.size()); ++i) {
    const contender& c = all[i].second;
    const auto with = [&](const std::string& more) {
      changed.push_back(c);
      changed.back().own += (c.own.empty() ? "" : ",") + more;
    };
    with("layers=pyramid");
    if (policy_of(c.entry(4)).scored->scorer(0)->needs().compares_heads) with("heads=ada");
  }
  return changed;
}

std::vector<job> budget_plan(const setting& s, index_t cache, const std::vector<contender>& changed) {
  std::vector<job> jobs;
  for (const contender& c : changed) {
    job j = loss_job(c.entry(4), cache);
    try {
      compare::cache_bytes(j.policy, *s.subject.model, cache);
    } catch (const std::invalid_argument&) {
      continue;  // a layer would have no row free
    }
    jobs.push_back(std::move(j));
  }
  return jobs;
}

}  // namespace evidence
