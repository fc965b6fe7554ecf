#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "compare/caches.hpp"
#include "compare/files.hpp"
#include "evidence/bootstrap.hpp"
#include "evidence/jobs.hpp"
#include "evidence/recall.hpp"
#include "evidence/report.hpp"
#include "nano.hpp"

namespace {

using namespace evidence;

compare::token_stream held_out() { return nano::text(4000); }

const progress silent = [](index_t) {};

}  // namespace

TEST_CASE("prefill in chunks costs every token what decoding costs it") {
  const compare::token_stream text = held_out();
  const compare::subject subject = nano::subject();
  index_t seen = 0;
  const std::vector<double> window =
      compare::evaluator(subject, compare::sink_window(0, 40), text.ids).by_prefill(600, [&](index_t tokens) {
        seen += tokens;
      });
  CHECK(seen == 600);
  for (const index_t sinks : {0, 3}) {
    const engine::cache_factory caches = compare::sink_window(sinks, 40 - sinks);
    const std::vector<double> prefilled = compare::evaluator(subject, caches, text.ids).by_prefill(600, silent),
                              decoded = compare::evaluator(subject, caches, text.ids).by_decode(600, silent);
    REQUIRE(prefilled.size() == 600);
    REQUIRE(decoded.size() == 600);
    for (std::size_t i = 0; i < 600; ++i) CHECK(std::abs(prefilled[i] - decoded[i]) < 1e-4);
    CHECK((std::abs(prefilled.back() - window.back()) > 1e-3) == (sinks > 0));
    // One after the other goes on where the first left off.
    compare::evaluator both(subject, caches, text.ids);
    both.by_prefill(300, silent);
    CHECK(std::abs(both.by_decode(300, silent).back() - decoded.back()) < 1e-4);
  }
}

TEST_CASE("recomputed tokens are evenly spaced, and see the first token and the newest") {
  CHECK(targets(10, 50, 4) == std::vector<index_t>{15, 25, 35, 45});
  CHECK(targets(10, 13, 3) == std::vector<index_t>{10, 11, 12});
  const compare::token_stream text = held_out();
  const compare::subject subject = nano::subject();
  compare::evaluator evaluator(subject, compare::sink_window(0, 12), text.ids);
  evaluator.recomputed(12, 12);
  const double bits = evaluator.recomputed(500, 12);
  engine::session session(nano::model(), compare::sink_window(0, 100));
  std::span<const float> logits = session.decode(text.ids[0]);
  for (std::size_t i = 490; i <= 500; ++i) logits = session.decode(text.ids[i]);
  CHECK(std::abs(engine::loss_bits(logits, text.ids[501]) - bits) < 2e-4);
}

TEST_CASE("the share of the first token is what PyTorch found for this model") {
  const engine::model model(SINKCACHE_SOURCE_DIR "/examples/models/tiny-softmax.safetensors");
  const compare::token_stream text = held_out();
  engine::session fresh(model, compare::sink_window(1, 127), {.watches_sinks = true});
  const engine::matrix shares = pinned_shares(fresh, 128, text.ids, 512, silent);
  // When the model was trained: means over other texts, of queries from 64 on, without eviction.
  const engine::matrix found{
      {.43f, .38f, .45f, .33f}, {.32f, .23f, .05f, .16f}, {0, .01f, .18f, .56f}, {.54f, .47f, 0, 0}};
  INFO(shares);
  CHECK((shares - found).cwiseAbs().maxCoeff() < 0.2f);
  CHECK((shares - found).cwiseAbs().mean() < 0.05f);
  for (const index_t pinned : {0, 40}) {
    engine::session session(model, compare::sink_window(pinned, 40), {.watches_sinks = true});
    for (std::size_t i = 0; i < 30; ++i) session.decode(text.ids[i]);
    CHECK((session.pinned_shares().array() - (pinned > 0 ? 1.f : 0.f)).abs().maxCoeff() < 1e-6f);
  }
}

TEST_CASE("the bootstrap finds the interval of a mean") {
  const auto mean = [](std::span<const std::size_t> drawn) {
    return static_cast<double>(std::accumulate(drawn.begin(), drawn.end(), std::size_t{0})) /
           static_cast<double>(drawn.size());
  };
  const interval i = bootstrap(100, mean);  // of 0 to 99: a standard error of 2.887
  CHECK(i.estimate == Approx(49.5));
  CHECK(std::abs(i.low - (49.5 - 1.96 * 2.887)) < 0.4);
  CHECK(std::abs(i.high - (49.5 + 1.96 * 2.887)) < 0.4);
  CHECK(bootstrap(100, mean).low == i.low);
  const interval one = bootstrap(7, [](std::span<const std::size_t>) { return 2.0; });
  CHECK((one.low == 2 && one.estimate == 2 && one.high == 2));
}

TEST_CASE("facts are asked for so many tokens later, in the same words") {
  const compare::token_stream text = held_out();
  const recall_stream stream = plant(nano::subject(), text.ids, 100, {{40, 300}, 5});
  REQUIRE(stream.facts.size() == 10);
  const auto digits_at = [&](index_t first) {
    std::vector<int> ids(stream.ids.begin() + first, stream.ids.begin() + first + digits_of_a_fact);
    for (int& id : ids) id -= '0';
    return ids;
  };
  const auto words = [&](index_t first, index_t last) {
    return std::string(stream.ids.begin() + first, stream.ids.begin() + last);
  };
  for (const fact& f : stream.facts) {
    CHECK(f.first >= 100);
    CHECK(digits_at(f.last - 3) == f.digits);
    CHECK(digits_at(f.asked_first + 1) == f.digits);
    CHECK(f.asked_last == f.asked_first + 3);
    const std::string sentence = words(f.first, f.last - 3);
    CHECK(sentence.starts_with("\n\nThe secret code of "));
    CHECK(sentence == words(f.asked_first + 1 - static_cast<index_t>(sentence.size()), f.asked_first + 1));
    const index_t later = f.asked_first + 1 - static_cast<index_t>(sentence.size()) - f.last;
    CHECK(later >= f.distance);
    CHECK(later <= f.distance + 100);
  }
  // Taking the likeliest digit, by decoding.
  const engine::cache_factory caches = compare::sink_window(1, 99);
  std::vector<int> right(stream.facts.size());
  engine::session session(nano::model(), caches);
  for (std::size_t i = 0; i < stream.ids.size(); ++i) {
    const std::span<const float> logits = session.decode(stream.ids[i]);
    const auto best = std::max_element(logits.begin() + '0', logits.begin() + '9' + 1) - logits.begin();
    for (std::size_t j = 0; j < right.size(); ++j) {
      const auto at = static_cast<index_t>(i);
      if (at >= stream.facts[j].asked_first && at <= stream.facts[j].asked_last) right[j] += best == stream.ids[i + 1];
    }
  }
  CHECK(recalled(nano::subject(), caches, stream, silent) == right);
  CHECK_THROWS_WITH(plant(nano::subject(), std::span(text.ids).first(150), 100, {{40}, 5}),
                    Catch::Contains("too short to plant 5 facts"));
}

TEST_CASE("a run that is kept is not taken for another") {
  options o = nano::options();
  o.caches = {16};
  o.tokens = 600, o.targets = 5, o.facts = 1, o.check = 50, o.threads = 1;
  const setting s{o, nano::subject(), held_out()};
  const std::vector<job> jobs = plan(o);
  const std::string path =
      (std::filesystem::temp_directory_path() / fmt::format("sinkcache_evidence_{}.json", ::getpid())).string();
  std::filesystem::remove(path);
  CHECK(kept(path, jobs[0], s).is_null());

  std::map<std::string, json> files;
  for (const job& j : jobs) {
    keep(path, j, s, {{"made_up", 1}});
    CHECK(kept(path, j, s).at("result").at("made_up") == 1);
    if (j.is == job::kind::recall || j.is == job::kind::decode) continue;
    index_t done = 0;
    files[j.name()] = measure(j, s, [&](index_t tokens) { done += tokens; });
    CHECK(done == work(j, o));
  }
  CHECK(files.at("check-sinks4-16").at("largest_difference_bits").get<double>() < 1e-4);
  const job& loss = *std::find_if(jobs.begin(), jobs.end(), [](const job& j) { return j.is == job::kind::loss; });
  CHECK_THROWS_WITH(kept(path, loss, s), Catch::Contains("name another --folder"));
  keep(path, loss, s, {});
  options other = o;
  other.tokens = 599;
  CHECK_THROWS_WITH(kept(path, loss, {other, nano::subject(), held_out()}), Catch::Contains("had to be of"));
  compare::write_atomically(path, "{\"inputs\": ");
  CHECK_THROWS_WITH(kept(path, loss, s), Catch::Contains("something else"));
  std::filesystem::remove(path);
}

TEST_CASE("new tables leave what a page says around them") {
  CHECK(page_with("new\n", "") == "# Evidence\n\nnew\n");
  CHECK(page_with("new\n", "# Evidence\n\nold\n") == "# Evidence\n\nnew\n");
  CHECK(page_with("new\n", "before\n<!-- evidence -->\nold\n<!-- end -->\nbehind\n") ==
        "before\n<!-- evidence -->\nnew\n<!-- end -->\nbehind\n");
  CHECK(page_with("new\n", "<!-- evidence -->\n1\n<!-- end -->\n<!-- ranking m -->\n2\n<!-- end -->\n", "ranking m") ==
        "<!-- evidence -->\n1\n<!-- end -->\n<!-- ranking m -->\nnew\n<!-- end -->\n");
  CHECK(page_with("new\n", "<!-- end -->\n<!-- evidence -->\nold\n") == "# Evidence\n\nnew\n");
}
