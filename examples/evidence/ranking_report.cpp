// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <optional>

#include "../compare/caches.hpp"
#include "../compare/comparison.hpp"
#include "../compare/files.hpp"
#include "ranking.hpp"

namespace evidence {
namespace {

constexpr double nothing = 0.01;  // bits per byte: differences below it are called none

std::string text_name(const setting& s) { return std::filesystem::path(s.options.text).stem().string(); }

std::string shown(const interval& more) {
  return fmt::format("{:+.3f} ({:+.3f} to {:+.3f})", more.estimate, more.low, more.high);
}

// Among the usual ones, those with budgets by layer and head, and the window.
std::vector<contender> all_of(const std::vector<setting>& texts, index_t cache, const std::vector<results>& kept) {
  std::vector<contender> all = contenders(texts.front().options, cache);
  for (const contender& c : variants(texts, cache, kept)) all.push_back(c);
  all.push_back({"window", "", 0, 0});
  all.push_back(few_bits_window);
  return all;
}

class ranking_page {
 public:
  ranking_page(const std::vector<setting>& texts, const std::vector<results>& kept) : texts_(texts), kept_(kept) {}

  std::string write(const std::string& command) const {
    std::string tables;
    for (const index_t cache : first().options.caches) tables += of_cache(cache);
    return head(command) + tables + method();
  }

 private:
  const setting& first() const { return texts_.front(); }

  std::string head(const std::string& command) const {
    origin from;
    for (std::size_t i = 0; i < texts_.size(); ++i)
      for (const index_t cache : first().options.caches)
        for (const contender& c : all_of(texts_, cache, kept_))
          if (fits(c, cache, 4))
            if (const json* const file = kept_[i](loss_job(texts_[i].options, c, 4, cache))) from.add(*file);
    return fmt::format(
        "What policies that evict by score cost against sinks and a window of the same rows, as measured by\n\n"
        "```sh\n{}\n```\n\nModel: {}. The first {} each of {}. {}\n",
        command, first().subject.name, compare::tokens_text(first().options.tokens), shown_texts(texts_), from.text());
  }

  // One row a policy, interval and so on; texts side by side. Sorted by the first text's loss with 4 pinned.
  std::string of_cache(index_t cache) const {
    const std::vector<contender> all = all_of(texts_, cache, kept_);
    std::vector<std::vector<standing>> found;
    for (std::size_t i = 0; i < texts_.size(); ++i) found.push_back(standings(texts_[i], cache, kept_[i], all));
    std::vector<const contender*> order;
    for (const contender& c : all) order.push_back(&c);
    const auto loss = [&](const contender* c) {
      const standing* const s = find(found.front(), *c, 4);
      return s ? s->more.estimate : HUGE_VAL;
    };
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return loss(a) < loss(b); });
    std::string out = fmt::format("\n### A cache of {}\n\n| policy | recent, interval |", compare::tokens_text(cache)),
                rule = "|---|---|";
    for (const setting& s : texts_) {
      out += fmt::format(" {}: bits per byte | less sinks:4's | with 1 pinned | with none |", text_name(s));
      rule += "---|---|---|---|";
    }
    out += " recalled after 1x | 4x | 16x | kB | ms a token |\n" + rule + "---|---|---|---|---|\n";
    for (const contender* const c : order)
      if (std::isfinite(loss(c))) out += row(*c, cache, found);
    return out + not_compared(cache);
  }

  static const standing* find(const std::vector<standing>& all, const contender& c, index_t sinks) {
    for (const standing& s : all)
      if (s.sinks == sinks && s.of.shown() == c.shown() && s.of.interval == c.interval && s.of.recent == c.recent)
        return &s;
    return nullptr;
  }

  std::string row(const contender& c, index_t cache, const std::vector<std::vector<standing>>& found) const {
    std::string out = c.rolls()
                          ? fmt::format("| **sinks + window**{} | |", c.kv_format.empty() ? "" : " " + c.kv_format)
                          : fmt::format("| {} | {}, {} |", c.shown(), c.recent, c.interval);
    const bool is_reference = c.rolls() && c.kv_format.empty();
    for (const std::vector<standing>& of_text : found) {
      const standing* const pinned = find(of_text, c, 4);
      const std::string bits = pinned && !c.is_variant() ? fmt::format("{:.3f}", pinned->bits.estimate) : "";
      out += pinned ? fmt::format(" {} | {} |", bits, is_reference ? "" : shown(pinned->more)) : " | |";
      for (const index_t sinks : {1, 0}) {
        const standing* const s = find(of_text, c, sinks);
        out += s ? fmt::format(" {:+.3f} |", s->more.estimate) : " |";
      }
    }
    const compare::policy p = c.policy(4);
    out += recall(p, cache);
    const json* const timed = kept_.front()({job::kind::decode, p, cache});
    out += fmt::format(" {:.0f} |", static_cast<double>(compare::cache_bytes(p, *first().subject.model, cache)) / 1e3);
    return out + (timed ? fmt::format(" {:.2f} |\n", timed->at("result").at("ms_per_token").get<double>()) : " |\n");
  }

  std::string recall(const compare::policy& p, index_t cache) const {
    const json* const file = kept_.front()({job::kind::recall, p, cache});
    std::string out;
    for (const index_t times : {1, 4, 16}) {
      const std::optional<double> share = file ? recalled_share(*file, times * cache) : std::nullopt;
      out += share ? fmt::format(" {:.2f} |", *share) : " |";
    }
    return out;
  }

  std::string not_compared(index_t cache) const {
    std::string missing;
    for (const contender& c : contenders(first().options, cache))
      for (const index_t sinks : pinned_by_all)
        if (!fits(c, cache, sinks))
          missing += fmt::format("{}{} with {} pinned", missing.empty() ? "" : ", ", c.shown(), sinks);
    std::string out;
    if (contenders(first().options, cache).front().recent != 32)
      out += "\nRecent tokens and interval are fewer than elsewhere: 32 and 16 do not fit.\n";
    else if (contenders(first().options, cache).back().interval < 64)
      out += "\nAn interval of 64 does not fit.\n";
    if (!missing.empty()) out += fmt::format("\nNo row would be free to choose: {}.\n", missing);
    return out;
  }

  std::string method() const {
    return fmt::format(
        "\n### How the ranking is measured\n\n"
        "- Equal rows: a window of N tokens with its pinned ones, and a budget of N less the interval. Tokens that an\n"
        "  event is about to take count. Losses are means over all tokens from number N on.\n"
        "- *less sinks:4's*: bits per byte above those of 4 pinned tokens and a window, over the same tokens, with "
        "the\n"
        "  95% interval of a bootstrap of blocks of 512 tokens; the columns after it: the same with 1 and no pinned\n"
        "  tokens. A difference below {} bits counts as none. `random` is the mean of three seeds.\n"
        "- What is compared with sinks:4 alone is so over the first {} tokens: fewer pinned tokens, an interval of "
        "64,\n"
        "  budgets by layer and head, few bits. There `random` has one seed, and the "
        "table shows no bits for them.\n"
        "- *recalled*: the share of digits of {} planted numbers that were the likeliest of the ten, 1, 4 or 16 caches "
        "later;\n"
        "  guessing gives 0.10. Of the first text, with 4 pinned.\n"
        "- *kB*: of all layers' caches in float32, with all that the policy carries along. *ms a token*: decoded one "
        "by\n"
        "  one with a full cache, {} thread{}.\n"
        "- Eviction runs while a prompt is read, so this does not repeat results of papers that evict after\n"
        "  the whole prompt. Policies that merge or offload are not compared: nothing here does that.\n",
        nothing, compare::grouped(first().options.side_tokens), first().options.facts, first().options.threads,
        first().options.threads == 1 ? "" : "s");
  }

  const std::vector<setting>& texts_;
  const std::vector<results>& kept_;
};

}  // namespace

std::optional<double> recalled_share(const json& file, index_t distance) {
  const json& result = file.at("result");
  double right = 0, asked = 0;
  for (const json& fact : result.at("facts"))
    if (fact.at("distance").get<index_t>() == distance) {
      right += fact.at("digits_right").get<double>();
      asked += result.at("digits").get<double>();
    }
  if (asked == 0) return {};
  return right / asked;
}

std::string ranking_report(const std::vector<setting>& texts, const std::string& command,
                           const std::vector<results>& kept) {
  return ranking_page(texts, kept).write(command);
}

}  // namespace evidence
