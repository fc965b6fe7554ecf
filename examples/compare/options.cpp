// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "options.hpp"

#include <algorithm>
#include <set>

#include "command_line.hpp"
#include "known_models.hpp"

namespace compare {
namespace {

policy parse_policy(const std::string& name, index_t cache) {
  if (name == "full") return {policy::kind::full, 0, name};
  if (name == "window") return {policy::kind::window, 0, name};
  if (name == "recompute") return {policy::kind::recompute, 1, name};
  if (!name.starts_with("sinks:"))
    throw usage_error(fmt::format("--policies: '{}' had to be full, window, sinks:N or recompute", name));
  const std::optional<index_t> sinks = loaders::whole_number<index_t>(name.substr(6), 1, cache - 1);
  if (!sinks)
    throw usage_error(
        fmt::format("--policies: '{}' had to be sinks:N with N from 1 to {}, below --cache", name, cache - 1));
  return {policy::kind::sinks, *sinks, fmt::format("sinks:{}", *sinks)};
}

}  // namespace

std::vector<std::string> split(const char* option, const std::string& list) {
  std::vector<std::string> parts;
  for (std::size_t first = 0, last = 0; last != std::string::npos; first = last + 1) {
    last = list.find(',', first);
    parts.push_back(list.substr(first, last - first));
    if (parts.back().empty()) throw usage_error(fmt::format("{} '{}' has an empty entry", option, list));
  }
  return parts;
}

const char* const usage =
    "usage: compare_policies [--model FILE | --models LIST] [--text FILE] [--bos] [--cache N] [--policies LIST]\n"
    "                        [--tokens N] [--threads N] [--json FILE] [--svg FILE]\n"
    "       compare_policies --help\n";

std::vector<policy> parse_policies(const std::string& list, index_t cache) {
  std::vector<policy> policies;
  std::set<std::string> seen;
  for (const std::string& name : split("--policies", list)) {
    policies.push_back(parse_policy(name, cache));
    if (!seen.insert(policies.back().name).second)
      throw usage_error(fmt::format("--policies has {} twice", policies.back().name));
  }
  return policies;
}

std::optional<options> parse_options(int argc, const char* const* argv) {
  options o;
  std::string policies = "full,window,sinks:1,sinks:4,recompute", models;
  CLI::App app("What a small KV cache costs a language model, policy by policy, in bits per byte of a text.",
               "compare_policies");

  app.get_formatter()->column_width(18);

  const auto text = [&app](const std::string& name, std::string& to, const std::string& type,
                           const std::string& description) {
    const auto not_empty = [](const std::string& value) { return value.empty() ? "is empty" : std::string(); };
    return app.add_option(name, to, description)->type_name(type)->check(not_empty);
  };

  std::string model = "tiny-natural";
  CLI::Option* one = text("--model", model, "FILE",
                          "a GGUF file, a safetensors file with its configuration in the metadata,\n"
                          "a name in examples/models (default: tiny-natural), or smollm2:\n"
                          "SmolLM2-135M, which examples/get-model smollm2 gets");
  CLI::Option* several = text("--models", models, "LIST",
                              "several models side by side, comma separated,\n"
                              "each also with its own remedy removed");
  text("--text", o.text, "FILE", "what to predict (default: examples/data/sotu-heldout.txt)");
  app.add_flag("--bos", o.bos, "begin with the model's BOS token where it is not used to one, as SmolLM2 is not");
  add_count<index_t>(app, "--cache", 2, index_t{1} << 20,
                     "tokens that a cache holds, pinned ones included (default: 128)",
                     [&o](index_t n) { o.cache = n; });
  text("--policies", policies, "LIST",
       "comma separated (default: full,window,sinks:1,sinks:4,recompute)\n"
       "full: nothing is evicted\n"
       "window: the newest tokens\n"
       "sinks:N: the first N tokens for ever, and the newest\n"
       "recompute: a fresh pass over the first token and the newest, at sampled tokens");
  add_count<index_t>(app, "--tokens", 2, index_t{1} << 30,
                     "tokens to predict (default: 20480 bytes, 4096 where a token is more, or all of\na shorter text)",
                     [&o](index_t n) { o.tokens = n; });
  add_count<index_t>(app, "--threads", 1, 1024,
                     "policies evaluated at a time, which changes no result (default: one a core)\n"
                     "times per token are undisturbed with 1 only: runs share memory bandwidth",
                     [&o](index_t n) { o.threads = static_cast<std::size_t>(n); });
  text("--json", o.json, "FILE", "write all results there");
  CLI::Option* svg = text("--svg", o.svg, "FILE", "draw the loss along the stream there");
  several->excludes(one)->excludes(svg);

  if (!parse(app, argc, argv)) return {};

  o.remedies = several->count() > 0;
  for (const std::string& name : o.remedies ? split("--models", models) : std::vector{model}) {
    const std::string file = model_file(name);
    if (std::find(o.models.begin(), o.models.end(), file) != o.models.end())
      throw usage_error(fmt::format("--models has {} twice", name));
    o.models.push_back(file);
  }
  if (o.text.empty()) o.text = SINKCACHE_SOURCE_DIR "/examples/data/sotu-heldout.txt";
  if (!o.json.empty() && o.json == o.svg) throw usage_error("--json and --svg are the same file");
  o.policies = parse_policies(policies, o.cache);
  return o;
}

}  // namespace compare
