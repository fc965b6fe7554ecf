// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "jobs.hpp"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <sinkcache/version.hpp>
#include <stdexcept>

#include "../compare/caches.hpp"
#include "../compare/files.hpp"
#include "../compare/machine.hpp"
#include "recall.hpp"

namespace evidence {
namespace {

using compare::decode_work;

constexpr index_t recomputed_passes = 4;

const char* kind_name(job::kind kind) {
  switch (kind) {
    case job::kind::loss:
      return "loss";
    case job::kind::recompute:
      return "recompute";
    case job::kind::recall:
      return "recall";
    case job::kind::shares:
      return "shares";
    case job::kind::check:
      return "check";
    case job::kind::decode:
      break;
  }
  return "decode";
}

index_t tokens_of(const job& j, const options& o) { return j.tokens > 0 ? j.tokens : o.tokens; }

recall_setting recall_of(const options& o, index_t cache) {
  if (o.ranking) return {{cache, 4 * cache, 16 * cache}, o.facts};
  return {{32, 128, 512, 2048}, o.facts};
}

engine::cache_factory caches_of(const job& j) { return compare::caches_of(j.policy, j.cache); }

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char date[sizeof "2026-12-31"];
  return {date, std::strftime(date, sizeof date, "%Y-%m-%d", &utc)};
}

json rounded(const std::vector<double>& bits) {
  json all = json::array();
  for (const double each : bits) all.push_back(std::round(each * 1e4) / 1e4);
  return all;
}

// What a result depends on.
json inputs(const job& j, const setting& s) {
  const options& o = s.options;
  json in = inputs_of(j.name(), s);
  in["policy"] = j.policy.name;
  in["cache"] = j.cache;
  if (j.is == job::kind::check) in["tokens"] = o.check;
  if (j.is == job::kind::loss || j.is == job::kind::recompute) in["tokens"] = tokens_of(j, o);
  if (j.is == job::kind::recompute) in["targets"] = o.targets;
  if (j.is == job::kind::recall) in["facts"] = o.facts;
  if (j.is == job::kind::recall && o.ranking) in["distances"] = recall_of(o, j.cache).distances;
  if (j.is == job::kind::decode) in["threads"] = o.threads;
  return in;
}

json measure_recall(const job& j, const setting& s, const progress& on_tokens) {
  const recall_stream stream = plant(s.subject, s.stream.ids, j.cache, recall_of(s.options, j.cache));
  const std::vector<int> right = recalled(s.subject, caches_of(j), stream, on_tokens);
  json facts = json::array();
  for (std::size_t i = 0; i < right.size(); ++i) {
    const fact& f = stream.facts[i];
    // The last digit is asked for with all of the fact in the cache, the first with none of it left.
    const index_t window = j.cache - j.policy.num_sink_tokens;
    const bool inside = f.asked_last - f.first < window, outside = f.asked_first - f.last >= window;
    facts.push_back({{"distance", f.distance},
                     {"tokens_later", f.asked_first - f.last},
                     {"visible", j.policy.scored ? "by score"
                                 : inside        ? "whole"
                                 : outside       ? "no"
                                                 : "in part"},
                     {"digits_right", right[i]}});
  }
  return {{"tokens", stream.ids.size()}, {"digits", digits_of_a_fact}, {"facts", std::move(facts)}};
}

}  // namespace

std::string job::name() const {
  std::string of = policy.name;
  if (policy.is == compare::policy::kind::scored)
    std::ranges::replace_if(
        of, [](char c) { return c == ':' || c == ','; }, '_');
  std::erase(of, ':');
  std::erase(of, '=');
  std::ranges::replace_if(
      of, [](char c) { return c == ' ' || c == '/'; }, '_');
  if (is == kind::recompute) return fmt::format("{}-{}", of, cache);
  return fmt::format("{}-{}-{}", kind_name(is), of, cache);
}

std::vector<job> plan(const options& o) {
  std::vector<job> jobs;
  for (const index_t cache : o.caches) {
    const std::vector<compare::policy> policies =
        compare::parse_policies("window,sinks:1,sinks:2,sinks:4,sinks:8,recompute", cache);
    for (const compare::policy& p : policies) {
      const bool recompute = p.is == compare::policy::kind::recompute;
      jobs.push_back({recompute ? job::kind::recompute : job::kind::loss, p, cache});
      jobs.push_back({job::kind::decode, p, cache});
      if (p.name == "sinks:1") jobs.push_back({job::kind::shares, p, cache});
      if (p.name == "window" || p.name == "sinks:4") jobs.push_back({job::kind::recall, p, cache});
    }
  }
  if (o.check > 0)
    jobs.push_back({job::kind::check, compare::parse_policies("sinks:4", o.caches.front()).front(), o.caches.front()});
  std::stable_sort(jobs.begin(), jobs.end(), [&](const job& a, const job& b) {
    if ((a.is == job::kind::decode) != (b.is == job::kind::decode)) return b.is == job::kind::decode;
    return work(a, o) > work(b, o);
  });
  return jobs;
}

index_t work(const job& j, const options& o) {
  const recall_setting recall = recall_of(o, j.cache);
  switch (j.is) {
    case job::kind::loss:
      return tokens_of(j, o);
    case job::kind::recompute:
      return o.targets * j.cache;
    case job::kind::recall:
      return j.cache + (o.ranking ? recall.distances.back() : 0) +
             o.facts * static_cast<index_t>(recall.distances.size()) * (recall.spacing + 34);  // a fact and a question
    case job::kind::shares:
      return decode_work * decoded_tokens;
    case job::kind::check:
      return (1 + decode_work) * o.check;
    case job::kind::decode:
      break;
  }
  return j.policy.is == compare::policy::kind::recompute ? recomputed_passes * j.cache : decode_work * decoded_tokens;
}

json measure(const job& j, const setting& s, const progress& on_tokens) {
  const engine::model& model = *s.subject.model;
  const options& o = s.options;
  const std::span<const int> all = s.stream.ids;
  const auto predicted = static_cast<std::size_t>(tokens_of(j, o));
  const auto ids = all.first(predicted + 1);
  const progress on_decoded = [&](index_t tokens) { on_tokens(decode_work * tokens); };
  switch (j.is) {
    case job::kind::loss:
      return {
          {"loss_bits", rounded(compare::evaluator(s.subject, caches_of(j), ids).by_prefill(predicted, on_tokens))}};
    case job::kind::recompute: {
      const std::vector<index_t> chosen = targets(j.cache, o.tokens, o.targets);
      compare::evaluator evaluator(s.subject, caches_of(j), ids);
      std::vector<double> bits;
      for (const index_t target : chosen) {
        bits.push_back(evaluator.recomputed(static_cast<std::size_t>(target), j.cache));
        on_tokens(j.cache);
      }
      return {{"targets", chosen}, {"loss_bits", rounded(bits)}};
    }
    case job::kind::recall:
      return measure_recall(j, s, on_tokens);
    case job::kind::shares: {
      engine::session session(model, caches_of(j), {.watches_sinks = true});
      const engine::matrix shares = pinned_shares(session, j.cache, all, decoded_tokens, on_decoded);
      json layers = json::array();
      for (index_t layer = 0; layer < shares.rows(); ++layer)
        layers.push_back(rounded({shares.row(layer).begin(), shares.row(layer).end()}));
      return {{"shares", std::move(layers)}};
    }
    case job::kind::check: {
      const auto few = static_cast<std::size_t>(o.check);
      const std::vector<double> prefilled = compare::evaluator(s.subject, caches_of(j), ids).by_prefill(few, on_tokens),
                                decoded = compare::evaluator(s.subject, caches_of(j), ids).by_decode(few, on_decoded);
      double worst = 0;
      for (std::size_t i = 0; i < decoded.size(); ++i) worst = std::max(worst, std::abs(prefilled[i] - decoded[i]));
      return {{"largest_difference_bits", worst}};
    }
    case job::kind::decode:
      break;
  }
  engine::session session(model, caches_of(j), {.threads = o.threads});
  const double ms = j.policy.is == compare::policy::kind::recompute
                        ? compare::ms_per_pass(session, j.cache, ids, recomputed_passes, on_tokens)
                        : compare::ms_per_token(session, j.cache, all, decoded_tokens, on_decoded);
  return {{"ms_per_token", ms}, {"cache_bytes", session.cache_bytes()}};
}

json inputs_of(const std::string& run, const setting& s) {
  const options& o = s.options;
  return {{"run", run},
          {"model", s.subject.name},
          {"model_bytes", std::filesystem::file_size(o.model)},
          {"text", compare::shown_path(o.text)},
          {"text_bytes", std::filesystem::file_size(o.text)},
          {"first_token", s.subject.first_token ? json(*s.subject.first_token) : json(nullptr)}};
}

json kept(const std::string& path, const json& inputs) {
  if (!std::filesystem::exists(path)) return nullptr;
  json file = json::parse(compare::read_file(path), nullptr, false);
  if (!file.is_object() || !file.contains("inputs") || file["inputs"] != inputs)
    throw std::runtime_error(fmt::format(
        "{}: is of {}, had to be of {}: name another --folder, or remove it", path,
        file.is_object() && file.contains("inputs") ? file["inputs"].dump() : "something else", inputs.dump()));
  return file;
}

void keep(const std::string& path, const json& inputs, json result) {
  const json file = {{"inputs", inputs},
                     {"date", today()},
                     {"machine", compare::cpu_name()},
                     {"compiler", compare::compiler_name()},
                     {"isa", sinkcache::isa()},
                     {"git_commit", compare::git_commit()},
                     {"result", std::move(result)}};
  compare::write_atomically(path, file.dump(1) + "\n");
}

void origin::add(const json& file) {
  dates_.insert(file.at("date").get<std::string>());
  machines_.insert(file.at("machine").get<std::string>());
  commits_.insert(file.at("git_commit").get<std::string>());
}

std::string origin::text() const {
  return fmt::format("Measured {} on {}, commit {}.", fmt::join(dates_, ", "), fmt::join(machines_, ", "),
                     fmt::join(commits_, ", "));
}

std::string shown_texts(const std::vector<setting>& texts) {
  std::string names;
  for (const setting& s : texts) names += (names.empty() ? "" : " and ") + compare::shown_path(s.options.text);
  return names;
}

json kept(const std::string& path, const job& j, const setting& s) { return kept(path, inputs(j, s)); }
void keep(const std::string& path, const job& j, const setting& s, json result) {
  keep(path, inputs(j, s), std::move(result));
}

}  // namespace evidence
