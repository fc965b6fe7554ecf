// Policies by score as compare_policies reads, lists and compares them.

// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <set>
#include <sinkcache/named_policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../effort.hpp"
#include "compare/caches.hpp"
#include "compare/comparison.hpp"
#include "compare/evaluate.hpp"
#include "compare/files.hpp"
#include "compare/options.hpp"
#include "compare/report.hpp"
#include "compare/scored_policies.hpp"
#include "compare/svg.hpp"

namespace {

using namespace compare;

const std::string source_dir = SINKCACHE_SOURCE_DIR;

const engine::model& model_of(const std::string& name) {
  static const engine::model nano(source_dir + "/examples/models/nano-softmax.safetensors");
  static const engine::model tiny(source_dir + "/examples/models/tiny-natural.safetensors");
  return name == "nano" ? nano : tiny;
}

std::vector<std::string> names(const std::string& list, index_t cache = 128) {
  std::vector<std::string> all;
  for (const policy& p : parse_policies(list, cache)) all.push_back(p.name);
  return all;
}

std::string refused(const std::string& list, index_t cache = 128) {
  try {
    parse_policies(list, cache);
  } catch (const usage_error& error) {
    return error.what();
  }
  return "accepted";
}

std::vector<run> evaluated(const subject& s, const std::vector<policy>& policies, index_t cache, index_t tokens) {
  const std::vector<token_stream> streams = {read_by(s, read_file(source_dir + "/examples/data/sotu-heldout.txt"))};
  return evaluate(std::span(&s, 1), policies, streams, cache, tokens, 2, [](index_t) {});
}

// The names of a policy for each that the library has, and what changes them.
const char* const all_policies =
    "random,random:seed=1,random:draw=once,h2o,h2o:normalise=lifetime,tova,snapkv,snapkv:form=rkv,knorm,keydiff,"
    "mean_key,lagkv,lagkv:mode=fifo,expected_attention,rkv,gkv";

// The oldest odd positions leave first.
struct oldest_odd final : sinkcache::token_scorer {
  sinkcache::scorer_needs needs() const noexcept override { return {}; }
  void score(const sinkcache::scored_head& head, std::span<float> scores) const noexcept override {
    for (std::size_t i = 0; i < scores.size(); ++i)
      scores[i] = static_cast<float>(head.at[i] - (head.at[i] % 2 == 1 ? head.seen : 0));
  }
};

void register_once() {
  static const bool registered = [] {
    register_policy({.name = "oldest_odd", .keeps = "even positions", .make = [](const numbers&) {
                       return std::make_shared<const oldest_odd>();
                     }});
    register_policy({.name = "steps",
                     .keeps = "nothing in particular",
                     .make = [](const numbers& given) -> std::shared_ptr<const sinkcache::token_scorer> {
                       if (given.at("length") == 3) return std::make_shared<const oldest_odd>();
                       return std::make_shared<const sinkcache::policies::knorm>();
                     },
                     .parameters = {{"length", 2}}});
    return true;
  }();
  CHECK(registered);
}

}  // namespace

TEST_CASE("a policy is followed by its parameters, whatever commas there are") {
  CHECK(names("window,h2o:sinks=4,recent=32,tova") == std::vector<std::string>{"window", "h2o", "tova"});
  CHECK(names("h2o:sinks=1,interval=64,snapkv:recent=16,form=rkv,sinks:4") ==
        std::vector<std::string>{"h2o:sinks=1,interval=64", "snapkv:form=rkv,recent=16", "sinks:4"});
  const std::vector<policy> read = parse_policies(
      "snapkv:form=rkv,sinks=2,recent=7,interval=9,layers=pyramid,beta=5,"
      "heads=ada,alpha=0.5",
      128);
  REQUIRE(read.size() == 1);
  CHECK(read[0].is == policy::kind::scored);
  CHECK(read[0].num_sink_tokens == 2);
  const scored_policy& p = *read[0].scored;
  CHECK((p.name == "snapkv" && p.sinks == 2 && p.recent == 7 && p.interval == 9 && p.pyramid == 5. && p.ada == 0.5));
  CHECK(p.own == std::vector<std::pair<std::string, std::string>>{{"form", "rkv"}});
  CHECK(p.kept() == 2 + 8);  // its own window is longer
  CHECK(p.budget(128) == 119);
  CHECK(parse_policies(p.shown(), 128)[0].name == read[0].name);
}

TEST_CASE("an unknown policy or parameter lists the known ones") {
  CHECK_THAT(refused("h3o"), Catch::StartsWith("--policies: 'h3o' had to be one of: full, window, sinks:N, recompute, "
                                               "random, h2o, tova"));
  CHECK_THAT(
      refused("h2o:window=4"),
      Catch::Contains("h2o's parameter 'window=4' had to be one of: normalise=none|lifetime sinks=4 pin= recent=32"));
  CHECK_THAT(refused("tova:fast"), Catch::Contains("tova's parameter 'fast' had to be one of: sinks=4"));
  CHECK_THAT(refused("tova,fast"), Catch::Contains("'fast' had to be one of"));
  CHECK_THAT(refused("sinks=4,tova"), Catch::Contains("begins with 'sinks=4', had to begin with a policy"));
  CHECK(refused("window,sinks=4") == "--policies: 'window:sinks=4' had to be window alone: it has no parameters");
  CHECK(refused("full:x") == "--policies: 'full:x' had to be full alone: it has no parameters");
  CHECK_THAT(refused("random:layer=1"), Catch::Contains("random's parameter 'layer=1'"));
  for (const char* value : {"-1", "", "4x", "1e3", "99999999999999999999"})
    CHECK_THAT(refused(fmt::format("tova:sinks={}", value)), Catch::Contains("tova's sinks is"));
  CHECK_THAT(refused("tova:interval=0"), Catch::Contains("interval is '0', had to be a whole number from 1"));
  CHECK_THAT(refused("h2o:normalise=twice"), Catch::Contains("normalise was 'twice'"));
  CHECK_THAT(refused("snapkv:window=x"), Catch::Contains("window was 'x'"));
  CHECK_THAT(refused("h2o:layers=falling"), Catch::Contains("layers is 'falling', had to be uniform or pyramid"));
  CHECK_THAT(refused("h2o:heads=ada,alpha=2"), Catch::Contains("alpha is '2', had to be a number from 0 to 1"));
  CHECK_THAT(refused("h2o:alpha=0.5"), Catch::Contains("alpha needs heads=ada"));
  CHECK_THAT(refused("h2o:sinks=1,sinks=2"), Catch::Contains("h2o has sinks twice"));
  CHECK(refused("h2o:,tova") == "--policies: 'h2o:' had to have parameters after the colon, or no colon");
  CHECK(refused("h2o,h2o:sinks=4,recent=32") == "--policies has h2o twice");
  CHECK(refused("h2o:normalise=none,h2o") == "--policies has h2o twice");
}

TEST_CASE("a policy that a cache is too small for says what it needs") {
  CHECK(refused("h2o", 53) == "accepted");
  CHECK_THAT(refused("h2o", 52), Catch::Contains("--cache is 52, h2o had to have at least 53: 36 tokens that never "
                                                 "leave (sinks=4, recent=32 or its own window), one that may, and "
                                                 "interval=16"));
  CHECK(refused("snapkv:recent=0,sinks=0,interval=1", 10) == "accepted");
  CHECK_THAT(refused("snapkv:recent=0,sinks=0,interval=1", 9), Catch::Contains("at least 10"));
  // Of those that nobody asked for some are left out.
  const char* const small[] = {"compare_policies", "--cache", "40"};
  const options o = *parse_options(3, small);
  CHECK(o.policies.size() == 3);
  CHECK_THAT(o.left_out, Catch::StartsWith("random,h2o,tova"));
}

TEST_CASE("every policy is listed in a line, with its paper and its parameters") {
  register_once();
  const std::string list = listed_policies();
  for (const sinkcache::named_policy& p : sinkcache::named_policies) {
    const std::size_t at = list.find(fmt::format("\n{} ", p.name));
    REQUIRE(at != std::string::npos);
    const std::string line = list.substr(at + 1, list.find('\n', at + 1) - at - 1);
    CHECK_THAT(line, Catch::Contains(std::string(p.keeps)) && Catch::Contains(std::string(p.source)));
    if (p.name != "random") CHECK_THAT(line, Catch::Contains(std::string(p.parameters)));
  }
  CHECK_THAT(list, Catch::Contains("\nsteps ") && Catch::Contains("length=2"));
  CHECK_THAT(list, !Catch::Contains("layer="));
  const char* const arguments[] = {"compare_policies", "--list-policies"};
  CHECK_FALSE(parse_options(2, arguments).has_value());
}

TEST_CASE("policies are compared at equal rows, the interval counted") {
  const engine::model& model = model_of("nano");
  const std::vector<policy> policies =
      parse_policies(std::string("window,sinks:4,h2o:interval=64,recent=8,h2o:layers=pyramid,") + all_policies, 96);
  const loaders::model_config& c = model.config();
  for (const policy& p : policies) {
    INFO(p.name);
    const engine::session session(model, caches_of(p, 96, 0));
    index_t rows = 0;
    for (index_t layer = 0; layer < c.num_hidden_layers; ++layer) rows += session.cache(layer).capacity();
    CHECK(rows == 96 * c.num_hidden_layers);
    CHECK(session.cache_bytes() == cache_bytes(p, model, 96));
  }
  const engine::session falling(model, caches_of(policies[3], 96));
  CHECK(falling.cache(0).capacity() > falling.cache(c.num_hidden_layers - 1).capacity());
}

TEST_CASE("at equal bytes each policy holds as many tokens as fit") {
  const engine::model& c = model_of("nano");
  for (const policy& p : parse_policies("window,sinks:4,h2o,keydiff,snapkv:sinks=0", most_tokens)) {
    INFO(p.name);
    const std::size_t bytes = cache_bytes(parse_policies("window", 120).front(), c, 120);
    const index_t rows = cache_of(p, c, bytes);
    CHECK(cache_bytes(p, c, rows) <= bytes);
    CHECK(cache_bytes(p, c, rows + 1) > bytes);
    CHECK((p.is == policy::kind::scored ? rows < 120 : rows == 120));
    CHECK_THROWS_WITH(cache_of(p, c, 16), Catch::Contains("--bytes is 16"));
  }
  // What a policy needs beside what never leaves, and what no cache can have.
  const auto told = [&](const char* entry) {
    const policy p = parse_policies(entry, most_tokens).front();
    try {
      return fmt::format("{}", cache_of(p, c, 1000));
    } catch (const usage_error& error) {
      return std::string(error.what());
    }
  };
  CHECK_THAT(told("lagkv:lag=100"), Catch::StartsWith("--bytes is 1000, lagkv:lag=100 had to have at least ") &&
                                        Catch::EndsWith(": 220 tokens"));  // 4, two lags, an interval of 16
  CHECK_THAT(told("h2o:heads=duo,short=0,newest=90"), Catch::EndsWith(": 82 tokens"));  // two heads: 94 + 38 + 32
  CHECK_THAT(told("snapkv:kernel=4"), Catch::StartsWith("--policies: snapkv:kernel=4: ") && Catch::Contains("odd"));
}

TEST_CASE("positions that an entry pins stay, from run to run") {
  const engine::layer_info layer{{.num_kv_heads = 2, .head_dim = 16, .rope = sinkcache::rope::none()}, 4, 0, 1};
  sinkcache::matrix rows = sinkcache::matrix::Random(400, 32);
  rows.row(17) *= 100;  // the first that goes where small norms are kept
  const auto stays = [&](const std::string& entry, index_t position) {
    const policy p = with_kv_formats(parse_policies(entry, 96), entry.back() == '0' ? "q4" : "f32", 64).front();
    const auto made = caches_of(p, 96)(layer);
    made->append(rows, rows);
    bool pinned = true;
    CHECK(made->try_pin(position, pinned));
    return pinned;
  };
  CHECK_FALSE(stays("knorm", 17));
  CHECK(stays("knorm:pin=17", 17));
  CHECK(stays("knorm:pin=30+17", 17));
  CHECK(stays("knorm:pin=17,recent=20", 17));
  CHECK(stays("knorm:pin=17+18+19+20+21+22+23+24+25+26+27+28+29+30+31+32+33+34,recent=20",
              34));  // q4 spares 16 unless told

  std::vector<int> tokens(300);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int>(i * 7 % 90);
  const auto last_logits = [&](engine::session& session) {
    const std::span<const float> logits = session.prefill(tokens);
    return std::vector<float>(logits.begin(), logits.end());
  };
  const auto fresh = [&](const char* entry) {
    return engine::session(model_of("nano"), caches_of(parse_policies(entry, 96).front(), 96));
  };
  engine::session pinning = fresh("random:pin=17");
  const std::vector<float> first = last_logits(pinning);
  pinning.clear();
  CHECK(last_logits(pinning) == first);
  engine::session other = fresh("random");
  CHECK(last_logits(other) != first);

  CHECK(names("h2o:pin=9+4+9,sinks=0") == std::vector<std::string>{"h2o:sinks=0,pin=4+9"});
  for (const char* pins : {"", "x", "4+", "-1", "1.5"})
    CHECK_THAT(refused(fmt::format("h2o:pin={}", pins)),
               Catch::Contains(fmt::format("h2o's pin is '{}', had to be POSITION", pins)));
  CHECK(least_cache(parse_policies("h2o:pin=1+40+41", most_tokens).front()) ==
        least_cache(parse_policies("h2o", most_tokens).front()) + 2);
}

TEST_CASE("short heads leave their rows to the others") {
  engine::layer_info layer{{.num_kv_heads = 4, .head_dim = 16, .rope = sinkcache::rope::none()}, 8, 0, 3};
  const auto budgets = [&](const char* entry, index_t number) {
    layer.layer = number;
    const auto made = caches_of(parse_policies(entry, 96).front(), 96)(layer);
    const auto& cache = dynamic_cast<const sinkcache::scored_kv_cache<sinkcache::f32>&>(*made);
    std::vector<index_t> all;
    for (index_t h = 0; h < 4; ++h) all.push_back(cache.budget(h));
    return all;
  };
  using rows = std::vector<index_t>;
  const char* const duo = "knorm:heads=duo,short=1+2.0,newest=9";  // 320 rows a layer, 13 of them of each short head
  CHECK(budgets(duo, 0) == rows{103, 13, 102, 102});
  CHECK(budgets(duo, 2) == rows{13, 13, 147, 147});
  CHECK(budgets("knorm:heads=duo,short=2.0", 1) == rows{80, 80, 80, 80});
  CHECK(budgets("knorm:heads=duo,short=0+1+2+3", 1) == rows{36, 36, 36, 36});

  CHECK(names("knorm:newest=9,short=01+2.0,heads=duo") == std::vector<std::string>{duo});
  CHECK(names("h2o:heads=duo,short=0,newest=32") == std::vector<std::string>{"h2o:heads=duo,short=0"});
  for (const char* entry : {"h2o:heads=duo", "h2o:short=0", "h2o:heads=ada,short=0"})
    CHECK_THAT(refused(entry), Catch::Contains("h2o's heads=duo and short=HEADS need each other"));
  CHECK_THAT(refused("h2o:newest=4"), Catch::Contains("h2o's newest needs heads=duo"));
  CHECK_THAT(refused("h2o:heads=duo,short=0,newest=0"), Catch::Contains("newest is '0', had to be a whole number"));
  for (const char* heads : {"", "x", "0+", "+0", "1.", ".1", "1.2.3", "-1", "0 1"})
    CHECK_THAT(refused(fmt::format("h2o:heads=duo,short={}", heads)),
               Catch::Contains(fmt::format("short is '{}', had to be HEAD or LAYER.HEAD", heads)));
  CHECK_THROWS_WITH(budgets("knorm:heads=duo,short=4", 1),
                    "a short head was 4 of layer 1, had to be below 4, of a layer below 3");
  CHECK_THROWS_WITH(budgets("knorm:heads=duo,short=3.1", 0),
                    "a short head was 1 of layer 3, had to be below 4, of a layer below 3");
  CHECK_THROWS_WITH(budgets("tova:heads=duo,short=0", 0), Catch::Contains("this scorer keeps one set in all heads"));
  CHECK_THROWS_WITH(budgets("knorm:heads=duo,short=0+1+2,newest=95", 0), Catch::Contains("budget was"));

  // At equal rows there are equal bytes, but for what an event of the longest head takes.
  const engine::model& model = model_of("nano");
  const auto bytes = [&](const char* entry) {
    return static_cast<double>(cache_bytes(parse_policies(entry, 96).front(), model, 96));
  };
  CHECK(bytes("knorm:heads=duo,short=0,newest=5") / bytes("knorm") == Approx(1).epsilon(0.05));
}

TEST_CASE("layers that a model windows keep their windows") {
  const policy h2o = parse_policies("h2o", 96).front();
  engine::layer_info layer{{.num_kv_heads = 2, .head_dim = 16, .rope = sinkcache::rope::none()}, 4, 0, 1};
  CHECK(caches_of(h2o, 96)(layer)->capacity() == 96);
  layer.cache.window = 20;
  const auto windowed = caches_of(h2o, 96)(layer);
  CHECK(windowed->capacity() == 20 + 4);
  CHECK(windowed->learner() == nullptr);
}

TEST_CASE("prefill in chunks costs what decoding costs under every policy") {
  const subject s{&model_of("nano"), "nano"};
  const token_stream text = read_by(s, read_file(source_dir + "/examples/data/sotu-heldout.txt").substr(0, 1000));
  const auto tokens = static_cast<std::size_t>(std::max(200, effort::cases(500)));
  for (const policy& p :
       parse_policies(std::string(all_policies) + ",h2o:heads=ada,tova:layers=pyramid,h2o:heads=duo,short=0", 64)) {
    INFO(p.name);
    const auto none = [](index_t) {};
    const std::vector<double> prefilled = evaluator(s, caches_of(p, 64), text.ids).by_prefill(tokens, none),
                              decoded = evaluator(s, caches_of(p, 64), text.ids).by_decode(tokens, none);
    double difference = 0;
    for (std::size_t i = 0; i < tokens; ++i)
      difference += std::abs(prefilled[i] - decoded[i]) / static_cast<double>(tokens);
    // Of float32's rounding; scores within it of one another may exchange a token or two.
    CHECK(difference < 2e-3);
  }
}

TEST_CASE("no two policies are one and the same on the default model") {
  const subject s{&model_of("tiny"), "tiny"};
  const std::vector<run> runs = evaluated(s, parse_policies(std::string("window,sinks:1,sinks:4,") + all_policies, 64),
                                          64, std::max(400, effort::cases(1500)));
  std::set<std::string> digits;
  for (const run& r : runs) {
    const double after = summarise(r, nullptr, 64).after;
    INFO(r.policy.name << " " << after);
    CHECK(std::isfinite(after));
    CHECK(digits.insert(fmt::format("{:.6g}", after)).second);
  }
}

TEST_CASE("a policy of one's own is compared as the others are") {
  register_once();
  CHECK_THAT(default_policies(), Catch::Contains(",oldest_odd,steps"));
  const subject s{&model_of("nano"), "nano"};
  const std::vector<policy> policies =
      parse_policies("sinks:4,oldest_odd,oldest_odd:sinks=0,steps,steps:length=3,knorm", 64);
  const std::vector<run> runs = evaluated(s, policies, 64, 300);
  CHECK(runs[1].loss_bits != runs[0].loss_bits);
  CHECK(runs[1].loss_bits != runs[2].loss_bits);
  CHECK(runs[3].loss_bits == runs[5].loss_bits);
  CHECK(runs[4].loss_bits == runs[1].loss_bits);
  const comparison c(runs, 64);
  CHECK_THAT(table(c), Catch::Contains("oldest_odd:sinks=0"));
  CHECK_THAT(sentence(c.findings()), Catch::Contains("Of the policies that score tokens"));
  CHECK_THAT(to_svg({"text", 64, 300}, c), Catch::Contains("steps:length=3"));

  // Its scores decide what stays: pinned and recent tokens, and even ones.
  engine::session session(model_of("nano"), caches_of(policies[1], 64));
  const std::vector<int> ids = read_by(s, read_file(source_dir + "/examples/data/sotu-heldout.txt")).ids;
  session.prefill(std::span(ids).first(161));  // an event was before the last of them
  const auto& cache = dynamic_cast<const sinkcache::scored_kv_cache<sinkcache::f32>&>(session.cache(0));
  const std::span<const sinkcache::position_t> kept = cache.kept(0);
  REQUIRE(kept.size() == 48 + 1);
  for (const sinkcache::position_t at : kept) CHECK((at < 4 || at >= 160 - 32 || at % 2 == 0));

  CHECK_THAT(refused("steps:length=x"), Catch::Contains("length is 'x', had to be a number"));
  CHECK_THAT(refused("steps:width=1"), Catch::Contains("had to be one of: length=2 sinks=4"));
  const auto make = [](const numbers&) { return std::make_shared<const oldest_odd>(); };
  for (const char* name : {"h2o", "steps", "window", "", "a b", "a:b", "a,b"})
    CHECK_THROWS_AS(register_policy({name, "", make}), std::invalid_argument);
  CHECK_THROWS_AS(register_policy({"nothing", "", nullptr}), std::invalid_argument);
}
