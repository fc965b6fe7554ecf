// Caches of this library in ggml graphs: chunks, several sequences, nodes that are computed twice, against the oracle.

#include "ggml_caches.hpp"

#include <ggml-cpu.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <sinkcache/policies.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <vector>

#include "../catch.hpp"
#include "../effort.hpp"
#include "../oracle.hpp"

using namespace sinkcache;

namespace {

struct context {
  explicit context(size_t bytes = 64u << 20) : graph(ggml_init({bytes, nullptr, false})) {}
  ~context() { ggml_free(graph); }
  context(const context&) = delete;
  context& operator=(const context&) = delete;

  void run(ggml_tensor* out, int threads) const {
    ggml_cgraph* const g = ggml_new_graph_custom(graph, 16, false);
    ggml_build_forward_expand(g, out);
    ggml_graph_compute_with_ctx(graph, g, threads);
  }
  ggml_tensor* floats(int64_t dim, int64_t heads, int64_t tokens) const {
    return ggml_new_tensor_3d(graph, GGML_TYPE_F32, dim, heads, tokens);
  }
  ggml_tensor* numbers(const std::vector<int32_t>& of) const {
    ggml_tensor* const t = ggml_new_tensor_1d(graph, GGML_TYPE_I32, int64_t(of.size()));
    std::memcpy(t->data, of.data(), of.size() * sizeof(int32_t));
    return t;
  }

  ggml_context* graph;
};

// A sequence as the host has it: all of its rows, never evicted.
struct stream {
  std::vector<float> q, k, v;
  int32_t seen = 0;
};

}  // namespace

TEST_CASE("caches in a ggml graph give what their policy says, in chunks of any length, and when computed twice") {
  for (int number = 0; number < effort::cases(12); ++number) {
    effort::dice dice(static_cast<uint64_t>(number) + 1);
    const index_t kv_heads = dice.from_to(1, 3), heads = kv_heads * dice.from_to(1, 4), dim = 16 * dice.from_to(1, 4);
    const cache_config config{.num_kv_heads = kv_heads,
                              .head_dim = dim,
                              .num_sink_tokens = dice.from_to(0, 4),
                              .window = dice.from_to(1, 40),
                              .rope = rope::plain(dim, 10000),
                              .rollback = dice.from_to(0, 20)};
    ggml_team team(4);
    workspace memory(team);
    ggml_caches caches({.num_qo_heads = heads}, team, memory);
    std::vector<stream> streams(size_t(dice.from_to(1, 3)));
    for (size_t s = 0; s < streams.size(); ++s) caches.set(int32_t(s), std::make_unique<kv_cache<f32>>(config));
    INFO("case " << number << ": heads " << heads << "/" << kv_heads << " of " << dim << ", " << config.num_sink_tokens
                 << "+" << config.window << ", rollback " << config.rollback << ", sequences " << streams.size());

    oracle::layer layer;
    layer.num_qo_heads = size_t(heads), layer.num_kv_heads = size_t(kv_heads);
    layer.head_dim = layer.v_head_dim = size_t(dim), layer.sm_scale = 1 / std::sqrt(double(dim));
    layer.k_rotated = false;
    for (index_t i = 0; i < dim / 2; ++i)
      layer.inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * double(i) / double(dim))));

    for (int step = 0; step < 6; ++step) {
      const context host;
      std::vector<int32_t> positions, sequences;
      const int64_t most = dice.one_in(2) ? 1 : 50;
      for (size_t s = 0; s < streams.size(); ++s)
        for (int64_t i = dice.from_to(most == 1 ? 0 : 1, most); i > 0; --i)
          positions.push_back(streams[s].seen++), sequences.push_back(int32_t(s));
      if (positions.empty()) continue;
      const auto tokens = int64_t(positions.size());
      ggml_tensor *const q = host.floats(dim, heads, tokens), *const k = host.floats(dim, kv_heads, tokens),
                         *const v = host.floats(dim, kv_heads, tokens);
      for (ggml_tensor* t : {q, k, v})
        for (int64_t i = 0; i < ggml_nelements(t); ++i)
          ggml_get_data_f32(t)[i] = static_cast<float>(2 * dice.signed_unit());
      for (int64_t i = 0; i < tokens; ++i) {
        stream& of = streams[size_t(sequences[size_t(i)])];
        const auto append = [&](std::vector<float>& to, const ggml_tensor* t) {
          const float* const row = static_cast<const float*>(t->data) + i * t->ne[0] * t->ne[1];
          to.insert(to.end(), row, row + t->ne[0] * t->ne[1]);
        };
        append(of.q, q), append(of.k, k), append(of.v, v);
      }
      status found;
      ggml_tensor* const out =
          caches.build(host.graph, q, k, v, host.numbers(positions), host.numbers(sequences), found);
      REQUIRE(found.message() == "");
      const auto result = [&](int threads) {
        std::fill_n(ggml_get_data_f32(out), ggml_nelements(out), std::numeric_limits<float>::quiet_NaN());
        host.run(out, threads);
        return std::vector<float>(ggml_get_data_f32(out), ggml_get_data_f32(out) + ggml_nelements(out));
      };
      const std::vector<float> once = result(1 + int(dice.from_to(0, 5)));
      REQUIRE(caches.take_refused().message() == "");
      if (tokens <= config.rollback) {
        const std::vector<float> twice = result(1 + int(dice.from_to(0, 5)));
        REQUIRE(caches.take_refused().message() == "");
        REQUIRE(std::memcmp(once.data(), twice.data(), once.size() * sizeof(float)) == 0);
      }

      for (int64_t i = 0; i < tokens; ++i) {
        const stream& of = streams[size_t(sequences[size_t(i)])];
        const int32_t position = positions[size_t(i)];
        std::vector<oracle::position> visible;
        for (int32_t p = 0; p <= position; ++p)
          if (p < config.num_sink_tokens || p > position - config.window) visible.push_back(p);
        const auto answers =
            oracle::attend(layer, of.q.data() + position * heads * dim, position, visible, of.k.data(), of.v.data());
        for (size_t h = 0; h < answers.size(); ++h)
          for (size_t d = 0; d < size_t(dim); ++d) {
            const double bound = 16 * 0x1p-24 * (1 + answers[h].a) * answers[h].v_max;
            const double off =
                std::abs(double(once[(size_t(i) * answers.size() + h) * size_t(dim) + d]) - answers[h].out[d]);
            if (!(off <= bound)) FAIL("token " << i << " at " << position << ", head " << h << ": off by " << off);
          }
      }
    }
  }
}

TEST_CASE("append and attend apart, and a policy that evicts by score") {
  const context host;
  const cache_config config{.num_kv_heads = 2, .head_dim = 16, .num_sink_tokens = 2, .rope = rope::plain(16, 10000)};
  ggml_team team(2);
  workspace memory(team), alone;
  ggml_caches caches({.num_qo_heads = 4}, team, memory);
  const auto make = [&] {
    return scored_kv_cache<f32>(config, {.budget = 24, .recent = 8, .interval = 8, .num_qo_heads = 4}, policies::h2o());
  };
  caches.set(0, std::make_unique<scored_kv_cache<f32>>(make()));
  scored_kv_cache<f32> other = make();
  const attention attend({.num_qo_heads = 4});
  effort::dice dice(7);
  status found;
  for (const int32_t tokens : {1, 30, 1, 1, 57, 1}) {
    ggml_tensor *const q = host.floats(16, 4, tokens), *const k = host.floats(16, 2, tokens),
                       *const v = host.floats(16, 2, tokens);
    for (ggml_tensor* t : {q, k, v})
      for (int64_t i = 0; i < ggml_nelements(t); ++i) ggml_get_data_f32(t)[i] = static_cast<float>(dice.signed_unit());
    std::vector<int32_t> positions(static_cast<size_t>(tokens));
    for (int32_t i = 0; i < tokens; ++i) positions[size_t(i)] = int32_t(other.seen()) + i;
    ggml_tensor* const out = caches.build(host.graph, q, k, v, host.numbers(positions), nullptr, found);
    REQUIRE(found.message() == "");
    host.run(out, 2);
    REQUIRE(caches.take_refused().message() == "");
    std::vector<float> expected(static_cast<size_t>(tokens * 64));
    const auto rows = [&](const ggml_tensor* t) {
      return const_matrix_view(static_cast<const float*>(t->data), tokens, t->ne[0] * t->ne[1]);
    };
    attend.prefill(rows(q), rows(k), rows(v), other, matrix_view(expected.data(), tokens, 64), alone);
    for (size_t i = 0; i < expected.size(); ++i) REQUIRE(std::abs(expected[i] - ggml_get_data_f32(out)[i]) < 1e-6f);
  }

  caches.set(0, std::make_unique<kv_cache<f32>>(
                    cache_config{.num_kv_heads = 2, .head_dim = 16, .window = 8, .rope = rope::plain(16, 10000)}));
  ggml_tensor *const q = host.floats(16, 4, 3), *const k = host.floats(16, 2, 3), *const v = host.floats(16, 2, 3);
  for (ggml_tensor* t : {q, k, v}) std::fill_n(ggml_get_data_f32(t), ggml_nelements(t), 0.5f);
  ggml_tensor* const positions = host.numbers({0, 1, 2});
  host.run(caches.append(host.graph, k, v, positions, nullptr, found), 2);
  CHECK(caches.get(0)->seen() == 3);
  ggml_tensor* const out = caches.attend(host.graph, q, 16, positions, nullptr, found);
  host.run(out, 2);
  CHECK(caches.take_refused().message() == "");
  CHECK(ggml_get_data_f32(out)[63] == Approx(0.5f));
}

TEST_CASE("what caches in a graph cannot serve they refuse by name") {
  const context host;
  ggml_team team(2);
  workspace memory(team);
  ggml_caches caches({.num_qo_heads = 4}, team, memory);
  status found;
  ggml_tensor *const q = host.floats(16, 4, 3), *const k = host.floats(16, 2, 3), *const v = host.floats(16, 2, 3);
  for (ggml_tensor* t : {q, k, v}) std::fill_n(ggml_get_data_f32(t), ggml_nelements(t), 0.5f);
  const auto refusal = [&](const std::vector<int32_t>& positions, const std::vector<int32_t>& sequences) {
    ggml_tensor* const out = caches.build(host.graph, q, k, v, host.numbers(positions), host.numbers(sequences), found);
    REQUIRE(found.message() == "");
    host.run(out, 2);
    std::string refused(caches.take_refused().message());
    CHECK(std::isnan(ggml_get_data_f32(out)[0]) == !refused.empty());
    return refused;
  };
  CHECK(refusal({0, 1, 2}, {0, 0, 0}) == "sinkcache: a token's sequence was 0, had to be one whose cache was set");
  caches.set(0, std::make_unique<kv_cache<f32>>(cache_config{
                    .num_kv_heads = 2, .head_dim = 16, .window = 2, .rope = rope::plain(16, 10000), .rollback = 1}));
  CHECK(refusal({1, 2, 3}, {0, 0, 0}) == "sinkcache: a token's position in sequence 0 was 1, had to be the next, 0");
  CHECK(refusal({0, 1, 2}, {0, 0, 0}) == "");
  CHECK(refusal({0, 1, 2}, {0, 0, 0}) == "");  // from the start again
  CHECK(refusal({3, 4, 5}, {0, 0, 0}) == "");
  CHECK(refusal({3, 4, 5}, {0, 0, 0}).find("sinkcache: seen was 3") == 0);  // what it saw is overwritten
  CHECK(refusal({6, 7, 7}, {0, 0, 1}) == "sinkcache: a token's sequence was 1, had to be one whose cache was set");
  CHECK(refusal({8, 10, 11}, {0, 0, 0}) == "sinkcache: a token's position in sequence 0 was 10, had to be the next, 9");
  CHECK(caches.build(host.graph, host.floats(16, 3, 3), k, v, host.numbers({0, 1, 2}), nullptr, found) == nullptr);
  CHECK(found.message() == "sinkcache: q->ne[1] was 3, had to be num_qo_heads, 4");
  CHECK(caches.build(host.graph, q, k, v, host.numbers({0, 1}), nullptr, found) == nullptr);
  CHECK(found.message() == "sinkcache: positions had 2 elements, had to have one for each token, 3");
  CHECK(caches.build(host.graph, ggml_permute(host.graph, q, 0, 2, 1, 3), k, v, host.numbers({0, 1, 2}), nullptr,
                     found) == nullptr);
}
