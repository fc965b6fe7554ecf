// What sinks and windows do to a real language model over a long text, as a page in Markdown; or a ranking of policies
// by score, or what formats of few bits cost. It takes an hour of two cores or more, and can be interrupted: each run
// is a file in a folder, and what is there is not run again.

#include <fmt/format.h>

#include <algorithm>
#include <csignal>
#include <exception>
#include <filesystem>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "compare/caches.hpp"
#include "compare/comparison.hpp"
#include "compare/files.hpp"
#include "compare/loaded_model.hpp"
#include "compare/parallel.hpp"
#include "compare/progress.hpp"
#include "evidence/formats.hpp"
#include "evidence/jobs.hpp"
#include "evidence/ranking.hpp"
#include "evidence/report.hpp"
#include "text/utf8.hpp"

namespace {

using namespace evidence;

struct interrupted {};

volatile std::sig_atomic_t end_asked = 0;

extern "C" void on_signal(int) { end_asked = 1; }

std::string path_of(const job& j, const options& o) { return o.folder + "/" + j.name() + ".json"; }

// What is not kept yet, `threads` at a time.
void run_all(const std::vector<job>& jobs, const setting& s, std::size_t threads, compare::progress_bar& bar) {
  compare::for_each_index(jobs.size(), threads, [&](std::size_t i) {
    keep(path_of(jobs[i], s.options), jobs[i], s, measure(jobs[i], s, [&](index_t tokens) {
           if (end_asked) throw interrupted();
           bar.step(tokens);
         }));
    bar.say(jobs[i].name());
  });
}

// All of them that are not kept yet; those that are timed by themselves.
void run_missing(const std::vector<job>& jobs, const setting& s) {
  std::vector<job> together, alone;
  index_t left = 0;
  for (const job& j : jobs) {
    if (!kept(path_of(j, s.options), j, s).is_null()) continue;
    (j.is == job::kind::decode ? alone : together).push_back(j);
    left += work(j, s.options);
  }
  if (together.empty() && alone.empty()) return;
  compare::progress_bar bar(left);
  bar.say(fmt::format("{} of {} runs are done, in {}", jobs.size() - together.size() - alone.size(), jobs.size(),
                      compare::shown_path(s.options.folder)));
  run_all(together, s, static_cast<std::size_t>(s.options.threads), bar);
  run_all(alone, s, 1, bar);
}

// By how long a pass over some tokens takes here.
std::string estimate(const setting& s, index_t tokens) {
  engine::session session(*s.subject.model, compare::sink_window(1, 255));
  const double ms = compare::ms_per_pass(session, 256, s.stream.ids, 2, [](index_t) {}) / 256;
  return fmt::format("{} to go, {} at a time and {:.1f} ms each: about {:.0f} minutes", compare::tokens_text(tokens),
                     s.options.threads, ms,
                     ms * static_cast<double>(tokens) / static_cast<double>(s.options.threads) / 60e3);
}

compare::token_stream read(const compare::subject& subject, const options& o) {
  compare::token_stream stream = compare::read_by(subject, compare::read_file(o.text));
  const auto tokens = static_cast<index_t>(stream.ids.size());
  if (tokens <= o.tokens)
    throw compare::usage_error(
        fmt::format("--tokens is {}, but {} has only {} to predict", o.tokens, o.text, tokens - 1));
  const index_t timed = *std::max_element(o.caches.begin(), o.caches.end()) + decoded_tokens;
  if (tokens < timed)
    throw compare::usage_error(
        fmt::format("{} has {}, had to have {} for the timed runs", o.text, compare::tokens_text(tokens), timed));
  return stream;
}

void print_page(const options& o, const std::string& tables, const std::string& part) {
  if (o.markdown.empty())
    fmt::print("{}", page_with(tables, "", part));
  else
    compare::write_atomically(
        o.markdown, page_with(tables, std::filesystem::exists(o.markdown) ? compare::read_file(o.markdown) : "", part));
}

void gather(const options& o, const std::string& command) {
  const compare::loaded_model model(o.model);
  setting s{o, model.subject(o.bos), {}};
  s.stream = read(s.subject, o);
  std::filesystem::create_directories(o.folder);
  if (!o.markdown.empty()) compare::check_writable(o.markdown);
  const std::vector<job> jobs = plan(o);
  run_missing(jobs, s);
  std::map<std::string, json> files;
  for (const job& j : jobs) files.emplace(j.name(), kept(path_of(j, o), j, s));
  print_page(o, report(s, command, [&](const job& j) -> const json& { return files.at(j.name()); }), "evidence");
}

// Those of a text that are kept.
class kept_results {
 public:
  explicit kept_results(const setting& s) : setting_(s) {}

  const json* operator()(const job& j) {
    const auto [file, is_new] = files_.emplace(j.name(), nullptr);
    if (is_new || file->second.is_null()) file->second = kept(path_of(j, setting_.options), j, setting_);
    return file->second.is_null() ? nullptr : &file->second;
  }

 private:
  const setting& setting_;
  std::map<std::string, json> files_;
};

// Several texts, each with a folder of its own.
struct texts_at_hand {
  std::list<options> of_texts;
  std::vector<setting> all;

  texts_at_hand(const options& o, const compare::subject& subject, index_t tokens) {
    for (const std::string& text : o.texts) {
      options& own = of_texts.emplace_back(o);
      own.text = text;
      own.folder += "/" + subject.name + "/" + std::filesystem::path(text).stem().string();
      std::filesystem::create_directories(own.folder);
      all.push_back({own, subject, {}});
      all.back().stream = compare::read_by(subject, compare::read_file(text));
      const auto has = static_cast<index_t>(all.back().stream.ids.size());
      if (has <= tokens)
        throw compare::usage_error(
            fmt::format("{} has {}, had to have {}", text, compare::tokens_text(has), tokens + 1));
    }
    for (const std::string& path : {o.markdown, o.svg})
      if (!path.empty()) compare::check_writable(path);
  }
};

void rank(options o, const std::string& command) {
  const compare::loaded_model model(o.model);
  if (o.caches.empty()) {
    const std::optional<index_t> trained = model.model().config().max_position_embeddings;
    if (!trained) throw compare::usage_error("--caches is missing, and the model does not say what it was trained on");
    for (const index_t part : {4, 8, 16}) o.caches.push_back(*trained / part);
  }
  const index_t largest = *std::max_element(o.caches.begin(), o.caches.end());
  const texts_at_hand at_hand(o, model.subject(o.bos), std::max(o.tokens, largest + decoded_tokens));
  const std::vector<setting>& texts = at_hand.all;

  std::list<kept_results> files;
  std::vector<results> all;
  for (const setting& s : texts) {
    kept_results& of_text = files.emplace_back(s);
    all.emplace_back([&of_text](const job& j) { return of_text(j); });
  }
  if (!o.report_only) {
    index_t left = 0;
    for (std::size_t i = 0; i < texts.size(); ++i)
      for (const job& j : ranking_plan(texts[i].options, i == 0)) left += all[i](j) ? 0 : work(j, texts[i].options);
    if (left > 0) fmt::print(stderr, "{}\n", estimate(texts.front(), left));
    for (int now = 0; now < stages; ++now)
      for (std::size_t i = 0; i < texts.size(); ++i) {
        std::vector<job> jobs = ranking_plan(texts[i].options, i == 0);
        std::erase_if(jobs, [&](const job& j) { return stage(j) != now; });
        run_missing(jobs, texts[i]);
      }
    for (const index_t cache : o.caches) {
      const std::vector<contender> changed = variants(texts, cache, all);
      for (const setting& s : texts) run_missing(variants_plan(s, cache, changed), s);
    }
  }
  print_page(o, ranking_report(texts, command, all), "ranking " + texts.front().subject.name);
  if (!o.svg.empty()) compare::write_atomically(o.svg, ranking_svg(texts, all));
}

void cost_formats(const options& o, const std::string& command) {
  const compare::loaded_model model(o.model);
  const texts_at_hand at_hand(o, model.subject(o.bos), o.tokens + *std::max_element(o.caches.begin(), o.caches.end()));
  const auto path_of = [](const formats_job& j, const setting& s) {
    return s.options.folder + "/" + j.name() + ".json";
  };
  if (!o.report_only) {
    std::vector<std::pair<const setting*, formats_job>> missing;
    index_t left = 0;
    for (std::size_t i = 0; i < formats_plan(o).size(); ++i)
      for (const setting& s : at_hand.all) {
        const formats_job j = formats_plan(o)[i];
        if (!kept(path_of(j, s), inputs(j, s)).is_null()) continue;
        missing.emplace_back(&s, j);
        left += work(j);
      }
    if (!missing.empty()) {
      compare::progress_bar bar(left);
      bar.say(estimate(at_hand.all.front(), left));
      compare::for_each_index(missing.size(), static_cast<std::size_t>(o.threads), [&](std::size_t i) {
        const auto& [s, j] = missing[i];
        keep(path_of(j, *s), inputs(j, *s), measure(j, *s, [&](index_t tokens) {
               if (end_asked) throw interrupted();
               bar.step(tokens);
             }));
        bar.say(fmt::format("{} of {}", j.name(), compare::shown_path(s->options.text)));
      });
    }
  }
  std::list<std::map<std::string, json>> files;
  std::vector<formats_results> all;
  for (const setting& s : at_hand.all) {
    std::map<std::string, json>& of_text = files.emplace_back();
    for (const formats_job& j : formats_plan(s.options)) of_text[j.name()] = kept(path_of(j, s), inputs(j, s));
    all.emplace_back([&of_text](const formats_job& j) {
      const json& file = of_text.at(j.name());
      return file.is_null() ? nullptr : &file;
    });
  }
  print_page(o, formats_report(at_hand.all, command, all), "formats " + at_hand.all.front().subject.name);
  if (!o.svg.empty()) compare::write_atomically(o.svg, formats_svg(at_hand.all, all));
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  try {
    std::string command;
    for (int i = 0; i < argc; ++i) command += fmt::format("{}{}", i ? " " : "", argv[i]);
    if (const auto options = parse_options(argc, argv))
      options->ranking   ? rank(*options, command)
      : options->formats ? cost_formats(*options, command)
                         : gather(*options, command);
    if (std::fflush(stdout) != 0) throw std::runtime_error("the output cannot be written");
  } catch (const interrupted&) {
    fmt::print(stderr, "evidence: interrupted; the same command goes on from here\n");
    return 130;
  } catch (const compare::usage_error& error) {
    fmt::print(stderr, "evidence: {}\n(--help lists the options)\n", text::harmless(error.what()));
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "evidence: {}\n", text::harmless(error.what()));
    return 1;
  }
}
