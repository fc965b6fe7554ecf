#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../effort.hpp"
#include "compare/caches.hpp"
#include "compare/evaluate.hpp"
#include "compare/files.hpp"
#include "compare/known_models.hpp"
#include "compare/options.hpp"
#include "compare/report.hpp"
#include "compare/svg.hpp"
#include "llama_gguf.hpp"

namespace {

using namespace compare;

const std::string source_dir = SINKCACHE_SOURCE_DIR;

const engine::model& nano(const std::string& kind) {
  static const engine::model softmax(source_dir + "/examples/models/nano-softmax.safetensors");
  static const engine::model sink(source_dir + "/examples/models/nano-sink.safetensors");
  return kind == "sink" ? sink : softmax;
}

const std::string& held_out_text() {
  static const std::string text = read_file(source_dir + "/examples/data/sotu-heldout.txt");
  return text;
}

std::vector<run> evaluated(const std::vector<subject>& subjects, const std::string& policies, index_t cache,
                           index_t tokens, std::size_t threads = 1) {
  std::vector<token_stream> streams;
  for (const subject& s : subjects) streams.push_back(read_by(s, held_out_text()));
  return evaluate(subjects, parse_policies(policies, cache), streams, cache, tokens, threads, [](index_t) {});
}

template <class Error, class F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

std::string usage_message(std::vector<const char*> arguments) {
  arguments.insert(arguments.begin(), "compare_policies");
  return message_of<usage_error>([&] { parse_options(static_cast<int>(arguments.size()), arguments.data()); });
}

// Runs that cost `before` bits a token until the first eviction and `after` from then on.
struct invented {
  const char* policy;
  double before, after;
};

std::string words(const std::vector<invented>& losses, index_t cache = 10, index_t tokens = 1000) {
  const subject s{&nano("softmax"), "nano-softmax", false};
  std::vector<run> runs;
  for (const invented& loss : losses) {
    run r{&s, parse_policies(loss.policy, cache).front(), cache, {}, 100, 1};
    for (index_t i = 0; i < tokens; ++i) {
      const bool skipped = r.policy.is == policy::kind::recompute && i >= cache && i % 7 != 0;
      const double value = i < cache ? loss.before : loss.after;
      r.loss_bits.push_back(skipped ? std::numeric_limits<double>::quiet_NaN() : value);
    }
    runs.push_back(std::move(r));
  }
  return sentence(comparison(runs, cache).findings());
}

// A variable that is as it was afterwards.
struct environment {
  explicit environment(const char* variable) : name(variable) {
    if (const char* const value = std::getenv(variable)) before = value;
  }
  ~environment() { before ? set(*before) : static_cast<void>(::unsetenv(name)); }
  void set(const std::string& value) const { ::setenv(name, value.c_str(), 1); }

  const char* name;
  std::optional<std::string> before;
};

// A vocabulary in a file without tensors.
std::string small_vocabulary() {
  gguf_writer::file file;
  file.metadata = plain::vocabulary_metadata({{"<bos>", 3}});
  file.metadata.push_back(gguf_writer::metadata("tokenizer.ggml.bos_token_id", 258u));
  return file.bytes();
}

}  // namespace

TEST_CASE("bits are counted per byte, however many a token stands for") {
  const std::string bytes = small_vocabulary();
  const text::tokenizer tokenizer(loaders::gguf::parse(std::as_bytes(std::span(bytes)), "vocabulary"));
  // Its own vocabulary is smaller by a token or two, which this text does not need.
  const subject by_token{&nano("softmax"), "nano-softmax", false, &tokenizer};
  const std::string text = "the lathe, then the other";
  const token_stream stream = read_by(by_token, text);
  CHECK(stream.ids.front() == 256);
  CHECK(stream.bytes.front() == 0);
  CHECK(std::accumulate(stream.bytes.begin(), stream.bytes.end(), 0) == static_cast<int>(text.size()));
  CHECK(stream.ids.size() == 1 + text.size() - 2 * 5);
  CHECK(stream.bytes[1] == 3);

  run r{&by_token, parse_policies("window", 4).front(), 4, {8, 8, 1, 3, 5, 7}, 0, 0, {4, 4, 1, 1, 2, 2}};
  const loss_summary summary = summarise(r, nullptr, 4);
  CHECK(summary.before == Approx(20 / 10.));
  CHECK(summary.after == Approx(12 / 4.));
  CHECK(summary.all == Approx(32 / 14.));
  CHECK(loss_by_segment(r, 4).front().loss_bits == Approx(32 / 14.));

  const setting s{"text", 4, 6, 14};
  CHECK_THAT(header(s, std::vector{by_token}), Catch::Contains("6 tokens (14 bytes) of text, a cache of 4 tokens"));
  const nlohmann::json json = nlohmann::json::parse(to_json(s, std::vector{comparison(std::span(&r, 1), 4)}));
  CHECK(json.at("runs").at(0).at("bytes") == 14);
  CHECK(json.at("runs").at(0).at("tokenizer") == "bpe");
}

TEST_CASE("a model of one's own BOS keeps it, another begins with one only where asked to") {
  const subject own{&nano("softmax"), "nano-softmax", false, nullptr, 7};
  CHECK(read_by(own, "ab").ids == std::vector<int>{256, 'a', 'b'});
}

TEST_CASE("smollm2 is looked for in the user's cache folder, and where it is missing it is said how to get it") {
  const environment cache("XDG_CACHE_HOME"), home("HOME");
  cache.set("/nonexistent");
  const std::string file = model_file("smollm2");
  CHECK(file == "/nonexistent/sinkcache/SmolLM2-135M-Instruct.Q4_1.gguf");
  if (::isatty(0) == 0)
    CHECK(message_of<std::runtime_error>([&] { offer_missing_model(file); }) ==
          file + ": no such file: examples/get-model smollm2 gets it");
  cache.set("");
  home.set("/home/me");
  CHECK(model_file("smollm2") == "/home/me/.cache/sinkcache/SmolLM2-135M-Instruct.Q4_1.gguf");
  CHECK(model_file("a.gguf") == "a.gguf");
  CHECK(model_file("tiny-sink") == source_dir + "/examples/models/tiny-sink.safetensors");
  CHECK_NOTHROW(offer_missing_model("/nonexistent/other.gguf"));
}

TEST_CASE("policies are read strictly") {
  const std::vector<policy> policies = parse_policies("full,window,sinks:04,recompute", 8);
  REQUIRE(policies.size() == 4);
  CHECK(policies[2].name == "sinks:4");
  CHECK(policies[2].num_sink_tokens == 4);

  const auto refused = [](const char* list) { return message_of<usage_error>([=] { parse_policies(list, 8); }); };
  CHECK(refused("") == "--policies '' has an empty entry");
  CHECK(refused("full,,window") == "--policies 'full,,window' has an empty entry");
  CHECK_THAT(refused("fast"), Catch::StartsWith("--policies: 'fast' had to be one of: full, window, sinks:N, "));
  for (const char* sinks : {"sinks:0", "sinks:8", "sinks:", "sinks:-1", "sinks:4x", "sinks:99999999999999999999"})
    CHECK_THAT(refused(sinks), Catch::Contains("had to be sinks:N with N from 1 to 7"));
  CHECK(refused("sinks:4,full,sinks:04") == "--policies has sinks:4 twice");
}

TEST_CASE("bad arguments are told by name") {
  CHECK(usage_message({}) == "nothing was thrown");
  CHECK(usage_message({"--cache", "1"}) == "--cache is '1', had to be a whole number from 2 to 1048576");
  for (const char* cache : {"", "12x", "1e3", " 8", "99999999999999999999"})
    CHECK_THAT(usage_message({"--cache", cache}), Catch::Contains("--cache"));
  CHECK_THAT(usage_message({"--tokens", "1"}), Catch::Contains("--tokens is '1'"));
  CHECK_THAT(usage_message({"--threads", "0"}), Catch::Contains("--threads is '0'"));
  CHECK_THAT(usage_message({"--polices", "full"}), Catch::Contains("--polices"));
  CHECK_THAT(usage_message({"stray"}), Catch::Contains("stray"));
  CHECK_THAT(usage_message({"--cache"}), Catch::Contains("--cache"));
  CHECK_THAT(usage_message({"--cache", "8", "--cache", "9"}), Catch::Contains("--cache"));
  CHECK_THAT(usage_message({"--cache", "4"}), Catch::Contains("'sinks:4' had to be sinks:N with N from 1 to 3"));
  CHECK_THAT(usage_message({"--models", "a,b", "--model", "c"}), Catch::Contains("--model"));
  CHECK_THAT(usage_message({"--models", "a,b,a"}), Catch::Contains("--models has a twice"));
  CHECK_THAT(usage_message({"--json", "x", "--svg", "x"}), Catch::Contains("the same file"));
}

TEST_CASE("nothing differs before the first eviction") {
  const std::vector<run> runs =
      evaluated({{&nano("softmax"), "nano-softmax"}}, "full,window,sinks:3,recompute", 20, 60);
  for (const run& r : runs) {
    INFO(r.policy.name);
    for (std::size_t i = 0; i < 20; ++i) CHECK(std::abs(r.loss_bits[i] - runs[0].loss_bits[i]) < 1e-4);
  }
  // i + 1 tokens were appended when ids[i + 1] is predicted: 21 of them do not fit 20.
  CHECK(std::abs(runs[1].loss_bits[20] - runs[0].loss_bits[20]) > 1e-3);
  CHECK(runs[0].window == 60);
  CHECK(runs[2].window == 17);
  CHECK(runs[2].cache_bytes == runs[1].cache_bytes);
}

TEST_CASE("recompute is a fresh pass over the first token and the newest") {
  const std::vector<subject> subjects = {{&nano("softmax"), "nano-softmax"}};
  const index_t cache = 12, tokens = 1200;
  const std::vector<run> runs = evaluated(subjects, "window,recompute", cache, tokens);
  const std::vector<int> ids = read_by(subjects.front(), held_out_text()).ids;
  REQUIRE(ids.size() == held_out_text().size() + 1);
  CHECK(ids.front() == 256);

  index_t sampled = 0;
  for (std::size_t i = static_cast<std::size_t>(cache); i < runs[1].loss_bits.size(); ++i) {
    if (std::isnan(runs[1].loss_bits[i])) continue;
    if (++sampled % 50 != 0) continue;
    engine::session session(nano("softmax"), compare::sink_window(0, 100));
    std::span<const float> logits = session.decode(ids[0]);
    for (std::size_t j = i - static_cast<std::size_t>(cache) + 2; j <= i; ++j) logits = session.decode(ids[j]);
    CHECK(std::abs(engine::loss_bits(logits, ids[i + 1]) - runs[1].loss_bits[i]) < 2e-4);
  }
  CHECK(sampled >= 500);
  const loss_summary summary = summarise(runs[1], &runs[1], cache);
  CHECK(summary.tokens_scored == cache + sampled);
  CHECK(summary.after == summary.after_sampled);
}

TEST_CASE("the default run repeats the means that PyTorch computed") {
  if (effort::cases(10) < 10) return;  // a minute under sanitizers
  for (const std::string kind : {"softmax", "sink"}) {
    const nlohmann::json reference =
        nlohmann::json::parse(read_file(source_dir + "/examples/models/nano-" + kind + ".ref.json"));
    const std::vector<subject> subjects = {{&nano(kind), kind}};
    const std::vector<run> runs = evaluated(subjects, "window,sinks:1,sinks:4", 128, default_tokens, 2);
    for (std::size_t i = 0; i < runs.size(); ++i) {
      const double expected = reference.at("runs").at(i).at("bpb_after_first_eviction_20k");
      CHECK(std::abs(summarise(runs[i], nullptr, 128).after - expected) < 2e-4);
    }
  }
}

TEST_CASE("losses are the same for any number of threads") {
  const std::vector<subject> subjects = {{&nano("softmax"), "a"}, {&nano("sink"), "b"}, {&nano("sink"), "b", true}};
  const std::vector<run> one = evaluated(subjects, "window,sinks:1,recompute", 16, 100, 1);
  const std::vector<run> five = evaluated(subjects, "window,sinks:1,recompute", 16, 100, 5);
  REQUIRE(one.size() == 9);
  for (std::size_t i = 0; i < one.size(); ++i) {
    CHECK(one[i].subject == five[i].subject);
    CHECK(one[i].policy.name == five[i].policy.name);
    for (std::size_t j = 0; j < 100; ++j)
      CHECK((one[i].loss_bits[j] == five[i].loss_bits[j] || std::isnan(one[i].loss_bits[j])));
  }
  CHECK(one[3].loss_bits != one[6].loss_bits);  // the remedy was removed
}

TEST_CASE("segments tile the stream and add up to the whole") {
  const subject s{&nano("softmax"), "nano-softmax", false};
  for (const index_t cache : {2, 7, 16, 100, 128, 5000}) {
    for (const index_t tokens : {2, 3, 100, 129, 1000}) {
      run r{&s, parse_policies("window", cache).front(), cache, {}, 0, 0};
      double sum = 0;
      for (index_t i = 0; i < tokens; ++i) {
        r.loss_bits.push_back(std::sqrt(static_cast<double>(i)));
        sum += r.loss_bits.back();
      }
      index_t next = 0;
      bool at_eviction = false;
      for (const segment_loss& segment : loss_by_segment(r, cache)) {
        CHECK(segment.first_token == next);
        CHECK(segment.tokens > 0);
        CHECK(segment.tokens_scored == segment.tokens);
        at_eviction |= next == cache;
        next += segment.tokens;
        sum -= segment.loss_bits * static_cast<double>(segment.tokens);
      }
      CHECK(next == tokens);
      CHECK(std::abs(sum) < 1e-6);
      if (cache + 16 <= tokens) CHECK(at_eviction);
    }
  }
}

TEST_CASE("the words fit the numbers") {
  CHECK(
      words({{"full", 2, 6}, {"window", 2, 2.56}, {"sinks:1", 2, 2}, {"sinks:4", 2, 2.001}, {"recompute", 2, 1.99}}) ==
      "Evicting the first token costs 28% more bits per byte (2.560 against 2.000); pinning 1 token brings it back to "
      "within 0.50% of recomputing the cache for every token; keeping all 1,000 tokens costs 200% more than sinks:1: "
      "the model was trained on contexts of 256.");
  CHECK(
      words({{"window", 2, 2.0002}, {"sinks:4", 2, 2}, {"recompute", 2, 2}}) ==
      "Evicting the first 4 tokens changes nothing (2.000 against 2.000); pinning 4 tokens does as well as recomputing "
      "the cache for every token.");
  CHECK(
      words({{"window", 2, 1.9}, {"sinks:1", 2, 2}, {"recompute", 2, 1.8}}) ==
      "Evicting the first token saves 5.0% of the bits per byte (1.900 against 2.000); pinning 1 token needs 11% more "
      "bits than recomputing the cache for every token.");
  CHECK(words({{"window", 2, 3}, {"recompute", 2, 2}}) ==
        "A plain window needs 50% more bits than recomputing the cache for every token.");
  CHECK(words({{"full", 2, 1.5}, {"sinks:1", 2, 2}}, 10, 200) ==
        "Keeping all 200 tokens saves 25% of the bits of sinks:1.");
  CHECK(words({{"full", 2, 2.5}, {"sinks:1", 2, 2}}, 10, 200) == "Keeping all 200 tokens costs 25% more than sinks:1.");
  CHECK(words({{"full", 2, 2}, {"window", 2, 2}}, 10, 200) == "Keeping all 200 tokens gains nothing over window.");
  CHECK(words({{"window", 2, 3}}) == "Window needs 3.000 bits per byte after the first 10 tokens, 2.000 before.");
  CHECK(words({{"recompute", 2, 3}}) == "Recompute needs 3.000 bits per byte after the first 10 tokens, 2.000 before.");
  CHECK(words({{"window", 2, 2}, {"sinks:1", 2, 2}}, 128, 100) ==
        "Nothing was evicted: 100 tokens fit a cache of 128, so the policies cannot differ.");
}

TEST_CASE("numbers are written for people") {
  CHECK(grouped(7) == "7");
  CHECK(grouped(20480) == "20,480");
  CHECK(grouped(1000000) == "1,000,000");
  CHECK(percent(0.28) == "28%");
  CHECK(percent(-0.0123) == "1.2%");
  CHECK(percent(0.0996) == "10%");
  CHECK(percent(0.00996) == "1.0%");
  CHECK(percent(0.00051) == "0.05%");
  CHECK(signed_percent(-0.25) == "-25%");
}

TEST_CASE("the report has what its readers rely on") {
  const std::vector<subject> subjects = {
      {&nano("softmax"), "nano<softmax>"}, {&nano("sink"), "nano-sink"}, {&nano("sink"), "nano-sink", true}};
  const setting s{"text & more", 16, 100};
  const std::vector<run> runs = evaluated(subjects, "full,window,sinks:1,recompute", s.cache, s.tokens);
  std::vector<comparison> comparisons;
  for (std::size_t i = 0; i < subjects.size(); ++i)
    comparisons.emplace_back(std::span(runs).subspan(4 * i, 4), s.cache);

  const nlohmann::json json = nlohmann::json::parse(to_json(s, comparisons));
  CHECK(json.at("runs").at(0).at("bytes") == 100);
  CHECK(json.at("runs").at(0).at("tokenizer") == "byte");
  CHECK(json.at("runs").at(0).at("first_token") == 256);
  for (const char* key :
       {"schema_version", "machine", "compiler", "isa", "git_commit", "model", "text", "tokens", "cache"})
    CHECK(json.contains(key));
  REQUIRE(json.at("runs").size() == 12);
  for (const nlohmann::json& r : json.at("runs")) {
    for (const char* key : {"policy", "num_sink_tokens", "window", "cache_bytes", "us_per_token", "tokens_scored"})
      CHECK(r.contains(key));
    for (const char* key : {"all", "before_first_eviction", "after_first_eviction"})
      CHECK(r.at("loss_bits").at(key).is_number());
    CHECK(r.at("loss_by_segment").size() > 2);
  }
  CHECK(json.at("runs").at(8).at("attention") == "softmax");
  CHECK(json.at("runs").at(4).at("attention") == "sink logits");

  CHECK_THAT(table(comparisons[0]), Catch::Contains("recompute") && Catch::Contains("best"));
  CHECK_THAT(models_table(comparisons), Catch::Contains("no sink logits"));
  CHECK_THAT(models_sentence(comparisons), Catch::Contains("one seed each, so this is no ranking"));
  CHECK_THAT(seeded_note(subjects), Catch::Contains("nano<softmax>, nano-sink"));
  const std::string svg = to_svg(s, comparisons[0]);
  CHECK_THAT(svg, Catch::StartsWith("<svg") && Catch::EndsWith("</svg>\n"));
  CHECK_THAT(svg, Catch::Contains("first eviction") && Catch::Contains("nano&lt;softmax>") &&
                      Catch::Contains("text &amp; more"));
  CHECK_THAT(svg, !Catch::Contains("nan\""));
}

TEST_CASE("a picture of the shortest texts has an end, and numbers only") {
  const std::vector<subject> subjects = {{&nano("softmax"), "nano-softmax"}};
  for (const index_t tokens : {2, 3, 4, 5, 9})
    for (const index_t cache : {2, 3, 8}) {
      const setting s{"text", cache, tokens};
      const std::vector<run> runs = evaluated(subjects, "full,window,sinks:1", cache, tokens);
      const std::string svg = to_svg(s, comparison(runs, cache));
      INFO(tokens << " tokens, cache of " << cache);
      CHECK_THAT(svg, Catch::StartsWith("<svg") && Catch::EndsWith("</svg>\n"));
      CHECK_THAT(svg, !Catch::Contains("nan\"") && !Catch::Contains("inf\""));
    }
}

TEST_CASE("files are written whole or not at all") {
  const std::filesystem::path dir =
      std::filesystem::temp_directory_path() / ("sinkcache_compare_test_" + std::to_string(getpid()));
  std::filesystem::create_directory(dir);
  const std::string path = (dir / "out.json").string();
  check_writable(path);
  CHECK(std::filesystem::is_empty(dir));
  write_atomically(path, "one");
  write_atomically(path, "two");
  CHECK(read_file(path) == "two");
  CHECK(std::distance(std::filesystem::directory_iterator(dir), {}) == 1);

  const auto refused = [](const std::string& p) { return message_of<std::runtime_error>([&] { check_writable(p); }); };
  CHECK_THAT(refused((dir / "missing" / "x").string()), Catch::Contains("cannot be written: No such file"));
  CHECK_THAT(refused(dir.string()), Catch::Contains("not a regular file"));
  CHECK_THAT(refused("/dev/null"), Catch::Contains("not a regular file"));
  CHECK_THAT(message_of<std::runtime_error>([&] { read_file(dir.string()); }), Catch::Contains("is a directory"));
  std::filesystem::remove_all(dir);
}
