// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "ranking.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
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

// What each block of the text cost after the first eviction; of chance the mean of its seeds. Empty: not run.
struct losses {
  std::vector<double> bits, bytes;
  std::size_t tokens = 0;
};

void add_blocks(const setting& s, const json& file, index_t cache, double weight, std::size_t most, losses& to) {
  auto loss = file.at("result").at("loss_bits").get<std::vector<double>>();
  loss.resize(std::min(loss.size(), most));
  to.tokens = loss.size();
  const std::size_t first = static_cast<std::size_t>(cache),
                    blocks = (loss.size() - first + block_tokens - 1) / block_tokens;
  to.bits.resize(blocks);
  to.bytes.assign(blocks, 0);
  for (std::size_t i = first; i < loss.size(); ++i) {
    to.bits[(i - first) / block_tokens] += weight * loss[i];
    to.bytes[(i - first) / block_tokens] += s.stream.bytes[i + 1];
  }
}

// Of what is run over fewer tokens chance is drawn once.
std::span<const char* const> seeds_of(const contender& c, index_t sinks) {
  return std::span(random_seeds).first(c.is_random() && sinks == 4 && !c.is_variant() ? std::size(random_seeds) : 1);
}

losses losses_of(const setting& s, const contender& c, index_t sinks, index_t cache, const results& kept,
                 std::size_t most = std::numeric_limits<std::size_t>::max()) {
  losses sum;
  const std::size_t seeds = seeds_of(c, sinks).size();
  for (std::size_t i = 0; i < seeds; ++i) {
    const json* const file = kept(loss_job(s.options, c, sinks, cache, random_seeds[i]));
    if (!file) return {};
    add_blocks(s, *file, cache, 1 / static_cast<double>(seeds), most, sum);
  }
  return sum;
}

double drawn_sum(const std::vector<double>& of, std::span<const std::size_t> drawn) {
  return std::accumulate(drawn.begin(), drawn.end(), 0.0, [&](double sum, std::size_t i) { return sum + of[i]; });
}

}  // namespace

compare::policy contender::policy(index_t sinks, const std::string& seed) const {
  std::string entry = sinks == 0 ? "window" : fmt::format("sinks:{}", sinks);
  if (!rolls()) entry = fmt::format("{}:sinks={},recent={},interval={}", name, sinks, recent, interval);
  for (const std::string& each : {own, seed})
    if (!each.empty()) entry += "," + each;
  const std::vector<compare::policy> policies = compare::parse_policies(entry, compare::most_tokens);
  return kv_format.empty() ? policies.front() : compare::with_kv_formats(policies, kv_format, 64).front();
}

bool contender::is_variant() const {
  return interval > 16 || !kv_format.empty() || own.find("layers=") != own.npos || own.find("heads=") != own.npos;
}

job loss_job(const options& o, const contender& c, index_t sinks, index_t cache, const std::string& seed) {
  job j{job::kind::loss, c.policy(sinks, seed), cache};
  if (sinks != 4 || c.is_variant()) j.tokens = std::min(o.tokens, cache + o.side_tokens);
  return j;
}

std::string contender::shown() const {
  return name + (own.empty() ? "" : ":" + own) + (kv_format.empty() ? "" : " " + kv_format);
}

bool fits(const contender& c, index_t cache, index_t sinks) { return compare::least_cache(c.policy(sinks)) <= cache; }

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
      const contender rolling{"window", "", 0, 0};
      jobs.push_back(loss_job(o, rolling, sinks, cache));
      if (first && sinks != 1) jobs.push_back({job::kind::recall, rolling.policy(sinks), cache});
      if (first) jobs.push_back({job::kind::decode, rolling.policy(sinks), cache});
      for (const contender& c : contenders(o, cache)) {
        if (!fits(c, cache, sinks) || (sinks != 4 && c.is_variant())) continue;
        for (const char* seed : seeds_of(c, sinks)) jobs.push_back(loss_job(o, c, sinks, cache, seed));
        if (!first || sinks != 4 || c.is_variant()) continue;
        jobs.push_back({job::kind::recall, c.policy(sinks), cache});
        jobs.push_back({job::kind::decode, c.policy(sinks), cache});
      }
    }
    jobs.push_back(loss_job(o, few_bits_window, 4, cache));
  }
  std::stable_sort(jobs.begin(), jobs.end(), [](const job& a, const job& b) { return stage(a) < stage(b); });
  return jobs;
}

int stage(const job& j) {
  if (j.is == job::kind::decode) return stages - 1;
  if (j.is == job::kind::recall) return 1;
  return j.tokens == 0 || !j.policy.scored ? 0 : 2;
}

std::vector<standing> standings(const setting& s, index_t cache, const results& kept,
                                const std::vector<contender>& some) {
  std::map<std::size_t, losses> references;  // over as many tokens
  std::vector<standing> all;
  for (const contender& c : some)
    for (const index_t sinks : pinned_by_all) {
      if (!fits(c, cache, sinks)) continue;
      const losses own = losses_of(s, c, sinks, cache, kept);
      if (own.bits.empty()) continue;
      const auto [at, is_new] = references.emplace(own.tokens, losses());
      losses& reference = at->second;
      if (is_new) reference = losses_of(s, {"window", "", 0, 0}, 4, cache, kept, own.tokens);
      if (reference.bits.size() != own.bits.size()) continue;
      const auto bits = [&](std::span<const std::size_t> drawn) {
        return drawn_sum(own.bits, drawn) / drawn_sum(own.bytes, drawn);
      };
      const auto more = [&](std::span<const std::size_t> drawn) {
        return (drawn_sum(own.bits, drawn) - drawn_sum(reference.bits, drawn)) / drawn_sum(own.bytes, drawn);
      };
      all.push_back({c, sinks, bootstrap(own.bits.size(), bits), bootstrap(own.bits.size(), more)});
    }
  std::stable_sort(all.begin(), all.end(),
                   [](const standing& a, const standing& b) { return a.more.estimate < b.more.estimate; });
  return all;
}

std::vector<contender> variants(const std::vector<setting>& texts, index_t cache, const std::vector<results>& kept) {
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
    if (c.policy(4).scored->scorer(0)->needs().compares_heads) with("heads=ada");
    changed.push_back(c);
    changed.back().kv_format = few_bits_window.kv_format;
  }
  return changed;
}

std::vector<job> variants_plan(const setting& s, index_t cache, const std::vector<contender>& changed) {
  std::vector<job> jobs;
  for (const contender& c : changed) {
    job j = loss_job(s.options, c, 4, cache);
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
