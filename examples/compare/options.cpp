// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "options.hpp"

#include <algorithm>
#include <set>

#include "command_line.hpp"
#include "known_models.hpp"
#include "kv_formats.hpp"
#include "scored_policies.hpp"

namespace compare {
namespace {

policy parse_policy(const std::string& entry, index_t cache) {
  if (entry == "full") return {policy::kind::full, 0, entry};
  if (entry == "window") return {policy::kind::window, 0, entry};
  if (entry == "recompute") return {policy::kind::recompute, 1, entry};
  if (entry.starts_with("sinks:")) {
    const std::optional<index_t> sinks = loaders::whole_number<index_t>(entry.substr(6), 1, cache - 1);
    if (!sinks)
      throw usage_error(
          fmt::format("--policies: '{}' had to be sinks:N with N from 1 to {}, below --cache", entry, cache - 1));
    return {policy::kind::sinks, *sinks, fmt::format("sinks:{}", *sinks)};
  }
  const std::size_t colon = std::min(entry.find(':'), entry.size());
  if (colon + 1 == entry.size())
    throw usage_error(fmt::format("--policies: '{}' had to have parameters after the colon, or no colon", entry));
  for (const char* const plain : {"full", "window", "recompute"})
    if (entry.substr(0, colon) == plain)
      throw usage_error(fmt::format("--policies: '{}' had to be {} alone: it has no parameters", entry, plain));
  std::vector<std::string> parameters;
  if (colon < entry.size()) parameters = split("--policies", entry.substr(colon + 1));
  const auto scored = std::make_shared<const scored_policy>(parse_scored(entry.substr(0, colon), parameters));
  return {policy::kind::scored, scored->sinks, scored->shown(), scored};
}

// Policies with their parameters.
std::vector<std::string> entries(const std::string& list) {
  std::vector<std::string> all;
  for (const std::string& item : split("--policies", list)) {
    const bool goes_on = item.find('=') < item.find(':');
    if (goes_on && all.empty())
      throw usage_error(fmt::format("--policies begins with '{}', had to begin with a policy", item));
    if (!goes_on)
      all.push_back(item);
    else
      all.back() += (all.back().find(':') == std::string::npos ? ':' : ',') + item;
  }
  return all;
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

std::string default_policies() {
  std::string list = "window,sinks:1,sinks:4,random,h2o,tova";
  for (const std::string& own : registered_policies()) list += "," + own;
  return list;
}

const char* const usage =
    "usage: compare_policies [--model FILE | --models LIST] [--text FILE] [--bos] [--cache N | --bytes N]\n"
    "                        [--policies LIST] [--kv-format LIST] [--kv-recent N] [--tokens N] [--threads N]\n"
    "                        [--json FILE] [--svg FILE]\n"
    "       compare_policies --list-policies\n"
    "       compare_policies --help\n";

index_t least_cache(const policy& p) {
  switch (p.is) {
    case policy::kind::full:
    case policy::kind::window:
      return 1;
    case policy::kind::recompute:
      return 2;
    case policy::kind::sinks:
      return p.num_sink_tokens + 1;
    case policy::kind::scored:
      break;
  }
  return p.scored->kept() + 1 + p.scored->interval;
}

void require_fits(const policy& p, index_t cache) {
  if (cache >= least_cache(p)) return;
  if (p.is != policy::kind::scored)
    throw usage_error(fmt::format("--cache is {}, {} had to have at least {}", cache, p.name, least_cache(p)));
  throw usage_error(fmt::format(
      "--cache is {}, {} had to have at least {}: {} tokens that never leave (sinks={}, recent={} or its "
      "own window), one that may, and interval={}",
      cache, p.name, least_cache(p), p.scored->kept(), p.scored->sinks, p.scored->recent, p.scored->interval));
}

std::vector<policy> parse_policies(const std::string& list, index_t cache) {
  std::vector<policy> policies;
  std::set<std::string> seen;
  for (const std::string& entry : entries(list)) {
    policies.push_back(parse_policy(entry, cache));
    require_fits(policies.back(), cache);
    if (!seen.insert(policies.back().name).second)
      throw usage_error(fmt::format("--policies has {} twice", policies.back().name));
  }
  return policies;
}

std::vector<policy> with_kv_formats(const std::vector<policy>& policies, const std::string& list, index_t kv_recent) {
  std::vector<policy> all;
  std::vector<const kv_formats*> chosen;
  for (const std::string& entry : split("--kv-format", list)) {
    const std::size_t slash = std::min(entry.find('/'), entry.size());
    const bool twice = entry.substr(0, slash) == entry.substr(std::min(slash + 1, entry.size()));
    const std::string name = twice ? entry.substr(0, slash) : entry;
    std::string known;
    const kv_formats* found = nullptr;
    for (const kv_formats& each : all_kv_formats()) {
      known += (known.empty() ? "" : ", ") + each.name;
      if (each.name == name) found = &each;
    }
    if (!found) throw usage_error(fmt::format("--kv-format: '{}' had to be one of: {}", entry, known));
    if (std::find(chosen.begin(), chosen.end(), found) != chosen.end())
      throw usage_error(fmt::format("--kv-format has {} twice", name));
    chosen.push_back(found);
  }
  for (const policy& p : policies)
    for (const kv_formats* const formats : chosen) {
      all.push_back(p);
      all.back().name += " " + formats->name;
      all.back().formats = formats;
      all.back().kv_recent = kv_recent;
    }
  return all;
}

std::optional<options> parse_options(int argc, const char* const* argv) {
  options o;
  std::string policies = default_policies(), models;
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
  add_count<index_t>(app, "--cache", 2, most_tokens,
                     "tokens that a cache holds, pinned ones and those until the next event included\n(default: 128)",
                     [&o](index_t n) { o.cache = n; });
  add_count<std::size_t>(app, "--bytes", 1, std::size_t{1} << 50,
                         "bytes that all layers' caches may take, instead: each policy holds the tokens that fit",
                         [&o](std::size_t n) { o.bytes = n; });
  app.get_option("--bytes")->excludes(app.get_option("--cache"));
  text("--policies", policies, "LIST",
       fmt::format("comma separated (default: {})\n"
                   "full, window, sinks:N, recompute, and policies by score with their parameters,\n"
                   "as in window,h2o:sinks=4,recent=32,tova: --list-policies explains them",
                   policies));
  std::string kv_formats;
  index_t kv_recent = 64;
  CLI::Option* formats = text("--kv-format", kv_formats, "LIST",
                              "store keys and values so, each policy each way, comma separated (default: f32):\n"
                              "f32, f16, bf16, q8, q6, q4, q2, or keys/values, as in f32,q8,q8/q4,q4/q2;\n"
                              "without --policies these are window and sinks:1 then");
  add_count<index_t>(app, "--kv-recent", 0, most_tokens,
                     "newest tokens that q8, q6, q4 and q2 leave in bf16, as they do pinned ones (default: 64)",
                     [&kv_recent](index_t n) { kv_recent = n; });
  app.get_option("--kv-recent")->needs(formats);
  bool list = false;
  app.add_flag("--list-policies", list, "explain the policies, a line each, and their parameters");
  add_count<index_t>(app, "--tokens", 2, index_t{1} << 30,
                     "tokens to predict (default: 20480 bytes, 4096 where a token is more, or all of\na shorter text)",
                     [&o](index_t n) { o.tokens = n; });
  add_count<index_t>(app, "--threads", 1, 1024,
                     "policies evaluated at a time, which changes no result (default: one a core)\n"
                     "times per token are undisturbed with 1 only: runs share memory bandwidth",
                     [&o](index_t n) { o.threads = static_cast<std::size_t>(n); });
  text("--json", o.json, "FILE", "write all results there");
  CLI::Option* svg =
      text("--svg", o.svg, "FILE", "draw the loss along the stream there; with --kv-format the loss against bytes");
  several->excludes(one)->excludes(svg)->excludes(app.get_option("--bytes"));

  if (!parse(app, argc, argv)) return {};
  if (list) {
    fmt::print("{}", listed_policies());
    return {};
  }

  o.remedies = several->count() > 0;
  for (const std::string& name : o.remedies ? split("--models", models) : std::vector{model}) {
    const std::string file = model_file(name);
    if (std::find(o.models.begin(), o.models.end(), file) != o.models.end())
      throw usage_error(fmt::format("--models has {} twice", name));
    o.models.push_back(file);
  }
  if (o.text.empty()) o.text = SINKCACHE_SOURCE_DIR "/examples/data/sotu-heldout.txt";
  if (!o.json.empty() && o.json == o.svg) throw usage_error("--json and --svg are the same file");
  if (formats->count() > 0) {
    if (app.count("--policies") == 0) policies = "window,sinks:1";
    o.policies = with_kv_formats(parse_policies(policies, o.bytes ? most_tokens : o.cache), kv_formats, kv_recent);
    o.crosses_formats = true;
    return o;
  }
  if (app.count("--policies") > 0 || o.bytes) {
    o.policies = parse_policies(policies, o.bytes ? most_tokens : o.cache);
    return o;
  }
  // Of those that nobody asked for, what scores tokens may be too much for a small cache.
  std::string fitting;
  for (const std::string& entry : split("--policies", policies)) {
    const bool fits = least_cache(parse_policies(entry, most_tokens).front()) <= o.cache || entry.starts_with("sinks:");
    (fits ? fitting : o.left_out) += (fits ? fitting : o.left_out).empty() ? entry : "," + entry;
  }
  o.policies = parse_policies(fitting, o.cache);
  return o;
}

}  // namespace compare
