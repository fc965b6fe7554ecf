// What sinks and windows do to a real language model over a long text, as a page in Markdown. It takes up to 80 minutes
// of two cores, and can be interrupted: each run is a file in a folder, and what is there is not run again.

#include <fmt/format.h>

#include <algorithm>
#include <csignal>
#include <exception>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "compare/comparison.hpp"
#include "compare/files.hpp"
#include "compare/loaded_model.hpp"
#include "compare/parallel.hpp"
#include "compare/progress.hpp"
#include "evidence/jobs.hpp"
#include "evidence/report.hpp"

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

void gather(const options& o, const std::string& command) {
  const compare::loaded_model model(o.model);
  setting s{o, model.subject(o.bos), {}};
  s.stream = compare::read_by(s.subject, compare::read_file(o.text));
  if (static_cast<index_t>(s.stream.ids.size()) <= o.tokens)
    throw compare::usage_error(
        fmt::format("--tokens is {}, but {} has only {} to predict", o.tokens, o.text, s.stream.ids.size() - 1));

  const index_t timed = *std::max_element(o.caches.begin(), o.caches.end()) + decoded_tokens;
  if (static_cast<index_t>(s.stream.ids.size()) < timed)
    throw compare::usage_error(fmt::format("{} has {}, had to have {} for the timed runs", o.text,
                                           compare::tokens_text(static_cast<index_t>(s.stream.ids.size())), timed));

  std::filesystem::create_directories(o.folder);
  if (!o.markdown.empty()) compare::check_writable(o.markdown);
  const std::vector<job> jobs = plan(o);
  std::vector<job> together, alone;
  index_t left = 0;
  for (const job& j : jobs) {
    if (!kept(path_of(j, o), j, s).is_null()) continue;
    (j.is == job::kind::decode ? alone : together).push_back(j);
    left += work(j, o);
  }
  if (together.size() + alone.size() > 0) {
    compare::progress_bar bar(left);
    bar.say(fmt::format("{} of {} runs are done, in {}", jobs.size() - together.size() - alone.size(), jobs.size(),
                        compare::shown_path(o.folder)));
    run_all(together, s, static_cast<std::size_t>(o.threads), bar);
    run_all(alone, s, 1, bar);
  }

  std::map<std::string, json> files;
  for (const job& j : jobs) files.emplace(j.name(), kept(path_of(j, o), j, s));
  const std::string tables = report(s, command, [&](const job& j) -> const json& { return files.at(j.name()); });
  if (o.markdown.empty())
    fmt::print("{}", page_with(tables, ""));
  else
    compare::write_atomically(
        o.markdown, page_with(tables, std::filesystem::exists(o.markdown) ? compare::read_file(o.markdown) : ""));
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  try {
    std::string command;
    for (int i = 0; i < argc; ++i) command += fmt::format("{}{}", i ? " " : "", argv[i]);
    if (const auto options = parse_options(argc, argv)) gather(*options, command);
    if (std::fflush(stdout) != 0) throw std::runtime_error("the output cannot be written");
  } catch (const interrupted&) {
    fmt::print(stderr, "evidence: interrupted; the same command goes on from here\n");
    return 130;
  } catch (const compare::usage_error& error) {
    fmt::print(stderr, "evidence: {}\n(--help lists the options)\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "evidence: {}\n", error.what());
    return 1;
  }
}
