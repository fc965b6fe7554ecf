#include "options.hpp"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "../compare/command_line.hpp"
#include "../compare/known_models.hpp"

namespace chat {
namespace {

using compare::usage_error;

index_t parse_sinks(const std::string& policy, index_t cache) {
  if (policy == "window" || policy == "full") return 0;
  index_t sinks = 0;
  const char* const end = policy.data() + policy.size();
  const bool is_sinks = policy.starts_with("sinks:");
  const auto [last, error] = std::from_chars(policy.data() + (is_sinks ? 6 : 0), end, sinks);
  if (!is_sinks || error != std::errc() || last != end || sinks < 1 || sinks >= cache)
    throw usage_error(
        fmt::format("--policy is '{}', had to be window, sinks:N with N from 1 to {}, or full", policy, cache - 1));
  return sinks;
}

}  // namespace

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
                 "sinks:N: keep the first N tokens for ever, and the newest (default: sinks:4)\n"
                 "full: keep all, and end when the cache is full")
      ->type_name("POLICY");
  app.add_option("--cache", o.cache,
                 "tokens that the cache holds, pinned ones included (default: 512; under full, the\n"
                 "context that the model was made for)")
      ->check(CLI::Range(2, 1 << 20))
      ->type_name("N");
  app.add_option("--temperature", temperature,
                 "0 takes the likeliest token (default: 1 with --write, which repeats itself with less;\n"
                 "0.6 in a chat)")
      ->check(CLI::Range(0.0, 100.0))
      ->type_name("T");
  app.add_option("--top-k", o.sampling.top_k, "draw among the K likeliest tokens, 0 for all (default: 40)")
      ->check(CLI::Range(0, 1 << 22))
      ->type_name("K");
  app.add_option("--seed", o.sampling.seed, "the same seed draws the same text (default: 0)")
      ->check(CLI::NonNegativeNumber)
      ->type_name("N");
  app.add_option("--tokens", o.tokens, "end after so many tokens were written")
      ->check(CLI::Range(index_t{1}, index_t{1} << 60))
      ->type_name("N");
  app.add_option("--threads", o.threads, "the text does not depend on them (default: one a core)")
      ->check(CLI::Range(1, 1024))
      ->type_name("N");
  if (!compare::parse(app, argc, argv)) return {};
  if (o.prompt && o.prompt->empty()) throw usage_error("--write is empty, had to be the beginning of a text");
  if (temperature && std::isnan(*temperature)) throw usage_error("--temperature is nan, had to be a number");
  o.num_sink_tokens = parse_sinks(o.policy, o.cache.value_or(default_cache));
  o.model = compare::model_file(o.model);
  o.sampling.temperature = temperature.value_or(o.prompt ? 1 : 0.6);
  return o;
}

}  // namespace chat
