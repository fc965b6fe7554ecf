// Attention over engines' own memory, one case for each host's layout, against the oracle at the design's bound. What a
// view may not read is NaN, or lies outside of a heap block of the exact size, where the sanitizers see it.

#include <fmt/format.h>

#include <sinkcache/kv_view.hpp>

#include <sinkcache/attention.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "plain_format.hpp"

using namespace sinkcache;

namespace {

constexpr double u = 0x1p-24;

static_assert(std::is_trivially_destructible_v<kv_view<f16>>, "a view that owns nothing");
static_assert(std::is_nothrow_move_constructible_v<kv_view<f16, f32>>);
static_assert(!std::is_constructible_v<kv_memory, std::vector<kv_piece>>, "a temporary would dangle");
static_assert(std::is_constructible_v<kv_memory, const std::vector<kv_piece>&>);
static_assert(std::is_constructible_v<kv_memory, const std::span<kv_piece>>, "a span does not own");

std::size_t as_size(index_t n) { return static_cast<std::size_t>(n); }

// As many elements, no more, NaN until they are written; `offset` bytes from where the heap aligns them.
template <class F>
class buffer {
 public:
  explicit buffer(index_t elements, index_t offset = 0)
      : offset_(offset), bytes_(new std::byte[as_size(elements * F::element_bytes + offset)]) {
    std::memset(bytes_.get(), 0xff, as_size(elements * F::element_bytes + offset));
  }

  void put(index_t at, float x) { plain::put<F>(x, bytes_.get() + offset_, at); }
  const void* at(index_t i) const { return bytes_.get() + offset_ + i * F::element_bytes; }

 private:
  index_t offset_;
  std::unique_ptr<std::byte[]> bytes_;
};

template <class F>
float stored(float x) {
  return static_cast<float>(plain::rounded<F>(x));
}

// A layer and its stream, as an engine would have it: keys and values as they are stored, keys rotated.
template <class K, class V = K>
struct host {
  cache_config config;
  attention_params params;
  index_t tokens;
  effort::dice dice;
  oracle::layer layer;
  std::vector<float> keys, values;  // [tokens, num_kv_heads, dim]
  std::vector<bool> held;

  host(const cache_config& c, const attention_params& p, index_t num_tokens, std::uint64_t seed = 1)
      : config(c), params(p), tokens(num_tokens), dice(seed), held(as_size(num_tokens), true) {
    if (config.v_head_dim == 0) config.v_head_dim = config.head_dim;
    for (index_t i = 0; i < tokens * config.num_kv_heads * config.head_dim; ++i)
      keys.push_back(stored<K>(2 * dice.signed_unit()));
    for (index_t i = 0; i < tokens * config.num_kv_heads * config.v_head_dim; ++i)
      values.push_back(stored<V>(2 * dice.signed_unit()));
    layer.num_qo_heads = as_size(params.num_qo_heads);
    layer.num_kv_heads = as_size(config.num_kv_heads);
    layer.head_dim = as_size(config.head_dim);
    layer.v_head_dim = as_size(config.v_head_dim);
    layer.in_cache = config.positions == positions::in_cache;
    layer.q_rotated = config.inputs == inputs::rotated;
    layer.first_position = config.first_position;
    layer.sm_scale =
        static_cast<double>(params.sm_scale.value_or(1.f / std::sqrt(static_cast<float>(config.head_dim))));
    layer.soft_cap = static_cast<double>(params.logits_soft_cap);
    layer.alibi_slopes = params.alibi_slopes;
    layer.sink_bias = params.sink_bias;
    for (index_t h = 0; h < params.softmax.num_sink_logits(); ++h) layer.sink_logits.push_back(params.softmax.sink(h));
    layer.num_sink_tokens = config.num_sink_tokens;
  }

  // With the rope that both sides have to know.
  void rotate_with(const std::vector<float>& inv_freq, rope_pairing pairing = rope_pairing::half_split) {
    config.rope = rope(inv_freq, pairing);
    layer.inv_freq = inv_freq;
    layer.interleaved = pairing == rope_pairing::interleaved;
  }

  // Writes what is held to where k_at and v_at of (token, head, dim) say.
  template <class Buffer, class At>
  void put_keys(Buffer& to, const At& k_at) const {
    put(to, keys, config.head_dim, k_at);
  }
  template <class Buffer, class At>
  void put_values(Buffer& to, const At& v_at) const {
    put(to, values, config.v_head_dim, v_at);
  }
  template <class Buffer, class At>
  void put(Buffer& to, const std::vector<float>& from, index_t dim, const At& at) const {
    for (index_t t = 0; t < tokens; ++t)
      for (index_t h = 0; h < config.num_kv_heads && held[as_size(t)]; ++h)
        for (index_t d = 0; d < dim; ++d) to.put(at(t, h, d), from[as_size((t * config.num_kv_heads + h) * dim + d)]);
  }

  // What the token at `query` sees, by the definition.
  std::vector<position_t> visible(position_t query) const {
    std::vector<position_t> result;
    for (position_t p = 0; p <= std::min<position_t>(query, tokens - 1); ++p)
      if (held[as_size(p)] && (p < config.num_sink_tokens || config.window == 0 || p > query - config.window))
        result.push_back(p);
    return result;
  }

  // Compares the newest `rows` tokens' attention, and the newest one's alone, with the oracle's. Empty if they agree.
  std::string check(const kv_source& view, index_t rows) {
    const index_t q_dim = params.num_qo_heads * config.head_dim, v_dim = params.num_qo_heads * config.v_head_dim;
    matrix q(rows, q_dim), out = matrix::Constant(rows, v_dim, std::numeric_limits<float>::quiet_NaN());
    for (index_t i = 0; i < q.size(); ++i) q.data()[i] = 2 * dice.signed_unit();
    std::vector<float> lse(as_size(rows * params.num_qo_heads));
    workspace scratch;
    const attention attention(params);
    const index_t enough = std::max(scratch.nbytes(), attention.workspace_bytes(view, rows));
    scratch.reserve(enough);
    attention.attend(q, view, out, scratch, {.lse = lse});
    if (scratch.nbytes() != enough) return "workspace_bytes was too little";
    for (index_t row = 0; row < rows; ++row) {
      const position_t query = view.seen() - rows + row;
      const std::vector<position_t> seen = visible(query);
      const std::string wrong =
          far_from(oracle::attend(layer, q.row(row).data(), query, seen, keys.data(), values.data()),
                   out.row(row).data(), lse.data() + row * params.num_qo_heads);
      if (!wrong.empty()) return fmt::format("query {} of {} tokens: {}", query, seen.size(), wrong);
    }
    matrix newest(1, v_dim);
    attention.decode(q.bottomRows(1), view, newest, scratch);
    const std::vector<position_t> seen = visible(view.seen() - 1);
    if (static_cast<std::size_t>(view.size()) != seen.size())
      return fmt::format("size() {} instead of {}", view.size(), seen.size());
    if (view.capacity() < view.size()) return fmt::format("capacity() {} below size()", view.capacity());
    const auto expected =
        oracle::attend(layer, q.row(rows - 1).data(), view.seen() - 1, seen, keys.data(), values.data());
    const std::string wrong = far_from(expected, newest.data(), nullptr);
    return wrong.empty() ? wrong : "decode: " + wrong;
  }

  static std::string far_from(const std::vector<oracle::answer>& expected, const float* out, const float* lse) {
    for (std::size_t head = 0; head < expected.size(); ++head) {
      const oracle::answer& e = expected[head];
      const double bound = 16 * u * (1 + e.a);
      for (double x : e.out) {
        const double error = std::abs(static_cast<double>(*out++) - x);
        if (!(error <= bound * e.v_max)) return fmt::format("head {}: output {} instead of {}", head, out[-1], x);
      }
      if (lse == nullptr || static_cast<double>(lse[head]) == e.lse) continue;
      const double error = std::abs(static_cast<double>(lse[head]) - e.lse);
      if (!(error <= bound)) return fmt::format("head {}: lse {} instead of {}", head, lse[head], e.lse);
    }
    return "";
  }
};

// Keys in the engine's memory, queries rotated by it too.
cache_config engine_rotated(index_t num_kv_heads, index_t head_dim, index_t v_head_dim = 0) {
  return {.num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .v_head_dim = v_head_dim,
          .positions = positions::absolute,
          .inputs = inputs::rotated};
}

std::vector<float> frequencies(index_t width, double theta = 10000) {
  std::vector<float> result;
  for (index_t i = 0; i < width; i += 2)
    result.push_back(static_cast<float>(std::pow(theta, -static_cast<double>(i) / static_cast<double>(width))));
  return result;
}

// Rows that a decode, a short chunk, one as wide as a panel and one of several panels have.
constexpr index_t some_rows[] = {1, 3, 17, 40};

}  // namespace

// Host layouts. Orders are of memory, the last runs fastest.

TEST_CASE("kv_view: llama.cpp, f16 [token][head][dim] with learned sinks and a sliding window") {
  constexpr index_t heads = 2, dim = 64, cells = 96, tokens = 83;
  const float sinks[] = {0.5f, -1.f, 2.f, -std::numeric_limits<float>::infinity()};
  for (index_t n_swa : {0, 20}) {
    cache_config config = engine_rotated(heads, dim);
    config.window = n_swa;
    host<f16> llama(config, {.num_qo_heads = 4, .softmax = softmax_variant::sink_logits(sinks)}, tokens);
    buffer<f16> k(cells * heads * dim), v(cells * heads * dim);  // cells that are not written are NaN
    const auto at = [](index_t t, index_t h, index_t d) { return (t * heads + h) * dim + d; };
    llama.put_keys(k, at);
    llama.put_values(v, at);
    const kv_strides strides{.head = dim, .token = heads * dim};  // nb[1], nb[2] over nb[0]
    const kv_view<f16> view(config, {strides, strides}, kv_piece{0, cells, k.at(0), v.at(0)}, tokens);
    for (index_t rows : some_rows) CHECK(llama.check(view, rows) == "");
  }
}

TEST_CASE("kv_view: llama.cpp without flash attention, V transposed, f16 [head][dim][cell]") {
  for (index_t dim : {64, 40, 67}) {
    constexpr index_t heads = 2, cells = 64, tokens = 53;
    const cache_config config = engine_rotated(heads, dim);
    host<f16> llama(config, {.num_qo_heads = 4}, tokens);
    buffer<f16> k(cells * heads * dim), v(cells * heads * dim);
    llama.put_keys(k, [&](index_t t, index_t h, index_t d) { return (t * heads + h) * dim + d; });
    llama.put_values(v, [&](index_t t, index_t h, index_t d) { return (h * dim + d) * cells + t; });
    const kv_layout layout{{.head = dim, .token = heads * dim}, {.head = dim * cells, .token = 1, .dim = cells}};
    const kv_view<f16> view(config, layout, kv_piece{0, cells, k.at(0), v.at(0)}, tokens);
    for (index_t rows : some_rows) CHECK(llama.check(view, rows) == "");
  }
}

TEST_CASE(
    "kv_view: llama.cpp after seq_rm, keys at their true positions: a gap after the kept tokens, cells taken again") {
  constexpr index_t heads = 1, dim = 32, kept = 4, discarded = 29, tokens = 75;
  cache_config config = engine_rotated(heads, dim);
  config.positions = positions::in_cache;
  config.num_sink_tokens = kept;
  host<f16> llama(config, {.num_qo_heads = 2}, tokens);
  llama.rotate_with(frequencies(dim));
  for (index_t t = kept; t < kept + discarded; ++t) llama.held[as_size(t)] = false;
  // Freed cells are taken again: the newest tokens lie where the discarded ones did.
  constexpr index_t cells = 50;
  const auto cell = [](index_t t) { return t < cells ? t : kept + t - cells; };
  static_assert(tokens < cells + discarded);
  buffer<f16> k(cells * dim), v(cells * dim);
  llama.put_keys(k, [&](index_t t, index_t, index_t d) { return cell(t) * dim + d; });
  llama.put_values(v, [&](index_t t, index_t, index_t d) { return cell(t) * dim + d; });
  const kv_piece pieces[] = {
      {0, kept, k.at(0), v.at(0)},
      {kept + discarded, cells - kept - discarded, k.at((kept + discarded) * dim), v.at((kept + discarded) * dim)},
      {cells, tokens - cells, k.at(kept * dim), v.at(kept * dim)}};
  const kv_view<f16> view(llama.config, {{.token = dim}, {.token = dim}}, pieces, tokens);
  CHECK(view.size() == tokens - discarded);
  for (index_t rows : some_rows) CHECK(llama.check(view, rows) == "");
}

TEST_CASE("kv_view: llama2.c, f32 [layer][seq_len][kv_dim], pairs side by side, raw queries") {
  constexpr index_t layers = 3, layer = 1, heads = 3, dim = 48, seq_len = 64, tokens = 45;
  cache_config config = engine_rotated(heads, dim);
  config.inputs = inputs::raw;
  host<f32> llama2(config, {.num_qo_heads = 6}, tokens);
  llama2.rotate_with(frequencies(dim), rope_pairing::interleaved);
  buffer<f32> k(layers * seq_len * heads * dim), v(layers * seq_len * heads * dim);
  const auto at = [](index_t t, index_t h, index_t d) { return ((layer * seq_len + t) * heads + h) * dim + d; };
  llama2.put_keys(k, at);
  llama2.put_values(v, at);
  const kv_strides strides{.head = dim, .token = heads * dim};
  kv_view<f32> view(llama2.config, {strides, strides}, kv_piece{0, seq_len, k.at(at(0, 0, 0)), v.at(at(0, 0, 0))}, 0);
  for (position_t seen : {1, 2, 44, 45}) {
    view.set_seen(seen);
    llama2.tokens = seen;  // what comes later is not seen, though it lies there
    CHECK(llama2.check(view, 1) == "");
    CHECK(llama2.check(view, static_cast<index_t>(seen)) == "");
  }
}

TEST_CASE("kv_view: gemma.cpp, f32 rows of a token with every layer's heads, K beside V; a ring; raw queries") {
  constexpr index_t layers = 3, layer = 2, heads = 2, dim = 80, seq_len = 40, tokens = 131, window = 24;
  constexpr index_t row = layers * heads * 2 * dim;
  cache_config config = engine_rotated(heads, dim);
  config.inputs = inputs::raw;
  config.window = window;
  host<f32> gemma(config, {.num_qo_heads = 4, .sm_scale = 0.1f, .logits_soft_cap = 50}, tokens);
  gemma.rotate_with(frequencies(dim));
  for (index_t t = 0; t < tokens - seq_len; ++t) gemma.held[as_size(t)] = false;
  buffer<f32> cache(seq_len * row);
  const auto at = [](index_t t, index_t h, index_t d) { return t % seq_len * row + (layer * heads + h) * 2 * dim + d; };
  gemma.put_keys(cache, at);
  gemma.put_values(cache, [&](index_t t, index_t h, index_t d) { return at(t, h, d) + dim; });
  const kv_strides strides{.head = 2 * dim, .token = row};
  const auto piece = [&](position_t first, position_t last) {
    return kv_piece{first, static_cast<index_t>(last - first), cache.at(at(first, 0, 0)), cache.at(at(first, 0, dim))};
  };
  constexpr position_t turn = tokens / seq_len * seq_len;
  const kv_piece pieces[] = {piece(tokens - seq_len, turn), piece(turn, tokens)};
  const kv_view<f32> view(gemma.config, {strides, strides}, pieces, tokens);
  CHECK(view.min_truncate() == tokens - seq_len + window);
  for (index_t rows : {1, 3, 16, 17}) CHECK(gemma.check(view, rows) == "");
  matrix q = matrix::Zero(18, 4 * dim), out(18, 4 * dim);
  workspace scratch;
  CHECK(attention(gemma.params).try_attend(q, view, out, scratch).message() ==
        "sinkcache: q.rows() was 18, had to be at most 17: what older tokens saw is overwritten");
}

// BNSH: CTranslate2, TinyChatEngine, InfiniLM, mlx and OpenVINO's operator.
TEST_CASE("kv_view: CTranslate2, TinyChatEngine, OpenVINO's SDPA, InfiniLM: BNSH, [head][token][dim]") {
  constexpr index_t heads = 3, dim = 64, tokens = 77;
  const cache_config config = engine_rotated(heads, dim);
  host<bf16> ct2(config, {.num_qo_heads = 6}, tokens);
  buffer<bf16> k(heads * tokens * dim), v(heads * tokens * dim);
  const auto at = [](index_t t, index_t h, index_t d) { return (h * tokens + t) * dim + d; };
  ct2.put_keys(k, at);
  ct2.put_values(v, at);
  const kv_strides strides{.head = tokens * dim, .token = dim};
  const kv_view<bf16> view(config, {strides, strides}, kv_piece{0, tokens, k.at(0), v.at(0)}, tokens);
  for (index_t rows : some_rows) CHECK(ct2.check(view, rows) == "");
}

TEST_CASE("kv_view: ONNX Runtime GroupQueryAttention, past and present in one [head][max_seq][dim], softmax1") {
  constexpr index_t heads = 2, dim = 96, max_seq = 128, tokens = 61;
  cache_config config = engine_rotated(heads, dim);
  config.window = 32;  // local_window_size
  host<f16> ort(config, {.num_qo_heads = 8, .softmax = softmax_variant::softmax1()}, tokens);
  ort.layer.sink_logits.assign(8, 0.f);
  buffer<f16> k(heads * max_seq * dim), v(heads * max_seq * dim);
  const auto at = [](index_t t, index_t h, index_t d) { return (h * max_seq + t) * dim + d; };
  ort.put_keys(k, at);
  ort.put_values(v, at);
  const kv_strides strides{.head = max_seq * dim, .token = dim};
  const kv_view<f16> view(config, {strides, strides}, kv_piece{0, max_seq, k.at(0), v.at(0)}, tokens);
  for (index_t rows : some_rows) CHECK(ort.check(view, rows) == "");
}

TEST_CASE("kv_view: ncnn, a channel per head with room after its rows, V narrower and wider than K") {
  constexpr index_t heads = 2, dim = 48, rows_of_capacity = 50, tokens = 37;
  for (index_t v_dim : {1, 16, 31, 128}) {
    const cache_config config = engine_rotated(heads, dim, v_dim);
    host<f32> ncnn(config, {.num_qo_heads = 2}, tokens);
    const index_t k_cstep = rows_of_capacity * dim + 4, v_cstep = rows_of_capacity * v_dim + 12;
    buffer<f32> k(heads * k_cstep), v(heads * v_cstep);
    ncnn.put_keys(k, [&](index_t t, index_t h, index_t d) { return h * k_cstep + t * dim + d; });
    ncnn.put_values(v, [&](index_t t, index_t h, index_t d) { return h * v_cstep + t * v_dim + d; });
    const kv_layout layout{{.head = k_cstep, .token = dim}, {.head = v_cstep, .token = v_dim}};
    const kv_view<f32> view(config, layout, kv_piece{0, rows_of_capacity, k.at(0), v.at(0)}, tokens);
    for (index_t rows : {1, 3, 17}) CHECK(ncnn.check(view, rows) == "");
  }
}

TEST_CASE("kv_view: HF transformers, tensors transposed any way") {
  constexpr index_t heads = 2, dim = 40, tokens = 45;
  const cache_config config = engine_rotated(heads, dim);
  // Strides of (head, token, dim), by the order of the dimensions in memory.
  const kv_strides orders[] = {{tokens * dim, dim, 1},       // [head][token][dim]
                               {dim, heads * dim, 1},        // [token][head][dim]: view(...).transpose(1, 2)
                               {tokens * dim, 1, tokens},    // [head][dim][token]: K^T
                               {1, heads * dim, heads},      // [token][dim][head]
                               {tokens, 1, heads * tokens},  // [dim][head][token]
                               {1, heads, heads * tokens}};  // [dim][token][head]
  for (const kv_strides& k_order : orders)
    for (const kv_strides& v_order : orders) {
      host<f32, bf16> hf(config, {.num_qo_heads = 4}, tokens);
      buffer<f32> k(heads * tokens * dim);
      buffer<bf16> v(heads * tokens * dim);
      const auto at = [](const kv_strides& s) {
        return [s](index_t t, index_t h, index_t d) { return h * s.head + t * s.token + d * s.dim; };
      };
      hf.put_keys(k, at(k_order));
      hf.put_values(v, at(v_order));
      const kv_view<f32, bf16> view(config, {k_order, v_order}, kv_piece{0, tokens, k.at(0), v.at(0)}, tokens);
      for (index_t rows : {1, 17}) CHECK(hf.check(view, rows) == "");
    }
}

TEST_CASE("kv_view: vLLM, pages [page][slot][head][dim] of a pool, int32 block tables") {
  constexpr index_t heads = 2, dim = 64, page_tokens = 16, pages = 12, tokens = 101;
  for (index_t window : {0, 30}) {
    cache_config config = engine_rotated(heads, dim);
    config.window = window;
    host<bf16> vllm(config, {.num_qo_heads = 8}, tokens);
    const std::int32_t table[] = {7, 0, 11, 3, 4, 10, 2};
    constexpr index_t page = page_tokens * heads * dim;
    buffer<bf16> k(pages * page), v(pages * page);
    const auto at = [&](index_t t, index_t h, index_t d) {
      return table[t / page_tokens] * page + (t % page_tokens * heads + h) * dim + d;
    };
    vllm.put_keys(k, at);
    vllm.put_values(v, at);
    const kv_strides strides{.head = dim, .token = heads * dim};
    const kv_view<bf16> view(config, {strides, strides},
                             kv_pages{k.at(0), v.at(0), page, page, pages, page_tokens, table}, tokens);
    CHECK(view.size() == (window == 0 ? tokens : window));
    for (index_t rows : some_rows) CHECK(vllm.check(view, rows) == "");
  }
}

TEST_CASE(
    "kv_view: FlashInfer, pages [page][k and v][head][slot][dim] (HND), the first pages dropped behind a window") {
  constexpr index_t heads = 2, dim = 32, page_tokens = 8, pages = 9, tokens = 100, window = 33, dropped = 8;
  cache_config config = engine_rotated(heads, dim);
  config.window = window;  // window_left + 1
  host<f16> infer(config, {.num_qo_heads = 4}, tokens);
  for (index_t t = 0; t < dropped * page_tokens; ++t) infer.held[as_size(t)] = false;
  const std::vector<std::int32_t> indices{4, 1, 8, 2, 5};
  constexpr index_t half = heads * page_tokens * dim, page = 2 * half;
  buffer<f16> cache(pages * page);
  const auto at = [&](index_t t, index_t h, index_t d) {
    return indices[as_size(t / page_tokens - dropped)] * page + (h * page_tokens + t % page_tokens) * dim + d;
  };
  infer.put_keys(cache, at);
  infer.put_values(cache, [&](index_t t, index_t h, index_t d) { return at(t, h, d) + half; });
  const kv_strides strides{.head = page_tokens * dim, .token = dim};
  const kv_view<f16> view(
      config, {strides, strides},
      kv_pages{cache.at(0), cache.at(half), page, page, pages, page_tokens, indices, dropped * page_tokens}, tokens);
  for (index_t rows : {1, 4}) CHECK(infer.check(view, rows) == "");
  CHECK(view.min_truncate() == dropped * page_tokens + window);
}

TEST_CASE("kv_view: OpenVINO's and InfiniLM's pages as pieces of their own, keys [dim][slot]") {
  constexpr index_t heads = 2, dim = 24, page_tokens = 8, tokens = 91;
  const cache_config config = engine_rotated(heads, dim);
  host<f32> vino(config, {.num_qo_heads = 2}, tokens);
  std::vector<buffer<f32>> k, v;  // every page has its own memory
  std::vector<kv_piece> pieces;
  for (position_t first = 0; first < tokens; first += page_tokens) {
    k.emplace_back(heads * dim * page_tokens);
    v.emplace_back(heads * dim * page_tokens);
    for (index_t t = first; t < std::min<position_t>(tokens, first + page_tokens); ++t)
      for (index_t h = 0; h < heads; ++h)
        for (index_t d = 0; d < dim; ++d) {
          const auto from = as_size((t * heads + h) * dim + d);
          k.back().put((h * dim + d) * page_tokens + t - first, vino.keys[from]);
          v.back().put((h * page_tokens + t - first) * dim + d, vino.values[from]);
        }
    pieces.push_back({first, page_tokens, k.back().at(0), v.back().at(0)});
  }
  const kv_layout layout{{.head = dim * page_tokens, .token = 1, .dim = page_tokens},
                         {.head = dim * page_tokens, .token = dim}};
  const kv_view<f32> view(config, layout, pieces, tokens);
  CHECK(view.size() == tokens);
  for (index_t rows : some_rows) CHECK(vino.check(view, rows) == "");
}

TEST_CASE("kv_view: MLA in its absorbed form, latent rows of 576 whose first 512 are the values") {
  constexpr index_t dim = 576, v_dim = 512, tokens = 150;
  cache_config config = engine_rotated(1, dim);
  config.v_head_dim = v_dim;
  for (index_t window : {0, 40}) {
    config.window = window;
    host<bf16> deepseek(config, {.num_qo_heads = 16, .sm_scale = 0.07f}, tokens);
    for (index_t t = 0; t < tokens; ++t)
      std::copy_n(deepseek.keys.begin() + t * dim, v_dim, deepseek.values.begin() + t * v_dim);
    buffer<bf16> latent(tokens * dim);
    deepseek.put_keys(latent, [](index_t t, index_t, index_t d) { return t * dim + d; });
    const kv_strides rows{.token = dim};
    const kv_view<bf16> view(config, {rows, rows}, kv_piece{0, tokens, latent.at(0), latent.at(0)}, tokens);
    for (index_t n : some_rows) CHECK(deepseek.check(view, n) == "");
  }
}

TEST_CASE("kv_view: mlx RotatingKVCache, kept tokens and a ring in one [head][max_size][dim]") {
  constexpr index_t heads = 2, dim = 64, keep = 4, max_size = 64, ring = max_size - keep, tokens = 171;
  for (const positions where : {positions::in_cache, positions::absolute})
    for (const inputs in : {inputs::raw, inputs::rotated}) {
      cache_config config = engine_rotated(heads, dim);
      config.positions = where;
      config.inputs = in;
      config.num_sink_tokens = keep;
      host<bf16, f16> mlx(config, {.num_qo_heads = 4, .sink_bias = {0.f, 1.f, -1.f, 0.5f}}, tokens);
      mlx.rotate_with(frequencies(dim));
      for (index_t t = keep; t < tokens - ring; ++t) mlx.held[as_size(t)] = false;
      buffer<bf16> k(heads * max_size * dim);
      buffer<f16> v(heads * max_size * dim);
      const auto slot = [](index_t t) { return t < keep ? t : keep + (t - keep) % ring; };
      const auto at = [&](index_t t, index_t h, index_t d) { return (h * max_size + slot(t)) * dim + d; };
      mlx.put_keys(k, at);
      mlx.put_values(v, at);
      const auto pieces = ring_pieces({.k = k.at(0),
                                       .v = v.at(0),
                                       .k_row = dim * index_t{sizeof(std::uint16_t)},
                                       .v_row = dim * index_t{sizeof(std::uint16_t)},
                                       .pinned = keep,
                                       .rows = ring},
                                      tokens);
      const kv_strides strides{.head = max_size * dim, .token = dim};
      kv_view<bf16, f16> view(mlx.config, {strides, strides}, pieces, tokens);
      CHECK(mlx.check(view, 1) == "");
      // A chunk reads a window that is a chunk shorter than the ring, so that nothing that it saw is overwritten.
      mlx.config.window = ring - 16;
      kv_view<bf16, f16> shorter(mlx.config, {strides, strides}, pieces, tokens);
      CHECK(shorter.min_truncate() == tokens - 16);
      for (index_t rows : {1, 3, 17}) CHECK(mlx.check(shorter, rows) == "");
    }
}

TEST_CASE("kv_view: the pieces of a ring, with pinned rows or without, are what it holds") {
  for (index_t pinned = 0; pinned <= 3; ++pinned)
    for (index_t rows = 1; rows <= 5; ++rows) {
      std::vector<position_t> memory(as_size(pinned + rows), -1);  // as keys and as values
      for (position_t seen = 0; seen <= 14; ++seen) {
        CAPTURE(pinned, rows, seen);
        std::vector<position_t> found, expected;
        for (position_t p = 0; p < seen; ++p)
          if (p < pinned || p >= seen - rows) expected.push_back(p);
        const kv_ring ring{memory.data(), memory.data(), sizeof memory[0], sizeof memory[0], pinned, rows};
        for (const kv_piece& piece : ring_pieces(ring, seen)) {
          CHECK(piece.k == piece.v);
          for (index_t i = 0; i < piece.tokens; ++i) {
            found.push_back(static_cast<const position_t*>(piece.k)[i]);
            CHECK(found.back() == piece.first + i);
          }
        }
        CHECK(found == expected);
        memory[as_size(seen < pinned ? seen : pinned + (seen - pinned) % rows)] = seen;
      }
    }
  CHECK_THROWS_WITH(ring_pieces({.rows = 0}, 1), "sinkcache: rows was 0, had to be at least 1");
  CHECK_THROWS_WITH(ring_pieces({.rows = 1}, -1), "sinkcache: seen was -1, had to be from 0 to 4611686018427387904");
  status found;
  try_ring_pieces({.pinned = max_position + (max_position - 1), .rows = 1}, 0, found);
  CHECK(!found.ok());
  CHECK(try_ring_pieces({.rows = 1}, max_position, found)[2].first == max_position);
  CHECK(found.ok());
  try_ring_pieces({.rows = 1}, max_position + 1, found);
  CHECK(!found.ok());
}

TEST_CASE("kv_view: pieces come as a span, a vector or an array") {
  const float row[4] = {};
  kv_view<f32> view({.num_kv_heads = 1, .head_dim = 4, .rope = rope::none()}, {{0, 4}, {0, 4}});
  std::vector<kv_piece> pieces = {{0, 1, row, row}};
  view.assign(std::span(pieces.data(), 1), 1);
  CHECK(view.size() == 1);
  view.assign(pieces, 1);
  view.assign(std::span<const kv_piece>(pieces), 1);
  const std::array<kv_piece, 1> one = {pieces[0]};
  view.assign(one, 1);
  CHECK(view.size() == 1);
  static_assert(!std::is_convertible_v<std::vector<kv_piece>, kv_memory> &&
                !std::is_convertible_v<std::array<kv_piece, 1>, kv_memory>);
}

// One piece holds the pinned rows and all others.
TEST_CASE("kv_view: sink_bias is added to pinned tokens, and not to the oldest of the window") {
  constexpr index_t tokens = 20, window = 4, sinks = 3;
  const std::vector<float> key(as_size(tokens * 4), 0.f);  // all logits are 0
  std::vector<float> value(as_size(tokens * 4));
  for (index_t i = 0; i < tokens; ++i) value[as_size(i * 4)] = static_cast<float>(i);
  cache_config config = engine_rotated(1, 4);
  config.num_sink_tokens = sinks, config.window = window;
  const float bias = 2;
  const attention layer({.num_qo_heads = 1, .sink_bias = {bias}});
  const matrix q = matrix::Ones(1, 4);
  matrix out(1, 4);
  workspace scratch;
  kv_view<f32> view(config, {{.token = 4}, {.token = 4}});
  for (const index_t seen : {2, 5, 7, 8, 9, 20}) {
    CAPTURE(seen);
    view.assign(kv_piece{0, tokens, key.data(), value.data()}, seen);
    layer.decode(q, view, out, scratch);
    double sum = 0, weights = 0;
    for (index_t i = 0; i < seen; ++i) {
      if (i >= sinks && i < seen - window) continue;
      const double weight = i < sinks ? std::exp(static_cast<double>(bias)) : 1;
      weights += weight, sum += weight * static_cast<double>(i);
    }
    CHECK(static_cast<double>(out(0, 0)) == Approx(sum / weights).epsilon(1e-6));
  }
}

TEST_CASE("kv_view: capacity is the most that a query sees, with a hole among the pinned tokens too") {
  constexpr position_t tokens = 20;
  const float row[tokens * 4] = {};
  for (index_t sinks = 0; sinks <= 6; ++sinks)
    for (index_t window = 0; window <= 5; ++window)
      for (position_t hole = 0; hole <= 4; ++hole)
        for (position_t after = hole; after <= 8; ++after) {
          CAPTURE(sinks, window, hole, after);
          cache_config config = engine_rotated(1, 4);
          config.num_sink_tokens = sinks, config.window = window;
          const kv_piece pieces[] = {{0, hole, row, row}, {after, tokens - after, row, row}};
          const kv_view<f32> view(config, {{.token = 4}, {.token = 4}}, pieces, tokens);
          index_t most = 0;
          for (position_t query = 0; query < tokens; ++query) most = std::max(most, view.num_visible(query));
          CHECK(view.capacity() == most);
        }
}

TEST_CASE("kv_view: queries [head][token][dim] go head by head") {
  constexpr index_t heads = 2, group = 2, dim = 32, tokens = 30, rows = 9;
  const cache_config config = engine_rotated(1, dim);
  buffer<f32> k(heads * tokens * dim), v(heads * tokens * dim);
  for (index_t head = 0; head < heads; ++head) {
    host<f32> one(config, {.num_qo_heads = 1}, tokens, static_cast<std::uint64_t>(head) + 7);
    const auto at = [&](index_t t, index_t, index_t d) { return (head * tokens + t) * dim + d; };
    one.put_keys(k, at);
    one.put_values(v, at);
    const kv_view<f32> view(config, {{.token = dim}, {.token = dim}},
                            kv_piece{0, tokens, k.at(head * tokens * dim), v.at(head * tokens * dim)}, tokens);
    for (index_t i = 0; i < group; ++i) CHECK(one.check(view, rows) == "");
  }
}

// What holds for every layout.

TEST_CASE("kv_view: a view of a cache's own layout gives the cache's bits") {
  constexpr index_t heads = 2, dim = 64, tokens = 700, sinks = 4, window = 600;
  const cache_config config{.num_kv_heads = heads,
                            .head_dim = dim,
                            .num_sink_tokens = sinks,
                            .window = window,
                            .rope = rope::plain(dim, 10000)};
  cache_config unrotated = config;
  unrotated.rope = rope::none();
  kv_cache<f16> cache(unrotated);
  effort::dice dice(3);
  matrix k(tokens, heads * dim), v(tokens, heads * dim), q(1, 4 * dim), out(1, 4 * dim), same(1, 4 * dim);
  for (index_t i = 0; i < k.size(); ++i) k.data()[i] = dice.signed_unit(), v.data()[i] = dice.signed_unit();
  for (index_t i = 0; i < q.size(); ++i) q.data()[i] = dice.signed_unit();
  cache.append(k, v);
  buffer<f16> keys(tokens * heads * dim), values(tokens * heads * dim);
  for (index_t i = 0; i < k.size(); ++i) keys.put(i, k.data()[i]), values.put(i, v.data()[i]);
  const kv_strides strides{.head = dim, .token = heads * dim};
  const kv_view<f16> view(unrotated, {strides, strides}, kv_piece{0, tokens, keys.at(0), values.at(0)}, tokens);
  workspace scratch;
  attention layer({.num_qo_heads = 4});
  layer.decode(q, cache, out, scratch);
  layer.decode(q, view, same, scratch);
  CHECK(view.size() == cache.size());
  CHECK(view.capacity() == sinks + window);
  // A ring that has rotated cuts a segment in two, and its tiles with it; sums then round apart.
  CHECK((out - same).cwiseAbs().maxCoeff() <= 16 * 0x1p-24f * 8);
  kv_cache<f16> full(cache_config{.num_kv_heads = heads, .head_dim = dim, .window = tokens, .rope = rope::none()});
  full.append(k, v);
  cache_config all = unrotated;
  all.window = all.num_sink_tokens = 0;
  layer.decode(q, full, out, scratch);
  layer.decode(q, kv_view<f16>(all, {strides, strides}, kv_piece{0, tokens, keys.at(0), values.at(0)}, tokens), same,
               scratch);
  CHECK(out == same);
}

TEST_CASE("kv_view: random layouts, pieces, windows, formats") {
  // A cache that a random engine has: spans of positions, cut into pieces, each somewhere in memory.
  const auto run = []<class K, class V>(std::uint64_t seed, K, V) -> std::string {
    effort::dice dice(seed);
    const bool large = dice.one_in(8);
    const auto draw_dim = [&] {
      const index_t whole[] = {16, 32, 48, 64, 128};
      return dice.one_in(2) ? whole[dice.from_to(0, 4)] : static_cast<index_t>(dice.from_to(1, large ? 512 : 100));
    };
    const index_t heads = dice.from_to(1, 3), group = dice.from_to(1, 5), dim = draw_dim();
    cache_config config = engine_rotated(heads, dim, dice.one_in(2) ? dim : draw_dim());
    const index_t tokens = dice.from_to(1, large ? 1200 : 250);
    config.num_sink_tokens = dice.one_in(2) ? 0 : dice.from_to(1, 9);
    config.window = dice.one_in(2) ? 0 : dice.from_to(1, tokens + 10);
    if (dice.one_in(2)) config.positions = positions::in_cache;
    if (dice.one_in(2)) config.inputs = inputs::raw;
    if (dice.one_in(4)) config.first_position = dice.from_to(0, 100000);
    attention_params params{.num_qo_heads = heads * group};
    if (dice.one_in(3)) {
      std::vector<float> sinks;
      for (index_t h = 0; h < heads * group; ++h) sinks.push_back(3 * dice.signed_unit());
      params.softmax = softmax_variant::sink_logits(sinks);
    }
    if (dice.one_in(4)) params.logits_soft_cap = 5;
    host<K, V> engine(config, params, tokens, seed);
    if (dice.one_in(2))
      engine.rotate_with(frequencies(2 * dice.from_to(0, dim / 2)),
                         dice.one_in(2) ? rope_pairing::half_split : rope_pairing::interleaved);
    else
      engine.config.rope = rope::none();
    const index_t gaps = dice.one_in(3) ? 0 : dice.from_to(0, 6);
    for (index_t i = 0; i < gaps; ++i) {
      const index_t from = dice.from_to(0, tokens - 1), length = dice.from_to(1, 1 + tokens / 4);
      for (index_t t = from; t < std::min(tokens, from + length); ++t) engine.held[as_size(t)] = false;
    }
    // Room between heads, tokens and elements; a random order of them.
    const auto draw_strides = [&](index_t of_dim, index_t longest, index_t& size) {
      kv_strides s;
      index_t* order[] = {&s.head, &s.token, &s.dim};
      const index_t counts[] = {heads, longest, of_dim};
      index_t permutation[] = {0, 1, 2};
      if (dice.one_in(2)) std::swap(permutation[0], permutation[dice.from_to(0, 2)]);
      if (dice.one_in(2)) std::swap(permutation[1], permutation[2]);
      size = 1;
      for (index_t i = 2; i >= 0; --i) {
        *order[permutation[i]] = size;
        size = size * counts[permutation[i]] + (dice.one_in(3) ? dice.from_to(0, 5) : 0);
      }
      size = s.head * (heads - 1) + s.token * (longest - 1) + s.dim * (of_dim - 1) + 1;
      return s;
    };
    struct part {
      position_t first;
      index_t tokens;
    };
    std::vector<part> parts;
    index_t longest = 1;
    const index_t piece_tokens = dice.one_in(2) ? tokens : dice.from_to(1, 40);
    for (index_t t = 0; t < tokens; ++t) {
      if (!engine.held[as_size(t)]) continue;
      if (parts.empty() || parts.back().first + parts.back().tokens != t || parts.back().tokens == piece_tokens)
        parts.push_back({t, 0});
      longest = std::max(longest, ++parts.back().tokens);
    }
    index_t k_size = 0, v_size = 0;
    kv_layout layout;
    layout.k = draw_strides(dim, longest, k_size);
    layout.v = draw_strides(engine.config.v_head_dim, longest, v_size);
    std::vector<buffer<K>> k;
    std::vector<buffer<V>> v;
    std::vector<kv_piece> pieces;
    for (const part& p : parts) {
      k.emplace_back(k_size, dice.one_in(4) ? dice.from_to(0, 7) : 0);
      v.emplace_back(v_size, dice.one_in(4) ? dice.from_to(0, 7) : 0);
      for (index_t t = 0; t < p.tokens; ++t)
        for (index_t h = 0; h < heads; ++h) {
          const index_t from = (static_cast<index_t>(p.first) + t) * heads + h;
          for (index_t d = 0; d < dim; ++d)
            k.back().put(h * layout.k.head + t * layout.k.token + d * layout.k.dim,
                         engine.keys[as_size(from * dim + d)]);
          for (index_t d = 0; d < engine.config.v_head_dim; ++d)
            v.back().put(h * layout.v.head + t * layout.v.token + d * layout.v.dim,
                         engine.values[as_size(from * engine.config.v_head_dim + d)]);
        }
      pieces.push_back({p.first, p.tokens, k.back().at(0), v.back().at(0)});
    }
    status found;
    const auto view = kv_view<K, V>::try_create(engine.config, layout, pieces, tokens, found);
    if (!view) return std::string(found.message());
    const position_t most = std::min<position_t>(tokens - view->min_truncate() + 1, tokens);
    const index_t rows = dice.one_in(3) ? 1 : dice.from_to(1, std::min<position_t>(most, 50));
    return engine.check(*view, rows);
  };
  for (int i = 0; i < effort::cases(150); ++i) {
    const std::uint64_t seed = 1000 + static_cast<std::uint64_t>(i);
    std::string wrong;
    switch (seed % 5) {
      case 0:
        wrong = run(seed, f32(), f32());
        break;
      case 1:
        wrong = run(seed, f16(), f16());
        break;
      case 2:
        wrong = run(seed, bf16(), bf16());
        break;
      case 3:
        wrong = run(seed, f32(), bf16());
        break;
      default:
        wrong = run(seed, bf16(), f16());
    }
    CAPTURE(seed);
    REQUIRE(wrong == "");
  }
}

TEST_CASE("kv_view: how far back chunks may reach, with a hole on either side of the window's first token") {
  // Tokens 0 to 39 and a window of 20: the newest sees 20 to 39. Held are [first, hole) and [after, 40).
  constexpr index_t dim = 16, tokens = 40, window = 20;
  struct hole_at {
    index_t sinks, first, hole, after;
    position_t min_truncate;
  };
  const hole_at cases[] = {
      {0, 10, 21, 25, 30},  // 20 is held, as are those before it
      {0, 10, 20, 25, 30},  // the hole begins at the window: 19 and those before it are held still
      {0, 10, 19, 25, 40},  // 19 left the window, and is held no longer
      {0, 10, 15, 20, 40},  // the hole ends at the window
      {0, 10, 15, 19, 39},  // one token more is held
      {4, 10, 20, 25, 30}, {4, 5, 20, 25, 25}, {4, 4, 20, 25, 0},  // all that was ever evicted is held
      {0, 0, 20, 25, 0},
  };
  for (const hole_at& c : cases) {
    CAPTURE(c.sinks, c.first, c.hole, c.after);
    cache_config config = engine_rotated(1, dim);
    config.num_sink_tokens = c.sinks;
    config.window = window;
    host<f32> engine(config, {.num_qo_heads = 1}, tokens);
    for (index_t t = 0; t < tokens; ++t) engine.held[as_size(t)] = (t >= c.first && t < c.hole) || t >= c.after;
    buffer<f32> k(tokens * dim), v(tokens * dim);
    const auto at = [](index_t t, index_t, index_t d) { return t * dim + d; };
    engine.put_keys(k, at);
    engine.put_values(v, at);
    const auto piece = [&](index_t first, index_t last) {
      return kv_piece{first, last - first, k.at(first * dim), v.at(first * dim)};
    };
    const kv_piece pieces[] = {piece(c.first, c.hole), piece(c.after, tokens)};
    const kv_view<f32> view(config, {{.token = dim}, {.token = dim}}, pieces, tokens);
    CHECK(view.min_truncate() == c.min_truncate);
    const auto rows = std::min<index_t>(tokens, static_cast<index_t>(tokens - c.min_truncate) + 1);
    CHECK(engine.check(view, rows) == "");
    if (rows == tokens) continue;
    matrix q = matrix::Ones(rows + 1, dim), out(rows + 1, dim);
    workspace scratch;
    CHECK(attention(engine.params).try_attend(q, view, out, scratch).message() ==
          fmt::format("sinkcache: q.rows() was {}, had to be at most {}: what older tokens saw is overwritten",
                      rows + 1, rows));
  }
}

TEST_CASE("kv_view: a stream ends at 2^62") {
  constexpr position_t end = position_t{1} << 62;
  static_assert(max_position == end);
  constexpr index_t dim = 4, tokens = 10, rows = 3;
  cache_config config = engine_rotated(1, dim);
  config.window = 7;
  host<f32> engine(config, {.num_qo_heads = 1}, tokens);
  buffer<f32> k(tokens * dim), v(tokens * dim);
  const auto at = [](index_t t, index_t, index_t d) { return t * dim + d; };
  engine.put_keys(k, at);
  engine.put_values(v, at);
  const kv_layout layout{{.token = dim}, {.token = dim}};
  const std::int32_t table[] = {0, 1};
  const auto piece = [&](position_t first) { return kv_piece{first, tokens, k.at(0), v.at(0)}; };
  const auto pages = [&](position_t first) { return kv_pages{k.at(0), v.at(0), 5 * dim, 5 * dim, 2, 5, table, first}; };
  // The last tokens that there can be: as at the start, for without positions nothing depends on where.
  for (const kv_memory& last : {kv_memory(piece(end - tokens)), kv_memory(pages(end - tokens))}) {
    const kv_view<f32> view(config, layout, last, end);
    const matrix q = matrix::Ones(rows, dim);
    matrix out(rows, dim);
    std::vector<float> lse(rows);
    workspace scratch;
    attention(engine.params).attend(q, view, out, scratch, {.lse = lse});
    for (index_t row = 0; row < rows; ++row) {
      const position_t query = tokens - rows + row;
      CHECK(host<f32>::far_from(oracle::attend(engine.layer, q.row(row).data(), query, engine.visible(query),
                                               engine.keys.data(), engine.values.data()),
                                out.row(row).data(), &lse[as_size(row)]) == "");
    }
  }

  kv_view<f32> view(config, layout);
  const auto words = [&](const kv_memory& bad, position_t seen) {
    const status found = view.try_assign(bad, seen);
    CHECK((view.seen() == 0 && view.size() == 0));
    return std::string(found.message());
  };
  CHECK(words(piece(end - tokens), end + 1) ==
        "sinkcache: seen was 4611686018427387905, had to be from 0 to 4611686018427387904");
  CHECK(view.try_set_seen(end + 1).message() ==
        "sinkcache: seen was 4611686018427387905, had to be from 0 to 4611686018427387904");
  CHECK(words(piece(end - tokens + 1), end) == "sinkcache: a piece's tokens was 10, had to be at most 9");
  CHECK(words(kv_piece{end + 1, 0, k.at(0), v.at(0)}, end) ==
        "sinkcache: a piece's first position was 4611686018427387905, had to be at most 4611686018427387904");
  CHECK(words(pages(end - tokens + 1), end) == "sinkcache: positions of the table was 10, had to be at most 9");
  CHECK(words(pages(end + 1), end) ==
        "sinkcache: the pages' first position was 4611686018427387905, had to be from 0 to 4611686018427387904");
}

TEST_CASE("kv_view: NaN in a row reaches those that see it, and only those") {
  constexpr index_t dim = 20, tokens = 40;
  cache_config config = engine_rotated(1, dim);
  config.window = 8;
  host<f32> engine(config, {.num_qo_heads = 1}, tokens);
  buffer<f32> k(tokens * dim), v(tokens * dim);
  const auto at = [](index_t t, index_t, index_t d) { return t * dim + d; };
  engine.held[20] = false;  // stays NaN, and the piece holds it all the same
  engine.put_keys(k, at);
  engine.put_values(v, at);
  const kv_view<f32> view(config, {{.token = dim}, {.token = dim}}, kv_piece{0, tokens, k.at(0), v.at(0)}, tokens);
  matrix q = matrix::Ones(tokens, dim), out(tokens, dim);
  workspace scratch;
  attention({.num_qo_heads = 1}).attend(q, view, out, scratch);
  for (index_t row = 0; row < tokens; ++row) {
    CAPTURE(row);
    CHECK(out.row(row).array().isNaN().all() == (row >= 20 && row < 28));
    CHECK(out.row(row).array().isNaN().any() == (row >= 20 && row < 28));
  }
}

TEST_CASE("kv_view: a prefix that sequences share, and each one's own tokens, merged") {
  constexpr index_t heads = 2, dim = 32, tokens = 60, prefix = 41;
  cache_config config = engine_rotated(heads, dim);
  config.inputs = inputs::raw;
  config.window = 50;
  host<f32> engine(config, {.num_qo_heads = 4, .alibi_slopes = {0.1f, 0.2f, 0.3f, 0.4f}}, tokens);
  engine.rotate_with(frequencies(dim));
  buffer<f32> k(tokens * heads * dim), v(tokens * heads * dim);
  const auto at = [](index_t t, index_t h, index_t d) { return (t * heads + h) * dim + d; };
  engine.put_keys(k, at);
  engine.put_values(v, at);
  const kv_strides s{.head = dim, .token = heads * dim};
  const kv_view<f32> shared(engine.config, {s, s}, kv_piece{0, prefix, k.at(0), v.at(0)}, tokens);
  const kv_view<f32> own(engine.config, {s, s},
                         kv_piece{prefix, tokens - prefix, k.at(at(prefix, 0, 0)), v.at(at(prefix, 0, 0))}, tokens);
  matrix q = matrix::Random(1, 4 * dim), out(1, 4 * dim);
  workspace scratch;
  const attention layer(engine.params);
  attention_state state(4, dim);
  layer.attend(q, shared, state, scratch);
  layer.attend(q, own, state, scratch);
  for (index_t head = 0; head < 4; ++head)
    state.finish(softmax_variant::standard(), head, {out.data() + head * dim, as_size(dim)});
  CHECK(host<f32>::far_from(oracle::attend(engine.layer, q.data(), tokens - 1, engine.visible(tokens - 1),
                                           engine.keys.data(), engine.values.data()),
                            out.data(), nullptr) == "");
}

TEST_CASE("kv_view: a view without tokens, or moved from, sees nothing") {
  const cache_config config = engine_rotated(1, 4);
  kv_view<f32> view(config, {{.token = 4}, {.token = 4}});
  matrix q = matrix::Ones(1, 4), out = matrix::Ones(1, 4);
  workspace scratch;
  float lse = 0;
  view.set_seen(3);  // known, and held by nobody here
  attention({.num_qo_heads = 1}).decode(q, view, out, scratch, {.lse = {&lse, 1}});
  CHECK(out.isZero(0));
  CHECK(lse == -std::numeric_limits<float>::infinity());
  const buffer<f32> memory(8);
  view.assign(kv_piece{0, 2, memory.at(0), memory.at(0)}, 2);
  CHECK(view.size() == 2);
  kv_view<f32> taken = std::move(view);
  CHECK(taken.size() == 2);
  CHECK(view.size() == 0);  // NOLINT(bugprone-use-after-move): that is what is asked
  const std::vector<kv_piece> none;
  taken.assign(none, 5);
  CHECK(taken.size() == 0);
  taken.assign(kv_memory(), 5);
  CHECK(taken.size() == 0);
}

TEST_CASE("kv_view: a batch of views without tokens needs no memory for them") {
  const kv_view<f32> nothing(engine_rotated(1, 64), {{.token = 64}, {.token = 64}}, kv_memory(), 1);
  constexpr index_t heads = 256, views = 200;
  const attention layer({.num_qo_heads = heads});
  const matrix q = matrix::Ones(1, heads * 64);
  matrix out = matrix::Ones(views, heads * 64);
  std::vector<decode_item> batch;
  for (index_t i = 0; i < views; ++i)
    batch.push_back(
        {.q = {q.data(), as_size(heads * 64)}, .keys = &nothing, .out = {out.row(i).data(), as_size(heads * 64)}});
  workspace scratch;
  const index_t before = scratch.nbytes();
  layer.decode(batch, scratch);
  CHECK(scratch.nbytes() == before);
  CHECK(out.isZero(0));
}

TEST_CASE("kv_view: bad configurations and layouts are refused in exact words") {
  const cache_config good = engine_rotated(2, 8);
  const kv_layout layout{{.head = 8, .token = 16}, {.head = 8, .token = 16}};
  const auto words = [&](const cache_config& config, const kv_layout& l) {
    status found;
    const auto view = kv_view<f32>::try_create(config, l, found);
    CHECK(view.has_value() == found.ok());
    CHECK(kv_view<f32>::validate(config, l).message() == found.message());
    return std::string(found.message());
  };
  const auto changed = [&](auto member, auto value) {
    cache_config config = good;
    config.*member = value;
    return words(config, layout);
  };
  CHECK(words(good, layout).empty());
  CHECK(changed(&cache_config::window, index_t{-1}) == "sinkcache: window was -1, had to be at least 0");
  CHECK(changed(&cache_config::num_sink_tokens, index_t{-2}) ==
        "sinkcache: num_sink_tokens was -2, had to be at least 0");
  CHECK(changed(&cache_config::num_kv_heads, index_t{0}) == "sinkcache: num_kv_heads was 0, had to be at least 1");
  CHECK(changed(&cache_config::head_dim, index_t{577}) == "sinkcache: head_dim was 577, had to be from 1 to 576");
  CHECK(
      changed(&cache_config::positions, positions::in_cache) ==
      "sinkcache: rope was absent, had to be given, say .rope = rope::plain(head_dim, theta), or rope::none(), unless "
      "positions are absolute and inputs rotated");
  CHECK(words(good, {{.head = -8, .token = 16}, layout.v}) == "sinkcache: layout.k.head was -8, had to be at least 0");
  CHECK(words(good, {layout.k, {.head = 8, .token = -16}}) ==
        "sinkcache: layout.v.token was -16, had to be at least 1");
  CHECK(words(good, {}) == "sinkcache: layout.k.token was 0, had to be at least 1");
  CHECK(words(good, {layout.k, {.head = 8, .token = 16, .dim = 0}}) ==
        "sinkcache: layout.v.dim was 0, had to be at least 1");
  constexpr index_t huge = std::numeric_limits<index_t>::max();
  CHECK(changed(&cache_config::num_sink_tokens, huge) ==
        fmt::format("sinkcache: num_sink_tokens was {}, had to be below {}", huge, max_position));
  cache_config most = good;
  most.num_sink_tokens = max_position - 1;
  kv_part memory[2];
  part_list parts(memory, 2);
  CHECK(kv_view<f32>(most, layout).plan(0, -1, -1, parts).queries == 1);
  CHECK(words(good, {{.head = huge, .token = 16}, layout.v}) ==
        fmt::format("sinkcache: bytes of a stride was {} * 4, had to fit 63 bits", huge));
}

TEST_CASE("kv_view: bad pieces are refused in exact words, and change nothing") {
  cache_config config = engine_rotated(2, 8);
  const kv_layout layout{{.head = 8, .token = 16}, {.head = 8, .token = 16}};
  const buffer<f32> memory(64 * 16);
  const void* const p = memory.at(0);
  kv_view<f32> view(config, layout, kv_piece{0, 64, p, p}, 64);
  const auto words = [&](const kv_memory& bad, position_t seen = 64) {
    const status found = view.try_assign(bad, seen);
    CHECK((view.seen() == 64 && view.size() == 64));
    return std::string(found.message());
  };
  CHECK(words(kv_piece{0, 64, nullptr, p}) == "sinkcache: k was null, had to be where keys lie");
  CHECK(words(kv_piece{0, 64, p, nullptr}) == "sinkcache: v was null, had to be where values lie");
  CHECK(words(kv_piece{-1, 64, p, p}) ==
        "sinkcache: a piece's first position was -1, had to be at least where the piece before it ends, 0");
  CHECK(words(kv_piece{0, -5, p, p}) == "sinkcache: a piece's tokens was -5, had to be at least 0");
  CHECK(words(kv_piece{max_position, 1, p, p}) == "sinkcache: a piece's tokens was 1, had to be at most 0");
  CHECK(words(kv_piece{0, index_t{1} << 60, p, p}) ==
        fmt::format("sinkcache: bytes that a layout reaches over was {} * 64, had to fit 63 bits", index_t{1} << 60));
  const kv_piece long_then_short[] = {{0, index_t{1} << 60, p, p}, {index_t{1} << 60, 1, p, p}};
  CHECK(words(long_then_short) == words(kv_piece{0, index_t{1} << 60, p, p}));
  CHECK(words(kv_piece{0, 64, p, p}, -1) ==
        fmt::format("sinkcache: seen was -1, had to be from 0 to {}", max_position));
  const kv_piece overlapping[] = {{0, 10, p, p}, {9, 3, p, p}};
  CHECK(words(overlapping) ==
        "sinkcache: a piece's first position was 9, had to be at least where the piece before it ends, 10");

  const kv_piece unsorted[] = {{0, 10, p, p}, {12, 0, nullptr, nullptr}, {11, 3, p, p}};
  CHECK(words(unsorted) ==
        "sinkcache: a piece's first position was 11, had to be at least where the piece before it ends, 12");

  std::vector<kv_piece> spans;
  for (position_t i = 0; i < 30; ++i) spans.push_back({2 * i, 1, p, p});
  CHECK(kv_view<f32>(config, layout, spans, 64).size() == 30);

  const std::int32_t table[] = {0, 3, 1}, outside[] = {0, 4, 1}, negative[] = {0, -1, 1};
  const kv_pages pages{p, p, 256, 256, 4, 16, table};
  const auto changed = [&](auto member, auto value) {
    kv_pages bad = pages;
    bad.*member = value;
    return words(bad);
  };
  CHECK(changed(&kv_pages::table, std::span<const std::int32_t>(outside)) ==
        "sinkcache: a page of the table was 4, had to be at least 0 and below num_pages, 4");
  CHECK(changed(&kv_pages::table, std::span<const std::int32_t>(negative)) ==
        "sinkcache: a page of the table was -1, had to be at least 0 and below num_pages, 4");
  CHECK(changed(&kv_pages::page_tokens, index_t{0}) == "sinkcache: page_tokens was 0, had to be at least 1");
  CHECK(changed(&kv_pages::num_pages, index_t{-1}) == "sinkcache: num_pages was -1, had to be at least 0");
  for (const index_t none : {-1, 0}) {  // 0: forgotten, all pages would be the first
    CHECK(changed(&kv_pages::k_page, none) == fmt::format("sinkcache: k_page was {}, had to be at least 1", none));
    CHECK(changed(&kv_pages::v_page, none) == fmt::format("sinkcache: v_page was {}, had to be at least 1", none));
  }
  CHECK(changed(&kv_pages::first, position_t{-1}) ==
        fmt::format("sinkcache: the pages' first position was -1, had to be from 0 to {}", max_position));
  CHECK(changed(&kv_pages::k, static_cast<const void*>(nullptr)) == "sinkcache: k was null, had to be where keys lie");
  CHECK(changed(&kv_pages::page_tokens, index_t{1} << 62) ==
        fmt::format("sinkcache: positions of the table was {} * 3, had to fit 63 bits", index_t{1} << 62));
  CHECK(changed(&kv_pages::k_page, index_t{1} << 61) ==
        fmt::format("sinkcache: bytes of a page was {} * 4, had to fit 63 bits", index_t{1} << 61));
  CHECK(words(kv_pages{p, p, 0, 256, 2, 16, std::span(table, 1)}) ==
        "sinkcache: k_page was 0, had to be at least 1");  // of two
  const std::int32_t first_page[] = {0};
  CHECK(view.try_assign(kv_pages{p, p, 0, 0, 1, 16, first_page}, 64).ok());  // of one page none is the next
  view.assign(kv_piece{0, 64, p, p}, 64);
  status found;
  CHECK(!kv_view<f32>::try_create(config, layout, kv_piece{0, 64, nullptr, p}, 64, found).has_value());
  CHECK(found.message() == "sinkcache: k was null, had to be where keys lie");
  CHECK(kv_view<f32>::try_create(config, layout, kv_piece{0, 64, p, p}, 64, found).has_value());
  CHECK(found.ok());
  CHECK(view.try_set_seen(-3).message() == fmt::format("sinkcache: seen was -3, had to be from 0 to {}", max_position));
  CHECK(view.seen() == 64);
}
