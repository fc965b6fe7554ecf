#include "options.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "../compare/command_line.hpp"
#include "../compare/known_models.hpp"

namespace chat {
namespace {

using compare::usage_error;

// The number of sinks:N; nothing of another policy.
std::optional<index_t> counted_sinks(const std::string& policy, index_t cache) {
  if (!policy.starts_with("sinks:")) return {};
  return loaders::whole_number<index_t>(policy.substr(6), 1, cache - 1);
}

void check_policy(const options& o) {
  const index_t cache = o.cache.value_or(default_cache);
  if (o.policy == "window" || o.policy == "full" || counted_sinks(o.policy, cache)) return;
  if (o.policy == "sinks:system" && !o.prompt) return;
  throw usage_error(fmt::format("--policy is '{}', had to be window, sinks:N with N from 1 to {}{}, or full", o.policy,
                                cache - 1, o.prompt ? "" : ", sinks:system"));
}

}  // namespace

index_t pinned_tokens(const options& o, index_t system_tokens) {
  const index_t cache = o.cache.value_or(default_cache);
  if (o.policy != "sinks:system") return counted_sinks(o.policy, cache).value_or(0);
  // Without a system turn, as many as do in other texts.
  if (system_tokens == 0) return std::min<index_t>(4, cache - 1);
  if (system_tokens >= cache)
    throw usage_error(
        fmt::format("--cache is {}, had to be above {}, the tokens of the system turn that sinks:system pins", cache,
                    system_tokens));
  return system_tokens;
}

std::string pinning_hint(const options& o, index_t system_tokens) {
  const index_t pinned = pinned_tokens(o, system_tokens);
  if (o.policy == "full" || pinned >= system_tokens) return {};
  return fmt::format(
      "--policy {} pins {} of the {} tokens of the system turn, and the model will forget the others: "
      "sinks:system pins all",
      o.policy, pinned, system_tokens);
}

std::optional<options> parse_options(int argc, const char* const* argv) {
  options o;
  std::optional<double> temperature;
  CLI::App app("A language model talks with you, or writes, for as long as you like, in constant memory.",
               "stream_chat");
  app.get_formatter()->column_width(18);
  app.add_option("--model", o.model,
                 "a GGUF or safetensors file, or a name in examples/models, or smollm2: the one\n"
                 "in the cache folder (default: smollm2)")
      ->type_name("FILE");
  app.add_option("--write", o.prompt, "continue this text instead of talking")->type_name("TEXT");
  app.add_option("--policy", o.policy,
                 "window: keep the newest tokens\n"
                 "sinks:N: keep the first N tokens for ever, and the newest (default with --write: sinks:4)\n"
                 "sinks:system: as many as the system turn has (default in a chat)\n"
                 "full: keep all, and end when the cache is full")
      ->type_name("POLICY");
  compare::add_count<index_t>(app, "--cache", 2, index_t{1} << 20,
                              "tokens that the cache holds, pinned ones included (default: 512; under full, the\n"
                              "context that the model was made for)",
                              [&o](index_t n) { o.cache = n; });
  app.add_option_function<std::string>(
         "--temperature",
         [&temperature](const std::string& text) {
           temperature = loaders::decimal_number(text, 0, 100);
           if (!temperature)
             throw usage_error(fmt::format("--temperature is '{}', had to be a number from 0 to 100", text));
         },
         "0 takes the likeliest token (default: 1 with --write, which repeats itself with less;\n"
         "0.6 in a chat)")
      ->type_name("T");
  compare::add_count<std::size_t>(
      app, "--top-k", 0, std::size_t{1} << 22, "draw among the K likeliest tokens, 0 for all (default: 40)",
      [&o](std::size_t n) { o.sampling.top_k = n; }, "K");
  compare::add_count<std::uint64_t>(app, "--seed", 0, std::numeric_limits<std::uint64_t>::max(),
                                    "the same seed draws the same text (default: 0)",
                                    [&o](std::uint64_t n) { o.sampling.seed = n; });
  compare::add_count<index_t>(app, "--tokens", 1, index_t{1} << 60, "end after so many tokens were written",
                              [&o](index_t n) { o.tokens = n; });
  compare::add_count<index_t>(app, "--threads", 1, 1024, "the text does not depend on them (default: one a core)",
                              [&o](index_t n) { o.threads = n; });
  if (!compare::parse(app, argc, argv)) return {};
  if (o.prompt && o.prompt->empty()) throw usage_error("--write is empty, had to be the beginning of a text");
  if (o.policy.empty()) o.policy = o.prompt ? "sinks:4" : "sinks:system";
  check_policy(o);
  o.model = compare::model_file(o.model);
  o.sampling.temperature = temperature.value_or(o.prompt ? 1 : 0.6);
  return o;
}

}  // namespace chat
