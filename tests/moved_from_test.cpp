// What was moved from can be destroyed and assigned to, and is refused by name where it is used: every public class.

#include <sinkcache/host_threads.hpp>
#include <sinkcache/key_policies.hpp>
#include <sinkcache/layer_caches.hpp>
#include <sinkcache/named_caches.hpp>
#include <sinkcache/policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <sinkcache/sinkcache.hpp>
#include <sinkcache/thread_pool.hpp>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"

using namespace sinkcache;

namespace {

constexpr index_t dim = 4, tokens = 6;

cache_config config_of(index_t window = 8) {
  return {.num_kv_heads = 1, .head_dim = dim, .window = window, .rope = rope::plain(dim, 100.0), .rollback = 0};
}
matrix rows(index_t n, float by) {
  matrix m(n, dim);
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = by * static_cast<float>(i % 7 - 3);
  return m;
}
const matrix& k() {
  static const matrix m = rows(tokens, 0.3f);
  return m;
}
const matrix& q() {
  static const matrix m = rows(1, 0.7f);
  return m;
}
softmax_variant sinks() { return softmax_variant::sink_logits(std::vector<float>{3.f}); }
attention layer() { return attention({.num_qo_heads = 1, .softmax = sinks()}); }

std::vector<float> outputs(const kv_source& keys, const attention& by = layer()) {
  matrix out(1, dim);
  workspace w;
  by.decode(q(), keys, out, w);
  return {out.data(), out.data() + dim};
}

const std::string no_cache = "sinkcache: the cache was moved from, had to be one that holds memory";

// Moves from a T and lets it go; moves again, asks what is left, and assigns to it.
template <class T>
void check_left(const std::function<T()>& make, const std::function<void(T&)>& ask,
                const std::function<std::vector<float>(T&)>& use) {
  T whole = make();
  const std::vector<float> right = use(whole);
  {
    T from = make();
    [[maybe_unused]] const T to(std::move(from));
  }
  T from = make();
  T to(std::move(from));
  CHECK(use(to) == right);
  ask(from);  // NOLINT(bugprone-use-after-move): that is what is asked
  from = std::move(to);
  CHECK(use(from) == right);
  ask(to);  // NOLINT(bugprone-use-after-move)
  to = make();
  CHECK(use(to) == right);
}

template <class Cache>
void check_cache(const std::function<Cache()>& make) {
  check_left<Cache>(
      make,
      [](Cache& cache) {
        const attention a = layer();
        matrix out(1, dim);
        workspace w;
        CHECK((cache.seen() == 0 && cache.size() == 0 && cache.capacity() == 0 && cache.nbytes() == 0));
        CHECK(cache.try_append(k(), k()).message() == no_cache);
        CHECK(a.try_decode(q(), cache, out, w).message() == no_cache);
        CHECK(a.try_decode(q(), std::as_const(cache), out, w).message() == no_cache);
        const std::vector<decode_item> batch = {{{q().data(), dim}, &cache, {out.data(), dim}}};
        CHECK(a.try_decode(batch, w).message() == no_cache);
        CHECK(a.try_attend(q().topRows(0), cache, out.topRows(0), w).message() == no_cache);
        CHECK(a.try_prefill(q(), k().topRows(1), k().topRows(1), cache, out, w).message() == no_cache);
        attention_state state(1, dim);
        CHECK(a.try_attend(q(), cache, state, w).message() == no_cache);
        const joined_source joined({&cache});
        CHECK(a.try_decode(q(), joined, out, w).message() == no_cache);
        status found;
        CHECK(!cache.try_clone(found));
        CHECK(found.message() == no_cache);
        CHECK_THROWS_WITH(cache.clone(), no_cache);
        CHECK(!cache.try_truncate(1).ok());
        bool pinned = true;
        CHECK(!cache.try_pin(0, pinned).ok());
        CHECK((!pinned && cache.max_parts() == 0 && cache.num_visible(0) == 0 && num_not_finite(cache) == 0));
        CHECK(cache.try_truncate(0).ok());
        CHECK((cache.learner() == nullptr && cache.room() > 0 && cache.min_truncate() == 0));
        cache.prepare();
        cache.clear();
      },
      [](Cache& cache) { return outputs(cache); });
}

template <class Cache>
Cache filled(Cache cache) {
  cache.append(k(), k());
  return cache;
}

// A window whose numbers lie elsewhere: gone when it was moved from.
struct held_window {
  std::shared_ptr<const sink_window> of = std::make_shared<const sink_window>(sink_window{1, 7, 2});

  index_t capacity() const { return of->capacity(); }
  index_t num_pinned() const { return of->num_sink_tokens; }
  span_list visible(position_t seen) const { return of->visible(seen); }
  placed place(position_t position) const { return of->place(position); }
};

TEST_CASE("moved from: caches") {
  check_cache<kv_cache<f32>>([] { return filled(kv_cache<f32>(config_of())); });
  check_cache<kv_cache<q8>>([] { return filled(kv_cache<q8>(config_of())); });
  check_cache<kv_cache<f32, f32, held_window>>(
      [] { return filled(kv_cache<f32, f32, held_window>(config_of(0), held_window())); });
  check_cache<kv_cache<q8, q8, held_window>>(
      [] { return filled(kv_cache<q8, q8, held_window>(config_of(0), held_window())); });
  const auto make_scored = []<class F>(F) {
    return filled(scored_kv_cache<F>(config_of(0), {.budget = 4, .recent = 1, .interval = 4}, policies::random()));
  };
  check_cache<scored_kv_cache<q8>>([&] { return make_scored(q8()); });
  using scored = scored_kv_cache<f32>;
  const auto make = [&] { return make_scored(f32()); };
  check_cache<scored>(make);
  scored from = make();
  const scored to(std::move(from));
  CHECK_THROWS_WITH(from.rules(), no_cache);  // NOLINT(bugprone-use-after-move)
  CHECK_THROWS_WITH(from.scorer(), no_cache);
  CHECK_THROWS_WITH(from.pin(2), no_cache);
  CHECK((from.kept(0).empty() && from.budget(0) == 0 && from.evicted_mass(0) == 0 && from.rollback() == 0));
}

TEST_CASE("moved from: layers") {
  check_left<layer_caches>(
      [] {
        std::vector<std::unique_ptr<any_kv_cache>> caches;
        caches.push_back(std::make_unique<kv_cache<f32>>(filled(kv_cache<f32>(config_of()))));
        return layer_caches(std::move(caches));
      },
      [](layer_caches& layers) {
        CHECK((layers.size() == 0 && layers.seen() == 0 && layers.nbytes() == 0 && layers.min_truncate() == 0));
        CHECK_THROWS_WITH(layers[0], "sinkcache: layer was 0, had to be from 0 to below 0");
        CHECK_THROWS_WITH(std::as_const(layers)[-1], "sinkcache: layer was -1, had to be from 0 to below 0");
        CHECK(layers.try_truncate(1).message() == "sinkcache: seen was 1, had to be from 0 to what was seen, 0");
        CHECK(layers.try_erase(0, 1).message() == "sinkcache: last was 1, had to be at most what was seen, 0");
        status found;
        CHECK(layers.try_clone(found)->size() == 0);
        layers.clear();
      },
      [](layer_caches& layers) { return outputs(layers[0]); });
  // What names a cache has no names left.
  named_cache from{.policy = "a policy of a name that is longer than what a string holds in itself"};
  const named_cache to = std::move(from);
  status found;
  CHECK(!try_make_cache<format_list<f32>>(from, found));  // NOLINT(bugprone-use-after-move)
  CHECK(found.message() == "sinkcache: the format of keys was '', had to be f32");
}

// These are copied: what was moved from is as it was. A pool of threads stays where it is.
template <class... T>
constexpr bool only_copied = (std::is_trivially_copyable_v<T> && ...);
static_assert(only_copied<cache_config, rope, kv_layout, kv_piece, kv_pages, kv_ring, kv_memory, span_list, sink_window,
                          call_part, work_ref, sequential>);
static_assert(!std::is_move_constructible_v<thread_pool> && !std::is_move_assignable_v<thread_pool>);
static_assert(std::is_copy_constructible_v<pool_executor<thread_pool>> && std::is_copy_constructible_v<status>);

TEST_CASE("moved from: sources that read") {
  static const kv_cache<f32> cache = filled(kv_cache<f32>(config_of()));
  const auto refused = [](const char* message) {
    return [message](const kv_source& source) {
      matrix out(1, dim);
      workspace w;
      CHECK(layer().try_decode(q(), source, out, w).message() == message);
      CHECK((source.seen() == 0 && source.size() == 0));
    };
  };
  check_left<joined_source>([] { return joined_source({&cache}); },
                            refused("sinkcache: a joined_source was moved from, had to be one that has sources"),
                            [](const joined_source& joined) { return outputs(joined); });
  check_left<static_tokens<f32>>([] { return static_tokens<f32>(config_of(), k(), k()); },
                                 refused("sinkcache: static_tokens was moved from, had to be tokens"),
                                 [](const static_tokens<f32>& source) {  // no token of its own: decode is refused
                                   attention_state state(1, dim);
                                   workspace w;
                                   layer().attend(q(), source, state, w);
                                   std::vector<float> out(dim);
                                   state.finish(sinks(), 0, out);
                                   return out;
                                 });
  // A view is as it was before it was assigned any tokens.
  check_left<kv_view<f32>>(
      [] {
        return kv_view<f32>(config_of(), {{.token = dim}, {.token = dim}}, kv_piece{0, tokens, k().data(), k().data()},
                            tokens);
      },
      [](kv_view<f32>& view) { CHECK((view.seen() == 0 && view.size() == 0)); },
      [](const kv_view<f32>& view) { return outputs(view); });
}

TEST_CASE("moved from: attention, its softmax, its states, its memory") {
  const kv_cache<f32> cache = filled(kv_cache<f32>(config_of()));
  const std::string no_softmax = "sinkcache: softmax was moved from, had to be one that was not";
  check_left<attention>(
      layer,
      [&](attention& a) {
        matrix out(1, dim);
        workspace w;
        kv_cache<f32> own = filled(kv_cache<f32>(config_of()));
        CHECK(a.try_decode(q(), cache, out, w).message() == no_softmax);
        const std::vector<decode_item> batch = {{{q().data(), dim}, &cache, {out.data(), dim}}};
        CHECK(a.try_decode(batch, w).message() == no_softmax);
        CHECK(a.try_attend(q(), cache, out, w).message() == no_softmax);
        attention_state state(1, dim);
        CHECK(a.try_attend(q(), cache, state, w).message() == no_softmax);
        CHECK(a.try_prefill(q(), k().topRows(1), k().topRows(1), own, out, w).message() == no_softmax);
        CHECK(own.seen() == tokens);
        CHECK_THROWS_WITH(a.workspace_bytes(cache, 1), no_softmax);
      },
      [&](const attention& a) { return outputs(cache, a); });
  check_left<softmax_variant>(
      sinks,
      [&](softmax_variant& softmax) {
        CHECK_THROWS_WITH(attention({.num_qo_heads = 1, .softmax = softmax}), no_softmax);
        CHECK(validate(attention_params{.num_qo_heads = 1, .softmax = softmax}).message() == no_softmax);
        const attention_state state(1, dim);
        CHECK_THROWS_WITH(state.finish(softmax, 0), no_softmax);
      },
      [&](const softmax_variant& softmax) {
        return outputs(cache, attention({.num_qo_heads = 1, .softmax = softmax}));
      });
  check_left<attention_params>(
      [] { return attention_params{.num_qo_heads = 1, .softmax = sinks(), .alibi_slopes = {0.5f}}; },
      [&](attention_params& params) { CHECK(validate(params).message() == no_softmax); },
      [&](const attention_params& params) { return outputs(cache, attention(params)); });
  check_left<attention_state>(
      [&] {
        attention_state state(1, dim);
        workspace w;
        layer().attend(q(), cache, state, w);
        return state;
      },
      [&](attention_state& state) {
        const std::string refused = "sinkcache: the state was moved from, had to be one that has heads";
        CHECK((state.num_heads() == 0 && state.v_head_dim() == 0 && state.data().empty()));
        state.clear();
        CHECK_THROWS_WITH(state.merge(attention_state(1, dim)), refused);
        CHECK_THROWS_WITH(state.finish(sinks(), 0), refused);
        attention_state whole(1, dim);
        CHECK_THROWS_WITH(whole.merge(state), "sinkcache: other.num_heads() was 0, had to be exactly 1");
        workspace w;
        CHECK(layer().try_attend(q(), cache, state, w).message() ==
              "sinkcache: state.num_heads() was 0, had to be exactly 1");
      },
      [](const attention_state& state) {
        const matrix out = state.finish(sinks(), 0).out;
        return std::vector<float>(out.data(), out.data() + dim);
      });
  // A workspace takes memory again when it is asked to.
  const auto decode = [&](workspace& w) {
    matrix out(1, dim);
    layer().decode(q(), cache, out, w);
    return std::vector<float>(out.data(), out.data() + dim);
  };
  check_left<workspace>([] { return workspace(); }, [&](workspace& w) { CHECK(w.nbytes() == 0); }, decode);
  workspace from;
  const workspace to(std::move(from));
  CHECK(decode(from) == outputs(cache));  // NOLINT(bugprone-use-after-move)
}

TEST_CASE("moved from: what is copied instead, and matrices") {
  // rope and configurations hold all they have in themselves; a matrix has no rows left.
  check_left<rope>([] { return rope::plain(dim, 100.0); }, [](rope& r) { CHECK(r.width() == dim); },
                   [](const rope& r) { return std::vector<float>{static_cast<float>(r.width())}; });
  check_left<cache_config>([] { return config_of(); }, [](cache_config& c) { CHECK(validate(c).ok()); },
                           [](const cache_config& c) { return outputs(filled(kv_cache<f32>(c))); });
  matrix m = k();
  const matrix taken(std::move(m));
  kv_cache<f32> cache(config_of());
  CHECK(cache.try_append(taken, m).message() ==  // NOLINT(bugprone-use-after-move)
        "sinkcache: v.rows() was 0, had to be exactly 6");
  m = k();
  CHECK(cache.try_append(taken, m).ok());
  std::shared_ptr<const token_scorer> scorer = std::make_shared<policies::random>();
  const std::shared_ptr<const token_scorer> kept = std::move(scorer);
  CHECK(scored_kv_cache<f32>::validate(config_of(0), {.budget = 4}, scorer.get()).message() ==
        "sinkcache: scorer was null, had to be a scorer");
}

}  // namespace
