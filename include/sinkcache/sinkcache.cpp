// sinkcache.h, for a host to compile: include/ and Eigen, with exceptions, -std=c++20 -O3 -march=native. Fewer
// formats compile sooner: -DSINKCACHE_C_FORMATS='sinkcache::f16, sinkcache::q8'.

#include "sinkcache.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <sinkcache/attention.hpp>
#include <sinkcache/named_caches.hpp>
#include <sinkcache/thread_pool.hpp>

#include <sinkcache/detail/macros_off.hpp>

#if !defined(__cpp_exceptions)
#error "sinkcache: sinkcache.cpp returns as a status what it catches; compile it with exceptions, which none leaves"
#endif

// Of this file alone, as are the unnamed ones below.
namespace sinkcache_c {

using namespace sinkcache;

#if defined(SINKCACHE_C_FORMATS)
using formats = format_list<SINKCACHE_C_FORMATS>;
#else
using formats = all_formats;
#endif

// Knows a handle from another one, and mostly from one that was destroyed.
enum class handle_kind : std::uint64_t {
  none = 0,
  cache = 0x73696e6b63616368,
  attention = 0x73696e6b61747465,
  workspace = 0x73696e6b776f726b
};

// A host's executor: counts what it runs.
class host_executor {
 public:
  explicit host_executor(const sinkcache_executor& of) : of_(of) {}

  index_t concurrency() const { return static_cast<index_t>(of_.concurrency); }
  void run(index_t n, const work_ref& work) noexcept {
    run_call call{work, n, concurrency()};
    of_.run(of_.host, n, &run_item, &call);
    if (left_out_ == 0) left_out_ = n - call.done;
  }
  // Whether all that was run since the last time was run whole.
  void require_whole(status& found) noexcept {
    found.require(left_out_ == 0, "items that the executor left out", left_out_, "0");
    left_out_ = 0;
  }

 private:
  struct run_call {
    const work_ref& work;
    index_t n, concurrency;
    std::atomic<index_t> done{0};
  };

  static void run_item(void* call, std::int64_t item, std::int64_t worker) {
    run_call* const of = static_cast<run_call*>(call);
    if (of == nullptr || item < 0 || item >= of->n || worker < 0 || worker >= of->concurrency) return;
    of->work(static_cast<index_t>(item), static_cast<index_t>(worker));
    ++of->done;
  }

  sinkcache_executor of_;
  index_t left_out_ = 0;
};

}  // namespace sinkcache_c

using namespace sinkcache_c;

struct sinkcache_cache {
  handle_kind kind = handle_kind::cache;
  std::unique_ptr<any_kv_cache> cache;

  ~sinkcache_cache() { kind = handle_kind::none; }
};

struct sinkcache_attention {
  handle_kind kind = handle_kind::attention;
  sinkcache::attention attention;

  ~sinkcache_attention() { kind = handle_kind::none; }
};

struct sinkcache_workspace {
  handle_kind kind = handle_kind::workspace;
  std::unique_ptr<thread_pool> pool;  // either its own threads
  std::optional<host_executor> host;  // or the host's
  std::optional<workspace> memory;    // bound to one of them
  std::atomic_flag in_use = ATOMIC_FLAG_INIT;

  ~sinkcache_workspace() { kind = handle_kind::none; }
};

namespace {

sinkcache_status finish(const status& found, sinkcache_error* error) noexcept {
  if (error != nullptr) {
    static_assert(sizeof error->text >= 240);
    std::memcpy(error->text, found.c_str(), found.message().size() + 1);
  }
  return found ? SINKCACHE_OK : found.lacks_memory() ? SINKCACHE_NO_MEMORY : SINKCACHE_REFUSED;
}

// What `call`, which adds to a status, found or threw.
template <class Call>
sinkcache_status guarded(sinkcache_error* error, const Call& call) noexcept {
  status found;
  try {
    call(found);
  } catch (const std::bad_alloc&) {
    found.refuse_memory("memory was exhausted, had to be there");
  } catch (const std::system_error& thrown) {
    found.refuse_memory("threads could not be started: {}", thrown.what());
  } catch (const std::exception& thrown) {
    std::string_view text = thrown.what();
    constexpr std::string_view prefix = "sinkcache: ";
    if (text.starts_with(prefix)) text.remove_prefix(prefix.size());
    found.refuse("{}", text);
  } catch (...) {
    found.refuse("something was thrown, had to be a std::exception");
  }
  return finish(found, error);
}

template <class Handle>
void require_handle(status& found, const char* name, const Handle* handle, handle_kind kind) noexcept {
  found.require(handle != nullptr, name, "null", "a handle that was created");
  if (found) found.require(handle->kind == kind, name, "another handle, or destroyed", "one of its kind");
}
void require(status& found, const sinkcache_cache* cache) noexcept {
  require_handle(found, "cache", cache, handle_kind::cache);
}
void require(status& found, const sinkcache_attention* attention) noexcept {
  require_handle(found, "attention", attention, handle_kind::attention);
}
void require(status& found, const sinkcache_workspace* workspace) noexcept {
  require_handle(found, "workspace", workspace, handle_kind::workspace);
}

// Another handle is left alone, and mostly one that was destroyed.
template <class Handle>
void destroy(Handle* handle, handle_kind kind) noexcept {
  if (handle != nullptr && handle->kind == kind) delete handle;
}

// Where a new handle goes; null until there is one.
template <class Handle>
void require_place(status& found, const char* name, Handle** place) noexcept {
  found.require(place != nullptr, name, "null", "a place for the handle");
  if (place != nullptr) *place = nullptr;
}

// That a configuration is there, and has the fields of this version.
template <class Config>
void require_fields(status& found, const char* name, const char* size_name, const Config* config) noexcept {
  found.require(config != nullptr, name, "null", "a configuration");
  if (found) found.require(config->size == sizeof(Config), size_name, config->size, "its sizeof,", sizeof(Config));
}

// That an array is there as its size says, and has no more floats than can be right: so it is read no further.
void require_floats(status& found, const char* name, const float* data, std::int64_t size, std::int64_t most,
                    const char* rule) noexcept {
  found.require(size >= 0, name, size, "at least 0 floats");
  found.require(size <= most, name, size, rule, most);
  if (found && (data == nullptr) != (size == 0))
    found.refuse("{} was {}, had to be the number of floats of its array, which was {}", name, size,
                 data == nullptr ? "null" : "given");
}
std::span<const float> floats(const float* data, std::int64_t size) { return {data, static_cast<std::size_t>(size)}; }

// Rows that a call names, if all of them lie in what was given.
template <class View, class Rows>
View view(status& found, const char* name, const Rows& of, std::int64_t rows, index_t cols) noexcept {
  const std::int64_t stride = of.stride == 0 ? cols : of.stride;
  if (found && rows > 0) {
    if (of.data == nullptr) found.refuse("{}'s data was null, had to be {} x {} floats", name, rows, cols);
    if (stride < cols) found.refuse("{}'s stride was {}, had to be 0, or at least {}", name, of.stride, cols);
    const index_t before = detail::checked_product(found, "floats of rows", rows - 1, stride);
    const index_t needed = detail::checked_sum(found, "floats of rows", before, cols);
    if (of.size < needed) found.refuse("{}'s size was {}, had to be at least {} floats", name, of.size, needed);
  }
  return View(of.data, static_cast<index_t>(rows), cols, static_cast<index_t>(stride));
}
const_matrix_view input(status& found, const char* name, const sinkcache_input& of, std::int64_t rows,
                        index_t cols) noexcept {
  return view<const_matrix_view>(found, name, of, rows, cols);
}
matrix_view output(status& found, const char* name, const sinkcache_output& of, std::int64_t rows,
                   index_t cols) noexcept {
  return view<matrix_view>(found, name, of, rows, cols);
}
// Empty where it is not wanted.
std::span<float> lse_of(status& found, const sinkcache_output& of, std::int64_t rows, index_t num_qo_heads) noexcept {
  if (of.data == nullptr) {
    found.require(of.size == 0, "lse's size", of.size, "0 where its data is null");
    return {};
  }
  if (of.stride != 0) found.require(of.stride == num_qo_heads, "lse's stride", of.stride, "0 or", num_qo_heads);
  output(found, "lse", of, rows, num_qo_heads);
  return {of.data, found ? static_cast<std::size_t>(rows * num_qo_heads) : 0};
}

void require_tokens(status& found, std::int64_t tokens) noexcept {
  found.require(tokens >= 0 && tokens <= max_position, "tokens", tokens, "from 0 to", max_position);
}

// Columns of rows, checked as products of what the two handles say.
struct call_shape {
  call_shape(status& found, const sinkcache_attention& attention, const sinkcache_cache& cache) noexcept
      : of(cache.cache->geometry()),
        num_qo_heads(attention.attention.params().num_qo_heads),
        q(detail::checked_product(found, "num_qo_heads * head_dim", num_qo_heads, of.head_dim)),
        out(detail::checked_product(found, "num_qo_heads * v_head_dim", num_qo_heads, of.v_head_dim)) {}

  const kv_geometry& of;
  index_t num_qo_heads, q, out;
};

// A workspace while a call has it.
class held_workspace {
 public:
  held_workspace(status& found, sinkcache_workspace* of) noexcept : found_(found) {
    if (!found) return;
    found.require(!of->in_use.test_and_set(), "workspace", "in use by another call", "one for each call in flight");
    if (found) of_ = of;
  }
  ~held_workspace() {
    if (of_ == nullptr) return;
    if (of_->host) of_->host->require_whole(found_);
    of_->in_use.clear();
  }
  held_workspace(const held_workspace&) = delete;
  held_workspace& operator=(const held_workspace&) = delete;

 private:
  status& found_;
  sinkcache_workspace* of_ = nullptr;
};

// Fields of a rope that its type does not have.
void require_zero(status& found, std::string_view type, std::initializer_list<std::pair<const char*, double>> fields) {
  for (const auto& [name, value] : fields)
    if (!(value == 0)) found.refuse("rope's {} was {}, had to be 0: type '{}' has none", name, value, type);
}

rope make_rope(status& found, const sinkcache_rope& of, index_t head_dim) {
  const std::string_view type = of.type == nullptr ? "plain" : of.type;
  const auto is = [&](auto... types) { return ((type == types) || ...); };
  if (!is("plain", "linear", "llama3", "yarn", "inv_freq", "none"))
    found.refuse("rope's type was '{}', had to be one of: plain linear llama3 yarn inv_freq none", type.substr(0, 32));
  found.require(of.interleaved == 0 || of.interleaved == 1, "rope's interleaved", of.interleaved, "0 or 1");
  found.require(of.no_truncate == 0 || of.no_truncate == 1, "rope's no_truncate", of.no_truncate, "0 or 1");
  require_floats(found, "rope's num_inv_freq", of.inv_freq, of.num_inv_freq, head_dim / 2, "at most head_dim / 2,");
  if (is("none", "inv_freq"))
    require_zero(found, type, {{"theta", of.theta}, {"width", static_cast<double>(of.width)}});
  if (is("none", "inv_freq", "plain")) require_zero(found, type, {{"factor", of.factor}});
  if (!is("llama3"))
    require_zero(found, type, {{"low_freq_factor", of.low_freq_factor}, {"high_freq_factor", of.high_freq_factor}});
  if (!is("llama3", "yarn"))
    require_zero(found, type, {{"original_max_position_embeddings", of.original_max_position_embeddings}});
  if (!is("yarn"))
    require_zero(found, type,
                 {{"no_truncate", of.no_truncate},
                  {"beta_fast", of.beta_fast},
                  {"beta_slow", of.beta_slow},
                  {"mscale", of.mscale},
                  {"mscale_all_dim", of.mscale_all_dim}});
  if (!is("yarn", "inv_freq")) require_zero(found, type, {{"attention_factor", of.attention_factor}});
  if (is("inv_freq"))
    found.require(of.num_inv_freq > 0, "rope's num_inv_freq", of.num_inv_freq, "at least 1: type 'none' has none");
  else
    require_zero(found, type, {{"num_inv_freq", static_cast<double>(of.num_inv_freq)}});
  // Said here, because for the library a rope is as wide as a head.
  const index_t width = of.width == 0 ? head_dim : static_cast<index_t>(of.width);
  if (!is("none", "inv_freq"))
    found.require(width > 0 && width % 2 == 0 && width <= head_dim, "rope's width", of.width,
                  "even and at most head_dim, which 0 stands for,", head_dim);
  if (!found) return rope::none();

  const rope_pairing pairing = of.interleaved == 1 ? rope_pairing::interleaved : rope_pairing::half_split;
  if (is("plain")) return rope::plain(width, of.theta, pairing);
  if (is("linear")) return rope::linear(width, of.theta, of.factor, pairing);
  if (is("llama3"))
    return rope::llama3(width, of.theta,
                        {of.factor, of.low_freq_factor, of.high_freq_factor, of.original_max_position_embeddings},
                        pairing);
  if (is("yarn")) {
    rope::yarn_scaling by{.factor = of.factor,
                          .original_max_position_embeddings = of.original_max_position_embeddings,
                          .truncate = of.no_truncate == 0,
                          .mscale = of.mscale,
                          .mscale_all_dim = of.mscale_all_dim};
    if (of.beta_fast != 0) by.beta_fast = of.beta_fast;
    if (of.beta_slow != 0) by.beta_slow = of.beta_slow;
    if (of.attention_factor != 0) by.attention_factor = of.attention_factor;
    return rope::yarn(width, of.theta, by, pairing);
  }
  if (is("inv_freq"))
    return rope(floats(of.inv_freq, of.num_inv_freq), pairing,
                of.attention_factor == 0 ? 1.f : static_cast<float>(of.attention_factor));
  return rope::none();
}

// 0: the default, -1: none.
void read_count(status& found, const char* name, std::int64_t given, index_t& to) noexcept {
  found.require(given >= -1, name, given, "at least -1");
  if (given != 0) to = given == -1 ? 0 : static_cast<index_t>(given);
}

named_cache read_config(status& found, const sinkcache_cache_config& of) {
  named_cache to;
  if (of.policy != nullptr) to.policy = of.policy;
  if (of.k_format != nullptr) to.k_format = of.k_format;
  if (of.v_format != nullptr) {
    to.v_format = of.v_format;
    found.require(!to.v_format.empty(), "the format of values", "''", "a name, or NULL: that of keys");
  }
  to.num_qo_heads = static_cast<index_t>(of.num_qo_heads);
  cache_config& config = to.config;
  config.num_kv_heads = static_cast<index_t>(of.num_kv_heads);
  config.head_dim = static_cast<index_t>(of.head_dim);
  config.v_head_dim = static_cast<index_t>(of.v_head_dim);
  config.num_sink_tokens = static_cast<index_t>(of.num_sink_tokens);
  config.window = static_cast<index_t>(of.window);
  config.first_position = of.first_position;
  read_count(found, "rollback", of.rollback, config.rollback);
  read_count(found, "recent", of.recent, config.recent);
  found.require(of.positions == SINKCACHE_POSITIONS_IN_CACHE || of.positions == SINKCACHE_POSITIONS_ABSOLUTE,
                "positions", of.positions, "SINKCACHE_POSITIONS_IN_CACHE (0) or _ABSOLUTE (1)");
  config.positions = of.positions == SINKCACHE_POSITIONS_ABSOLUTE ? positions::absolute : positions::in_cache;
  found.require(of.inputs == SINKCACHE_INPUTS_RAW || of.inputs == SINKCACHE_INPUTS_ROTATED, "inputs", of.inputs,
                "SINKCACHE_INPUTS_RAW (0) or _ROTATED (1)");
  config.inputs = of.inputs == SINKCACHE_INPUTS_ROTATED ? inputs::rotated : inputs::raw;
  if (of.rope != nullptr) {
    require_fields(found, "rope", "rope's size", of.rope);
    // Where head_dim is wrong, that is what the cache refuses.
    const bool is_head = config.head_dim >= 1 && config.head_dim <= max_head_dim;
    if (found) config.rope = is_head ? make_rope(found, *of.rope, config.head_dim) : rope::none();
  }
  return to;
}

attention_params read_params(status& found, const sinkcache_attention_config& of) {
  attention_params to;
  to.num_qo_heads = static_cast<index_t>(of.num_qo_heads);
  if (of.sm_scale != 0) to.sm_scale = of.sm_scale;
  to.logits_soft_cap = of.logits_soft_cap;
  const auto require_per_head = [&](const char* name, const float* data, std::int64_t size) {
    require_floats(found, name, data, size, std::max<std::int64_t>(0, of.num_qo_heads), "at most num_qo_heads,");
  };
  require_per_head("num_sink_logits", of.sink_logits, of.num_sink_logits);
  require_per_head("num_alibi_slopes", of.alibi_slopes, of.num_alibi_slopes);
  require_per_head("num_sink_bias", of.sink_bias, of.num_sink_bias);
  const std::string_view softmax = of.softmax == nullptr ? "standard" : of.softmax;
  if (softmax != "standard" && softmax != "softmax1" && softmax != "sink_logits")
    found.refuse("softmax was '{}', had to be standard, softmax1 or sink_logits", softmax.substr(0, 32));
  if (softmax != "sink_logits")
    found.require(of.num_sink_logits == 0, "num_sink_logits", of.num_sink_logits, "0 unless softmax is sink_logits");
  if (!found) return to;
  if (softmax == "softmax1") to.softmax = softmax_variant::softmax1();
  if (softmax == "sink_logits") to.softmax = softmax_variant::sink_logits(floats(of.sink_logits, of.num_sink_logits));
  to.alibi_slopes.assign(of.alibi_slopes, of.alibi_slopes + of.num_alibi_slopes);
  to.sink_bias.assign(of.sink_bias, of.sink_bias + of.num_sink_bias);
  return to;
}

template <class Bind>
sinkcache_status create_workspace(sinkcache_workspace** place, sinkcache_error* error, const Bind& bind) noexcept {
  return guarded(error, [&](status& found) {
    require_place(found, "workspace", place);
    if (!found) return;
    auto made = std::make_unique<sinkcache_workspace>();
    bind(found, *made);
    if (found) *place = made.release();
  });
}

}  // namespace

int sinkcache_c_version(void) { return SINKCACHE_C_VERSION; }
const char* sinkcache_version(void) {
  return SINKCACHE_STRING(SINKCACHE_VERSION_MAJOR) "." SINKCACHE_STRING(SINKCACHE_VERSION_MINOR) "." SINKCACHE_STRING(
      SINKCACHE_VERSION_PATCH);
}
const char* sinkcache_isa(void) { return sinkcache::isa(); }

sinkcache_status sinkcache_cache_create(const sinkcache_cache_config* config, sinkcache_cache** cache,
                                        sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require_place(found, "cache", cache);
    require_fields(found, "config", "config's size", config);
    if (!found) return;
    const named_cache of = read_config(found, *config);
    if (!found) return;
    auto made = std::make_unique<sinkcache_cache>();
    made->cache = try_make_cache<formats>(of, found);
    if (found) *cache = made.release();
  });
}

sinkcache_status sinkcache_cache_clone(const sinkcache_cache* cache, sinkcache_cache** copy, sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require_place(found, "copy", copy);
    require(found, cache);
    if (!found) return;
    auto made = std::make_unique<sinkcache_cache>();
    made->cache = cache->cache->try_clone_any(found);
    if (found) *copy = made.release();
  });
}

void sinkcache_cache_destroy(sinkcache_cache* cache) { destroy(cache, handle_kind::cache); }

sinkcache_status sinkcache_append(sinkcache_cache* cache, int64_t tokens, sinkcache_input k, sinkcache_input v,
                                  sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require(found, cache);
    require_tokens(found, tokens);
    if (!found) return;
    const kv_geometry& of = cache->cache->geometry();
    const const_matrix_view keys = input(found, "k", k, tokens, of.num_kv_heads * of.head_dim),
                            values = input(found, "v", v, tokens, of.num_kv_heads * of.v_head_dim);
    if (found) found = cache->cache->try_append(keys, values);
  });
}

sinkcache_status sinkcache_truncate(sinkcache_cache* cache, int64_t seen, sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require(found, cache);
    if (found) found = cache->cache->try_truncate(seen);
  });
}

sinkcache_status sinkcache_clear(sinkcache_cache* cache, sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require(found, cache);
    if (found) cache->cache->clear();
  });
}

sinkcache_status sinkcache_pin(sinkcache_cache* cache, int64_t position, int32_t* pinned, sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require(found, cache);
    bool holds = false;
    if (found) found = cache->cache->try_pin(position, holds);
    if (pinned != nullptr) *pinned = holds ? 1 : 0;
  });
}

namespace {

template <class Ask>
int64_t asked(const sinkcache_cache* cache, const Ask& ask) noexcept {
  status found;
  require(found, cache);
  return found ? static_cast<int64_t>(ask(*cache->cache)) : -1;
}

}  // namespace

int64_t sinkcache_seen(const sinkcache_cache* cache) {
  return asked(cache, [](const any_kv_cache& of) { return of.seen(); });
}
int64_t sinkcache_size(const sinkcache_cache* cache) {
  return asked(cache, [](const any_kv_cache& of) { return of.size(); });
}
int64_t sinkcache_min_truncate(const sinkcache_cache* cache) {
  return asked(cache, [](const any_kv_cache& of) { return of.min_truncate(); });
}
int64_t sinkcache_nbytes(const sinkcache_cache* cache) {
  return asked(cache, [](const any_kv_cache& of) { return of.nbytes(); });
}

sinkcache_status sinkcache_attention_create(const sinkcache_attention_config* config, sinkcache_attention** attention,
                                            sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require_place(found, "attention", attention);
    require_fields(found, "config", "config's size", config);
    if (!found) return;
    attention_params params = read_params(found, *config);
    if (found) found = validate(params);
    if (found) *attention = new sinkcache_attention{.attention = sinkcache::attention(std::move(params))};
  });
}

void sinkcache_attention_destroy(sinkcache_attention* attention) { destroy(attention, handle_kind::attention); }

sinkcache_status sinkcache_workspace_create(int64_t threads, sinkcache_workspace** workspace, sinkcache_error* error) {
  return create_workspace(workspace, error, [&](status& found, sinkcache_workspace& made) {
    found.require(threads >= 1 && threads <= 1024, "threads", threads, "from 1 to", 1024);
    if (!found) return;
    made.pool = std::make_unique<thread_pool>(static_cast<index_t>(threads));
    made.memory = sinkcache::workspace::try_create(*made.pool, found);
  });
}

sinkcache_status sinkcache_workspace_create_on(const sinkcache_executor* executor, sinkcache_workspace** workspace,
                                               sinkcache_error* error) {
  return create_workspace(workspace, error, [&](status& found, sinkcache_workspace& made) {
    require_fields(found, "executor", "executor's size", executor);
    if (!found) return;
    found.require(executor->concurrency >= 1 && executor->concurrency <= 1024, "executor's concurrency",
                  executor->concurrency, "from 1 to", 1024);
    found.require(executor->run != nullptr, "executor's run", "null", "a function");
    if (!found) return;
    made.host.emplace(*executor);
    made.memory = sinkcache::workspace::try_create(*made.host, found);
  });
}

void sinkcache_workspace_destroy(sinkcache_workspace* workspace) { destroy(workspace, handle_kind::workspace); }

namespace {

decode_item read_item(status& found, const sinkcache_attention& attention, const sinkcache_decode_item& from) noexcept {
  require(found, from.cache);
  if (!found) return {};
  any_kv_cache& cache = *from.cache->cache;
  found.require(cache.seen() > 0, "tokens that the cache has seen", cache.seen(), "at least 1");
  const call_shape shape(found, attention, *from.cache);
  const const_matrix_view q = input(found, "q", from.q, 1, shape.q);
  const matrix_view out = output(found, "out", from.out, 1, shape.out);
  const std::span<float> lse = lse_of(found, from.lse, 1, shape.num_qo_heads);
  return {.q = {q.row(0), static_cast<std::size_t>(shape.q)},
          .keys = &cache,
          .out = {out.row(0), static_cast<std::size_t>(shape.out)},
          .lse = lse,
          .weights = cache.learner()};
}

}  // namespace

sinkcache_status sinkcache_decode(const sinkcache_attention* attention, sinkcache_cache* cache, sinkcache_input q,
                                  sinkcache_output out, sinkcache_output lse, sinkcache_workspace* workspace,
                                  sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require(found, attention);
    require(found, workspace);
    if (!found) return;
    const decode_item item = read_item(found, *attention, {cache, q, out, lse});
    const held_workspace held(found, workspace);
    if (found) found = attention->attention.try_decode({&item, 1}, *workspace->memory);
  });
}

sinkcache_status sinkcache_decode_batch(const sinkcache_attention* attention, int64_t num_items,
                                        const sinkcache_decode_item* items, sinkcache_workspace* workspace,
                                        sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require(found, attention);
    require(found, workspace);
    constexpr std::int64_t most = std::int64_t{1} << 32;
    found.require(num_items >= 0 && num_items <= most, "num_items", num_items, "from 0 to", most);
    found.require(num_items <= 0 || items != nullptr, "items", "null", "an array of them");
    if (!found) return;
    std::vector<decode_item> batch;
    std::vector<const kv_source*> caches;
    for (std::int64_t i = 0; i < num_items && found; ++i) {
      batch.push_back(read_item(found, *attention, items[i]));
      caches.push_back(batch.back().keys);
    }
    std::sort(caches.begin(), caches.end(), std::less<>());
    if (found && std::adjacent_find(caches.begin(), caches.end()) != caches.end())
      found.refuse("a cache was given twice, had to be one for each item of a batch");
    const held_workspace held(found, workspace);
    if (found) found = attention->attention.try_decode(batch, *workspace->memory);
  });
}

sinkcache_status sinkcache_prefill(const sinkcache_attention* attention, sinkcache_cache* cache, int64_t tokens,
                                   sinkcache_input q, sinkcache_input k, sinkcache_input v, sinkcache_output out,
                                   sinkcache_output lse, sinkcache_workspace* workspace, sinkcache_error* error) {
  return guarded(error, [&](status& found) {
    require(found, attention);
    require(found, cache);
    require(found, workspace);
    require_tokens(found, tokens);
    if (!found) return;
    const call_shape shape(found, *attention, *cache);
    const kv_geometry& of = shape.of;
    const const_matrix_view queries = input(found, "q", q, tokens, shape.q),
                            keys = input(found, "k", k, tokens, of.num_kv_heads * of.head_dim),
                            values = input(found, "v", v, tokens, of.num_kv_heads * of.v_head_dim);
    const matrix_view outputs = output(found, "out", out, tokens, shape.out);
    const std::span<float> lses = lse_of(found, lse, tokens, shape.num_qo_heads);
    const held_workspace held(found, workspace);
    if (found)
      found = attention->attention.try_prefill(queries, keys, values, *cache->cache, outputs, *workspace->memory,
                                               {.lse = lses});
  });
}

#include <sinkcache/detail/macros_on.hpp>
