#include <sinkcache/joined.hpp>
#include <sinkcache/named_caches.hpp>

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "catch.hpp"
#include "counting_resource.hpp"

namespace {

using namespace sinkcache;

// Few, because what reads each format is compiled.
using formats = format_list<f32, q8>;

named_cache usual(const std::string& policy = "sinks", const std::string& k_format = "f32",
                  const std::string& v_format = "") {
  return {.policy = policy,
          .k_format = k_format,
          .v_format = v_format,
          .config = {.num_kv_heads = 2,
                     .head_dim = 8,
                     .num_sink_tokens = 2,
                     .window = 22,
                     .rope = rope::plain(8, 10000),
                     .rollback = 3,
                     .recent = 5},
          .num_qo_heads = 4};
}

matrix random_rows(index_t rows, index_t cols, unsigned seed) {
  std::srand(seed);
  return matrix::Random(rows, cols);
}

// What queries get from a cache over a stream, prefill and then decode.
matrix outputs(any_kv_cache& cache) {
  const attention layer({.num_qo_heads = 4});
  workspace memory;
  const matrix q = random_rows(60, 4 * 8, 1), k = random_rows(60, 2 * 8, 2), v = random_rows(60, 2 * 8, 3);
  matrix out(60, 4 * 8);
  layer.prefill(q.topRows(50), k.topRows(50), v.topRows(50), cache, out.topRows(50), memory);
  for (index_t i = 50; i < 60; ++i) {
    cache.append(k.middleRows(i, 1), v.middleRows(i, 1));
    layer.decode(q.middleRows(i, 1), cache, out.middleRows(i, 1), memory);
  }
  return out;
}

std::string message_of(const named_cache& of) {
  status found;
  const auto cache = try_make_cache<formats>(of, found);
  CHECK((cache == nullptr) == !found.ok());
  return std::string(found.message());
}

template <class Cache>
void check_same(const named_cache& of, Cache direct) {
  INFO(of.policy << ", " << of.k_format << ", " << of.v_format);
  const std::unique_ptr<any_kv_cache> named = make_cache<formats>(of);
  CHECK(named->nbytes() == direct.nbytes());
  CHECK(named->kind().k_format == direct.kind().k_format);
  CHECK(named->kind().v_format == direct.kind().v_format);
  CHECK(outputs(*named) == outputs(direct));
}

// What the caches of a model are tested with.

named_cache layer_of(index_t window, index_t rollback, const std::string& policy = "sinks",
                     const std::string& format = "f32") {
  return {.policy = policy,
          .k_format = format,
          .config = {.num_kv_heads = 1,
                     .head_dim = 4,
                     .num_sink_tokens = 2,
                     .window = window,
                     .rope = rope::none(),
                     .rollback = rollback,
                     .recent = 3},
          .num_qo_heads = 1};
}

void append_random(any_kv_cache& cache, index_t tokens) {
  const matrix rows = matrix::Random(tokens, 4);
  cache.append(rows, rows);
}

// Of a full layer, a window, one of few bits and one that evicts by score.
layer_caches four_layers() {
  return make_layer_caches<formats>(std::vector<named_cache>{
      layer_of(100, 0), layer_of(8, 5), layer_of(12, 7, "sinks", "q8"), layer_of(14, 9, "knorm:recent=2,interval=4")});
}

matrix decoded(layer_caches& caches) {
  const attention layer({.num_qo_heads = 1});
  workspace memory;
  matrix out(caches.size(), 4);
  const matrix q = matrix::Ones(1, 4);
  for (index_t i = 0; i < caches.size(); ++i) layer.decode(q, caches[i], out.middleRows(i, 1), memory);
  return out;
}

// A cache of somebody's own, with no more than it has to have.
class smallest_cache final : public any_kv_cache {
 public:
  smallest_cache() : any_kv_cache({.num_kv_heads = 1, .head_dim = 4, .v_head_dim = 4, .rope = rope::none()}) {}

  std::size_t nbytes() const noexcept override { return 1; }
  cache_kind kind() const noexcept override { return {"none", "none"}; }
  index_t room() const noexcept override { return 1; }
  void write(index_t, index_t, const_matrix_view, const_matrix_view, index_t, index_t) noexcept override {}
  void advance(index_t n) noexcept override { seen_ += n; }
  status try_truncate(position_t seen) noexcept override {
    status found;
    require_truncate(found, seen);
    if (found) seen_ = seen;
    return found;
  }
  position_t min_truncate() const noexcept override { return std::max<position_t>(0, seen_ - 1); }
  void clear() noexcept override { seen_ = 0; }
  index_t capacity() const noexcept override { return 1; }
  index_t max_parts() const noexcept override { return 1; }
  plan_end plan(index_t, position_t, position_t, part_list&) const noexcept override { return {1, 1}; }
};

}  // namespace

TEST_CASE("a named window is the cache of those formats") {
  named_cache of = usual();
  check_same(of, kv_cache<f32>(of.config));
  of = usual("sinks", "f32", "q8");
  check_same(of, kv_cache<f32, q8>(of.config));
  of = usual("sinks", "q8", "f32");
  check_same(of, kv_cache<q8, f32>(of.config));
  of = usual("window", "q8");
  of.config.num_sink_tokens = 0;
  check_same(of, kv_cache<q8>(of.config));
}

TEST_CASE("a named scored cache keeps as many rows as the window would, or its budget") {
  for (const named_policy& policy : named_policies) {
    const std::string name(policy.name), own = name == "lagkv" ? "lag=4," : "";
    named_cache of = usual(name + ":" + own + "recent=3,interval=8");
    eviction rules{.budget = 16, .recent = 3, .interval = 8, .num_qo_heads = 4};
    cache_config config = of.config;
    config.window = 0;
    status found;
    const std::vector<policy_parameter> lag{{"lag", "4"}};
    const auto scorer = make_policy(name, own.empty() ? std::vector<policy_parameter>() : lag, found);
    REQUIRE(found.ok());
    check_same(of, scored_kv_cache<f32>(config, rules, scorer));

    of.policy = name + ":interval=4,budget=14," + own + "recent=3";
    of.config.window = 0;
    rules.budget = 14, rules.interval = 4;
    check_same(of, scored_kv_cache<f32>(config, rules, scorer));
  }
}

TEST_CASE("a named scored cache of few bits is that cache") {
  named_cache of = usual("knorm:recent=3,interval=8", "q8", "f32");
  cache_config config = of.config;
  config.window = 0;
  check_same(of, scored_kv_cache<q8, f32>(config, {.budget = 16, .recent = 3, .interval = 8, .num_qo_heads = 4},
                                          policies::knorm()));
}

TEST_CASE("parameters in a policy's text reach the scorer and the rules") {
  eviction rules{.budget = 1, .accounts = true};
  status found;
  const auto scorer = make_policy("snapkv:kernel=5,adaptive=0.25,window=4,recent=9,budget=77,interval=3", rules, found);
  REQUIRE(found.ok());
  const auto& snapkv = dynamic_cast<const policies::snapkv&>(*scorer);
  CHECK(snapkv.kernel == 5);
  CHECK(snapkv.window == 4);
  CHECK(rules.budget == 77);
  CHECK(rules.recent == 9);
  CHECK(rules.interval == 3);
  CHECK(rules.adaptive == 0.25);
  CHECK(rules.accounts);
  CHECK(make_policy("snapkv:budget=5,kernel=x", rules, found) == nullptr);
  CHECK(rules.budget == 77);
  CHECK(make_policy("tova", rules, found) != nullptr);
  CHECK(rules.recent == 9);
}

TEST_CASE("a name that is not known says which are") {
  const std::string policies = "random h2o tova snapkv knorm keydiff mean_key lagkv expected_attention rkv gkv";
  CHECK(message_of(usual("sink")) == "sinkcache: the policy was 'sink', had to be one of: sinks window " + policies);
  CHECK(message_of(usual("")) == "sinkcache: the policy was '', had to be one of: sinks window " + policies);
  CHECK(message_of(usual("sinks:4")) ==
        "sinkcache: the policy was 'sinks:4', had to be 'sinks': num_sink_tokens and window say the rest");
  CHECK(message_of(usual("h2o:decay=1")) ==
        "sinkcache: h2o's parameter was 'decay', had to be one of: normalise=none|lifetime budget= recent=32 "
        "interval=64 adaptive=");
  CHECK(message_of(usual("tova:decay=1")) ==
        "sinkcache: tova's parameter was 'decay', had to be one of: budget= recent=32 interval=64 adaptive=");
  for (const char* const text : {"h2o:", "h2o:recent=3,"})
    CHECK(message_of(usual(text)) == "sinkcache: h2o's parameter was '', had to be name=value");
  CHECK(message_of(usual("h2o:recent=3,recent=3")) ==
        "sinkcache: h2o's parameters were given twice, had to be given once each");
  for (const std::string text : {"3x", "1.5", "1e3", "99999999999999999999", ""})
    CHECK(message_of(usual("h2o:recent=" + text)) ==
          "sinkcache: h2o's recent was '" + text +
              "', had to be a whole number from -9223372036854775808 to 9223372036854775807");
  CHECK(message_of(usual("random:seed=-1")) ==
        "sinkcache: random's seed was '-1', had to be a whole number from 0 to 18446744073709551615");
  CHECK(message_of(usual("gkv:decay=x")) == "sinkcache: gkv's decay was 'x', had to be a number");
  CHECK(message_of(usual("sinks", "f8")) == "sinkcache: the format of keys was 'f8', had to be f32 or q8");
  CHECK(message_of(usual("sinks", "f32", "f16")) == "sinkcache: the format of values was 'f16', had to be f32 or q8");
  CHECK(message_of(usual("h2o:recent=3,interval=8", "f32", "Q8")) ==
        "sinkcache: the format of values was 'Q8', had to be f32 or q8");
  CHECK_THROWS_AS(make_cache<formats>(usual("sink")), std::invalid_argument);
}

TEST_CASE("names that do not go together are refused") {
  CHECK(message_of(usual("window")) == "sinkcache: num_sink_tokens was 2, had to be 0: the policy window pins none");
  CHECK(message_of(usual("h2o:recent=3,budget=20")) ==
        "sinkcache: window was 22, had to be 0: the policy's budget says how many rows are kept");
  named_cache of = usual("h2o:budget=0");
  of.config.window = 0;
  CHECK(message_of(of).starts_with("sinkcache: budget was 0, had to be"));
  of.policy = "h2o";
  CHECK(message_of(of) == "sinkcache: window was 0, had to be at least 1, or the policy's budget given");
  of.config.window = std::numeric_limits<index_t>::max();
  CHECK(message_of(of) == "sinkcache: num_sink_tokens + window was 2 + 9223372036854775807, had to fit 63 bits");
  of = usual("h2o:interval=0");
  CHECK(message_of(of) == "sinkcache: interval was 0, had to be at least 1");
  // 2 pinned rows, 8 recent ones, and 14 that come between two events leave none of 24 free.
  CHECK(message_of(usual("h2o:recent=8,interval=14")) ==
        "sinkcache: num_sink_tokens + window was 24, had to be above num_sink_tokens, recent (or the scorer's window) "
        "and interval together, 24");
  CHECK(message_of(usual("h2o:recent=8,interval=13")).empty());
  CHECK(message_of(usual("snapkv:recent=0,interval=14")) == message_of(usual("h2o:recent=8,interval=14")));
}

TEST_CASE("named caches take memory from the resource that is given") {
  counting_resource memory;
  {
    const auto cache = make_cache<formats>(usual(), &memory);
    const auto scored = make_cache<formats>(usual("knorm:recent=3,interval=8"), &memory);
    CHECK(memory.bytes == cache->nbytes() + scored->nbytes());
    memory.exhausted = true;
    status found;
    const auto missing = [&](bool made) {
      CHECK_FALSE(made);
      CHECK((!found.ok() && found.lacks_memory()));
    };
    for (const char* const format : {"f32", "q8"})
      for (const char* const policy : {"sinks", "knorm:recent=3,interval=8"}) {
        const named_cache of = usual(policy, format);
        missing(try_make_cache<formats>(of, found, &memory) != nullptr);
        missing(try_make_layer_caches<formats>({&of, 1}, found, &memory).has_value());
        CHECK(found.message().starts_with("sinkcache: layer 0: bytes of the cache was "));
      }
    for (const any_kv_cache* const each : {cache.get(), scored.get()}) missing(each->try_clone_any(found) != nullptr);
    const matrix rows = random_rows(3, 16, 1);
    missing(static_tokens<f32>::try_create(usual().config, rows, rows, found, &memory).has_value());
    CHECK(found.message() == "sinkcache: bytes of the cache was 768, had to be at most what the memory resource has");
  }
  CHECK(memory.all_returned());
}

TEST_CASE("layers are taken back together or not at all") {
  layer_caches caches = four_layers();
  REQUIRE(caches.size() == 4);
  for (index_t i = 0; i < 4; ++i) append_random(caches[i], 40);
  CHECK(caches.seen() == 40);
  CHECK(caches.min_truncate() == 35);  // the window's

  const status refused = caches.try_truncate(34);
  CHECK(refused.message() == "sinkcache: seen was 34, had to be at least 35: older tokens are overwritten");
  for (index_t i = 0; i < 4; ++i) CHECK(caches[i].seen() == 40);
  CHECK_FALSE(caches.try_truncate(41).ok());
  CHECK_FALSE(caches.try_truncate(-1).ok());
  CHECK_THROWS_AS(caches.truncate(34), std::invalid_argument);

  caches.truncate(35);
  for (index_t i = 0; i < 4; ++i) CHECK(caches[i].seen() == 35);

  // A pass that failed after its first two layers.
  append_random(caches[0], 3), append_random(caches[1], 3);
  CHECK(caches.seen() == 35);
  caches.truncate(caches.seen());
  for (index_t i = 0; i < 4; ++i) CHECK(caches[i].seen() == 35);
  append_random(caches[3], 2);  // or a host that takes them in another order
  CHECK(caches.seen() == 35);
  caches.truncate(35);

  caches.clear();
  for (index_t i = 0; i < 4; ++i) CHECK(caches[i].seen() == 0);
}

TEST_CASE("layers that all can go back to their pinned tokens do") {
  layer_caches caches =
      make_layer_caches<formats>(std::vector<named_cache>{layer_of(8, 1), layer_of(9, 1, "sinks", "q8")});
  for (index_t i = 0; i < 2; ++i) append_random(caches[i], 40);
  CHECK_FALSE(caches.try_truncate(3).ok());
  caches.truncate(2);
  CHECK(caches.seen() == 2);
}

TEST_CASE("layers know their bytes and are copied together") {
  layer_caches caches = four_layers();
  for (index_t i = 0; i < 4; ++i) append_random(caches[i], 40);
  std::size_t bytes = 0;
  for (index_t i = 0; i < 4; ++i) bytes += caches[i].nbytes();
  CHECK(caches.nbytes() == bytes);

  layer_caches copy = caches.clone();
  const matrix before = decoded(caches);
  CHECK(decoded(copy) == before);
  for (index_t i = 0; i < 4; ++i) append_random(caches[i], 1);
  CHECK(copy.seen() == 40);
  CHECK(decoded(copy) == before);
  CHECK(decoded(caches) != before);
  copy.truncate(39);
  CHECK(caches.seen() == 41);

  const layer_caches moved = std::move(caches);
  CHECK(moved.seen() == 41);
  CHECK(moved.nbytes() == bytes);
}

TEST_CASE("layers that cannot be are refused") {
  CHECK_THROWS_WITH(layer_caches(std::vector<std::unique_ptr<any_kv_cache>>(1)),
                    "sinkcache: a layer's cache was null, had to be a cache");
  CHECK_THROWS_WITH(make_layer_caches<formats>(std::vector<named_cache>{layer_of(8, 1), layer_of(0, 1)}),
                    "sinkcache: layer 1: window was 0, had to be at least 1: of a layer without a window, as many "
                    "tokens as its stream may have");
  status found;
  CHECK_FALSE(layer_caches::try_create(std::vector<std::unique_ptr<any_kv_cache>>(1), found));
  CHECK(found.message() == "sinkcache: a layer's cache was null, had to be a cache");
  const named_cache broken = layer_of(0, 1);
  CHECK_FALSE(try_make_layer_caches<formats>({&broken, 1}, found));
  CHECK((found.message().starts_with("sinkcache: layer 0: window was 0") && !found.lacks_memory()));
  const layer_caches none;
  CHECK(none.seen() == 0);
  CHECK(none.nbytes() == 0);
  CHECK(none.clone().size() == 0);
}

TEST_CASE("a cache of one's own takes back what it says it can, and is not copied") {
  std::vector<std::unique_ptr<any_kv_cache>> own;
  own.push_back(std::make_unique<smallest_cache>());
  layer_caches caches(std::move(own));
  append_random(caches[0], 5);
  CHECK_FALSE(caches.try_truncate(3).ok());
  caches.truncate(4);
  CHECK(caches.seen() == 4);
  status found;
  CHECK_FALSE(caches.try_clone(found));
  CHECK_FALSE(found.ok());
  CHECK_THROWS_WITH(caches.clone(), "sinkcache: the cache has no try_clone_any, had to be one that can be copied");
  bool pinned = true;
  CHECK_FALSE(caches[0].try_pin(1, pinned).ok());
  CHECK_FALSE(pinned);
}
