// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "report.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "../compare/comparison.hpp"
#include "../compare/files.hpp"
#include "bootstrap.hpp"

namespace evidence {
namespace {

constexpr index_t block_tokens = 512;  // that the bootstrap draws as one, because neighbours are alike

std::string shown(const interval& i, int decimals) {
  return fmt::format("{:.{}f} ({:.{}f} to {:.{}f})", i.estimate, decimals, i.low, decimals, i.high, decimals);
}

std::string shown_signed(const interval& i) {
  return fmt::format("{:+.3f} ({:+.3f} to {:+.3f})", i.estimate, i.low, i.high);
}

// Equally long parts of a stream, the last one the rest.
struct block {
  double bits = 0, tokens = 0, bytes = 0;
};

std::vector<block> blocks(const compare::run& r, index_t first) {
  std::vector<block> all;
  const auto tokens = static_cast<index_t>(r.loss_bits.size());
  for (index_t i = first; i < tokens; ++i) {
    if ((i - first) % block_tokens == 0) all.emplace_back();
    all.back().bits += r.loss_bits[static_cast<std::size_t>(i)];
    all.back().bytes += r.token_bytes[static_cast<std::size_t>(i)];
    all.back().tokens += 1;
  }
  return all;
}

double total(const std::vector<block>& of, std::span<const std::size_t> drawn, double block::*what) {
  return std::accumulate(drawn.begin(), drawn.end(), 0.0, [&](double sum, std::size_t i) { return sum + of[i].*what; });
}

interval per(const std::vector<block>& of, double block::*unit) {
  return bootstrap(of.size(), [&](auto drawn) { return total(of, drawn, &block::bits) / total(of, drawn, unit); });
}

interval perplexity(const std::vector<block>& of) {
  const interval bits = per(of, &block::tokens);
  return {std::exp2(bits.estimate), std::exp2(bits.low), std::exp2(bits.high)};
}

interval mean(const std::vector<double>& values) {
  return bootstrap(values.size(), [&](auto drawn) {
    return std::accumulate(drawn.begin(), drawn.end(), 0.0,
                           [&](double sum, std::size_t i) { return sum + values[i]; }) /
           static_cast<double>(drawn.size());
  });
}

class page {
 public:
  page(const setting& s, const std::function<const json&(const job&)>& kept) : setting_(s), jobs_(plan(s.options)) {
    for (const job& j : jobs_) kept_.emplace(j.name(), &kept(j));
  }

  std::string write(const std::string& command) const {
    std::string out = head(command);
    for (const index_t cache : setting_.options.caches) out += loss(cache);
    return out + shares() + recall() + method();
  }

 private:
  const json& file(const job& j) const { return *kept_.at(j.name()); }
  const json& result(const job& j) const { return file(j).at("result"); }

  // The only one of this kind, policy and cache.
  const job& find(job::kind kind, const std::string& policy, index_t cache) const {
    return *std::find_if(jobs_.begin(), jobs_.end(),
                         [&](const job& j) { return j.is == kind && j.policy.name == policy && j.cache == cache; });
  }

  std::vector<compare::policy> policies(index_t cache) const {
    return compare::parse_policies("window,sinks:1,sinks:2,sinks:4,sinks:8", cache);
  }

  compare::run run_of(const compare::policy& p, index_t cache) const {
    compare::run r{&setting_.subject, p, cache - p.num_sink_tokens, {}, 0, 0};
    r.loss_bits = result(find(job::kind::loss, p.name, cache)).at("loss_bits").get<std::vector<double>>();
    const auto first = setting_.stream.bytes.begin() + 1;
    r.token_bytes.assign(first, first + static_cast<std::ptrdiff_t>(r.loss_bits.size()));
    return r;
  }

  // What the files say of it, each once.
  std::string all_of(const char* key) const {
    std::set<std::string> values;
    for (const auto& [name, f] : kept_) values.insert(f->at(key).get<std::string>());
    std::string out;
    for (const std::string& value : values) out += (out.empty() ? "" : ", ") + value;
    return out;
  }

  bool begins_with_bos() const { return setting_.subject.first_token || setting_.subject.model->config().bos_token_id; }

  std::string head(const std::string& command) const {
    const options& o = setting_.options;
    const auto bytes = setting_.stream.bytes.begin() + 1;
    return fmt::format(
        "What a window and pinned first tokens do to a language model over a long text, as measured by\n\n"
        "```sh\n{}\n```\n\n"
        "Model: {}, {} parameters, {}. Text: {} ({} bytes) of {}. Measured {} on {} ({}, {}), commit {}.\n",
        command, setting_.subject.name, compare::grouped(setting_.subject.model->num_parameters()),
        begins_with_bos() ? "after a BOS token" : "without a BOS token", compare::tokens_text(o.tokens),
        compare::grouped(std::accumulate(bytes, bytes + o.tokens, index_t{0})), compare::shown_path(o.text),
        all_of("date"), all_of("machine"), all_of("compiler"), all_of("isa"), all_of("git_commit"));
  }

  std::string loss(index_t cache) const {
    const job& recompute = find(job::kind::recompute, "recompute", cache);
    const auto targets = result(recompute).at("targets").get<std::vector<std::size_t>>();
    const auto recomputed = result(recompute).at("loss_bits").get<std::vector<double>>();
    const std::vector<block> reference =
        blocks(run_of(compare::parse_policies("sinks:4", cache).front(), cache), cache);

    std::string out = fmt::format(
        "\n## Loss with a cache of {}\n\n"
        "| policy | perplexity | bits per byte | less sinks:4's | less recompute's | cache | ms a token |\n"
        "|---|---|---|---|---|---|---|\n",
        compare::tokens_text(cache));
    for (const compare::policy& p : policies(cache)) {
      const compare::run r = run_of(p, cache);
      const std::vector<block> own = blocks(r, cache);
      std::vector<double> differences;
      for (std::size_t i = 0; i < targets.size(); ++i) differences.push_back(r.loss_bits[targets[i]] - recomputed[i]);
      const interval less = bootstrap(own.size(), [&](auto drawn) {
        return (total(own, drawn, &block::bits) - total(reference, drawn, &block::bits)) /
               total(own, drawn, &block::bytes);
      });
      out += fmt::format("| {} | {} | {} | {} | {} | {} |\n", p.name, shown(perplexity(own), 2),
                         shown(per(own, &block::bytes), 3), p.name == "sinks:4" ? "" : shown_signed(less),
                         shown_signed(mean(differences)), cost(find(job::kind::decode, p.name, cache)));
    }
    out += fmt::format("| recompute | | | | | {} |\n", cost(find(job::kind::decode, "recompute", cache)));
    return out + along(cache);
  }

  std::string cost(const job& j) const {
    return fmt::format("{:.1f} MB | {:.1f}", result(j).at("cache_bytes").get<double>() / 1e6,
                       result(j).at("ms_per_token").get<double>());
  }

  std::string along(index_t cache) const {
    std::string out = "\nBits per byte along the text:\n\n| tokens |", rule = "|---|";
    std::vector<std::vector<compare::segment_loss>> columns;
    for (const compare::policy& p : policies(cache)) {
      out += fmt::format(" {} |", p.name);
      rule += "---|";
      columns.push_back(compare::loss_by_segment(run_of(p, cache), cache));
    }
    out += "\n" + rule + "\n";
    for (std::size_t i = 0; i < columns.front().size(); ++i) {
      const compare::segment_loss& s = columns.front()[i];
      if (s.first_token + s.tokens <= cache / 2) continue;
      out += fmt::format("| {} to {} |", compare::grouped(s.first_token), compare::grouped(s.first_token + s.tokens));
      for (const auto& column : columns) out += fmt::format(" {:.3f} |", column[i].loss_bits);
      out += "\n";
    }
    return out;
  }

  std::string recall() const {
    std::string out =
        "\n## Recall\n\n"
        "The share of the digits of planted numbers that are recalled that many tokens later; guessing gives 0.10.\n\n"
        "| cache | tokens later | the fact in the window | window | sinks:4 |\n|---|---|---|---|---|\n";
    for (const index_t cache : setting_.options.caches) {
      using row = std::pair<index_t, std::string>;
      std::map<row, std::map<std::string, std::vector<double>>> rows;
      for (const std::string policy : {"window", "sinks:4"}) {
        const json& r = result(find(job::kind::recall, policy, cache));
        for (const json& f : r.at("facts"))
          rows[{f.at("distance").get<index_t>(), f.at("visible").get<std::string>()}][policy].push_back(
              f.at("digits_right").get<double>() / r.at("digits").get<double>());
      }
      for (const auto& [key, shares] : rows) {
        out += fmt::format("| {} | {} | {} |", compare::grouped(cache), compare::grouped(key.first), key.second);
        for (const char* policy : {"window", "sinks:4"})
          out += shares.contains(policy) ? fmt::format(" {} |", shown(mean(shares.at(policy)), 2)) : " |";
        out += "\n";
      }
    }
    return out;
  }

  std::string shares() const {
    std::string out = "\n## What the first token gets\n";
    for (const index_t cache : setting_.options.caches) {
      const auto layers =
          result(find(job::kind::shares, "sinks:1", cache)).at("shares").get<std::vector<std::vector<double>>>();
      std::string rows;
      double sum = 0;
      std::size_t heads = 0, sinks = 0;
      for (std::size_t i = 0; i < layers.size(); ++i) {
        rows += fmt::format("| {} |", i);
        for (const double share : layers[i]) {
          rows += fmt::format(" {:.2f}", share);
          sum += share, ++heads, sinks += share > 0.3;
        }
        rows += " |\n";
      }
      out += fmt::format(
          "\nThe share of attention that each head gives to the first token, pinned by sinks:1, with a cache of {}: "
          "the mean\nover {} tokens decoded after the first eviction. Over all heads it is {:.2f}; {} of {} heads give "
          "it more than 0.3.\n\n| layer | heads |\n|---|---|\n{}",
          compare::grouped(cache), decoded_tokens, sum / static_cast<double>(heads), sinks, heads, rows);
    }
    return out;
  }

  std::string method() const {
    const options& o = setting_.options;
    std::string out = fmt::format(
        "\n## How it is measured\n\n"
        "- `window` keeps the newest tokens, `sinks:N` the first N forever and the newest of the rest; `recompute` is "
        "a\n"
        "  fresh pass over the first token and the newest, for each of {} tokens, evenly spaced after the first "
        "eviction.\n"
        "- Perplexity is that of a token, over the tokens after the first eviction. *less sinks:4's*: bits per byte "
        "above\n"
        "  those of sinks:4 over the same tokens. *less recompute's*: bits per token above those of recompute, over "
        "the\n"
        "  tokens that it computed.\n"
        "- In brackets is the 95% interval of a percentile bootstrap of 2,000 seeded draws: of blocks of {} tokens, "
        "of\n"
        "  recompute's tokens, and of facts. It says how much depends on which part of this text one takes, not how "
        "another\n"
        "  text would do.\n"
        "- The loss is evaluated by prefill in chunks.",
        compare::grouped(o.targets), block_tokens);
    if (const auto check =
            std::find_if(jobs_.begin(), jobs_.end(), [](const job& j) { return j.is == job::kind::check; });
        check != jobs_.end())
      out += fmt::format(
          " Over {}, with a cache of {} under sinks:4, the largest difference to\n"
          "  decoding token by token was {:.1g} bits, of any token.",
          compare::tokens_text(o.check), compare::grouped(check->cache),
          result(*check).at("largest_difference_bits").get<double>());
    return out +
           fmt::format(
               "\n- The times are means over 512 decoded tokens with a full cache, {} threads, nothing else of "
               "ours running;\n"
               "  recompute's is that of a pass over a full cache. *cache* is the memory of all layers' caches, "
               "in float32.\n"
               "- Recall: facts (\"The secret code of Anna is 4821.\") are planted between the lines of the text, {} "
               "for each\n"
               "  distance. That many tokens later, or a few more where another fact was in the way, the same "
               "words follow.\n"
               "  A digit is recalled if it is the likeliest of the ten, given the true digits before it.\n",
               o.threads, compare::grouped(o.facts));
  }

  const setting& setting_;
  std::vector<job> jobs_;
  std::map<std::string, const json*> kept_;
};

}  // namespace

std::string report(const setting& s, const std::string& command, const std::function<const json&(const job&)>& kept) {
  return page(s, kept).write(command);
}

std::string page_with(const std::string& tables, const std::string& old_page, const std::string& part) {
  const std::string begin = fmt::format("<!-- {} -->\n", part), end = "<!-- end -->\n";
  const std::size_t from = old_page.find(begin), upto = old_page.find(end, from);
  if (upto == std::string::npos) return "# Evidence\n\n" + tables;
  return old_page.substr(0, from + begin.size()) + tables + old_page.substr(upto);
}

}  // namespace evidence
