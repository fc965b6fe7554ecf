// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "options.hpp"

#include <set>
#include <thread>

#include "../compare/command_line.hpp"
#include "../compare/known_models.hpp"
#include "../compare/scored_policies.hpp"

namespace evidence {

std::optional<options> parse_options(int argc, const char* const* argv) {
  options o;
  o.model = "smollm2";
  o.text = SINKCACHE_SOURCE_DIR "/examples/data/sotu-heldout.txt";
  o.caches = {256, 1024};
  o.folder = SINKCACHE_SOURCE_DIR "/build/evidence";
  o.threads = static_cast<index_t>(std::max(1U, std::thread::hardware_concurrency()));
  CLI::App app(
      "What sinks and windows do to a language model over a long text: loss, memory, time, and what it can recall.\n"
      "Every run is kept in a folder, so that one may interrupt it and go on later.",
      "evidence");
  app.get_formatter()->column_width(18);
  app.add_option("--model", o.model, "a model as of compare_policies (default: smollm2)")->type_name("FILE");
  app.add_option("--text", o.text, "what to predict (default: examples/data/sotu-heldout.txt)")->type_name("FILE");
  app.add_flag("--bos", o.bos, "begin with the model's BOS token where it is not used to one, as SmolLM2 is not");
  const auto count = [&app](const std::string& name, index_t min, index_t max, index_t& to,
                            const std::string& description) {
    compare::add_count<index_t>(app, name, min, max, description, [&to](index_t n) { to = n; });
  };
  app.add_option_function<std::string>(
         "--caches",
         [&o](const std::string& list) {
           o.caches.clear();
           for (const std::string& each : compare::split("--caches", list))
             o.caches.push_back(compare::parse_count<index_t>("--caches", each, 16, 1 << 20));
         },
         "tokens that the caches hold, pinned ones included (default: 256,1024)")
      ->type_name("LIST");
  app.add_flag("--ranking", o.ranking,
               "rank all policies by score instead: loss after the first eviction on two texts, far recall,\n"
               "memory and time (then --tokens is 32768 by default, --facts 32, and --caches 1/4, 1/8\n"
               "and 1/16 of what the model was trained on)");
  app.add_flag("--formats", o.formats,
               "measure what keys and values of few bits cost instead: perplexity, and how far predictions differ\n"
               "from those of f32, on two texts (then --tokens is 32768 by default)")
      ->excludes("--ranking");
  std::string texts;
  CLI::Option* of_texts = app.add_option("--texts", texts,
                                         "of --ranking and --formats, comma separated\n"
                                         "(default: examples/data/sotu-heldout.txt,examples/data/kjv-heldout.txt)")
                              ->type_name("LIST");
  CLI::Option* svg = app.add_option("--svg", o.svg,
                                    "draw the ranking there, loss and recall against bytes, or divergence against bits")
                         ->type_name("FILE");
  std::string only;
  CLI::Option* of_only =
      app.add_option("--only", only, "rank these alone, comma separated names of compare_policies --list-policies")
          ->type_name("LIST");
  CLI::Option* report_only =
      app.add_flag("--report-only", o.report_only, "run nothing: report what of --ranking or --formats is kept so far");
  count("--tokens", 32, 1 << 30, o.tokens, "tokens to predict (default: 65536)");
  count("--side-tokens", 1, 1 << 30, o.side_tokens,
        "of the ranking, tokens after the first eviction of runs with fewer pinned tokens, an interval of 64,\n"
        "other budgets or few bits (default: 3072)");
  count("--targets", 1, 1 << 20, o.targets, "of them, how many to recompute (default: 128)");
  count("--facts", 1, 1 << 20, o.facts, "facts to plant for each distance (default: 64)");
  count("--check", 0, 1 << 30, o.check,
        "tokens on which prefill in chunks is compared with decoding token by token\n"
        "(default: 4096; 0: none)");
  count("--threads", 1, 1024, o.threads, "runs at a time, and threads of the timed runs (default: one a core)");
  app.add_option("--folder", o.folder, "where the runs are kept (default: build/evidence)")->type_name("DIR");
  app.add_option("--markdown", o.markdown,
                 "write the tables there, between its lines <!-- evidence --> (<!-- ranking MODEL -->, <!-- formats "
                 "MODEL -->)\n"
                 "and <!-- end -->, "
                 "if it has them "
                 "(default: print them)")
      ->type_name("FILE");
  if (!compare::parse(app, argc, argv)) return {};
  if (!o.ranking && of_only->count() > 0) throw compare::usage_error("--only is of --ranking");
  if (!o.ranking && !o.formats && of_texts->count() + svg->count() + report_only->count() > 0)
    throw compare::usage_error("--texts, --svg and --report-only are of --ranking and --formats");
  if (o.ranking) {
    if (app.count("--facts") == 0) o.facts = 32;
    if (app.count("--caches") == 0) o.caches.clear();
    if (of_only->count() > 0) o.only = compare::split("--only", only);
    for (const std::string& name : o.only) compare::parse_scored(name, {});
  }
  if (o.ranking || o.formats) {
    if (app.count("--tokens") == 0) o.tokens = 32768;
    if (app.count("--folder") == 0)
      o.folder = fmt::format("{}/build/{}", SINKCACHE_SOURCE_DIR, o.ranking ? "ranking" : "formats");
    o.check = 0;
    o.texts = of_texts->count() > 0 ? compare::split("--texts", texts)
                                    : std::vector<std::string>{SINKCACHE_SOURCE_DIR "/examples/data/sotu-heldout.txt",
                                                               SINKCACHE_SOURCE_DIR "/examples/data/kjv-heldout.txt"};
    o.text = o.texts.front();
  }
  if (std::set(o.caches.begin(), o.caches.end()).size() < o.caches.size())
    throw compare::usage_error("--caches has a size twice");
  if (o.formats) o.targets = 1;  // no more tokens than the caches hold
  for (const index_t cache : o.caches)
    if (cache + o.targets > o.tokens)
      throw compare::usage_error(fmt::format("--tokens is {}, had to be at least {}: a cache of {} and the targets",
                                             o.tokens, cache + o.targets, cache));
  if (o.check > o.tokens)
    throw compare::usage_error(fmt::format("--check is {}, had to be at most --tokens, {}", o.check, o.tokens));
  o.model = compare::model_file(o.model);
  return o;
}

}  // namespace evidence
