// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <optional>

#include "../compare/comparison.hpp"
#include "../compare/files.hpp"
#include "bootstrap.hpp"
#include "formats.hpp"

namespace evidence {
namespace {

// A cell's blocks beside those of floats.
struct kept_blocks {
  std::vector<double> tokens, bits, float_bits, nats, same;

  void add(const json& cell, const json& floats, std::size_t most) {
    const auto take = [&](const json& from, const char* what, std::vector<double>& to) {
      const auto all = from.at(what).get<std::vector<double>>();
      to.insert(to.end(), all.begin(), all.begin() + static_cast<std::ptrdiff_t>(std::min(most, all.size())));
    };
    take(cell, "tokens", tokens);
    take(cell, "bits", bits);
    take(floats, "bits", float_bits);
    take(cell, "nats", nats);
    take(cell, "same", same);
  }
};

double sum(const std::vector<double>& of, std::span<const std::size_t> drawn) {
  return std::accumulate(drawn.begin(), drawn.end(), 0.0, [&](double total, std::size_t i) { return total + of[i]; });
}

interval mean(const kept_blocks& b, std::vector<double> kept_blocks::*what) {
  return bootstrap(b.tokens.size(), [&](auto drawn) { return sum(b.*what, drawn) / sum(b.tokens, drawn); });
}

// The perplexity over that of floats, less 1.
interval more_perplexity(const kept_blocks& b) {
  return bootstrap(b.tokens.size(), [&](auto drawn) {
    return std::exp2((sum(b.bits, drawn) - sum(b.float_bits, drawn)) / sum(b.tokens, drawn)) - 1;
  });
}

std::string shown_percent(double value, bool plus = true) {
  const int decimals = std::abs(value) < 0.1 ? 2 : std::abs(value) < 1 ? 1 : 0;
  return fmt::format("{}{:.{}f}", plus && value >= 0 ? "+" : "", 100 * value, decimals);
}
std::string shown_percent(const interval& i) {
  return fmt::format("{}% ({} to {})", shown_percent(i.estimate), shown_percent(i.low), shown_percent(i.high));
}
std::string shown_nats(double nats) { return fmt::format("{:.2g}", nats); }
std::string shown_nats(const interval& i) {
  return fmt::format("{} ({} to {})", shown_nats(i.estimate), shown_nats(i.low), shown_nats(i.high));
}

std::string text_name(const setting& s) { return std::filesystem::path(s.options.text).stem().string(); }

// What is kept, by cell.
class measured {
 public:
  measured(const std::vector<setting>& texts, const std::vector<formats_results>& kept) : texts_(texts), kept_(kept) {}

  // Of the first table, all parts of a text; nothing where none is kept.
  std::optional<kept_blocks> main(std::size_t text, index_t cache, const cell& c) const {
    kept_blocks all;
    for (const formats_job& j : formats_plan(options_of(text)))
      if (j.is_main && j.cache == cache) add(text, j, c, all);
    if (all.tokens.empty()) return {};
    return all;
  }

  // Of the others, all texts together. What is in the first table too counts as far as those go.
  std::optional<kept_blocks> side(index_t cache, const cell& c) const {
    kept_blocks all;
    for (std::size_t text = 0; text < texts_.size(); ++text) {
      index_t tokens = 0;
      for (const formats_job& j : formats_plan(options_of(text)))
        if (!j.is_main && j.cache == cache) tokens = j.tokens;
      bool found = false;
      for (const formats_job& j : formats_plan(options_of(text)))
        if (!found && j.first == 0 && j.cache == cache && std::ranges::find(j.cells, c) != j.cells.end())
          found = add(text, j, c, all, tokens);
      if (!found) return {};
    }
    return all;
  }

 private:
  const options& options_of(std::size_t text) const { return texts_[text].options; }

  bool add(std::size_t text, const formats_job& j, const cell& c, kept_blocks& to, index_t tokens = 1 << 30) const {
    const json* const file = kept_[text](j);
    if (!file) return false;
    const json &result = file->at("result"), &cells = result.at("cells");
    to.add(cells.at(c.name()), cells.at("f32"),
           static_cast<std::size_t>(tokens / result.at("block_tokens").get<index_t>()));
    return true;
  }

  const std::vector<setting>& texts_;
  const std::vector<formats_results>& kept_;
};

class formats_page {
 public:
  formats_page(const std::vector<setting>& texts, const std::vector<formats_results>& kept)
      : texts_(texts), kept_(kept), measured_(texts, kept) {}

  std::string write(const std::string& command) const {
    std::string out = head(command);
    for (const index_t cache : first().options.caches) out += formats(cache) + spared(cache) + unlike(cache);
    return out + method();
  }

 private:
  const setting& first() const { return texts_.front(); }
  index_t head_dim() const { return first().subject.model->config().head_dim; }

  std::string head(const std::string& command) const {
    origin from;
    for (std::size_t i = 0; i < texts_.size(); ++i)
      for (const formats_job& j : formats_plan(texts_[i].options))
        if (const json* const file = kept_[i](j)) from.add(*file);
    return fmt::format(
        "What keys and values of few bits cost, as measured by\n\n```sh\n{}\n```\n\n"
        "Model: {}. {} each of {}. {}\n",
        command, first().subject.name, compare::tokens_text(first().options.tokens), shown_texts(texts_), from.text());
  }

  double megabytes(index_t cache, const cell& c) const {
    double bytes = 0;
    for (index_t i = 0; i < first().subject.model->config().num_hidden_layers; ++i) {
      sinkcache::cache_config config = first().subject.model->info(i).cache;
      config.num_sink_tokens = c.pinned;
      config.window = cache - c.pinned;
      config.recent = c.recent;
      config.rollback = 0;
      bytes += static_cast<double>(c.formats->bytes(config));
    }
    return bytes / 1e6;
  }

  // One row a format, texts side by side.
  std::string formats(index_t cache) const {
    std::string out = fmt::format("\n### Few bits in a cache of {}\n\n| keys/values | bits | MB |",
                                  compare::tokens_text(cache)),
                rule = "|---|---|---|";
    for (const setting& s : texts_) {
      out += fmt::format(" {}: perplexity | KL | same token |", text_name(s));
      rule += "---|---|---|";
    }
    out += "\n" + rule + "\n";
    const std::vector<cell> cells = main_cells();
    const cell floats{&formats_named("f32"), 1, 64};
    out += fmt::format("| f32 | 32 | {:.2f} |", megabytes(cache, floats));
    for (std::size_t i = 0; i < texts_.size(); ++i) {
      const auto found = measured_.main(i, cache, cells.front());
      out +=
          found ? fmt::format(" {:.2f} | | |", std::exp2(mean(*found, &kept_blocks::float_bits).estimate)) : " | | |";
    }
    out += "\n";
    for (const cell& c : cells) {
      out += fmt::format("| {} | {} | {:.2f} |", c.formats->name, c.formats->bits(head_dim()), megabytes(cache, c));
      for (std::size_t i = 0; i < texts_.size(); ++i) {
        const auto found = measured_.main(i, cache, c);
        out += found ? row(*found) : " | | |";
      }
      out += "\n";
    }
    return out;
  }

  static std::string row(const kept_blocks& b) {
    return fmt::format(" {} | {} | {}% |", shown_percent(more_perplexity(b)), shown_nats(mean(b, &kept_blocks::nats)),
                       shown_percent(mean(b, &kept_blocks::same).estimate, false));
  }

  std::string spared(index_t cache) const {
    std::string out = fmt::format(
        "\nWhat is spared, with a cache of {}: KL, and perplexity.\n\n"
        "| keys/values | pinned | 0 recent | 32 recent | 64 recent |\n|---|---|---|---|---|\n",
        compare::tokens_text(cache));
    const std::vector<cell> mains = main_cells();
    bool any = false;
    for (const char* name : few_bits)
      for (const index_t pinned : pinned_tokens) {
        out += fmt::format("| {} | {} |", name, pinned);
        for (const index_t recent : recent_tokens) {
          const cell c{&formats_named(name), pinned, recent};
          const auto found = measured_.side(cache, c);
          any |= found && !std::ranges::count(mains, c);
          out += found ? fmt::format(" {}, {}% |", shown_nats(mean(*found, &kept_blocks::nats).estimate),
                                     shown_percent(more_perplexity(*found).estimate))
                       : " |";
        }
        out += "\n";
      }
    return any ? out : "";
  }

  std::string unlike(index_t cache) const {
    std::string out = fmt::format(
        "\nWithout rotation, keys or values alone, and as ggml rounds, with a cache of {}, 1 pinned:\n\n"
        "| keys/values | recent | bits | perplexity | KL | same token |\n|---|---|---|---|---|---|\n",
        compare::tokens_text(cache));
    std::vector<cell> cells;
    for (const char* name : few_bits) {
      cells.push_back({&formats_named(name), 1, 64});
      cells.push_back({&formats_named(std::string("unrotated ") + name), 1, 64});
    }
    for (const cell& c : unlike_cells())
      if (!std::ranges::count(cells, c)) cells.push_back(c);
    const std::vector<cell> mains = main_cells();
    bool any = false;
    for (const cell& c : cells) {
      const auto found = measured_.side(cache, c);
      any |= found && !std::ranges::count(mains, c);
      out += fmt::format("| {} | {} | {} |{}\n", c.formats->name, c.recent, c.formats->bits(head_dim()),
                         found ? row(*found) : " | | |");
    }
    return any ? out : "";
  }

  std::string method() const {
    const std::vector<formats_job> jobs = formats_plan(first().options);
    const auto side = std::ranges::find_if(jobs, [](const formats_job& j) { return !j.is_main; });
    return fmt::format(
        "\n### How few bits are measured\n\n"
        "- A window and pinned tokens, 1 unless said, in a cache of as many rows as its size; 1 pinned token and the "
        "newest 64\n"
        "  are spared unless said: bf16. Every number is against a cache of f32 that keeps the same tokens, over the "
        "same\n"
        "  tokens: *perplexity* how many percent more, *KL* the mean divergence of the predictions in nats a token, "
        "*same\n"
        "  token* how often the likeliest token is the same one.\n"
        "- A text is read in parts of 8,192 tokens, each a stream of its own; its first tokens, as many as the cache "
        "holds, are\n"
        "  not scored. The tables of what is spared and of other formats are of the first {} of a text, all texts\n"
        "  together.\n"
        "- In brackets: the 95% interval of a bootstrap of blocks of 128 tokens. It says how much depends on which "
        "part of\n"
        "  these texts one takes, not how another text, or another model, would do.\n"
        "- *bits*: of an element, scales counted, keys and values alike; what is spared is not counted. *MB*: of all "
        "layers'\n"
        "  caches, what is spared included.\n"
        "- Loss is evaluated by prefill in chunks, which rounds each row when decoding would, as it leaves the newest. "
        "Codes\n"
        "  that the last bit of an activation tips over are not those of decoding.\n",
        compare::tokens_text(side->tokens));
  }

  const std::vector<setting>& texts_;
  const std::vector<formats_results>& kept_;
  measured measured_;
};

}  // namespace

std::optional<double> mean_nats(const std::vector<setting>& texts, const std::vector<formats_results>& kept,
                                index_t cache, const cell& c) {
  const auto found = measured(texts, kept).side(cache, c);
  if (!found) return {};
  return mean(*found, &kept_blocks::nats).estimate;
}

std::string formats_report(const std::vector<setting>& texts, const std::string& command,
                           const std::vector<formats_results>& kept) {
  return formats_page(texts, kept).write(command);
}

}  // namespace evidence
