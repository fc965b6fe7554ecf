// Formats crossed with policies, and what few bits cost, as compare_policies and evidence measure them.

// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "compare/caches.hpp"
#include "compare/comparison.hpp"
#include "compare/kv_formats.hpp"
#include "compare/report.hpp"
#include "compare/svg.hpp"
#include "evidence/formats.hpp"
#include "nano.hpp"

namespace {

using namespace compare;

std::vector<policy> crossed(const std::string& policies, const std::string& formats, index_t kv_recent = 8) {
  return with_kv_formats(parse_policies(policies, 128), formats, kv_recent);
}

std::string refused(const std::string& policies, const std::string& formats) {
  try {
    crossed(policies, formats);
  } catch (const usage_error& error) {
    return error.what();
  }
  return "accepted";
}

run invented_run(const subject& s, const policy& p, double loss, std::size_t bytes) {
  return {&s, p, 10, std::vector<double>(1000, loss), bytes, 1};
}

}  // namespace

TEST_CASE("each policy is run with each format, and is called after both") {
  std::vector<std::string> names;
  for (const policy& p : crossed("window,sinks:4", "f32,q8/q4,q4/q4")) names.push_back(p.name);
  CHECK(names == std::vector<std::string>{"window f32", "window q8/q4", "window q4", "sinks:4 f32", "sinks:4 q8/q4",
                                          "sinks:4 q4"});
  CHECK(crossed("h2o,full", "q8/q4").front().name == "h2o q8/q4");
  CHECK_THAT(refused("window", "q5"),
             Catch::StartsWith("--kv-format: 'q5' had to be one of: f32, f16, bf16, q8, q8/q6"));
  CHECK_THAT(refused("window", "q4/q8"), Catch::Contains("'q4/q8' had to be one of"));
  CHECK_THAT(refused("window", "q4,q4/q4"), Catch::Contains("has q4 twice"));
  CHECK_THAT(refused("window", "q4,"), Catch::Contains("empty entry"));
  const char* const alone[] = {"compare_policies", "--kv-recent", "3"};
  CHECK_THROWS_AS(parse_options(3, alone), usage_error);
  const char* const usual[] = {"compare_policies", "--kv-format", "f32,q2", "--kv-recent", "3"};
  const options o = *parse_options(5, usual);
  CHECK(o.policies.size() == 4);
  CHECK((o.policies[1].name == "window q2" && o.policies[1].kv_recent == 3));
}

TEST_CASE("a policy's caches are of its formats, and their bytes are counted so") {
  const std::set<std::string> few = {"q8", "q6", "q4", "q2"};
  for (const policy& p : crossed("full,window,sinks:4,h2o,knorm:sinks=0,lagkv", "f32,bf16,q8,q8/q4,q4/q2")) {
    INFO(p.name);
    const engine::session session(nano::model(), caches_of(p, 96, 0));
    CHECK(session.cache_bytes() == cache_bytes(p, nano::model(), 96));
    const sinkcache::cache_kind kind = session.cache(0).kind();
    const std::string k(kind.k_format), v(kind.v_format);
    CHECK((k == v ? k : k + "/" + v) == p.formats->name);
    CHECK(p.formats->few_bits == (few.count(k) > 0));
    CHECK(session.cache(0).capacity() == 96);
  }
  // Spared tokens take more bytes.
  const auto bytes = [&](index_t recent) {
    return cache_bytes(crossed("window", "q4", recent).front(), nano::model(), 96);
  };
  CHECK(bytes(0) < bytes(8));
  CHECK(bytes(8) < bytes(64));
  // Of a layer that the model windows, under a policy by score too.
  engine::layer_info layer{{.num_kv_heads = 2, .head_dim = 16, .window = 20, .rope = sinkcache::rope::none()}, 4, 0, 1};
  CHECK(std::string(caches_of(crossed("h2o", "bf16").front(), 96)(layer)->kind().k_format) == "bf16");
}

TEST_CASE("in as many bytes fewer bits hold more tokens") {
  const std::size_t bytes = cache_bytes(crossed("sinks:1", "f32").front(), nano::model(), 64);
  index_t before = 0;
  for (const policy& p : crossed("sinks:1", "f32,bf16,q8,q8/q4,q4,q2")) {
    INFO(p.name);
    const index_t rows = cache_of(p, nano::model(), bytes);
    CHECK(rows > before);
    CHECK(cache_bytes(p, nano::model(), rows) <= bytes);
    CHECK(cache_bytes(p, nano::model(), rows + 1) > bytes);
    before = rows;
  }
}

TEST_CASE("what formats cost is said of the best policy, and of policies in the first format") {
  const subject s = nano::subject();
  const std::vector<policy> p = crossed("window,sinks:1", "f32,q8,q4,q2");
  std::vector<run> runs;
  const double losses[] = {3, 1.9, 3, 3, 2, 2.0004, 2.01, 2.1};  // the window with q8 is a distraction
  const std::size_t bytes[] = {100, 50, 30, 20, 100, 50, 30, 20};
  for (std::size_t i = 0; i < p.size(); ++i) runs.push_back(invented_run(s, p[i], losses[i], bytes[i]));
  const comparison c(runs, 10);
  CHECK(sentence(c.findings()) ==
        "Sinks:1 q4 needs 0.50% more bits than sinks:1 f32, in 30% of its bytes; evicting the first token costs 50% "
        "more bits per byte (3.000 against 2.000).");
  // The one that costs least where all cost much.
  for (std::size_t i = 5; i < 8; ++i) runs[i].loss_bits.assign(1000, 2 + 0.1 * static_cast<double>(8 - i));
  CHECK_THAT(sentence(comparison(runs, 10).findings()), Catch::StartsWith("Sinks:1 q2 needs 5.0% more bits"));

  const setting setting{"text", 10, 1000};
  const std::string picture = to_front_svg(setting, c);
  for (const char* part : {"<svg", "</svg>", ">q2 2.100<", ">window<", ">sinks:1<", "bytes of all layers"}) {
    INFO(part);
    CHECK(picture.find(part) != std::string::npos);
  }
  CHECK(picture.find("\"nan") == std::string::npos);
}

TEST_CASE("a picture of formats shows all words, none over another") {
  const subject s = nano::subject();
  const std::vector<policy> p = crossed("window,sinks:1,snapkv:recent=16,interval=16", "f32,q8,q6/q4,q4,q4/q2,q2");
  std::vector<run> runs;
  const double losses[] = {3,     3,     3,     3,     3,     3,     1.712, 1.712, 1.714,
                           1.714, 1.721, 1.724, 1.703, 1.702, 1.703, 1.703, 1.708, 1.723};
  const std::size_t bytes[] = {1966, 599, 445, 394,  343,  292,  1966, 604,  456,
                               404,  353, 302, 3080, 2107, 1923, 1861, 1800, 1738};
  for (std::size_t i = 0; i < p.size(); ++i) runs.push_back(invented_run(s, p[i], losses[i], bytes[i]));
  const std::string picture = to_front_svg({"text", 10, 1000}, comparison(runs, 10));

  struct box {
    double x, y, width;
  };
  std::vector<box> names;
  const std::regex text(R"re(<text x="([^"]*)" y="([^"]*)" ([^>]*)>([^<]*)</text>)re");
  for (std::sregex_iterator at(picture.begin(), picture.end(), text), end; at != end; ++at) {
    const std::string attributes = (*at)[3], words = (*at)[4];
    INFO(words);
    if (attributes.find("font-size=\"19\"") != std::string::npos) CHECK(words.size() <= 80);
    if (attributes.find("middle\" fill") == std::string::npos) continue;
    const box b{std::stod((*at)[1].str()), std::stod((*at)[2].str()), 7 * static_cast<double>(words.size())};
    for (const box& other : names)
      CHECK((std::abs(b.y - other.y) > 12 || std::abs(b.x - other.x) > (b.width + other.width) / 2));
    CHECK(b.y < 484);  // where the axis is
    names.push_back(b);
  }
  CHECK(names.size() >= 8);
}

TEST_CASE("policies by score cost in few bits by prefill what they cost by decoding") {
  const subject s = nano::subject();
  const token_stream text = nano::text(1000);
  for (const policy& p : crossed("h2o,tova,lagkv", "q8,q8/q4", 16)) {
    INFO(p.name);
    const auto none = [](index_t) {};
    const std::vector<double> prefilled = evaluator(s, caches_of(p, 64), text.ids).by_prefill(400, none),
                              decoded = evaluator(s, caches_of(p, 64), text.ids).by_decode(400, none);
    double difference = 0, bits = 0;
    for (std::size_t i = 0; i < 400; ++i) difference += prefilled[i] - decoded[i], bits += decoded[i];
    CHECK(std::abs(difference) < 1e-3 * bits);
  }
}

// By decoding, with sums of doubles as they are written in books. Both agree but for codes that a last bit of an
// activation tips over.
TEST_CASE("what few bits cost is what decoding with them shows") {
  evidence::options o = nano::options();
  o.formats = true, o.tokens = 400, o.caches = {48};
  const evidence::setting s{o, nano::subject(), nano::text(2000)};
  const std::vector<evidence::cell> cells = {{&evidence::formats_named("q4"), 1, 8},
                                             {&evidence::formats_named("unrotated q2"), 1, 0}};
  const evidence::formats_job j{48, 1, 100, 300, true, cells};
  index_t told = 0;
  const evidence::json result = evidence::measure(j, s, [&](index_t n) { told += n; });
  CHECK(told == evidence::work(j));

  const auto logits_of = [&](const policy& p) {
    engine::session session(nano::model(), caches_of(p, 48));
    std::vector<std::vector<double>> all;
    for (std::size_t i = 100; i < 448; ++i) {
      const auto logits = session.decode(s.stream.ids[i]);
      if (i >= 148) all.emplace_back(logits.begin(), logits.end());
    }
    return all;
  };
  const auto log_softmax = [](std::vector<double> x) {
    double sum = 0;
    for (const double each : x) sum += std::exp(each);
    for (double& each : x) each -= std::log(sum);
    return x;
  };
  const auto floats = logits_of(parse_policies("sinks:1", 48).front());
  policy few = crossed("sinks:1", "q4").front();
  few.kv_recent = 8;
  policy plain = few;
  plain.formats = &evidence::formats_named("unrotated q2");
  plain.kv_recent = 0;
  const policy policies[] = {few, plain};
  for (std::size_t c = 0; c < 2; ++c) {
    INFO(cells[c].name());
    const auto own = logits_of(policies[c]);
    const evidence::json& found = result.at("cells").at(cells[c].name());
    for (std::size_t block = 0; block < 3; ++block) {
      double bits = 0, nats = 0, same = 0, tokens = 0;
      for (std::size_t i = 128 * block; i < std::min<std::size_t>(300, 128 * (block + 1)); ++i, ++tokens) {
        const std::vector<double> p = log_softmax(floats[i]), q = log_softmax(own[i]);
        bits -= q[static_cast<std::size_t>(s.stream.ids[148 + i + 1])] / std::log(2.);
        for (std::size_t t = 0; t < p.size(); ++t) nats += std::exp(p[t]) * (p[t] - q[t]);
        same += std::max_element(p.begin(), p.end()) - p.begin() == std::max_element(q.begin(), q.end()) - q.begin();
      }
      CHECK(found.at("tokens").at(block) == tokens);
      CHECK(found.at("bits").at(block).get<double>() == Approx(bits).epsilon(1e-3));
      CHECK(found.at("nats").at(block).get<double>() == Approx(nats).epsilon(0.03));
      CHECK(std::abs(found.at("same").at(block).get<double>() - same) <= 1);
      CHECK(nats > 1e-3);
    }
  }
}

TEST_CASE("evidence of formats has every cell in one run, and reports what is kept") {
  evidence::options o = nano::options();
  o.formats = true, o.tokens = 20000, o.caches = {256};
  const std::vector<evidence::formats_job> plan = evidence::formats_plan(o);
  std::set<std::string> files, cells;
  index_t scored = 0;
  for (const evidence::formats_job& j : plan) {
    CHECK(files.insert(j.name()).second);
    if (j.is_main) scored += j.tokens;
    for (const evidence::cell& c : j.cells) {
      CHECK(c.pinned == j.pinned);
      CHECK((cells.insert(c.name()).second || (j.is_main && j.first > 0)));
    }
  }
  CHECK(scored == 20000);
  for (const int pinned : {0, 1, 4})
    for (const int recent : {0, 32, 64}) CHECK(cells.contains(fmt::format("q4 p{} r{}", pinned, recent)));
  for (const char* name :
       {"bf16 p1 r64", "unrotated q4 p1 r64", "q4/f32 p1 r64", "f32/q4 p1 r64", "q4_0 p1 r64", "q4_0 p1 r0"}) {
    INFO(name);
    CHECK(cells.contains(name));
  }

  // Twice the perplexity, everywhere.
  evidence::setting s{o, nano::subject(), {}};
  std::vector<evidence::json> kept;
  for (const evidence::formats_job& j : plan) {
    evidence::json result = {{"block_tokens", 128}, {"cells", {}}};
    const auto blocks = static_cast<std::size_t>((j.tokens + 127) / 128);
    const auto cell = [&](double bits, double nats, double same) {
      const auto all = [&](double each) { return std::vector<double>(blocks, 128 * each); };
      return evidence::json{{"tokens", all(1)}, {"bits", all(bits)}, {"nats", all(nats)}, {"same", all(same)}};
    };
    result["cells"]["f32"] = cell(3, 0, 1);
    for (const evidence::cell& c : j.cells) result["cells"][c.name()] = cell(4, 0.25, 0.5);
    kept.push_back({{"result", result}, {"git_commit", "abc"}, {"date", "2026-01-01"}, {"machine", "one"}});
  }
  const std::vector<evidence::setting> texts = {s};
  bool all_kept = true;
  const std::vector<evidence::formats_results> results = {[&](const evidence::formats_job& j) -> const evidence::json* {
    for (std::size_t i = 0; i < plan.size(); ++i)
      if (plan[i].name() == j.name() && (all_kept || i == 0)) return &kept[i];
    return nullptr;
  }};
  const std::string page = evidence::formats_report(texts, "evidence --formats", results);
  CHECK_THAT(
      page, Catch::Contains("| f32 | 32 |") && Catch::Contains("+100% (+100 to +100) | 0.25 (0.25 to 0.25) | 50.0% |"));
  CHECK_THAT(page, Catch::Contains("| q4 | 4 | 0.25, +100% | 0.25, +100% | 0.25, +100% |") &&
                       Catch::Contains("| unrotated q4 | 64 |"));
  CHECK_THAT(evidence::formats_svg(texts, results),
             Catch::Contains(">q4/q2<") && Catch::Contains("A cache of 256 tokens"));
  all_kept = false;
  const std::string part = evidence::formats_report(texts, "evidence --formats", results);
  CHECK_THAT(part, Catch::Contains("+100% (+100 to +100)") && !Catch::Contains("What is spared, with"));
}
