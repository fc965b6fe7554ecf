// How close does one decode step come to reading the keys and values once? Method and reading: benchmarks/README.md.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory_resource>
#include <sinkcache/sinkcache.hpp>
#include <string>
#include <utility>
#include <vector>

namespace {

using sinkcache::index_t, sinkcache::matrix;

constexpr index_t num_sink_tokens = 4;

struct shape {
  index_t num_qo_heads, num_kv_heads, head_dim, visible;
};

// Shows where a cache keeps its rows, so that the same bytes can be read plainly.
class visible_memory final : public std::pmr::memory_resource {
 public:
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    size_ = bytes;
    return data_ = static_cast<std::byte*>(sinkcache::default_resource()->allocate(bytes, alignment));
  }
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
    sinkcache::default_resource()->deallocate(memory, bytes, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// The machine's limit: four streams through the memory, one vector sum a stream.
float read_once(const visible_memory& memory) {
  using sinkcache::detail::lanes, sinkcache::detail::vfloat;
  constexpr std::size_t streams = 4, line = 64;
  const std::size_t part = memory.size() / streams / line * line;
  vfloat sums[streams] = {};
  for (std::size_t i = 0; i < part; i += line)
    for (std::size_t s = 0; s < streams; ++s)
      for (std::size_t j = 0; j < line; j += sizeof(vfloat))
        sums[s] += sinkcache::detail::load(reinterpret_cast<const float*>(memory.data() + s * part + i + j));
  return sinkcache::detail::sums_of_lanes(sums[0], sums[1], sums[2], sums[3])[0];
}

double microseconds_of(const auto& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
}

double quantile(std::vector<double> values, double q) {
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(q * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

template <class F>
matrix stored(const matrix& rows, index_t dim) {
  std::vector<std::byte> block(static_cast<std::size_t>(F::block_bytes(dim)));
  matrix out(rows.rows(), rows.cols());
  for (index_t i = 0; i < rows.rows(); ++i)
    for (index_t d = 0; d < rows.cols(); d += dim) {
      F::encode(&rows(i, d), dim, block.data());
      F::decode(block.data(), 0, dim, &out(i, d));
    }
  return out;
}

// The largest error against double arithmetic on the stored values, over the largest value; positions off.
template <class F>
double error_of(const shape& shape) {
  const auto [heads, kv_heads, dim, visible] = shape;
  const matrix k = matrix::Random(visible, kv_heads * dim), v = matrix::Random(visible, kv_heads * dim);
  const matrix q = matrix::Random(1, heads * dim);
  matrix out(1, heads * dim);
  sinkcache::kv_cache<F> cache({.num_kv_heads = kv_heads,
                                .head_dim = dim,
                                .num_sink_tokens = num_sink_tokens,
                                .window = visible - num_sink_tokens,
                                .rope = sinkcache::rope::none()});
  sinkcache::workspace workspace;
  cache.append(k, v);
  sinkcache::attention({.num_qo_heads = heads}).decode(q, cache, out, workspace);
  const Eigen::MatrixXd kd = stored<F>(k, dim).template cast<double>(), vd = stored<F>(v, dim).template cast<double>();
  double error = 0;
  for (index_t h = 0; h < heads; ++h) {
    const index_t column = h / (heads / kv_heads) * dim;
    Eigen::VectorXd weights = kd.middleCols(column, dim) * q.middleCols(h * dim, dim).transpose().cast<double>();
    weights = (weights.array() / std::sqrt(static_cast<double>(dim))).exp();
    const Eigen::RowVectorXd exact = weights.transpose() * vd.middleCols(column, dim) / weights.sum();
    error = std::max(error, (out.middleCols(h * dim, dim).cast<double>() - exact).cwiseAbs().maxCoeff());
  }
  return error / vd.cwiseAbs().maxCoeff();
}

// Every round reads one layer plainly and decodes over another, so that both meet the same moods of the machine.
// `bytes` of layers: few stay in the last-level cache, many come from memory.
template <class F>
void decode(benchmark::State& state, shape shape, std::size_t bytes) {
  const sinkcache::cache_config config{.num_kv_heads = shape.num_kv_heads,
                                       .head_dim = shape.head_dim,
                                       .num_sink_tokens = num_sink_tokens,
                                       .window = shape.visible - num_sink_tokens,
                                       .rope = sinkcache::rope::plain(shape.head_dim, 500000)};
  const std::size_t layers = std::max<std::size_t>(1, bytes / sinkcache::kv_cache<F>::required_bytes(config));
  std::vector<visible_memory> memory(layers);
  std::vector<sinkcache::kv_cache<F>> caches;
  const matrix tokens = matrix::Random(shape.visible + shape.visible / 3, shape.num_kv_heads * shape.head_dim);
  for (visible_memory& m : memory) caches.emplace_back(config, &m).append(tokens, tokens);
  const matrix q = matrix::Random(1, shape.num_qo_heads * shape.head_dim);
  matrix out(1, q.cols());
  const sinkcache::attention attention({.num_qo_heads = shape.num_qo_heads});
  sinkcache::workspace workspace;

  std::vector<double> read_us, decode_us, ratio;
  std::size_t round = 0;
  for (auto _ : state) {
    const std::size_t a = round % layers, b = (round + layers / 2) % layers;
    read_us.push_back(microseconds_of([&] { benchmark::DoNotOptimize(read_once(memory[a])); }));
    decode_us.push_back(microseconds_of([&] { attention.decode(q, caches[b], out, workspace); }));
    benchmark::DoNotOptimize(out.data());
    ratio.push_back(decode_us.back() / read_us.back());
    state.SetIterationTime(decode_us.back() * 1e-6);
    ++round;
  }
  state.counters["read_us"] = quantile(read_us, 0.5);
  state.counters["decode_us"] = quantile(decode_us, 0.5);
  state.counters["ratio"] = quantile(ratio, 0.5);
  state.counters["ratio_p10"] = quantile(ratio, 0.1);
  state.counters["ratio_p90"] = quantile(ratio, 0.9);
  state.counters["error"] = error_of<F>(shape);
}

template <class F>
void add(const std::string& format, const std::string& name, const shape& shape) {
  const std::pair<const char*, std::size_t> places[] = {{"hot", 0}, {"cold", std::size_t{192} << 20}};
  for (const auto& [place, bytes] : places)
    benchmark::RegisterBenchmark(("decode/" + format + "/" + name + "/" + place).c_str(), decode<F>, shape, bytes)
        ->UseManualTime()
        ->MinTime(0.3);
}

}  // namespace

int main(int argc, char** argv) {
  const std::pair<const char*, shape> shapes[] = {
      {"llama-3-8b", {32, 8, 128, 1024}}, {"gpt-oss", {64, 8, 64, 1024}}, {"smollm2", {9, 3, 64, 1024}}};
  for (const auto& [name, shape] : shapes) {
    add<sinkcache::f32>("f32", name, shape);
    add<sinkcache::f16>("f16", name, shape);
    add<sinkcache::bf16>("bf16", name, shape);
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("isa", sinkcache::isa());
  benchmark::RunSpecifiedBenchmarks();
}
