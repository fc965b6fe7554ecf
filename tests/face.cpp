// The face of the library, as its users have it: every name and signature is here once. More may be added to it;
// whatever makes this file fail to compile breaks their programs.

#include <sinkcache/sinkcache.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <new>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"

namespace {

using std::same_as, std::declval;
namespace sc = sinkcache;

// Explicit: a braced or single argument does not turn into a T by itself.
template <class T, class... Arguments>
concept explicitly_from = std::constructible_from<T, Arguments...> && !(std::convertible_to<Arguments, T> && ...);

// Matrices and numbers.

static_assert(std::derived_from<sc::matrix, Eigen::MatrixBase<sc::matrix::Matrix>> && sc::matrix::IsRowMajor);
static_assert(same_as<sc::matrix::Scalar, float> && sc::matrix::SizeAtCompileTime == Eigen::Dynamic);
static_assert(same_as<sc::position_t, std::int64_t>);
static_assert(std::signed_integral<sc::index_t> && sizeof(sc::index_t) == sizeof(std::ptrdiff_t));

// Enumerations.

static_assert(!std::convertible_to<sc::positions, int> && sc::positions::in_cache != sc::positions::absolute);
static_assert(!std::convertible_to<sc::inputs, int> && sc::inputs::raw != sc::inputs::rotated);
static_assert(!std::convertible_to<sc::rope_pairing, int> &&
              sc::rope_pairing::half_split != sc::rope_pairing::interleaved);

// Rope.

static_assert(explicitly_from<sc::rope, std::span<const float>>);
static_assert(std::constructible_from<sc::rope, std::span<const float>, sc::rope_pairing>);
static_assert(std::constructible_from<sc::rope, std::span<const float>, sc::rope_pairing, float>);
static_assert(std::copyable<sc::rope> && sizeof(sc::rope) <= 8192);
static_assert(same_as<decltype(sc::rope::none()), sc::rope>);
static_assert(same_as<decltype(sc::rope::plain(sc::index_t{}, double{})), sc::rope>);

// Cache_config: names, order, types, defaults.

sc::cache_config full_config() {
  return {.num_kv_heads = 2,
          .head_dim = 8,
          .v_head_dim = 4,
          .num_sink_tokens = 1,
          .window = 3,
          .positions = sc::positions::absolute,
          .inputs = sc::inputs::rotated,
          .rope = sc::rope::none(),
          .first_position = 5,
          .rollback = 2};
}

static_assert(std::is_aggregate_v<sc::cache_config>);
static_assert(same_as<decltype(sc::cache_config::num_kv_heads), sc::index_t>);
static_assert(same_as<decltype(sc::cache_config::head_dim), sc::index_t>);
static_assert(same_as<decltype(sc::cache_config::v_head_dim), sc::index_t>);
static_assert(same_as<decltype(sc::cache_config::num_sink_tokens), sc::index_t>);
static_assert(same_as<decltype(sc::cache_config::window), sc::index_t>);
static_assert(same_as<decltype(sc::cache_config::positions), sc::positions>);
static_assert(same_as<decltype(sc::cache_config::inputs), sc::inputs>);
static_assert(same_as<decltype(sc::cache_config::rope), std::optional<sc::rope>>);
static_assert(same_as<decltype(sc::cache_config::first_position), sc::position_t>);
static_assert(same_as<decltype(sc::cache_config::rollback), sc::index_t>);

// Formats, policies, caches.

static_assert(sc::kv_format<sc::f32> && sc::kv_format<sc::f16> && sc::kv_format<sc::bf16>);
static_assert(sc::eviction_policy<sc::sink_window>);
static_assert(same_as<sc::kv_cache<sc::f16>, sc::kv_cache<sc::f16, sc::f16, sc::sink_window>>);

struct newest_only {
  sc::index_t capacity() const { return 1; }
  sc::span_list visible(sc::position_t seen) const {
    sc::span_list spans;
    spans.push_back({seen > 0 ? seen - 1 : 0, seen});
    return spans;
  }
  sc::placed place(sc::position_t) const { return {0, 0}; }
};
static_assert(sc::eviction_policy<newest_only>);

template <class Cache, class Policy>
constexpr bool is_a_cache() {
  using resource = std::pmr::memory_resource*;
  static_assert(std::constructible_from<Cache, const sc::cache_config&, Policy>);
  static_assert(std::constructible_from<Cache, const sc::cache_config&, Policy, resource>);
  static_assert(std::movable<Cache> && !std::copy_constructible<Cache>);
  using view = const sc::matrix&;
  static_assert(same_as<decltype(declval<Cache&>().append(declval<view>(), declval<view>())), void>);
  static_assert(same_as<decltype(declval<const Cache&>().size()), sc::index_t>);
  static_assert(same_as<decltype(declval<const Cache&>().capacity()), sc::index_t>);
  static_assert(same_as<decltype(declval<const Cache&>().seen()), sc::position_t>);
  static_assert(same_as<decltype(declval<const Cache&>().nbytes()), std::size_t>);
  static_assert(same_as<decltype(declval<Cache&>().truncate(sc::position_t{})), void>);
  static_assert(same_as<decltype(declval<const Cache&>().min_truncate()), sc::position_t>);
  static_assert(same_as<decltype(declval<Cache&>().clear()), void>);
  static_assert(same_as<decltype(declval<const Cache&>().clone()), Cache>);
  static_assert(same_as<decltype(declval<const Cache&>().config()), sc::cache_config>);
  return true;
}
static_assert(is_a_cache<sc::kv_cache<sc::f32>, sc::sink_window>());
static_assert(is_a_cache<sc::kv_cache<sc::bf16, sc::f16>, sc::sink_window>());
static_assert(is_a_cache<sc::kv_cache<sc::f16, sc::f32, newest_only>, newest_only>());

static_assert(explicitly_from<sc::kv_cache<sc::f32>, const sc::cache_config&>);
static_assert(std::constructible_from<sc::kv_cache<sc::f32>, const sc::cache_config&, std::pmr::memory_resource*>);
static_assert(
    same_as<decltype(sc::kv_cache<sc::f32>::required_bytes(declval<const sc::cache_config&>())), std::size_t>);
static_assert(std::convertible_to<decltype(sc::default_resource()), std::pmr::memory_resource*>);

// Softmax.

static_assert(same_as<decltype(sc::softmax_variant::standard()), sc::softmax_variant>);
static_assert(same_as<decltype(sc::softmax_variant::softmax1()), sc::softmax_variant>);
static_assert(same_as<decltype(sc::softmax_variant::sink_logits(std::span<const float>())), sc::softmax_variant>);
static_assert(std::copyable<sc::softmax_variant>);

// Attention.

sc::attention_params full_params() {
  return {.num_qo_heads = 4,
          .softmax = sc::softmax_variant::softmax1(),
          .sm_scale = 0.5f,
          .logits_soft_cap = 30.f,
          .alibi_slopes = {0.f, 0.f, 0.f, 0.f},
          .sink_bias = {0.f, 0.f, 0.f, 0.f}};
}

static_assert(std::is_aggregate_v<sc::attention_params>);
static_assert(same_as<decltype(sc::attention_params::num_qo_heads), sc::index_t>);
static_assert(same_as<decltype(sc::attention_params::softmax), sc::softmax_variant>);
static_assert(same_as<decltype(sc::attention_params::sm_scale), std::optional<float>>);
static_assert(same_as<decltype(sc::attention_params::logits_soft_cap), float>);
static_assert(same_as<decltype(sc::attention_params::alibi_slopes), std::vector<float>>);
static_assert(same_as<decltype(sc::attention_params::sink_bias), std::vector<float>>);
static_assert(explicitly_from<sc::attention, sc::attention_params>);

// Workspace and executors.

static_assert(sc::executor<sc::sequential>);

struct two_workers {
  sc::index_t concurrency() const { return 2; }
  template <class Work>
  void run(sc::index_t n, const Work& work) {
    for (sc::index_t item = 0; item < n; ++item) work(item, item % 2);
  }
};
static_assert(sc::executor<two_workers>);
static_assert(std::default_initializable<sc::workspace>);
static_assert(explicitly_from<sc::workspace, two_workers&>);
static_assert(std::movable<sc::workspace>);

// All of it, called.

template <class Cache>
float use(Cache cache) {
  const sc::matrix q = sc::matrix::Ones(3, 4 * 8), k = sc::matrix::Ones(3, 2 * 8), v = sc::matrix::Ones(3, 2 * 4);
  sc::matrix out(3, 4 * 4);
  float lse[12] = {};
  const sc::attention attention(full_params());
  two_workers workers;
  sc::workspace workspace(workers);
  workspace.reserve(1);

  attention.prefill(q, k, v, cache, out, workspace);
  attention.prefill(q, k, v, cache, out, workspace, {.lse = lse});
  cache.append(k.topRows(1), v.topRows(1));
  const Cache& constant = cache;
  attention.decode(q.topRows(1), constant, out.topRows(1), workspace);
  attention.decode(q.row(0), constant, out.row(0), workspace, {.lse = std::span(lse).first(4)});
  attention.decode(q.row(0), constant, out.topRows(0), workspace, {.lse = std::span(lse).first(4), .out = false});
  Cache copy = constant.clone();
  copy.truncate(copy.min_truncate());
  copy.clear();
  cache = std::move(copy);
  return out.sum() + lse[0];
}

float use_state() {
  sc::attention_state state(1, 4), other(1, 4);
  state.merge(other);
  const auto [out, lse] = state.finish(sc::softmax_variant::softmax1(), 0);
  static_assert(std::convertible_to<decltype(lse), float>);
  return out.sum() + lse;
}

// The README's program, for fewer tokens.
float use_as_in_the_readme() {
  sinkcache::kv_cache<sinkcache::bf16> cache({.num_kv_heads = 8,
                                              .head_dim = 128,
                                              .num_sink_tokens = 4,
                                              .window = 1020,
                                              .rope = sinkcache::rope::plain(128, 500000.0)});
  sinkcache::attention attention({.num_qo_heads = 32});
  sinkcache::workspace workspace;
  sinkcache::matrix q = sinkcache::matrix::Ones(1, 32 * 128), k = sinkcache::matrix::Ones(1, 8 * 128), v = k,
                    out(1, 32 * 128);
  for (int token = 0; token < 3; ++token) {
    cache.append(k, v);
    attention.decode(q, cache, out, workspace);
  }
  return out.sum();
}

// Everything that can be refused without an exception.

static_assert(noexcept(sc::validate(declval<const sc::cache_config&>())));
static_assert(noexcept(sc::validate(declval<const sc::attention_params&>())));
static_assert(same_as<decltype(sc::validate(sc::cache_config())), sc::status>);

template <class Cache>
constexpr bool can_be_tried() {
  using view = const sc::matrix&;
  using attention = const sc::attention&;
  using workspace = sc::workspace&;
  static_assert(noexcept(declval<Cache&>().try_append(declval<view>(), declval<view>())));
  static_assert(noexcept(declval<Cache&>().try_truncate(sc::position_t{})));
  static_assert(noexcept(declval<attention>().try_decode(declval<view>(), declval<const Cache&>(),
                                                         declval<sc::matrix&>(), declval<workspace>())));
  static_assert(noexcept(declval<attention>().try_attend(declval<view>(), declval<const Cache&>(),
                                                         declval<sc::attention_state&>(), declval<workspace>())));
  static_assert(
      noexcept(declval<attention>().try_prefill(declval<view>(), declval<view>(), declval<view>(), declval<Cache&>(),
                                                declval<sc::matrix&>(), declval<workspace>())));
  return true;
}
static_assert(can_be_tried<sc::kv_cache<sc::f32>>() && can_be_tried<sc::any_kv_cache>());

// Has no memory; says so as exceptions allow.
struct no_memory final : std::pmr::memory_resource {
  void* do_allocate(std::size_t, std::size_t) override {
#if defined(__cpp_exceptions)
    throw std::bad_alloc();
#else
    return nullptr;
#endif
  }
  void do_deallocate(void*, std::size_t, std::size_t) override {}
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

struct workers {
  sc::index_t number;
  sc::index_t concurrency() const { return number; }
  void run(sc::index_t, const sc::work_ref&) const {}
};

// What an engine does that may not die, with one bad argument after the other. Nothing throws or aborts.
TEST_CASE("face: bad input is a status, with exceptions and without") {
  sc::status found;
  sc::cache_config config = full_config();
  for (const sc::index_t bad : {sc::index_t{-1}, sc::index_t{0}, sc::index_t{1} << 62}) {
    config.num_kv_heads = bad;
    CHECK(!sc::kv_cache<sc::f32>::validate(config));
    CHECK(!sc::kv_cache<sc::f32>::try_create(config, found));
    CHECK(!found);
  }
  config = full_config();
  config.window = sc::index_t{1} << 50;
  CHECK(!sc::kv_cache<sc::bf16>::try_create(config, found));  // the default resource has none
  CHECK(found.message().find("bytes of the cache was ") != std::string_view::npos);
  no_memory none;
  CHECK(!sc::kv_cache<sc::bf16>::try_create(full_config(), found, &none));
  CHECK(found.message().find("bytes of the cache was ") != std::string_view::npos);
  CHECK(!sc::kv_cache<sc::bf16>::try_create(full_config(), found, nullptr));

  std::optional<sc::kv_cache<sc::bf16>> made = sc::kv_cache<sc::bf16>::try_create(full_config(), found);
  REQUIRE((made && found.ok()));
  sc::any_kv_cache& cache = *made;
  const sc::matrix q = sc::matrix::Ones(3, 4 * 8), k = sc::matrix::Ones(3, 2 * 8), v = sc::matrix::Ones(3, 2 * 4);
  CHECK(cache.try_append(v, k).message() == "sinkcache: k.cols() was 8, had to be exactly 16");
  CHECK(!cache.try_append(k, v.topRows(2)));
  CHECK(!cache.try_append({nullptr, 3, 16}, v));
  CHECK(cache.try_append(k, v));
  CHECK(cache.seen() == 3);
  CHECK(!cache.try_truncate(4));
  CHECK(!cache.try_truncate(-1));
  CHECK(cache.try_truncate(2));

  sc::attention_params params = full_params();
  params.sink_bias = {1.f};
  CHECK(sc::validate(params).message() == "sinkcache: sink_bias.size() was 1, had to be one per query head, 4");
  CHECK(sc::validate(full_params()).ok());
  const sc::attention attention(full_params());
  const std::vector<float> negative = {1.f, -1.5f}, too_many(257, 1.f), good = {1.f, 0.5f};
  CHECK(sc::rope::validate(good).ok());
  CHECK(sc::rope::validate(negative).message() == "sinkcache: an inv_freq was -1.5, had to be from 0 to 2^32");
  CHECK(sc::rope::validate(too_many).message() == "sinkcache: inv_freq.size() was 257, had to be at most 256");
  CHECK(sc::rope::validate(good, 0).message() == "sinkcache: attention_factor was 0, had to be finite and above 0");
  CHECK(sc::softmax_variant::validate(good).ok());
  CHECK(sc::softmax_variant::validate({}).message() ==
        "sinkcache: sink_logits.size() was 0, had to be one per query head");
  CHECK(sc::softmax_variant::validate(std::vector<float>{HUGE_VALF}).message() ==
        "sinkcache: a sink logit was inf, had to be below infinity");

  const workers no_workers{0};
  CHECK(!sc::workspace::try_create(no_workers, found));
  std::optional<sc::workspace> workspace = sc::workspace::try_create(found);
  REQUIRE((workspace && found.ok()));
  CHECK(!workspace->try_reserve(sc::index_t{1} << 60));
  sc::matrix out(3, 4 * 4);
  sc::attention_state state(4, 4), wrong(3, 4);
  CHECK(!attention.try_decode(q, cache, out, *workspace));
  CHECK(attention.try_decode(q.topRows(1), cache, out.topRows(1), *workspace));
  CHECK(!attention.try_attend(q.topRows(1), cache, wrong, *workspace));
  CHECK(attention.try_attend(q.topRows(1), cache, state, *workspace));
  CHECK(!attention.try_prefill(q, k, k, cache, out, *workspace));
  CHECK(cache.seen() == 2);
  CHECK(attention.try_prefill(q, k, v, cache, out, *workspace));
  CHECK(cache.seen() == 5);

  // A format that is named at run time, and a cache that was moved from.
  std::unique_ptr<sc::any_kv_cache> chosen;
  const auto make = [&](sc::viewed_format auto k_format, sc::viewed_format auto v_format) {
    using cache_type = sc::kv_cache<decltype(k_format), decltype(v_format)>;
    sc::status made_it;
    if (auto optional = cache_type::try_create(full_config(), made_it))
      chosen = std::make_unique<cache_type>(std::move(*optional));
    return made_it;
  };
  CHECK(sc::try_with_formats("f16", "q4", make).message() ==
        "sinkcache: the format of values was 'q4', had to be f32, f16 or bf16");
  CHECK(sc::try_with_formats("f16", "bf16", make));
  REQUIRE(chosen != nullptr);
  CHECK((chosen->try_append(k, v) && chosen->size() == 3 && chosen->capacity() == 4 && chosen->nbytes() > 0));
  const sc::kv_cache<sc::bf16> moved = std::move(*made);
  CHECK(!made->try_append(k, v));
  CHECK(!attention.try_prefill(q, k, v, *made, out, *workspace));
  CHECK(!attention.try_decode(q.topRows(1), *made, out.topRows(1), *workspace));
  CHECK(!made->try_clone(found));
  CHECK(moved.try_clone(found));
}

TEST_CASE("face: the defaults") {
  const sc::cache_config config{};
  CHECK(config.v_head_dim == 0);
  CHECK(config.num_sink_tokens == 0);
  CHECK((config.positions == sc::positions::in_cache));
  CHECK((config.inputs == sc::inputs::raw));
  CHECK(!config.rope.has_value());
  CHECK(config.first_position == 0);
  CHECK(config.rollback == 63);

  const sc::attention_params params{.num_qo_heads = 1};
  CHECK(params.softmax.sink(0) == sc::softmax_variant::standard().sink(0));
  CHECK(!params.sm_scale.has_value());
  CHECK(params.logits_soft_cap == 0.f);
  CHECK(params.alibi_slopes.empty());
  CHECK(params.sink_bias.empty());
}

TEST_CASE("face: everything can be called") {
  std::pmr::memory_resource* const resource = sc::default_resource();
  CHECK(use(sc::kv_cache<sc::f32>(full_config())) > 0);
  CHECK(use(sc::kv_cache<sc::bf16, sc::f16>(full_config(), resource)) > 0);
  sc::cache_config config = full_config();
  config.num_sink_tokens = config.window = 0;  // the policies have them
  CHECK(use(sc::kv_cache<sc::f16>(config, sc::sink_window{1, 3})) > 0);
  CHECK(use(sc::kv_cache<sc::f32, sc::f32, newest_only>(config, newest_only(), resource)) > 0);
  CHECK(use_state() == 0.f);
  CHECK(std::abs(use_as_in_the_readme() - 32 * 128) < 0.01f);  // the mean of equal values of 1
}

}  // namespace
