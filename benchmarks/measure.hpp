#pragma once

// What the benchmarks and the comparison with peers share: how time is taken, the machine's limits, and the error.

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory_resource>
#include <random>
#include <sinkcache/sinkcache.hpp>
#include <utility>
#include <vector>

#include "../tests/oracle.hpp"

namespace measure {

using sinkcache::index_t, sinkcache::matrix, sinkcache::position_t;

// ---- time -----------------------------------------------------------------------------------------------------------

// What this thread has computed: other processes that share the machine do not count.
inline double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

inline double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// At least so many rounds, and so many seconds.
struct effort {
  std::size_t rounds = 31;
  double seconds = 0.3;
};

struct spread {
  double median, p10, p90;
};

// Contenders that take turns. The machine's moods last longer than a round, so ratios within a round are what counts.
class rounds {
 public:
  using contender = std::function<void(std::size_t round)>;

  // Who begins changes from round to round; a round before the first is not counted.
  rounds(const std::vector<contender>& contenders, const effort& effort, double (*clock)() = thread_seconds) {
    const double start = wall_seconds();
    for (std::size_t round = 0; round <= effort.rounds || (wall_seconds() - start < effort.seconds && round <= 1000);
         ++round) {
      std::vector<double> seconds(contenders.size());
      for (std::size_t i = 0; i < contenders.size(); ++i) {
        const std::size_t turn = (round + i) % contenders.size();
        const double began = clock();
        contenders[turn](round);
        seconds[turn] = clock() - began;
      }
      if (round > 0) seconds_.push_back(std::move(seconds));
    }
  }

  std::size_t size() const { return seconds_.size(); }

  // Of a number that each round's seconds, one a contender, give.
  template <class F>
  spread of(const F& number) const {
    std::vector<double> numbers;
    for (const std::vector<double>& seconds : seconds_) numbers.push_back(number(seconds));
    std::sort(numbers.begin(), numbers.end());
    const auto quantile = [&](double q) {
      return numbers[static_cast<std::size_t>(q * static_cast<double>(numbers.size() - 1) + 0.5)];
    };
    return {quantile(0.5), quantile(0.1), quantile(0.9)};
  }
  spread seconds(std::size_t i) const {
    return of([=](const std::vector<double>& s) { return s[i]; });
  }
  spread ratio(std::size_t i, std::size_t to) const {
    return of([=](const std::vector<double>& s) { return s[i] / s[to]; });
  }

 private:
  std::vector<std::vector<double>> seconds_;
};

// ---- the machine's limits -------------------------------------------------------------------------------------------

// The compiler has to believe that somebody reads what was computed.
template <class T>
void keep(const T& value) {
  asm volatile("" : : "g"(&value) : "memory");
}

// Arithmetic: independent multiply-adds in registers.
inline void multiply_add(double flops) {
  using namespace sinkcache::detail;
  constexpr int num_sums = 12;
  vfloat sums[num_sums] = {}, factor = broadcast(0x1p-10f);
  for (auto steps = static_cast<index_t>(flops / (2 * num_sums * lanes)); steps > 0; --steps) {
#pragma GCC unroll 16
    for (int i = 0; i < num_sums; ++i) {
#if defined(__x86_64__)
      asm("" : "+v"(factor));  // or the product, which is the same in every step, leaves the loop
#elif defined(__aarch64__)
      asm("" : "+w"(factor));
#endif
      sums[i] = add_product(sums[i], factor, factor);
    }
  }
  keep(sums);
}

// Memory: four streams, one vector sum a stream.
inline void read(const std::byte* data, std::size_t size) {
  using sinkcache::detail::vfloat;
  constexpr std::size_t streams = 4, line = 64;
  const std::size_t part = size / streams / line * line;
  vfloat sums[streams] = {};
  for (std::size_t i = 0; i < part; i += line)
#pragma GCC unroll 4
    for (std::size_t s = 0; s < streams; ++s)
#pragma GCC unroll 4
      for (std::size_t j = 0; j < line; j += sizeof(vfloat))
        sums[s] += sinkcache::detail::load(reinterpret_cast<const float*>(data + s * part + i + j));
  keep(sums);
}

// ---- what is measured -----------------------------------------------------------------------------------------------

struct shape {
  const char* name;
  index_t num_qo_heads, num_kv_heads, head_dim;
  bool sink_logits = false;
};

// A to C are the attention of Llama 3 8B, gpt-oss and SmolLM2 135M. D to F are there so that nothing is tuned to three.
inline constexpr shape shapes[] = {{"A", 32, 8, 128}, {"B", 64, 8, 64, true}, {"C", 9, 3, 64},
                                   {"D", 24, 3, 96},  {"E", 10, 2, 80},       {"F", 8, 1, 256}};
inline constexpr index_t num_sink_tokens = 4;

// Tokens of the short caches: of D to F a number that tiles do not divide.
inline index_t short_visible(const shape& of) { return of.name[0] <= 'C' ? 1024 : num_sink_tokens + 1000; }

inline std::vector<float> inv_freq(index_t head_dim) {
  std::vector<float> result;
  for (index_t i = 0; i < head_dim; i += 2)
    result.push_back(static_cast<float>(std::pow(500000., -static_cast<double>(i) / static_cast<double>(head_dim))));
  return result;
}

inline matrix normal(index_t rows, index_t cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution;
  matrix result(rows, cols);
  for (index_t i = 0; i < result.size(); ++i) result.data()[i] = distribution(random);
  return result;
}

inline matrix queries(const shape& of, index_t tokens) { return normal(tokens, of.num_qo_heads * of.head_dim, 3); }

inline sinkcache::cache_config config_of(const shape& of, index_t visible) {
  const index_t pinned = std::min(num_sink_tokens, visible - 1);
  return {.num_kv_heads = of.num_kv_heads,
          .head_dim = of.head_dim,
          .num_sink_tokens = pinned,
          .window = visible - pinned,
          .rope = sinkcache::rope(inv_freq(of.head_dim))};
}

inline sinkcache::attention_params params_of(const shape& of) {
  sinkcache::attention_params params{.num_qo_heads = of.num_qo_heads};
  const matrix logits = normal(1, of.num_qo_heads, 4);
  if (of.sink_logits)
    params.softmax = sinkcache::softmax_variant::sink_logits({logits.data(), static_cast<std::size_t>(logits.size())});
  return params;
}

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

// The caches of as many layers as hold `bytes`, or of one: that stays in the last-level cache, those of cold() come
// from memory when they are walked in turn. They are two at least, so that a plain read is of another layer than the
// call.
template <class K, class V = K>
class layers {
 public:
  layers(const sinkcache::cache_config& config, index_t tokens, std::size_t bytes = 0)
      : memory_(bytes == 0 ? 1 : std::max<std::size_t>(2, (bytes + bytes_of(config) - 1) / bytes_of(config))) {
    const index_t cols = config.num_kv_heads * config.head_dim, chunk = std::min<index_t>(tokens, 1024);
    const matrix k = normal(chunk, cols, 1), v = normal(chunk, cols, 2);
    for (visible_memory& memory : memory_) {
      caches_.emplace_back(config, &memory);
      for (index_t first = 0; first < tokens; first += chunk) {
        const index_t n = std::min(chunk, tokens - first);
        caches_.back().append(k.topRows(n), v.topRows(n));
      }
    }
  }

  std::size_t size() const { return caches_.size(); }
  std::size_t layer_bytes() const { return memory_[0].size(); }
  sinkcache::kv_cache<K, V>& cache(std::size_t i) { return caches_[i % size()]; }
  // Plainly, one of so many parts of a layer's bytes.
  void read(std::size_t i, std::size_t part = 0, std::size_t parts = 1) const {
    const visible_memory& memory = memory_[i % size()];
    measure::read(memory.data() + memory.size() / parts * part, memory.size() / parts);
  }

 private:
  static std::size_t bytes_of(const sinkcache::cache_config& config) {
    return sinkcache::kv_cache<K, V>::required_bytes(config);
  }

  std::vector<visible_memory> memory_;
  std::vector<sinkcache::kv_cache<K, V>> caches_;
};

// A stored row as floats, as it was before the cache transformed it.
inline void decode_row(const sinkcache::kv_rows& rows, const sinkcache::row_transform* transform, index_t row,
                       index_t dim, float* to) {
  alignas(64) float padded[sinkcache::max_head_dim];
  rows.reader->load(rows, row, 1, dim, sinkcache::max_head_dim, padded);
  if (transform != nullptr) transform->undo(padded, dim);
  std::copy_n(padded, dim, to);
}

// What double arithmetic over the stored rows gives the newest token, [num_qo_heads * head_dim].
inline std::vector<double> exact(const sinkcache::any_kv_cache& cache, const sinkcache::attention_params& params,
                                 const float* q) {
  const sinkcache::kv_geometry& config = cache.geometry();
  const index_t dim = config.head_dim, group = params.num_qo_heads / config.num_kv_heads;
  oracle::layer layer;
  layer.num_qo_heads = static_cast<std::size_t>(group);
  layer.head_dim = layer.v_head_dim = static_cast<std::size_t>(dim);
  layer.in_cache = config.positions == sinkcache::positions::in_cache;
  if (config.rope && config.rope->width() > 0) layer.inv_freq = inv_freq(dim);
  layer.sm_scale = 1 / std::sqrt(static_cast<double>(dim));
  layer.soft_cap = static_cast<double>(params.logits_soft_cap);
  std::vector<float> keys(static_cast<std::size_t>(cache.seen() * dim)), values(keys.size());
  std::vector<double> result;
  for (index_t kv_head = 0; kv_head < config.num_kv_heads; ++kv_head) {
    std::vector<oracle::position> visible;
    std::vector<sinkcache::kv_part> memory(static_cast<std::size_t>(cache.max_parts()));
    sinkcache::part_list parts(memory.data(), cache.max_parts());
    cache.plan(kv_head, cache.seen() - 1, cache.seen() - 1, parts);
    for (const sinkcache::kv_part& part : parts)
      for (index_t i = 0; i < part.rows; ++i) {
        const position_t p = part.position(i);
        decode_row(part.k, config.k_transform, part.row + i, dim, keys.data() + p * dim);
        decode_row(part.v, config.v_transform, part.row + i, dim, values.data() + p * dim);
        visible.push_back(p);
      }
    layer.sink_logits.clear();
    for (index_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      if (std::isfinite(params.softmax.sink(head))) layer.sink_logits.push_back(params.softmax.sink(head));
    for (const oracle::answer& head :
         oracle::attend(layer, q + kv_head * group * dim, cache.seen() - 1, visible, keys.data(), values.data()))
      result.insert(result.end(), head.out.begin(), head.out.end());
  }
  return result;
}

// The largest error, relative to the largest output.
inline double error(const std::vector<double>& exact, const float* out) {
  double largest_error = 0, largest = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double error = std::abs(static_cast<double>(out[i]) - exact[i]);
    if (!(error <= largest_error)) largest_error = error;  // NaN too
    largest = std::max(largest, std::abs(exact[i]));
  }
  return largest_error / largest;
}

inline double error_of(const sinkcache::any_kv_cache& cache, const sinkcache::attention_params& params, const float* q,
                       const float* out) {
  return error(exact(cache, params, q), out);
}

}  // namespace measure
