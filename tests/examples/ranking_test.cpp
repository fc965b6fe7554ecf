// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <sinkcache/named_policies.hpp>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "compare/scored_policies.hpp"
#include "evidence/ranking.hpp"
#include "nano.hpp"

namespace {

using namespace evidence;

options small_options() {
  options o = nano::options();
  o.ranking = true;
  o.caches = {64, 32};
  o.tokens = 1200, o.facts = 2, o.check = 0, o.threads = 1;
  return o;
}

setting setting_of(const options& o) { return {o, nano::subject(), nano::text(6000)}; }

// Results by name, and by the last one asked for that is missing.
struct made_up {
  std::map<std::string, json> files;

  results read() {
    return [this](const job& j) {
      const auto file = files.find(j.name());
      return file == files.end() ? nullptr : &file->second;
    };
  }
  void lose(const std::string& entry, index_t cache, double bits, index_t tokens) {
    const job j{job::kind::loss, compare::parse_policies(entry, cache).front(), cache};
    files[j.name()] = {{"result", {{"loss_bits", std::vector<double>(static_cast<std::size_t>(tokens), bits)}}},
                       {"git_commit", "abc"},
                       {"date", "2026-01-01"},
                       {"machine", "one"}};
  }
};

}  // namespace

TEST_CASE("contenders keep 32 recent tokens where these fit, and fewer elsewhere") {
  const auto places = [](index_t cache) {
    std::set<std::pair<index_t, index_t>> all;
    for (const contender& c : contenders(small_options(), cache)) {
      all.emplace(c.recent, c.interval);
      CHECK((fits(c, cache, 4) || c.name == "snapkv" || c.name == "rkv" || c.name == "gkv"));
    }
    return all;
  };
  using pairs = std::set<std::pair<index_t, index_t>>;
  CHECK(places(512) == pairs{{32, 16}, {32, 64}});
  CHECK(places(64) == pairs{{32, 16}});
  CHECK(places(32) == pairs{{8, 4}});
  CHECK(places(16) == pairs{{4, 2}});
  std::set<std::string> names;
  for (const contender& c : contenders(small_options(), 64)) names.insert(c.name);
  options o = small_options();
  o.only = {"tova", "h2o"};
  CHECK(contenders(o, 64).size() == 3);  // and h2o by lifetime
  for (const sinkcache::named_policy& p : sinkcache::named_policies) CHECK(names.contains(std::string(p.name)));
}

TEST_CASE("a ranking runs each thing once, what matters most first, and times last") {
  const options o = small_options();
  const std::vector<job> jobs = ranking_plan(o, true);
  std::set<std::string> names;
  for (const job& j : jobs) CHECK(names.insert(j.name()).second);
  CHECK(std::is_sorted(jobs.begin(), jobs.end(), [](const job& a, const job& b) { return stage(a) < stage(b); }));
  for (const char* name : {"loss-window-64", "loss-sinks1-64", "loss-sinks4-32", "loss-random_seed2-64",
                           "recall-sinks4-64", "loss-h2o_sinks0-64", "decode-tova-64"}) {
    INFO(name);
    CHECK(names.contains(name));
  }
  for (const job& j : ranking_plan(o, false)) CHECK(j.is == job::kind::loss);
}

TEST_CASE("what is only compared with sinks:4 is measured on fewer tokens, and compared over those") {
  options o = small_options();
  o.side_tokens = 600;  // no whole number of blocks
  const setting s = setting_of(o);
  const contender h2o{"h2o", "", 32, 16}, rare{"h2o", "", 32, 64}, pyramid{"h2o", "layers=pyramid", 32, 16};
  CHECK(loss_job(o, h2o, 4, 64).tokens == 0);
  for (const job& j : {loss_job(o, h2o, 1, 64), loss_job(o, rare, 4, 64), loss_job(o, pyramid, 4, 64),
                       loss_job(o, few_bits_window, 4, 64)}) {
    INFO(j.name());
    CHECK(j.tokens == 664);
    CHECK(work(j, o) == 664);
  }
  CHECK(loss_job(o, few_bits_window, 4, 64).name() == "loss-sinks4_q8_q4-64");
  CHECK(measure(loss_job(o, few_bits_window, 4, 64), s, [](index_t) {}).at("loss_bits").size() == 664);

  made_up all;
  all.lose("sinks:4", 64, 2.0, 1200);
  json& reference = all.files.begin()->second["result"]["loss_bits"];
  for (std::size_t i = 664; i < 1200; ++i) reference[i] = 9.0;  // nobody else is asked about these
  all.lose("h2o:sinks=1", 64, 1.5, 664);
  const std::vector<standing> found = standings(s, 64, all.read(), {h2o});
  REQUIRE(found.size() == 1);
  CHECK((found[0].sinks == 1 && found[0].more.estimate == Approx(-0.5) && found[0].bits.estimate == Approx(1.5)));
}

TEST_CASE("what a ranking measures is what its jobs say") {
  const options o = small_options();
  const setting s = setting_of(o);
  const std::vector<job> jobs = ranking_plan(o, true);
  std::set<int> measured;
  for (const job& j : jobs) {
    if (j.cache != 64 || j.policy.name != "h2o" || j.is == job::kind::decode) continue;
    measured.insert(static_cast<int>(j.is));
    const json result = measure(j, s, [](index_t) {});
    if (j.is == job::kind::loss) CHECK(result.at("loss_bits").size() == 1200);
    if (j.is != job::kind::recall) continue;
    REQUIRE(result.at("facts").size() == 6);
    std::set<index_t> distances;
    for (const json& fact : result.at("facts")) {
      distances.insert(fact.at("distance").get<index_t>());
      CHECK(fact.at("visible") == "by score");
    }
    CHECK(distances == std::set<index_t>{64, 256, 1024});
    CHECK(recalled_share({{"result", result}}, 256).has_value());
    CHECK_FALSE(recalled_share({{"result", result}}, 128).has_value());
  }
  CHECK(measured.size() == 2);
}

TEST_CASE("policies stand by their loss after the first eviction, against 4 pinned tokens") {
  const options o = small_options();
  const setting s = setting_of(o);
  made_up all;
  all.lose("sinks:4", 64, 2.0, 1200);
  all.lose("random", 64, 2.25, 1200);
  all.lose("random:seed=1", 64, 2.5, 1200);
  const results read = all.read();
  const contender chance{"random", "", 32, 16}, h2o{"h2o", "", 32, 16};
  CHECK(standings(s, 64, read, {chance, h2o}).empty());  // a seed is missing
  all.lose("random:seed=2", 64, 2.75, 1200);
  all.lose("h2o", 64, 1.5, 1200);
  const std::vector<standing> found = standings(s, 64, read, {chance, h2o});
  REQUIRE(found.size() == 2);
  CHECK(found[0].of.name == "h2o");
  CHECK(found[0].more.estimate == Approx(-0.5));
  CHECK(found[1].bits.estimate == Approx(2.5));
  CHECK((found[1].more.low == Approx(0.5) && found[1].more.high == Approx(0.5)));

  all.lose("tova", 64, 1.6, 1200);
  all.lose("knorm", 64, 1.7, 1200);
  all.lose("rkv", 64, 1.8, 1200);
  const std::vector<setting> texts = {s};
  const std::vector<results> kept = {read};
  std::vector<std::string> changed;
  for (const contender& c : variants(texts, 64, kept)) changed.push_back(c.shown());
  CHECK(changed == std::vector<std::string>{"h2o:layers=pyramid", "h2o:heads=ada", "h2o q8/q4", "tova:layers=pyramid",
                                            "tova q8/q4", "knorm:layers=pyramid", "knorm q8/q4"});
  for (const job& j : variants_plan(s, 64, variants(texts, 64, kept))) CHECK(j.policy.scored->interval == 16);

  const std::string page = ranking_report(texts, "the command", kept);
  CHECK_THAT(page, Catch::Contains("| h2o | 32, 16 | 1.500 | -0.500 (-0.500 to -0.500) |"));
  CHECK(page.find("| h2o |") < page.find("| tova |"));
  CHECK(page.find("| rkv |") < page.find("| **sinks + window** |"));
  CHECK_THAT(page, Catch::Contains("the command") && !Catch::Contains("+nan") && !Catch::Contains("| nan") &&
                       !Catch::Contains("snapkv |"));
  const std::string svg = ranking_svg(texts, kept);
  CHECK_THAT(svg, Catch::StartsWith("<svg") && Catch::EndsWith("</svg>\n") && Catch::Contains("sinks + window"));
  CHECK_THAT(svg, !Catch::Contains("\"nan") && !Catch::Contains("Mnan") && !Catch::Contains("inf"));
}
