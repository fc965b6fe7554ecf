// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "program.hpp"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <numeric>

#include "caches.hpp"
#include "evaluate.hpp"
#include "files.hpp"
#include "loaded_model.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "svg.hpp"
#include "text/utf8.hpp"

namespace compare {
namespace {

// The models of the command line, with --models each followed by itself without its remedy. Plain softmax has none of
// its own: its remedy is the pinned token, so the window's row shows it removed.
std::vector<subject> subjects_of(const options& o, std::vector<loaded_model>& models) {
  std::vector<subject> subjects;
  for (const std::string& file : o.models) {
    subject s = models.emplace_back(file).subject(o.bos);
    subjects.push_back(s);
    s.remedy_removed = true;
    if (o.remedies && s.model->config().attention != loaders::attention_kind::softmax) subjects.push_back(s);
  }
  return subjects;
}

// Each policy gets the tokens that fit; the losses are compared from where the last of them evicts.
void at_equal_bytes(options& o, const engine::model& model) {
  o.cache = 2;
  for (policy& p : o.policies) {
    if (p.is == policy::kind::full) continue;
    p.cache = cache_of(p, model, *o.bytes);
    o.cache = std::max(o.cache, p.cache);
  }
}

// What a library's cache cannot be is told before the others have run.
void require_cache(const policy& p, index_t cache, const std::vector<subject>& subjects) {
  if (p.is != policy::kind::scored) return;
  try {
    for (const subject& s : subjects) cache_bytes(p, *s.model, p.cache > 0 ? p.cache : cache);
  } catch (const std::invalid_argument& error) {
    throw usage_error(fmt::format("--policies: {}: {}", p.name, error.what()));
  }
}

setting setting_of(const options& o, const std::vector<subject>& subjects, const std::vector<token_stream>& streams) {
  index_t available = index_t{1} << 30, tokens = default_tokens;
  for (const token_stream& stream : streams)
    available = std::min(available, static_cast<index_t>(stream.ids.size()) - 1);
  for (const subject& s : subjects)
    if (s.tokenizer) tokens = default_long_tokens;
  if (available < 2)
    throw std::runtime_error(fmt::format("{}: too short, there have to be 2 tokens to predict", o.text));
  if (o.tokens && *o.tokens > available)
    throw usage_error(fmt::format("--tokens is {}, but {} has only {} to predict", *o.tokens, o.text, available));
  setting s{shown_path(o.text), o.cache, o.tokens.value_or(std::min(tokens, available))};
  s.cache_bytes = o.bytes.value_or(0);
  if (subjects.front().tokenizer) {
    const auto bytes = streams.front().bytes.begin() + 1;
    s.bytes = std::accumulate(bytes, bytes + s.tokens, index_t{0});
  }
  return s;
}

void compare_all(options o) {
  std::vector<loaded_model> models;
  const std::vector<subject> subjects = subjects_of(o, models);
  const std::string text = read_file(o.text);
  std::vector<token_stream> streams;
  for (const subject& subject : subjects) streams.push_back(read_by(subject, text));
  if (o.bytes) at_equal_bytes(o, models.front().model());
  const setting s = setting_of(o, subjects, streams);
  for (const policy& p : o.policies) require_cache(p, s.cache, subjects);
  for (const std::string& path : {o.json, o.svg})
    if (!path.empty()) check_writable(path);

  std::vector<run> runs;
  {
    progress_bar progress(work(subjects, o.policies, s.cache, s.tokens));
    runs = evaluate(subjects, o.policies, streams, s.cache, s.tokens, o.threads,
                    [&progress](index_t tokens) { progress.step(tokens); });
  }
  std::vector<comparison> comparisons;
  for (std::size_t i = 0; i < subjects.size(); ++i)
    comparisons.emplace_back(std::span(runs).subspan(i * o.policies.size(), o.policies.size()), s.cache);

  fmt::print("{}\n", text::harmless(header(s, subjects)));
  fmt::print("{}\n", o.remedies ? models_table(comparisons) : table(comparisons.front()));
  if (!o.left_out.empty())
    fmt::print("left out, as the cache is too small for their default parameters: {}\n", o.left_out);
  if (const std::string note = seeded_note(subjects); !note.empty()) fmt::print("{}\n", note);
  fmt::print("{}\n", o.remedies ? models_sentence(comparisons) : sentence(comparisons.front().findings()));

  if (!o.json.empty()) write_atomically(o.json, to_json(s, comparisons));
  if (!o.svg.empty()) write_atomically(o.svg, (o.crosses_formats ? to_front_svg : to_svg)(s, comparisons.front()));
}

}  // namespace

int compare_policies(int argc, const char* const* argv) {
  try {
    if (const auto options = parse_options(argc, argv)) compare_all(*options);
    if (std::fflush(stdout) != 0) throw std::runtime_error("the output cannot be written");
  } catch (const usage_error& error) {
    fmt::print(stderr, "compare_policies: {}\n{}", text::harmless(error.what()), usage);
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "compare_policies: {}\n", text::harmless(error.what()));
    return 1;
  }
  return 0;
}

}  // namespace compare
