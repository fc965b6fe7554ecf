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

char* address(const ggml_tensor* t, int64_t i1, int64_t i2, int64_t i3) {
  return static_cast<char*>(t->data) + i1 * int64_t(t->nb[1]) + i2 * int64_t(t->nb[2]) + i3 * int64_t(t->nb[3]);
}

void store(const ggml_tensor* t, int64_t i0, int64_t i1, int64_t i2, int64_t i3, float value) {
  char* const at = address(t, i1, i2, i3) + i0 * int64_t(t->nb[0]);
  if (t->type == GGML_TYPE_F32) std::memcpy(at, &value, 4);
  const ggml_fp16_t half = ggml_fp32_to_fp16(value);
  if (t->type == GGML_TYPE_F16) std::memcpy(at, &half, 2);
  const ggml_bf16_t brain = ggml_fp32_to_bf16(value);
  if (t->type == GGML_TYPE_BF16) std::memcpy(at, &brain, 2);
}

void store_row(const ggml_tensor* t, int64_t i1, int64_t i2, int64_t i3, const std::vector<float>& row) {
  if (ggml_is_quantized(t->type)) {
    ggml_quantize_chunk(t->type, row.data(), address(t, i1, i2, i3), 0, 1, t->ne[0], nullptr);
    if (std::isnan(row[0])) std::memset(address(t, i1, i2, i3), 0xff, ggml_row_size(t->type, t->ne[0]));  // d is NaN
    return;
  }
  for (int64_t i = 0; i < t->ne[0]; ++i) store(t, i, i1, i2, i3, row[size_t(i)]);
}

std::vector<float> load_row(const ggml_tensor* t, int64_t i1, int64_t i2, int64_t i3) {
  std::vector<float> row(size_t(t->ne[0]));
  if (ggml_is_quantized(t->type)) {
    ggml_get_type_traits(t->type)->to_float(address(t, i1, i2, i3), row.data(), t->ne[0]);
    return row;
  }
  for (int64_t i = 0; i < t->ne[0]; ++i) {
    const char* const at = address(t, i1, i2, i3) + i * int64_t(t->nb[0]);
    float& value = row[size_t(i)];
    ggml_fp16_t half{};
    ggml_bf16_t brain{};
    if (t->type == GGML_TYPE_F32) std::memcpy(&value, at, 4);
    if (t->type == GGML_TYPE_F16) std::memcpy(&half, at, 2), value = ggml_fp16_to_fp32(half);
    if (t->type == GGML_TYPE_BF16) std::memcpy(&brain, at, 2), value = ggml_bf16_to_fp32(brain);
  }
  return row;
}

// What a cell holds, and a query is; of a cell `sequences` are bits, of a query one number.
struct token {
  int32_t position = -1;
  uint64_t sequences = 0;
};

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
          for (int64_t cell = 0; cell < s.cells; ++cell) {
            std::vector<float> row(size_t(t->ne[0]));
            for (float& element : row) element = normal(dice);
            store_row(t, cell, head, stream, row);
          }
    ggml_tensor* const rows_of_q =
        ggml_new_tensor_4d(context.get(), GGML_TYPE_F32, s.dim, s.heads, s.tokens, s.streams);
    for (int64_t i = 0; i < ggml_nelements(rows_of_q); ++i) ggml_get_data_f32(rows_of_q)[i] = normal(dice);
    q = ggml_permute(context.get(), rows_of_q, 0, 2, 1, 3);
    const auto numbers = [&](int64_t n) { return ggml_new_tensor_1d(context.get(), GGML_TYPE_I32, n); };
    in = {numbers(s.tokens * s.streams), numbers(s.cells * s.streams), numbers(s.tokens * s.streams),
          ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, 2, s.cells * s.streams)};
    table.resize(size_t(s.cells * s.streams)), queries.resize(size_t(s.tokens * s.streams));
    set_seen(s.seen);
  }

  // Cell i of each stream holds position i of its one sequence.
  void set_seen(int64_t seen) {
    for (int64_t i = 0; i < s.tokens * s.streams; ++i)
      queries[size_t(i)] = {int32_t(seen - s.tokens + i % s.tokens), 0};
    for (int64_t i = 0; i < s.cells * s.streams; ++i)
      table[size_t(i)] = i % s.cells < seen ? token{int32_t(i % s.cells), 1} : token{};
    set_tables();
  }

  // Sequences that share a prefix, lost some of their tokens, and lie in any order.
  void scatter() {
    const uint64_t names[] = {0, 5, 33};
    for (int64_t stream = 0; stream < s.streams; ++stream) {
      const int64_t num_sequences = std::min<int64_t>(dice.from_to(1, 3), s.tokens), each = s.tokens / num_sequences;
      std::vector<token> held, asking;
      for (int64_t i = 0; i < num_sequences; ++i) {
        const int64_t asked = i + 1 < num_sequences ? each : s.tokens - each * i;
        const int64_t most = std::max(asked, (s.cells - int64_t(held.size())) / (num_sequences - i)),
                      lost = dice.from_to(0, 20);
        const int64_t end = dice.from_to(asked, most) + lost, hole = dice.from_to(0, end - asked - lost);
        for (int64_t p = 0; p < end; ++p) {
          if (p >= hole && p < hole + lost && p < end - asked) continue;
          const bool shared =
              i > 0 && size_t(p) < held.size() && held[size_t(p)].position == p && p < 30 && p < end - asked;
          if (shared)
            held[size_t(p)].sequences |= uint64_t(1) << names[i];
          else
            held.push_back({int32_t(p), uint64_t(1) << names[i]});
        }
        for (int64_t p = end - asked; p < end; ++p) asking.push_back({int32_t(p), names[i]});
      }
      held.resize(size_t(s.cells));
      const auto swap = [&](std::vector<token>& of, int64_t i, int64_t j) { std::swap(of[size_t(i)], of[size_t(j)]); };
      if (dice.one_in(2)) std::rotate(held.begin(), held.begin() + dice.from_to(0, s.cells - 1), held.end());
      for (int64_t i = 0; i < (dice.one_in(2) ? s.cells : 5); ++i)
        swap(held, dice.from_to(0, s.cells - 1), dice.from_to(0, s.cells - 1));
      for (int64_t i = 0; i < (dice.one_in(4) ? s.tokens : 0); ++i)
        swap(asking, dice.from_to(0, s.tokens - 1), dice.from_to(0, s.tokens - 1));
      std::copy(held.begin(), held.end(), table.begin() + stream * s.cells);
      std::copy(asking.begin(), asking.end(), queries.begin() + stream * s.tokens);
    }
    set_tables();
  }

  void set_tables() {
    const auto put = [](ggml_tensor* t, size_t i, uint64_t value) {
      static_cast<int32_t*>(t->data)[i] = static_cast<int32_t>(value);
    };
    for (size_t i = 0; i < queries.size(); ++i)
      put(in.positions, i, uint64_t(queries[i].position)), put(in.sequences, i, queries[i].sequences);
    for (size_t i = 0; i < table.size(); ++i) {
      put(in.cell_positions, i, uint64_t(table[i].position));
      put(in.cell_sequences, 2 * i, table[i].sequences & 0xffffffff);
      put(in.cell_sequences, 2 * i + 1, table[i].sequences >> 32);
    }
  }

  // Empty cells hold NaN, or, for ggml, which multiplies them by 0, nothing.
  void fill_empty_cells(float value) {
    for (ggml_tensor* t : {k, v})
      for (int64_t stream = 0; stream < s.streams; ++stream)
        for (int64_t cell = 0; cell < s.cells; ++cell)
          if (table[size_t(stream * s.cells + cell)].position < 0)
            for (int64_t head = 0; head < s.kv_heads; ++head)
              store_row(t, cell, head, stream, std::vector<float>(size_t(t->ne[0]), value));
  }

  // Whether a query, a number over all streams, sees a cell of its stream.
  bool visible(int64_t query, int64_t cell, int64_t window, int64_t num_sink_tokens) const {
    const token& of = queries[size_t(query)];
    const token& at = table[size_t(query / s.tokens * s.cells + cell)];
    return at.position >= 0 && (at.sequences >> of.sequences & 1) != 0 && at.position <= of.position &&
           (window == 0 || at.position > of.position - window || at.position < num_sink_tokens);
  }

  float mask_value(int64_t query, int64_t cell, int64_t window, int64_t num_sink_tokens, float max_bias) const {
    if (!visible(query, cell, window, num_sink_tokens)) return -inf;
    const int32_t position = table[size_t(query / s.tokens * s.cells + cell)].position;
    return max_bias > 0 ? static_cast<float>(position - queries[size_t(query)].position) : 0;
  }

  // ggml's own, with the mask that says what ours is told in two numbers.
  ggml_tensor* flash(float scale, float soft_cap, float max_bias, const std::vector<float>& sink_logits, int64_t window,
                     int64_t num_sink_tokens) {
    ggml_tensor* const mask = ggml_new_tensor_4d(context.get(), GGML_TYPE_F16, s.cells, s.tokens, 1, s.streams);
    for (int64_t query = 0; query < s.tokens * s.streams; ++query)
      for (int64_t cell = 0; cell < s.cells; ++cell)
        store(mask, cell, query % s.tokens, 0, query / s.tokens,
              mask_value(query, cell, window, num_sink_tokens, max_bias));
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
  ggml_tensor *q = nullptr, *k = nullptr, *v = nullptr;
  ggml_cells in;
  std::vector<token> table, queries;  // of all streams
};

// The largest error, as a part of the bound. `layer` says how logits are made.
double error(const host& h, oracle::layer layer, const std::vector<float>& out, int64_t window,
             int64_t num_sink_tokens) {
  const shape& s = h.s;
  layer.num_qo_heads = size_t(s.heads), layer.num_kv_heads = size_t(s.kv_heads);
  layer.head_dim = size_t(s.dim), layer.v_head_dim = size_t(s.v_dim);
  double worst = 0;
  std::vector<float> keys, values, query_row;
  const auto append = [](std::vector<float>& to, const std::vector<float>& row) {
    to.insert(to.end(), row.begin(), row.end());
  };
  for (int64_t query = 0; query < s.tokens * s.streams; ++query) {
    const int64_t stream = query / s.tokens, position = h.queries[size_t(query)].position;
    const token* const cells_of_stream = &h.table[size_t(stream * s.cells)];
    // The stream as the oracle has it: a row for each position, zero where no cell holds it.
    std::vector<int64_t> cell_at(size_t(position + 1), -1);
    std::vector<oracle::position> visible;
    for (int64_t cell = 0; cell < s.cells; ++cell)
      if (h.visible(query, cell, window, num_sink_tokens)) cell_at[size_t(cells_of_stream[cell].position)] = cell;
    keys.clear(), values.clear(), query_row.clear();
    for (int64_t p = 0; p <= position; ++p) {
      const int64_t cell = cell_at[size_t(p)];
      if (cell >= 0) visible.push_back(p);
      for (int64_t head = 0; head < s.kv_heads; ++head) {
        append(keys, cell < 0 ? std::vector<float>(size_t(s.dim)) : load_row(h.k, cell, head, stream));
        append(values, cell < 0 ? std::vector<float>(size_t(s.v_dim)) : load_row(h.v, cell, head, stream));
      }
    }
    for (int64_t head = 0; head < s.heads; ++head) append(query_row, load_row(h.q, query % s.tokens, head, stream));
    const auto answers = oracle::attend(layer, query_row.data(), position, visible, keys.data(), values.data());
    for (size_t head = 0; head < answers.size(); ++head) {
      const double distance = layer.alibi_slopes.empty() || visible.empty()
                                  ? 0
                                  : double(layer.alibi_slopes[head]) * double(position + 1 - visible.front());
      const double bound = 16 * 0x1p-24 * (1 + answers[head].a + distance) * answers[head].v_max;
      for (size_t i = 0; i < size_t(s.v_dim); ++i) {
        const size_t row = size_t(query) * size_t(s.heads) + head;
        const double difference = std::abs(double(out[row * size_t(s.v_dim) + i]) - answers[head].out[i]);
        worst = std::max(worst, difference <= bound ? difference / bound : 1 + difference / bound);  // NaN too
        if (std::isnan(difference)) worst = inf;
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
    if (s.order != cells::transposed_values && s.dim % 32 == 0 && s.v_dim % 32 == 0 && dice.one_in(3)) {
      s.k_type = GGML_TYPE_Q8_0;
      s.v_type = dice.one_in(2) ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_0;
    }
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
    if (dice.one_in(2)) h.scatter();
    h.fill_empty_cells(not_a_number);

    attention_params params{.num_qo_heads = s.heads,
                            .sm_scale = scale,
                            .logits_soft_cap = soft_cap,
                            .alibi_slopes = alibi_slopes(s.heads, max_bias)};
    if (!sink_logits.empty()) params.softmax = softmax_variant::sink_logits(sink_logits);
    std::vector<workspace> workspaces(4);
    ggml_attention op(params, {.num_sink_tokens = num_sink_tokens, .window = window, .positions = positions::absolute},
                      workspaces);
    status found;
    ggml_tensor* const node = op.build(h.context.get(), h.q, h.k, h.v, h.in, found);
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
    h.fill_empty_cells(0);
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
  layer.sm_scale = 0.125, layer.q_rotated = true;
  for (int i = 0; i < 32; ++i) layer.inv_freq.push_back(static_cast<float>(std::pow(10000.0, -i / 32.0)));
  std::vector<workspace> workspaces(2);
  ggml_attention op({.num_qo_heads = 8}, {.num_sink_tokens = 4, .window = 60, .rope = rotary}, workspaces);
  status found;
  ggml_tensor* const node = op.build(h.context.get(), h.q, h.k, h.v, h.in, found);
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
  const auto refusal = [&](ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, const ggml_cells& cells_of) {
    CHECK(op.build(c, q, k, v, cells_of, found) == nullptr);
    return std::string(found.message());
  };
  ggml_tensor* const blocks = ggml_new_tensor_3d(c, GGML_TYPE_Q5_0, 64, 256, 2);
  CHECK(refusal(h.q, blocks, h.v, h.in) ==
        "sinkcache: the format of keys was 'q5_0', had to be f32, f16, bf16, q8_0 or q4_0");
  CHECK(refusal(h.q, h.k, blocks, h.in) ==
        "sinkcache: the format of values was 'q5_0', had to be f32, f16, bf16, q8_0 or q4_0");
  ggml_cells wrong = h.in;
  wrong.cell_positions = h.k;
  CHECK(refusal(h.q, h.k, h.v, wrong) == "sinkcache: the type of cell_positions was f16, had to be i32");
  wrong.cell_positions = h.in.positions;
  CHECK(refusal(h.q, h.k, h.v, wrong) == "sinkcache: cell_positions had 3 elements, had to have 256, side by side");
  wrong = h.in, wrong.cell_sequences = nullptr;
  CHECK(refusal(h.q, h.k, h.v, wrong) == "sinkcache: cell_sequences was null, had to be given as sequences is");
  wrong = {};
  CHECK(refusal(h.q, h.k, h.v, wrong) == "sinkcache: positions was null, had to be given");
  CHECK(refusal(ggml_new_tensor_3d(c, GGML_TYPE_F32, 64, 3, 8), h.k, h.v, h.in).find("q->nb[2] was 768") !=
        std::string::npos);
  CHECK(refusal(ggml_new_tensor_3d(c, GGML_TYPE_F16, 64, 3, 8), h.k, h.v, h.in).find("q's type was f16") !=
        std::string::npos);
  CHECK(refusal(h.q, ggml_new_tensor_3d(c, GGML_TYPE_F16, 64, 256, 3), h.v, h.in).find("k->ne[2] was 3") !=
        std::string::npos);
  CHECK(refusal(h.q, h.k, ggml_new_tensor_3d(c, GGML_TYPE_F16, 64, 255, 2), h.in).find("v->ne[1]") !=
        std::string::npos);

  ggml_tensor* const node = op.build(c, h.q, h.k, h.v, h.in, found);
  REQUIRE(found.message() == "");
  std::fill_n(ggml_get_data_f32(node), ggml_nelements(node), 7.0f);
  const auto run = [&] {
    CHECK(std::isnan(h.run(node, 2).back()));
    return std::string(op.take_refused().message());
  };
  h.set_seen(257);
  CHECK(run() == "sinkcache: of the queries at 254 to 256 of sequence 0 the cells had 2, had to have all");
  h.set_seen(2);
  CHECK(run() == "sinkcache: a query's position was -1, had to be at least 0");
  h.set_seen(20);
  h.table[100] = {7, 1}, h.set_tables();
  CHECK(run() == "sinkcache: position 7 of sequence 0 was in two cells, had to be in one");
  h.set_seen(20);
  h.queries[1].sequences = 64, h.set_tables();
  CHECK(run() == "sinkcache: a query's sequence was 64, had to be at least 0 and below the bits of cell_sequences, 64");
  h.set_seen(20);
  h.queries[2].sequences = 1, h.set_tables();
  CHECK(run() == "sinkcache: of the queries at 19 to 19 of sequence 1 the cells had 0, had to have all");
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
      ggml_tensor* const nodes[] = {op.build(h.context.get(), h.q, h.k, h.v, h.in, found),
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
