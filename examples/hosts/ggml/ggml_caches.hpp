#pragma once

// Attention over memory of this library's own as operators of a ggml graph, on its CPU backend: what an engine does
// instead of writing to its KV cache and attending to that. Constant memory, for ever.

#include <ggml.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <sinkcache/sinkcache.hpp>
#include <utility>
#include <vector>

// The threads that compute a node, as an executor. ggml calls each of them at once; the first makes the library's
// calls, the others serve it until it is done. `most` is the largest number that a graph may be computed with.
class ggml_team {
 public:
  using index_t = sinkcache::index_t;

  explicit ggml_team(index_t most) : most_(most) {}

  index_t concurrency() const { return most_; }

  // To be called by every thread of a node: calls f on the first.
  template <class F>
  void compute(index_t thread, index_t num_threads, const F& f) noexcept {
    num_threads = std::min(num_threads, most_);
    if (thread >= num_threads) return;
    if (thread > 0) return serve(thread);
    helpers_ = num_threads - 1;
    f();
    start(nullptr, 0);
    wait_for_helpers();
    round_.store(0, std::memory_order_relaxed);  // before ggml starts the next node
  }

  // The library's.
  void run(index_t n, const sinkcache::work_ref& work) {
    start(&work, n);
    take_items(0);
    wait_for_helpers();
  }

 private:
  void start(const sinkcache::work_ref* work, index_t n) noexcept {
    work_ = work;
    num_items_ = n;
    next_item_.store(0, std::memory_order_relaxed);
    busy_.store(helpers_, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    if (helpers_ > 0) round_.notify_all();
  }

  void serve(index_t worker) noexcept {
    for (unsigned last = 0;; ++last) {
      wait_while(round_, last);
      const bool end = work_ == nullptr;
      if (!end) take_items(worker);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
      if (end) return;
    }
  }

  void take_items(index_t worker) noexcept {
    for (index_t item = next_item_++; item < num_items_; item = next_item_++) (*work_)(item, worker);
  }

  void wait_for_helpers() noexcept {
    for (index_t busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) wait_while(busy_, busy);
  }

  // Asks a few times before it sleeps: the next work is near.
  template <class T>
  static void wait_while(const std::atomic<T>& value, T is) noexcept {
    for (int times = 0; times < 4096; ++times)
      if (value.load(std::memory_order_acquire) != is) return;
    value.wait(is, std::memory_order_acquire);
  }

  index_t most_, helpers_ = 0, num_items_ = 0;
  const sinkcache::work_ref* work_ = nullptr;  // null: the node is done
  std::atomic<unsigned> round_{0};             // of the node
  std::atomic<index_t> busy_{0}, next_item_{0};
};

// One layer's caches, one for each sequence.
class ggml_caches {
 public:
  using index_t = sinkcache::index_t;
  using status = sinkcache::status;

  // `workspace` runs on `team`; all operators of a graph can share both.
  ggml_caches(sinkcache::attention_params params, ggml_team& team, sinkcache::workspace& workspace)
      : attention_(std::move(params)), team_(team), workspace_(workspace) {}
  ggml_caches(const ggml_caches&) = delete;  // graphs point to it
  ggml_caches& operator=(const ggml_caches&) = delete;

  // A sequence's cache, of any format and policy; null takes it away. Not while a graph is computed. Its first token is
  // that at `first_position`, which has to be where the stream of the cache starts.
  void set(std::int32_t sequence, std::unique_ptr<sinkcache::any_kv_cache> cache, std::int32_t first_position = 0) {
    const auto s = static_cast<std::size_t>(sequence);
    if (s >= sequences_.size()) sequences_.resize(s + 1);
    sequences_[s] = {std::move(cache), first_position};
  }
  std::unique_ptr<sinkcache::any_kv_cache> take(std::int32_t sequence) noexcept {
    return get(sequence) == nullptr ? nullptr : std::move(sequences_[static_cast<std::size_t>(sequence)].cache);
  }
  sinkcache::any_kv_cache* get(std::int32_t sequence) const noexcept {
    const auto s = static_cast<std::size_t>(sequence);
    return sequence >= 0 && s < sequences_.size() ? sequences_[s].cache.get() : nullptr;
  }

  // Appends tokens and attends to them, in chunks of any length: q f32 [head_dim, heads, tokens], k f32 [head_dim,
  // kv_heads, tokens], v f32 [v_head_dim, kv_heads, tokens], of a cache with raw inputs as they were before rope; of
  // each token, i32, its position and its sequence (null: all are of sequence 0). Gives f32 [v_head_dim, heads,
  // tokens], or null and in `found` why.
  //
  // A token is appended at the position that it says: the next, or, where a node is computed again, one that is taken
  // back first, as far as the cache can. Another is refused.
  ggml_tensor* build(ggml_context* graph, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, ggml_tensor* positions,
                     ggml_tensor* sequences, status& found) {
    return build(graph, q, k, v, v->ne[0], positions, sequences, found);
  }
  // Attends alone: a layer that shares the caches of one before it, to the newest tokens.
  ggml_tensor* attend(ggml_context* graph, ggml_tensor* q, index_t v_head_dim, ggml_tensor* positions,
                      ggml_tensor* sequences, status& found) {
    return build(graph, q, nullptr, nullptr, v_head_dim, positions, sequences, found);
  }
  // Appends alone; for a chunk that is attended to later a cache needs a `rollback` of its length. Gives i32 [tokens].
  ggml_tensor* append(ggml_context* graph, ggml_tensor* k, ggml_tensor* v, ggml_tensor* positions,
                      ggml_tensor* sequences, status& found) {
    return build(graph, nullptr, k, v, v->ne[0], positions, sequences, found);
  }

  // Ask after each compute: the first thing that was refused since the last time. What comes out then is not to be
  // used.
  status take_refused() noexcept { return std::exchange(refused_, status()); }

 private:
  ggml_tensor* build(ggml_context* graph, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, index_t v_head_dim,
                     ggml_tensor* positions, ggml_tensor* sequences, status& found) {
    found = status();
    const index_t tokens = (q != nullptr ? q : k)->ne[2];
    const index_t heads = attention_.params().num_qo_heads;
    if (q != nullptr) {
      require_rows(found, "q", q, tokens);
      found.require(q->ne[1] == heads, "q->ne[1]", q->ne[1], "num_qo_heads,", heads);
    }
    if (k != nullptr) {
      require_rows(found, "k", k, tokens);
      require_rows(found, "v", v, tokens);
      found.require(v->ne[1] == k->ne[1], "v->ne[1]", v->ne[1], "that of k,", k->ne[1]);
      if (q != nullptr) found.require(q->ne[0] == k->ne[0], "q->ne[0]", q->ne[0], "that of k,", k->ne[0]);
    }
    require_numbers(found, "positions", positions, tokens);
    if (sequences != nullptr) require_numbers(found, "sequences", sequences, tokens);
    if (!found) return nullptr;
    ggml_tensor* args[5] = {positions, sequences == nullptr ? positions : sequences};
    int n = 2;
    for (ggml_tensor* t : {q, k, v})
      if (t != nullptr) args[n++] = t;
    const ggml_custom_op_t op = q == nullptr   ? &compute<false, true>
                                : k == nullptr ? &compute<true, false>
                                               : &compute<true, true>;
    return ggml_custom_4d(graph, q == nullptr ? GGML_TYPE_I32 : GGML_TYPE_F32, q == nullptr ? tokens : v_head_dim,
                          q == nullptr ? 1 : heads, q == nullptr ? 1 : tokens, 1, args, n, op, GGML_N_TASKS_MAX, this);
  }

  static void require_rows(status& found, const char* name, const ggml_tensor* t, index_t tokens) noexcept {
    if (t->type != GGML_TYPE_F32) found.refuse("the type of {} was {}, had to be f32", name, ggml_type_name(t->type));
    if (t->ne[2] != tokens || t->ne[3] != 1)
      found.refuse("{} had {} tokens, had to have {}, all in its dimension 2", name, t->ne[2] * t->ne[3], tokens);
    const bool side_by_side =
        t->nb[0] == sizeof(float) && (t->nb[1] == t->nb[0] * static_cast<std::size_t>(t->ne[0]) || t->ne[1] == 1);
    if (!side_by_side || t->nb[2] % sizeof(float) != 0)
      found.refuse("{} had heads {} bytes apart, had to have them side by side", name, t->nb[1]);
  }
  static void require_numbers(status& found, const char* name, const ggml_tensor* t, index_t tokens) noexcept {
    if (t->type != GGML_TYPE_I32) found.refuse("the type of {} was {}, had to be i32", name, ggml_type_name(t->type));
    if (!ggml_is_contiguous(t) || ggml_nelements(t) != tokens)
      found.refuse("{} had {} elements, had to have one for each token, {}", name, ggml_nelements(t), tokens);
  }

  // Called from C, by all threads of the graph at once, whatever the number of tasks.
  template <bool Attends, bool Appends>
  static void compute(ggml_tensor* out, int thread, int num_threads, void* self) {
    auto& of = *static_cast<ggml_caches*>(self);
    of.team_.compute(thread, num_threads, [&] {
      ggml_tensor** const from = out->src + 2;
      const status found = of.compute_tokens(*out, Attends ? from[0] : nullptr, Appends ? from[Attends] : nullptr,
                                             Appends ? from[Attends + 1] : nullptr);
      if (found) return;
      if constexpr (Attends)
        std::fill_n(static_cast<float*>(out->data), ggml_nelements(out), std::numeric_limits<float>::quiet_NaN());
      if (of.refused_) of.refused_ = found;
    });
  }

  status compute_tokens(ggml_tensor& out, const ggml_tensor* q, const ggml_tensor* k, const ggml_tensor* v) noexcept {
    const auto* positions = static_cast<const std::int32_t*>(out.src[0]->data);
    const auto* of = out.src[1] == out.src[0] ? nullptr : static_cast<const std::int32_t*>(out.src[1]->data);
    const index_t tokens = out.src[0]->ne[0];
    status found;
    // Tokens of one sequence that follow each other.
    for (index_t first = 0, n; first < tokens && found; first += n) {
      for (n = 1; first + n < tokens && positions[first + n] == positions[first + n - 1] + 1 &&
                  (of == nullptr || of[first + n] == of[first]);)
        ++n;
      found = compute_run(
          of == nullptr ? 0 : of[first], positions[first], n, rows(q, first, n), rows(k, first, n), rows(v, first, n),
          q == nullptr ? sinkcache::matrix_view(nullptr, 0, 0)
                       : sinkcache::matrix_view(static_cast<float*>(out.data) + first * out.ne[0] * out.ne[1], n,
                                                out.ne[0] * out.ne[1]),
          q != nullptr, k != nullptr);
    }
    return found;
  }

  status compute_run(std::int32_t sequence, std::int32_t position, index_t n, sinkcache::const_matrix_view q,
                     sinkcache::const_matrix_view k, sinkcache::const_matrix_view v, sinkcache::matrix_view out,
                     bool attends, bool appends) noexcept {
    status found;
    sinkcache::any_kv_cache* const cache = get(sequence);
    if (cache == nullptr) found.refuse("a token's sequence was {}, had to be one whose cache was set", sequence);
    if (!found) return found;
    const index_t at = index_t{position} - sequences_[static_cast<std::size_t>(sequence)].first_position;
    if (appends) {
      if (at < 0 || at > cache->seen())
        found.refuse("a token's position in sequence {} was {}, had to be the next, {}", sequence, position,
                     cache->seen() + position - at);
      else if (at == 0)
        cache->clear();
      else if (at < cache->seen())
        found = cache->try_truncate(at);
      if (!found) return found;
      if (attends && n > 1) return attention_.try_prefill(q, k, v, *cache, out, workspace_);
      found = cache->try_append(k, v);
      if (!attends || !found) return found;
    } else if (at + n != cache->seen()) {
      found.refuse("the newest query's position in sequence {} was {}, had to be that of its newest token, {}",
                   sequence, position + n - 1, cache->seen() - 1 + position - at);
      return found;
    }
    return n == 1 ? attention_.try_decode(q, *cache, out, workspace_)
                  : attention_.try_attend(q, *cache, out, workspace_);
  }

  static sinkcache::const_matrix_view rows(const ggml_tensor* t, index_t first, index_t n) noexcept {
    if (t == nullptr) return {nullptr, 0, 0};
    const auto stride = static_cast<index_t>(t->nb[2] / sizeof(float));
    return {static_cast<const float*>(t->data) + first * stride, n, t->ne[0] * t->ne[1], stride};
  }

  struct sequence_cache {
    std::unique_ptr<sinkcache::any_kv_cache> cache;
    std::int32_t first_position = 0;
  };

  sinkcache::attention attention_;
  ggml_team& team_;
  sinkcache::workspace& workspace_;
  std::vector<sequence_cache> sequences_;
  status refused_;
};
