// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "report.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sinkcache/version.hpp>

#include "../loaders/json.hpp"
#include "kv_formats.hpp"
#include "machine.hpp"
#include "scored_policies.hpp"

namespace compare {
namespace {

std::string bits(double value) { return std::isnan(value) ? "-" : fmt::format("{:.3f}", value); }

std::string bytes(std::size_t n) {
  if (n < 1'000'000) return fmt::format("{:.1f} kB", static_cast<double>(n) / 1e3);
  return fmt::format("{:.1f} MB", static_cast<double>(n) / 1e6);
}

std::size_t name_width(const comparison& c) {
  std::size_t width = 10;
  for (const run& r : c.runs()) width = std::max(width, r.policy.name.size());
  return width;
}

std::string cost_text(const comparison& c, std::size_t i) {
  if (i == c.best() && c.evicted()) return "best";
  const double cost = c.cost(i);
  return std::isnan(cost) ? "-" : signed_percent(cost);
}

const char* remedy(const engine::model& model) {
  switch (model.config().attention) {
    case loaders::attention_kind::softmax1:
      return "softmax1";
    case loaders::attention_kind::sink:
      return "sink logits";
    case loaders::attention_kind::softmax:
      break;
  }
  return "softmax";
}

// The weight of the auxiliary loss in the training arguments that our models carry along.
double seeding(const engine::model& model) {
  const auto it = model.metadata().find("train_args");
  if (it == model.metadata().end()) return 0;
  try {
    const nlohmann::json args = loaders::parse_json(it->second);
    const auto aux = args.is_object() ? args.find("aux") : args.end();
    return aux != args.end() && aux->is_number() ? aux->get<double>() : 0;
  } catch (const std::runtime_error&) {
    return 0;
  }
}

}  // namespace

std::string describe(const engine::model& model) {
  return fmt::format("{:.2f} M parameters, {}", static_cast<double>(model.num_parameters()) / 1e6, remedy(model));
}

std::string amount(const setting& s) {
  if (s.bytes == 0) return fmt::format("{} bytes", grouped(s.tokens));
  return fmt::format("{} ({} bytes)", tokens_text(s.tokens), grouped(s.bytes));
}

std::string header(const setting& s, std::span<const subject> subjects) {
  std::string out;
  for (const subject& each : subjects)
    if (!each.remedy_removed) out += fmt::format("{}: {}\n", each.name, describe(*each.model));
  const std::string cache = s.cache_bytes > 0
                                ? fmt::format("caches of {} bytes, up to {}",
                                              grouped(static_cast<index_t>(s.cache_bytes)), tokens_text(s.cache))
                                : fmt::format("a cache of {}", tokens_text(s.cache));
  return out + fmt::format("{} of {}, {}\n", amount(s), s.text, cache);
}

std::string table(const comparison& c) {
  const bool sampled = c.sampled();
  const bool own_rows = std::ranges::any_of(c.runs(), [](const run& r) { return r.policy.cache > 0; });
  const std::size_t width = name_width(c);
  std::string out = fmt::format("{:{}}  {:>{}}\n", "", width, "bits per byte", sampled ? 23 : 19);
  out += fmt::format("{:{}}  {:>7}  {:>7}  {:>7}", "policy", width, "all", "before", "after");
  if (sampled) out += fmt::format("  {:>7}", "sampled");
  if (own_rows) out += fmt::format("  {:>7}", "tokens");
  out += fmt::format("  {:>7}  {:>8}  {:>9}\n", "cost", "cache", "us/token");
  for (std::size_t i = 0; i < c.runs().size(); ++i) {
    const run& r = c.runs()[i];
    const loss_summary& l = c.summary(i);
    const bool partly = sampled && &r == c.recompute();  // its means are of other tokens than the columns above
    out += fmt::format("{:{}}  {:>7}  {:>7}  {:>7}", r.policy.name, width, partly ? "" : bits(l.all), bits(l.before),
                       partly ? "" : bits(l.after));
    if (sampled) out += fmt::format("  {:>7}", bits(l.after_sampled));
    if (own_rows) out += fmt::format("  {:>7}", r.policy.cache > 0 ? grouped(r.policy.cache) : "all");
    out += fmt::format("  {:>7}  {:>8}  {:>9.1f}\n", cost_text(c, i), bytes(r.cache_bytes), r.us_per_token);
  }
  if (!c.evicted()) return out;
  out += fmt::format("before, after: the first eviction, {} in\n", tokens_text(c.cache()));
  if (sampled)
    out += fmt::format("sampled: the {} after it where recompute was run; its cost is of this column\n",
                       tokens_text(c.tokens_sampled()));
  return out;
}

std::string seeded_note(std::span<const subject> subjects) {
  std::string names;
  for (const subject& s : subjects)
    if (!s.remedy_removed && seeding(*s.model) > 0) names += fmt::format("{}{}", names.empty() ? "" : ", ", s.name);
  if (names.empty()) return {};
  return fmt::format("Sinks seeded by an auxiliary loss early in training, not come about by themselves: {}.", names);
}

std::string models_table(std::span<const comparison> comparisons) {
  const auto label = [](const subject& s) {
    return s.remedy_removed ? fmt::format("no {}", remedy(*s.model)) : s.name;
  };
  const std::size_t width = name_width(comparisons.front());
  std::string names = fmt::format("{:{}}", "", width), columns = fmt::format("{:{}}", "policy", width), rows;
  std::vector<std::size_t> widths;
  for (const comparison& c : comparisons) {
    const std::string name = label(c.subject());
    widths.push_back(std::max<std::size_t>(name.size(), 14));
    names += fmt::format("   {:>{}}", name, widths.back());
    columns += fmt::format("   {:>{}} {:>6}", "before", widths.back() - 7, "after");
  }
  for (std::size_t i = 0; i < comparisons.front().runs().size(); ++i) {
    rows += fmt::format("{:{}}", comparisons.front().runs()[i].policy.name, width);
    for (std::size_t j = 0; j < comparisons.size(); ++j) {
      const loss_summary& l = comparisons[j].summary(i);
      rows += fmt::format("   {:>{}} {:>6}", bits(l.before), widths[j] - 7, bits(l.after));
    }
    rows += '\n';
  }
  std::string out = fmt::format("{}\n{}\n{}", names, columns, rows);
  const comparison& first = comparisons.front();
  if (first.sampled() && first.best() != comparison::none) {
    out += fmt::format("{:{}}", "best there", width);
    for (std::size_t j = 0; j < comparisons.size(); ++j)
      out += fmt::format("   {:>{}} {:>6}", "", widths[j] - 7,
                         bits(comparisons[j].summary(comparisons[j].best()).after_sampled));
    out += fmt::format("\nrecompute: after, at {}; best there: the least of the others at the same tokens\n",
                       tokens_text(first.tokens_sampled()));
  }
  if (std::any_of(comparisons.begin(), comparisons.end(),
                  [](const comparison& c) { return c.subject().remedy_removed; }))
    out += "no ...: the same weights with plain softmax instead\n";
  return out + "a plain softmax has no remedy but the pinned token: its window row is without\n";
}

std::string models_sentence(std::span<const comparison> comparisons) {
  std::string costs, removed;
  const auto add = [](std::string& list, const std::string& entry) { list += (list.empty() ? "" : ", ") + entry; };
  for (const comparison& c : comparisons) {
    const std::size_t window = c.find(policy::kind::window), pinned = c.best_pinned();
    if (!c.evicted() || window == comparison::none) continue;
    const std::string& name = c.subject().name;
    if (c.subject().remedy_removed)
      add(removed, fmt::format("{} without its {} {:.3f}", name, remedy(*c.subject().model), c.summary(window).after));
    else if (pinned != comparison::none)
      add(costs, fmt::format("{} {}", name, signed_percent(c.summary(window).after / c.summary(pinned).after - 1)));
  }
  std::string out;
  if (!costs.empty()) out += fmt::format("Evicting the first tokens changes the bits per byte by: {}; ", costs);
  if (!removed.empty()) out += fmt::format("with a plain window, {}; ", removed);
  return out + fmt::format("{}ne seed each, so this is no ranking of models or remedies.", out.empty() ? 'O' : 'o');
}

std::string to_json(const setting& s, std::span<const comparison> comparisons) {
  using json = nlohmann::ordered_json;
  std::string models;
  for (const comparison& c : comparisons)
    if (!c.subject().remedy_removed) models += (models.empty() ? "" : ",") + c.subject().name;
  json runs = json::array();
  for (const comparison& c : comparisons) {
    for (std::size_t i = 0; i < c.runs().size(); ++i) {
      const run& r = c.runs()[i];
      const loss_summary& l = c.summary(i);
      json segments = json::array();
      for (const segment_loss& segment : loss_by_segment(r, s.cache))
        segments.push_back({{"first_token", segment.first_token},
                            {"tokens", segment.tokens},
                            {"tokens_scored", segment.tokens_scored},
                            {"loss_bits", segment.loss_bits}});
      const std::optional<int> bos = r.subject->model->config().bos_token_id;
      const std::optional<int> first_token = bos ? bos : r.subject->first_token;
      const index_t bytes = r.token_bytes.empty()
                                ? static_cast<index_t>(r.loss_bits.size())
                                : std::accumulate(r.token_bytes.begin(), r.token_bytes.end(), index_t{0});
      runs.push_back({{"model", r.subject->name},
                      {"attention", r.subject->remedy_removed ? "softmax" : remedy(*r.subject->model)},
                      {"tokenizer", r.subject->tokenizer ? "bpe" : "byte"},
                      {"first_token", first_token ? json(*first_token) : json(nullptr)},
                      {"bytes", bytes},
                      {"policy", r.policy.name},
                      {"num_sink_tokens", r.policy.num_sink_tokens},
                      {"window", r.window},
                      {"rows", r.window + r.policy.num_sink_tokens},
                      {"interval", r.policy.scored ? json(r.policy.scored->interval) : json(nullptr)},
                      {"kv_format", r.policy.formats ? r.policy.formats->name : "f32"},
                      {"kv_recent", r.policy.kv_recent},
                      {"recent", r.policy.scored ? json(r.policy.scored->recent) : json(nullptr)},
                      {"loss_bits",
                       {{"all", l.all},
                        {"before_first_eviction", l.before},
                        {"after_first_eviction", l.after},
                        {"after_first_eviction_sampled", l.after_sampled}}},
                      {"cache_bytes", r.cache_bytes},
                      {"us_per_token", r.us_per_token},
                      {"tokens_scored", l.tokens_scored},
                      {"loss_by_segment", std::move(segments)}});
    }
  }
  const json all = {{"schema_version", 1},     {"machine", cpu_name()},      {"compiler", compiler_name()},
                    {"isa", sinkcache::isa()}, {"git_commit", git_commit()}, {"model", models},
                    {"text", s.text},          {"tokens", s.tokens},         {"cache", s.cache},
                    {"runs", std::move(runs)}};
  return all.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

}  // namespace compare
