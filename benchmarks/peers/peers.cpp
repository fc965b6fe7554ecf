// One attention call of a layer by this library, by ggml and by PyTorch, over the same keys and values, each in its own
// best layout: a library for compare.py, which takes turns among them. README.md.

#include "../measure.hpp"

#include <sinkcache/ggml_formats.hpp>

#if defined(HAVE_GGML)
#include <ggml-cpu.h>
#include <ggml.h>
#endif
#if defined(HAVE_TORCH)
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/version.h>
#endif

#include <memory>
#include <optional>
#include <string>

namespace {

using namespace measure;

// One way to the newest token's output.
struct contender {
  std::string name;
  std::function<void()> run;
  const float* out;  // of the newest token
  bool sink_logits;  // whether it was given them
};

// `tokens` queries at the end of `visible` tokens that all see what is before them, without rotary positions, which are
// the engine's business with ggml and PyTorch.
struct layer {
  shape of;
  index_t visible, tokens;
  matrix k = normal(visible, of.num_kv_heads*of.head_dim, 1), v = normal(visible, k.cols(), 2);
  matrix q = queries(of, tokens);
  visible_memory memory = {};  // our cache's
  std::vector<double> exact = {}, exact_without_sinks = {};
  std::vector<contender> contenders = {};
  std::vector<std::shared_ptr<void>> owned = {};

  template <class T>
  T& own(T&& object) {
    auto shared = std::make_shared<std::remove_cvref_t<T>>(std::forward<T>(object));
    owned.push_back(shared);
    return *shared;
  }
  float scale() const { return 1 / std::sqrt(static_cast<float>(of.head_dim)); }
};

// ---- ours -----------------------------------------------------------------------------------------------------------

struct our_memory {
  sinkcache::attention attention;
  sinkcache::workspace workspace = {};
  matrix out;
};

template <class F>
void add_ours(layer& layer) {
  using namespace sinkcache;
  const shape& of = layer.of;
  auto& cache = layer.own(kv_cache<F>({.num_kv_heads = of.num_kv_heads,
                                       .head_dim = of.head_dim,
                                       .window = layer.visible,
                                       .positions = positions::absolute,
                                       .rope = rope::none()},
                                      &layer.memory));
  cache.append(layer.k, layer.v);
  auto& ours =
      layer.own(our_memory{.attention = attention(params_of(of)), .out = matrix(layer.tokens, layer.q.cols())});
  const auto decode = [&] { ours.attention.decode(layer.q, cache, ours.out, ours.workspace); };
  const auto prefill = [&] {  // stores the tokens, which its peers find stored
    cache.truncate(layer.visible - layer.tokens);
    ours.attention.prefill(layer.q, layer.k.bottomRows(layer.tokens), layer.v.bottomRows(layer.tokens), cache, ours.out,
                           ours.workspace);
  };
  const float* const newest = ours.out.row(layer.tokens - 1).data();
  if (layer.tokens == 1)
    layer.contenders.push_back({"sinkcache", decode, newest, of.sink_logits});
  else
    layer.contenders.push_back({"sinkcache", prefill, newest, of.sink_logits});
  const float* const q = layer.q.row(layer.tokens - 1).data();
  layer.exact = exact(cache, params_of(of), q);
  layer.exact_without_sinks = exact(cache, {.num_qo_heads = of.num_qo_heads}, q);
}

// ---- ggml -----------------------------------------------------------------------------------------------------------

#if defined(HAVE_GGML)

enum class cells { by_head, by_token };  // [head][token][dim], and as llama.cpp has them, [token][head][dim]

template <class F>
constexpr ggml_type type_of = std::is_same_v<F, sinkcache::f32>    ? GGML_TYPE_F32
                              : std::is_same_v<F, sinkcache::f16>  ? GGML_TYPE_F16
                              : std::is_same_v<F, sinkcache::bf16> ? GGML_TYPE_BF16
                              : std::is_same_v<F, sinkcache::q8_0> ? GGML_TYPE_Q8_0
                                                                   : GGML_TYPE_Q4_0;

// A graph, and the thread and the memory that it is computed with.
struct ggml_program {
  ggml_program(std::size_t bytes) : context(ggml_init({bytes + (64u << 20), nullptr, false}), ggml_free) {}

  void compile(ggml_tensor* output) {
    graph = ggml_new_graph(context.get());
    ggml_build_forward_expand(graph, output);
    ggml_threadpool_params params = ggml_threadpool_params_default(1);
    pool.reset(ggml_threadpool_new(&params), ggml_threadpool_free);
    plan = ggml_graph_plan(graph, 1, pool.get());
    work.resize(plan.work_size);
    plan.work_data = work.data();
  }

  std::shared_ptr<ggml_context> context;
  std::shared_ptr<ggml_threadpool> pool;
  ggml_cgraph* graph = nullptr;
  ggml_cplan plan = {};
  std::vector<std::uint8_t> work;
};

// Rows [dim, tokens, heads] of a cache.
template <class F>
ggml_tensor* stored(ggml_context* context, const layer& layer, const matrix& rows, cells order) {
  const index_t dim = layer.of.head_dim, heads = layer.of.num_kv_heads;
  ggml_tensor* t = nullptr;
  if (order == cells::by_head)
    t = ggml_new_tensor_3d(context, type_of<F>, dim, layer.visible, heads);
  else
    t = ggml_permute(context, ggml_new_tensor_3d(context, type_of<F>, dim, heads, layer.visible), 0, 2, 1, 3);
  std::vector<std::byte> block(static_cast<std::size_t>(F::block_bytes(dim)));
  for (index_t i = 0; i < layer.visible; ++i)
    for (index_t head = 0; head < heads; ++head) {
      F::encode(rows.row(i).data() + head * dim, dim, block.data());
      std::memcpy(
          static_cast<char*>(t->data) + i * static_cast<index_t>(t->nb[1]) + head * static_cast<index_t>(t->nb[2]),
          block.data(), block.size());
    }
  return t;
}

ggml_tensor* mask_of(ggml_context* context, const layer& layer) {
  if (layer.tokens == 1) return nullptr;  // sees all
  ggml_tensor* const mask = ggml_new_tensor_2d(context, GGML_TYPE_F16, layer.visible, layer.tokens);
  auto* const values = static_cast<ggml_fp16_t*>(mask->data);
  for (index_t token = 0; token < layer.tokens; ++token)
    for (index_t cell = 0; cell < layer.visible; ++cell)
      values[token * layer.visible + cell] =
          ggml_fp32_to_fp16(cell <= layer.visible - layer.tokens + token ? 0 : -INFINITY);
  return mask;
}

ggml_tensor* sinks_of(ggml_context* context, const layer& layer) {
  ggml_tensor* const sinks = ggml_new_tensor_1d(context, GGML_TYPE_F32, layer.of.num_qo_heads);
  const sinkcache::attention_params params = params_of(layer.of);
  for (index_t head = 0; head < layer.of.num_qo_heads; ++head)
    ggml_get_data_f32(sinks)[head] = params.softmax.sink(head);
  return sinks;
}

template <class F>
void add_ggml(layer& layer, bool flash, cells order, const std::string& name) {
  const shape& of = layer.of;
  const auto elements = static_cast<std::size_t>(2 * layer.k.size());
  ggml_program& program = layer.own(
      ggml_program(2 * elements * sizeof(float) + static_cast<std::size_t>(layer.visible * layer.tokens) *
                                                      (flash ? 4 : 16 * static_cast<std::size_t>(of.num_qo_heads))));
  ggml_context* const context = program.context.get();
  // Queries as a graph has them: [dim, heads, tokens], seen as [dim, tokens, heads].
  ggml_tensor* q = ggml_new_tensor_3d(context, GGML_TYPE_F32, of.head_dim, of.num_qo_heads, layer.tokens);
  std::copy_n(layer.q.data(), layer.q.size(), ggml_get_data_f32(q));
  q = ggml_permute(context, q, 0, 2, 1, 3);
  ggml_tensor* const k = stored<F>(context, layer, layer.k, order);
  ggml_tensor* v = stored<F>(context, layer, layer.v, order);
  ggml_tensor* out = nullptr;
  index_t newest = (layer.tokens - 1) * layer.q.cols();
  if (flash) {
    out = ggml_flash_attn_ext(context, q, k, v, mask_of(context, layer), layer.scale(), 0, 0);
    if (of.sink_logits) ggml_flash_attn_ext_add_sinks(out, sinks_of(context, layer));
  } else if constexpr (sinkcache::elementwise_format<F>) {
    // Without flash attention llama.cpp keeps values transposed, [head][dim][token].
    ggml_tensor* const transposed = ggml_new_tensor_3d(context, v->type, layer.visible, of.head_dim, of.num_kv_heads);
    for (index_t head = 0; head < of.num_kv_heads; ++head)
      for (index_t i = 0; i < layer.visible; ++i)
        for (index_t d = 0; d < of.head_dim; ++d)
          std::memcpy(
              static_cast<char*>(transposed->data) + ((head * of.head_dim + d) * layer.visible + i) * F::element_bytes,
              static_cast<char*>(v->data) + d * F::element_bytes + i * static_cast<index_t>(v->nb[1]) +
                  head * static_cast<index_t>(v->nb[2]),
              static_cast<std::size_t>(F::element_bytes));
    v = transposed;
    ggml_tensor* const weights =
        ggml_soft_max_ext(context, ggml_mul_mat(context, k, q), mask_of(context, layer), layer.scale(), 0);
    if (of.sink_logits) ggml_soft_max_add_sinks(weights, sinks_of(context, layer));
    out = ggml_mul_mat(context, v, weights);  // [dim, tokens, heads]
    out = ggml_cont(context, ggml_permute(context, out, 0, 2, 1, 3));
  }
  program.compile(out);
  layer.contenders.push_back({name, [&program] { ggml_graph_compute(program.graph, &program.plan); },
                              ggml_get_data_f32(out) + newest, of.sink_logits});
}

#endif

// ---- PyTorch --------------------------------------------------------------------------------------------------------

#if defined(HAVE_TORCH)

struct torch_memory {
  at::Tensor q, k, v, scores, weights, out;
};

// Decode as two products of groups: a KV head's queries meet its keys and values once. Keys transposed are faster.
void add_torch(layer& layer) {
  at::set_num_threads(1);
  const shape& of = layer.of;
  const index_t group = of.num_qo_heads / of.num_kv_heads;
  const auto by_head = [&](const matrix& rows) {
    return at::from_blob(const_cast<float*>(rows.data()), {layer.visible, of.num_kv_heads, of.head_dim})
        .transpose(0, 1)
        .contiguous();
  };
  auto& torch = layer.own(torch_memory{
      at::from_blob(layer.q.data(), {of.num_kv_heads, group, of.head_dim}) * static_cast<double>(layer.scale()),
      by_head(layer.k).transpose(1, 2).contiguous(), by_head(layer.v),
      at::empty({of.num_kv_heads, group, layer.visible}), at::empty({of.num_kv_heads, group, layer.visible}),
      at::empty({of.num_kv_heads, group, of.head_dim})});
  const auto run = [&torch] {
    const c10::InferenceMode mode;
    at::bmm_out(torch.scores, torch.q, torch.k);
    at::_softmax_out(torch.weights, torch.scores, -1, false);
    at::bmm_out(torch.out, torch.weights, torch.v);
  };
  layer.contenders.push_back({"torch grouped bmm", run, torch.out.data_ptr<float>(), false});
}

#endif

template <class F>
void add_all(layer& layer) {
  add_ours<F>(layer);
#if defined(HAVE_GGML)
  constexpr bool bf16 = std::is_same_v<F, sinkcache::bf16>;
  add_ggml<F>(layer, true, cells::by_head, "ggml flash");
  if (!bf16) add_ggml<F>(layer, false, cells::by_head, "ggml non-flash");
  if (layer.tokens == 1) add_ggml<F>(layer, true, cells::by_token, "ggml flash, llama.cpp's cache");
#endif
#if defined(HAVE_TORCH)
  if (std::is_same_v<F, sinkcache::f32> && layer.tokens == 1) add_torch(layer);
#endif
}

// Few bits, of ours and of ggml's own: each stores what it was given in its way.
template <class F, class Ggml>
void add_few_bits(layer& layer) {
  add_ours<F>(layer);
#if defined(HAVE_GGML)
  add_ggml<Ggml>(layer, true, cells::by_head, "ggml flash");
  add_ggml<Ggml>(layer, true, cells::by_token, "ggml flash, llama.cpp's cache");
#endif
}

}  // namespace

extern "C" {

// What can be compared with, and which instructions we were built for.
const char* peers() {
  static const std::string names = std::string("sinkcache (") + sinkcache::isa() + ")"
#if defined(HAVE_GGML)
                                   + ", ggml " + ggml_version()
#endif
#if defined(HAVE_TORCH)
                                   + ", PyTorch " TORCH_VERSION
#endif
      ;
  return names.c_str();
}

void* layer_new(const char* format, const char* shape_name, long visible, long tokens) {
  const shape* const of = std::find_if(std::begin(shapes), std::end(shapes),
                                       [=](const shape& s) { return std::string(s.name) == shape_name; });
  if (of == std::end(shapes)) return nullptr;
  auto* const result = new layer{.of = *of, .visible = visible, .tokens = tokens};
  const std::string name = format;
  if (name == "f32") add_all<sinkcache::f32>(*result);
  if (name == "f16") add_all<sinkcache::f16>(*result);
  if (name == "bf16") add_all<sinkcache::bf16>(*result);
  if (name == "q8") add_few_bits<sinkcache::q8, sinkcache::q8_0>(*result);
  if (name == "q4") add_few_bits<sinkcache::q4, sinkcache::q4_0>(*result);
  return result;
}
void layer_free(layer* of) { delete of; }

long layer_size(const layer* of) { return static_cast<long>(of->contenders.size()); }
const char* layer_name(const layer* of, long i) { return of->contenders[static_cast<std::size_t>(i)].name.c_str(); }
// One call, and the thread's seconds that it took.
double layer_run(const layer* of, long i) {
  const double began = thread_seconds();
  of->contenders[static_cast<std::size_t>(i)].run();
  return thread_seconds() - began;
}
double layer_error(const layer* of, long i) {
  const contender& contender = of->contenders[static_cast<std::size_t>(i)];
  return error(contender.sink_logits ? of->exact : of->exact_without_sinks, contender.out);
}

// For a peer that is not in here, and knows no sink logits: what it reads, and the error of what it gives.
const float* layer_data(const layer* of, char which) {
  return which == 'q' ? of->q.data() : which == 'k' ? of->k.data() : of->v.data();
}
double layer_error_of(const layer* of, const float* out) { return error(of->exact_without_sinks, out); }

// The machine's limits: seconds of as much arithmetic, and of one plain read of as many bytes as our cache has.
double layer_fma(const layer* of) {
  const index_t pairs = of->tokens * of->visible - of->tokens * (of->tokens - 1) / 2;
  const double began = thread_seconds(), part = of->tokens == 1 ? 1 : 8;
  multiply_add(4. / part * static_cast<double>(of->of.num_qo_heads * of->of.head_dim * pairs));
  return part * (thread_seconds() - began);
}
double layer_read(const layer* of) {
  const double began = thread_seconds();
  read(of->memory.data(), of->memory.size());
  return thread_seconds() - began;
}
}
