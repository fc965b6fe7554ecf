#pragma once

// Random layers, streams and caches, drawn from a seed (random_case.cpp), and the suite that every format and policy
// has to pass (run_case.cpp).

#include <sinkcache/sinkcache.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <memory_resource>
#include <span>
#include <string>
#include <vector>

#include "effort.hpp"
#include "oracle.hpp"
#include "random_matrix.hpp"

namespace proof {

using namespace sinkcache;

inline constexpr double u = 0x1p-24;
inline constexpr float infinity = std::numeric_limits<float>::infinity();

double normal(effort::dice&);

template <class T>
T one_of(effort::dice& dice, std::initializer_list<T> list) {
  return list.begin()[dice.from_to(0, static_cast<std::int64_t>(list.size()) - 1)];
}

// Caches that can be looked into.

// Hands out one block, filled with 0xff: NaN in every format, so that a row read before it is written shows.
class open_memory final : public std::pmr::memory_resource {
 public:
  std::span<const std::byte> bytes() const { return {memory_, size_}; }

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    memory_ = static_cast<std::byte*>(::operator new (bytes, std::align_val_t{alignment}));
    size_ = bytes;
    std::memset(memory_, 0xff, bytes);
    return memory_;
  }
  void do_deallocate(void* memory, std::size_t, std::size_t alignment) override {
    ::operator delete (memory, std::align_val_t{alignment});
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

  std::byte* memory_ = nullptr;
  std::size_t size_ = 0;
};

// What a policy means, written down a second time, without spans or runs.
struct plain_policy {
  std::function<std::vector<position_t>(position_t seen)> visible;  // oldest first
  std::function<index_t(position_t position)> slot;
  index_t slots = 0;
};

plain_policy plain_sink_window(index_t num_sink_tokens, index_t window, index_t rollback = 0);

// A kv_cache of any formats and policy behind one face, so that the tests are compiled once, in memory that they see.
class open_cache {
 public:
  virtual ~open_cache() = default;

  virtual any_kv_cache& get() = 0;
  virtual void append(const_matrix_view k, const_matrix_view v) = 0;
  virtual void truncate(position_t seen) = 0;
  virtual position_t min_truncate() const = 0;
  virtual void clear() = 0;
  virtual index_t capacity() const = 0;

  // The row of a token in its slot, decoded.
  virtual void key(index_t kv_head, index_t slot, float* out) const = 0;
  virtual void value(index_t kv_head, index_t slot, float* out) const = 0;

  virtual std::span<const std::byte> bytes() const = 0;
};

template <kv_format K, kv_format V = K, class Policy = sink_window>
class open_cache_of final : public open_cache {
 public:
  template <class... PolicyIfNotDefault>
  explicit open_cache_of(const cache_config& config, const PolicyIfNotDefault&... policy)
      : cache_(config, policy..., &memory_) {}

  any_kv_cache& get() override { return cache_; }
  void append(const_matrix_view k, const_matrix_view v) override { cache_.append(k, v); }
  void truncate(position_t seen) override { cache_.truncate(seen); }
  position_t min_truncate() const override { return cache_.min_truncate(); }
  void clear() override { cache_.clear(); }
  index_t capacity() const override { return cache_.capacity(); }

  void key(index_t kv_head, index_t slot, float* out) const override {
    const index_t dim = cache_.config().head_dim, bytes = K::block_bytes(dim);
    K::decode(memory_.bytes().data() + (kv_head * cache_.policy().capacity() + slot) * bytes, 0, dim, out);
  }
  void value(index_t kv_head, index_t slot, float* out) const override {
    const cache_config& c = cache_.config();
    const index_t rows = cache_.policy().capacity(), bytes = V::block_bytes(c.v_head_dim);
    const std::byte* const values = memory_.bytes().data() + c.num_kv_heads * rows * K::block_bytes(c.head_dim);
    V::decode(values + (kv_head * rows + slot) * bytes, 0, c.v_head_dim, out);
  }

  std::span<const std::byte> bytes() const override { return memory_.bytes(); }

 private:
  open_memory memory_;
  kv_cache<K, V, Policy> cache_;
};

using cache_maker = std::function<std::unique_ptr<open_cache>(const cache_config&)>;

// The library's formats, by number: f32, f16, bf16.
inline constexpr int num_formats = 3;
std::unique_ptr<open_cache> make_cache(int k_format, int v_format, const cache_config& config);

// Random cases.

// How far a stored number may be from the one that was to be stored: relative * |x| + row * (largest |x| of its row).
struct storage_error {
  double relative = 0, of_row = 0;
};

// One layer, its cache and its stream.
struct random_case {
  std::uint64_t seed = 0;
  cache_config config;
  oracle::layer layer;  // the same layer in the oracle's words: what is stored are rotated keys
  attention_params params;
  int k_format = 0, v_format = 0;
  double logit_scale = 1;
  bool constant_values = false;
  bool rewinds = false;  // truncate and clear now and then
  index_t tokens = 0;    // to feed, those that are taken back included

  std::string name() const;
};

struct limits {
  index_t max_head_dim = 512, max_group = 71, max_sinks = 8, max_window = 300, max_tokens = 900;
};

random_case draw_case(std::uint64_t seed, const limits& = {});

// Fills in params from layer.
void set_params(random_case&);

// Tokens of a case's stream, as they go into the library and before they were rotated.
struct tokens {
  matrix q, k, v, raw_q, raw_k;
};

// Every so many tokens a query meets keys whose logits tie at the top.
inline constexpr int tie_period = 37;

// `count` tokens from position `first` of the stream on.
tokens draw_tokens(const random_case&, effort::dice&, position_t first, index_t count);

// The suite.

// How near a comparison came to its bound: 1 is just good enough.
struct nearness {
  double out = 0, lse = 0;
};

// Compares one query token's outputs, all heads, with the oracle's at the bound of the design:
// |out - ref| <= 16 u (1 + A) max|v|, |lse - ref| <= 16 u (1 + A). Empty if they hold.
std::string far_from(const std::vector<oracle::answer>& expected, const float* out, const float* lse,
                     nearness* near = nullptr);

// Feeds the case's stream in random chunks and tells what is wrong: outputs that are not within the bound, bytes that
// differ from those of token by token appending, stored rows that are not what was given, tokens that can be taken back
// though they were overwritten, or cannot though they were not. Empty if nothing is.
std::string run_case(const random_case&, const cache_maker&, const plain_policy&, storage_error k = {},
                     storage_error v = {}, nearness* near = nullptr);

// The same for the library's own formats and policy.
std::string run_library_case(const random_case&, nearness* near = nullptr);

}  // namespace proof
