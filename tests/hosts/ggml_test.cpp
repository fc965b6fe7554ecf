// Our operator in ggml graphs over llama.cpp's cache: against ggml_flash_attn_ext, and against the oracle at our bound.

#include "ggml_attention.hpp"

#include <ggml-cpu.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../effort.hpp"
#include "../oracle.hpp"

using namespace sinkcache;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity(), not_a_number = std::numeric_limits<float>::quiet_NaN();

enum class cells { by_token, by_head, transposed_values };  // llama.cpp with flash attention, HND, llama.cpp without it

struct shape {
  int64_t heads = 8, kv_heads = 2, dim = 64, v_dim = 64;
  int64_t cells = 256, seen = 200, tokens = 1, streams = 1;
  ggml_type k_type = GGML_TYPE_F16, v_type = GGML_TYPE_F16;
  ::cells order = ::cells::by_token;
};

float normal(effort::dice& dice) {
  return static_cast<float>(std::sqrt(-2 * std::log(1 - dice.uniform())) *
                            std::cos(6.283185307179586 * dice.uniform()));
}

void store(const ggml_tensor* t, int64_t i0, int64_t i1, int64_t i2, int64_t i3, float value) {
  char* const at = static_cast<char*>(t->data) + i0 * int64_t(t->nb[0]) + i1 * int64_t(t->nb[1]) +
                   i2 * int64_t(t->nb[2]) + i3 * int64_t(t->nb[3]);
  if (t->type == GGML_TYPE_F32) std::memcpy(at, &value, 4);
  const ggml_fp16_t half = ggml_fp32_to_fp16(value);
  if (t->type == GGML_TYPE_F16) std::memcpy(at, &half, 2);
  const ggml_bf16_t brain = ggml_fp32_to_bf16(value);
  if (t->type == GGML_TYPE_BF16) std::memcpy(at, &brain, 2);
}

float load(const ggml_tensor* t, int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
  const char* const at = static_cast<const char*>(t->data) + i0 * int64_t(t->nb[0]) + i1 * int64_t(t->nb[1]) +
                         i2 * int64_t(t->nb[2]) + i3 * int64_t(t->nb[3]);
  float value = 0;
  ggml_fp16_t half{};
  ggml_bf16_t brain{};
  if (t->type == GGML_TYPE_F32) return std::memcpy(&value, at, 4), value;
  if (t->type == GGML_TYPE_F16) return std::memcpy(&half, at, 2), ggml_fp16_to_fp32(half);
  return std::memcpy(&brain, at, 2), ggml_bf16_to_fp32(brain);
}

// A cache as llama.cpp lays it out, larger than what is seen of it, and queries as its graphs hand them over.
struct host {
  host(const shape& of, uint64_t seed) : s(of), dice(seed) {
    const size_t rows = size_t((s.cells + 8) * s.kv_heads * s.streams * (s.dim + s.v_dim));
    context.reset(ggml_init({rows * 16 + size_t(s.heads * s.tokens * s.streams * (s.dim + s.v_dim) * 64) +
                                 size_t(s.cells * s.tokens * s.streams * 8) + (16u << 20),
                             nullptr, false}));
    // Eight cells more than a graph looks at.
    const auto cache = [&](ggml_type type, int64_t dim, bool transposed) {
      const int64_t all = s.cells + 8;
      ggml_tensor* t = nullptr;
      if (transposed) {
        t = ggml_new_tensor_4d(context.get(), type, all, dim, s.kv_heads, s.streams);
        t = ggml_view_4d(context.get(), t, s.cells, dim, s.kv_heads, s.streams, t->nb[1], t->nb[2], t->nb[3], 0);
        return ggml_permute(context.get(), t, 1, 0, 2, 3);
      }
      if (s.order == cells::by_head) {
        t = ggml_new_tensor_4d(context.get(), type, dim, all, s.kv_heads, s.streams);
        return ggml_view_4d(context.get(), t, dim, s.cells, s.kv_heads, s.streams, t->nb[1], t->nb[2], t->nb[3], 0);
      }
      t = ggml_new_tensor_4d(context.get(), type, dim, s.kv_heads, all, s.streams);
      t = ggml_view_4d(context.get(), t, dim, s.kv_heads, s.cells, s.streams, t->nb[1], t->nb[2], t->nb[3], 0);
      return ggml_permute(context.get(), t, 0, 2, 1, 3);
    };
    k = cache(s.k_type, s.dim, false);
    v = cache(s.v_type, s.v_dim, s.order == cells::transposed_values);
    for (ggml_tensor* t : {k, v})
      for (int64_t stream = 0; stream < s.streams; ++stream)
        for (int64_t head = 0; head < s.kv_heads; ++head)
          for (int64_t cell = 0; cell < s.cells; ++cell)
            for (int64_t i = 0; i < t->ne[0]; ++i)
              store(t, i, cell, head, stream, cell < s.seen ? normal(dice) : not_a_number);
    ggml_tensor* const rows_of_q =
        ggml_new_tensor_4d(context.get(), GGML_TYPE_F32, s.dim, s.heads, s.tokens, s.streams);
    for (int64_t i = 0; i < ggml_nelements(rows_of_q); ++i) ggml_get_data_f32(rows_of_q)[i] = normal(dice);
    q = ggml_permute(context.get(), rows_of_q, 0, 2, 1, 3);
    positions = ggml_new_tensor_1d(context.get(), GGML_TYPE_I32, s.tokens * s.streams);
    set_seen(s.seen);
  }

  void set_seen(int64_t seen) {
    for (int64_t i = 0; i < s.tokens * s.streams; ++i)
      static_cast<int32_t*>(positions->data)[i] = static_cast<int32_t>(seen - s.tokens + i % s.tokens);
  }

  void clear_unseen_cells() {
    for (ggml_tensor* t : {k, v})
      for (int64_t i = 0; i < s.streams * s.kv_heads * (s.cells - s.seen) * t->ne[0]; ++i)
        store(t, i % t->ne[0], s.seen + i / t->ne[0] % (s.cells - s.seen),
              i / t->ne[0] / (s.cells - s.seen) % s.kv_heads, i / t->ne[0] / (s.cells - s.seen) / s.kv_heads, 0);
  }

  bool visible(int64_t token, int64_t cell, int64_t window, int64_t num_sink_tokens) const {
    const int64_t position = s.seen - s.tokens + token;
    return cell <= position && (window == 0 || cell > position - window || cell < num_sink_tokens);
  }

  float mask_value(int64_t token, int64_t cell, int64_t window, int64_t num_sink_tokens, float max_bias) const {
    if (!visible(token, cell, window, num_sink_tokens)) return -inf;
    return max_bias > 0 ? static_cast<float>(cell - (s.seen - s.tokens + token)) : 0;
  }

  // ggml's own, with the mask that says what ours is told in two numbers.
  ggml_tensor* flash(float scale, float soft_cap, float max_bias, const std::vector<float>& sink_logits, int64_t window,
                     int64_t num_sink_tokens) {
    ggml_tensor* const mask = ggml_new_tensor_2d(context.get(), GGML_TYPE_F16, s.cells, s.tokens);
    for (int64_t token = 0; token < s.tokens; ++token)
      for (int64_t cell = 0; cell < s.cells; ++cell)
        store(mask, cell, token, 0, 0, mask_value(token, cell, window, num_sink_tokens, max_bias));
    ggml_tensor* const values = s.order == cells::transposed_values ? ggml_cont(context.get(), v) : v;
    ggml_tensor* const out = ggml_flash_attn_ext(context.get(), q, k, values, mask, scale, max_bias, soft_cap);
    if (!sink_logits.empty()) {
      ggml_tensor* const sinks = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, s.heads);
      std::copy(sink_logits.begin(), sink_logits.end(), ggml_get_data_f32(sinks));
      ggml_flash_attn_ext_add_sinks(out, sinks);
    }
    return out;
  }

  ggml_cgraph* graph_of(ggml_tensor* out) {
    ggml_cgraph* const graph = ggml_new_graph_custom(context.get(), 16, false);
    ggml_build_forward_expand(graph, out);
    return graph;
  }
  std::vector<float> run(ggml_tensor* out, int threads) {
    ggml_graph_compute_with_ctx(context.get(), graph_of(out), threads);
    return {ggml_get_data_f32(out), ggml_get_data_f32(out) + ggml_nelements(out)};
  }

  struct give_back {
    void operator()(ggml_context* of) const { ggml_free(of); }
  };

  shape s;
  effort::dice dice;
  std::unique_ptr<ggml_context, give_back> context;
  ggml_tensor *q = nullptr, *k = nullptr, *v = nullptr, *positions = nullptr;
};

// The largest error, as a part of the bound. `layer` says how logits are made.
double error(const host& h, oracle::layer layer, const std::vector<float>& out, int64_t window,
             int64_t num_sink_tokens) {
  const shape& s = h.s;
  layer.num_qo_heads = size_t(s.heads), layer.num_kv_heads = size_t(s.kv_heads);
  layer.head_dim = size_t(s.dim), layer.v_head_dim = size_t(s.v_dim);
  double worst = 0;
  for (int64_t stream = 0; stream < s.streams; ++stream) {
    std::vector<float> keys, values, query;
    for (int64_t cell = 0; cell < s.seen; ++cell)
      for (int64_t head = 0; head < s.kv_heads; ++head) {
        for (int64_t i = 0; i < s.dim; ++i) keys.push_back(load(h.k, i, cell, head, stream));
        for (int64_t i = 0; i < s.v_dim; ++i) values.push_back(load(h.v, i, cell, head, stream));
      }
    for (int64_t token = 0; token < s.tokens; ++token) {
      query.clear();
      for (int64_t head = 0; head < s.heads; ++head)
        for (int64_t i = 0; i < s.dim; ++i) query.push_back(load(h.q, i, token, head, stream));
      std::vector<oracle::position> visible;
      for (int64_t cell = 0; cell < s.seen; ++cell)
        if (h.visible(token, cell, window, num_sink_tokens)) visible.push_back(cell);
      const auto answers =
          oracle::attend(layer, query.data(), s.seen - s.tokens + token, visible, keys.data(), values.data());
      for (size_t head = 0; head < answers.size(); ++head) {
        const double distance = layer.alibi_slopes.empty() || visible.empty()
                                    ? 0
                                    : double(layer.alibi_slopes[head]) * double(s.seen - visible.front());
        const double bound = 16 * 0x1p-24 * (1 + answers[head].a + distance) * answers[head].v_max;
        for (size_t i = 0; i < size_t(s.v_dim); ++i) {
          const size_t row = size_t(stream * s.tokens + token) * size_t(s.heads) + head;
          const double difference = std::abs(double(out[row * size_t(s.v_dim) + i]) - answers[head].out[i]);
          worst = std::max(worst, difference <= bound ? difference / bound : 1 + difference / bound);  // NaN too
          if (std::isnan(difference)) worst = inf;
        }
      }
    }
  }
  return worst;
}

// ggml's, from its one number.
std::vector<float> alibi_slopes(int64_t heads, float max_bias) {
  std::vector<float> slopes;
  if (max_bias == 0) return slopes;
  int64_t power = 1;
  while (2 * power <= heads) power *= 2;
  for (int64_t head = 0; head < heads; ++head)
    slopes.push_back(
        std::exp2(-max_bias / static_cast<float>(power) *
                  (head < power ? static_cast<float>(head + 1) : static_cast<float>(head - power) + 0.5f)));
  return slopes;
}

double nmse(const std::vector<float>& ours, const std::vector<float>& theirs) {
  double squares = 0, of = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    squares += std::pow(double(ours[i]) - double(theirs[i]), 2);
    of += std::pow(double(theirs[i]), 2);
  }
  return squares / of;
}

}  // namespace

TEST_CASE("in a ggml graph it gives what ggml_flash_attn_ext gives, and the oracle within the bound") {
  double worst_error = 0, worst_nmse = 0, worst_flash = 0;
  const int num_cases = effort::cases(40);
  for (int number = 0; number < num_cases; ++number) {
    effort::dice dice(static_cast<uint64_t>(number) + 1);
    shape s;
    const int64_t dims[] = {16, 40, 64, 80, 96, 128, 192, 256}, groups[] = {1, 2, 3, 4, 7, 8};
    s.kv_heads = dice.from_to(1, 4);
    s.heads = s.kv_heads * groups[dice.from_to(0, 5)];
    s.dim = s.v_dim = dims[dice.from_to(0, 7)];
    if (dice.one_in(4)) s.v_dim = dims[dice.from_to(0, 7)];
    s.seen = dice.from_to(1, dice.one_in(4) ? 900 : 200);
    s.tokens = dice.one_in(2) ? 1 : dice.from_to(1, std::min<int64_t>(s.seen, 48));
    s.cells = (s.seen + 63) / 64 * 64;
    s.streams = dice.one_in(4) ? 2 : 1;
    s.order = static_cast<cells>(dice.from_to(0, 2));
    if (dice.one_in(4)) s.k_type = s.v_type = GGML_TYPE_F32;
    if (dice.one_in(4)) s.k_type = s.v_type = GGML_TYPE_BF16;
    const int64_t window = dice.one_in(2) ? dice.from_to(1, s.seen) : 0;
    const int64_t num_sink_tokens = window > 0 && dice.one_in(2) ? dice.from_to(1, 4) : 0;
    const float soft_cap = dice.one_in(4) ? 5.0f : 0.0f, scale = 1 / std::sqrt(static_cast<float>(s.dim));
    const float max_bias = dice.one_in(4) ? 8.0f : 0.0f;  // ALiBi
    std::vector<float> sink_logits;
    if (dice.one_in(2))
      for (int64_t head = 0; head < s.heads; ++head) sink_logits.push_back(3 * dice.signed_unit());
    INFO("case " << number << ": heads " << s.heads << "/" << s.kv_heads << " of " << s.dim << "/" << s.v_dim
                 << ", seen " << s.seen << ", tokens " << s.tokens << ", streams " << s.streams << ", layout "
                 << static_cast<int>(s.order) << ", " << ggml_type_name(s.k_type) << ", window " << window << "+"
                 << num_sink_tokens << ", soft cap " << soft_cap << ", max_bias " << max_bias << ", sinks "
                 << sink_logits.size());
    host h(s, static_cast<uint64_t>(number) + 1000);

    attention_params params{.num_qo_heads = s.heads,
                            .sm_scale = scale,
                            .logits_soft_cap = soft_cap,
                            .alibi_slopes = alibi_slopes(s.heads, max_bias)};
    if (!sink_logits.empty()) params.softmax = softmax_variant::sink_logits(sink_logits);
    std::vector<workspace> workspaces(4);
    ggml_attention op(params, {.num_sink_tokens = num_sink_tokens, .window = window, .positions = positions::absolute},
                      workspaces);
    status found;
    ggml_tensor* const node = op.build(h.context.get(), h.q, h.k, h.v, h.positions, found);
    REQUIRE(found.message() == "");
    std::vector<float> ours;
    for (int threads : {1, 2, 3, 4, 6}) {  // of any number of threads the same bits, of NaN in unseen cells none
      std::fill_n(ggml_get_data_f32(node), ggml_nelements(node), not_a_number);
      const std::vector<float> out = h.run(node, threads);
      REQUIRE(op.take_refused().message() == "");
      if (threads == 1) ours = out;
      INFO(threads << " threads");
      REQUIRE(std::memcmp(out.data(), ours.data(), out.size() * sizeof(float)) == 0);
    }

    oracle::layer layer;
    layer.in_cache = false, layer.sm_scale = static_cast<double>(scale), layer.soft_cap = static_cast<double>(soft_cap);
    layer.sink_logits = sink_logits, layer.alibi_slopes = params.alibi_slopes;
    h.clear_unseen_cells();
    const std::vector<float> theirs =
        h.run(h.flash(scale, soft_cap, max_bias, sink_logits, window, num_sink_tokens), 2);
    const double ours_off = error(h, layer, ours, window, num_sink_tokens);
    CHECK(ours_off <= 1);
    CHECK(nmse(ours, theirs) <= 5e-4);
    worst_error = std::max(worst_error, ours_off);
    worst_nmse = std::max(worst_nmse, nmse(ours, theirs));
    worst_flash = std::max(worst_flash, error(h, layer, theirs, window, num_sink_tokens));
  }
  std::printf(
      "%d graphs: NMSE to ggml_flash_attn_ext at most %.1e; of the bound to the oracle, ours %.3f, ggml's %.0f\n",
      num_cases, worst_nmse, worst_error, worst_flash);
}

TEST_CASE("a graph is built once and decodes a stream, in StreamingLLM's positions") {
  const rope rotary = rope::plain(64, 10000);
  host h({.seen = 160, .order = cells::by_token}, 7);
  oracle::layer layer;
  layer.sm_scale = 0.125, layer.q_turned = true;
  for (int i = 0; i < 32; ++i) layer.inv_freq.push_back(static_cast<float>(std::pow(10000.0, -i / 32.0)));
  std::vector<workspace> workspaces(2);
  ggml_attention op({.num_qo_heads = 8}, {.num_sink_tokens = 4, .window = 60, .rope = rotary}, workspaces);
  status found;
  ggml_tensor* const node = op.build(h.context.get(), h.q, h.k, h.v, h.positions, found);
  REQUIRE(found.message() == "");
  ggml_cgraph* const graph = h.graph_of(node);
  for (h.s.seen = 1; h.s.seen <= 160; ++h.s.seen) {
    h.set_seen(h.s.seen);
    ggml_graph_compute_with_ctx(h.context.get(), graph, 2);
    REQUIRE(op.take_refused().message() == "");
    INFO("seen " << h.s.seen);
    REQUIRE(error(h, layer, {ggml_get_data_f32(node), ggml_get_data_f32(node) + ggml_nelements(node)}, 60, 4) <= 1);
  }
}

TEST_CASE("what the operator cannot serve it refuses by name, and no graph dies of it") {
  std::vector<workspace> workspaces(2);
  ggml_attention op({.num_qo_heads = 8}, {.positions = positions::absolute}, workspaces);
  host h({.tokens = 3}, 1);
  ggml_context* const c = h.context.get();
  status found;
  const auto refusal = [&](ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, ggml_tensor* positions) {
    CHECK(op.build(c, q, k, v, positions, found) == nullptr);
    return std::string(found.message());
  };
  ggml_tensor* const blocks = ggml_new_tensor_3d(c, GGML_TYPE_Q5_0, 64, 256, 2);
  CHECK(refusal(h.q, blocks, h.v, h.positions) ==
        "sinkcache: the format of keys was 'q5_0', had to be f32, f16, bf16, q8_0 or q4_0");
  CHECK(refusal(h.q, h.k, blocks, h.positions) ==
        "sinkcache: the format of values was 'q5_0', had to be f32, f16, bf16, q8_0 or q4_0");
  CHECK(refusal(h.q, h.k, h.v, h.k).find("positions' type was f16, had to be i32") != std::string::npos);
  CHECK(refusal(ggml_new_tensor_3d(c, GGML_TYPE_F32, 64, 3, 8), h.k, h.v, h.positions).find("q->nb[2] was 768") !=
        std::string::npos);
  CHECK(refusal(ggml_new_tensor_3d(c, GGML_TYPE_F16, 64, 3, 8), h.k, h.v, h.positions).find("q's type was f16") !=
        std::string::npos);
  CHECK(refusal(h.q, ggml_new_tensor_3d(c, GGML_TYPE_F16, 64, 256, 3), h.v, h.positions).find("k->ne[2] was 3") !=
        std::string::npos);
  CHECK(refusal(h.q, h.k, ggml_new_tensor_3d(c, GGML_TYPE_F16, 64, 255, 2), h.positions).find("v->ne[1]") !=
        std::string::npos);

  ggml_tensor* const node = op.build(c, h.q, h.k, h.v, h.positions, found);
  REQUIRE(found.message() == "");
  std::fill_n(ggml_get_data_f32(node), ggml_nelements(node), 7.0f);
  const auto run = [&] {
    const std::vector<float> out = h.run(node, 2);
    CHECK(std::all_of(out.begin(), out.end(), [](float f) { return f == 7; }));  // untouched
    return std::string(op.take_refused().message());
  };
  h.set_seen(257);
  CHECK(run() == "sinkcache: the newest query's position was 256, had to be below the cells, 256");
  h.set_seen(2);
  CHECK(run() == "sinkcache: q.rows() was 3, had to be at most what was stored, 2");
  h.set_seen(20);
  static_cast<int32_t*>(h.positions->data)[1] = 5;
  CHECK(run() == "sinkcache: a query's position was 5, had to be one below the next query's: 18");
  CHECK(op.take_refused().ok());
  h.set_seen(20);
  h.run(node, 2);
  CHECK(op.take_refused().ok());
  CHECK(ggml_get_data_f32(node)[0] != 7);
}

TEST_CASE("time, beside ggml_flash_attn_ext", "[.][timing]") {
  struct {
    int64_t seen, tokens;
    bool sinks;
  } const cases[] = {{4096, 1, false}, {4096, 1, true}, {16384, 1, false}, {1024, 512, false}};
  for (const auto& of : cases)
    for (int threads : {1, 2}) {
      host h({.heads = 32,
              .kv_heads = 8,
              .dim = 128,
              .v_dim = 128,
              .cells = of.seen,
              .seen = of.seen,
              .tokens = of.tokens},
             1);
      const std::vector<float> sink_logits(of.sinks ? 32 : 0, 0.5f);
      attention_params params{.num_qo_heads = 32};
      if (of.sinks) params.softmax = softmax_variant::sink_logits(sink_logits);
      std::vector<workspace> workspaces(2);
      ggml_attention op(params, {.positions = positions::absolute}, workspaces);
      status found;
      ggml_tensor* const nodes[] = {op.build(h.context.get(), h.q, h.k, h.v, h.positions, found),
                                    h.flash(1 / std::sqrt(128.0f), 0, 0, sink_logits, 0, 0)};
      REQUIRE(found.message() == "");
      double best[] = {1e9, 1e9};
      for (int round = 0; round < (of.tokens > 1 ? 5 : 15); ++round)
        for (int i : {0, 1}) {
          ggml_cplan plan = ggml_graph_plan(h.graph_of(nodes[i]), threads, nullptr);
          std::vector<uint8_t> work(plan.work_size);
          plan.work_data = work.data();
          ggml_cgraph* const graph = h.graph_of(nodes[i]);
          const auto start = std::chrono::steady_clock::now();
          ggml_graph_compute(graph, &plan);
          best[i] = std::min(best[i], std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
      std::printf("seen %5d, tokens %3d%s, %d threads: ours %.3f ms, ggml's %.3f ms, ours %.2f of it\n", int(of.seen),
                  int(of.tokens), of.sinks ? ", sinks" : "", threads, 1e3 * best[0], 1e3 * best[1], best[0] / best[1]);
    }
}
