#pragma once

// Scorers that look at what queries give tokens, or at nothing. Higher scores stay; formulas are those of the authors'
// code, parameters have the authors' defaults. (key_policies.hpp has those that look at keys and values.)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "detail/macros_off.hpp"
#include "scorer.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

namespace detail {

// The largest of the `kernel` scores around each of the first n, in stream order; `out` must not be `in`. Pinned rows
// lend theirs to their neighbours only if they may.
inline void max_pool(std::span<const float> in, index_t n, index_t kernel, std::span<const std::uint8_t> pinned,
                     bool lend_pinned, std::span<float> out) noexcept {
  for (index_t i = 0; i < n; ++i) {
    const index_t from = std::max<index_t>(0, i - kernel / 2), to = std::min(n, i + kernel / 2 + 1);
    float most = in[static_cast<std::size_t>(i)];
    for (index_t j = from; j < to; ++j)
      if (lend_pinned || pinned[static_cast<std::size_t>(j)] == 0)
        most = std::max(most, in[static_cast<std::size_t>(j)]);
    out[static_cast<std::size_t>(i)] = most;
  }
}

// The mean of the `kernel` scores around each of the first n; zeros beyond the ends count.
inline void average_pool(std::span<const float> in, index_t n, index_t kernel, std::span<float> out) noexcept {
  for (index_t i = 0; i < n; ++i) {
    double sum = 0;
    for (index_t j = std::max<index_t>(0, i - kernel / 2); j < std::min(n, i + kernel / 2 + 1); ++j)
      sum += static_cast<double>(in[static_cast<std::size_t>(j)]);
    out[static_cast<std::size_t>(i)] = static_cast<float>(sum / static_cast<double>(kernel));
  }
}

inline void require_kernel(status& found, index_t kernel) noexcept {
  found.require(kernel >= 1 && kernel % 2 == 1, "kernel", kernel, "odd and at least 1");
}

// The mean over the window's queries of the softmax of their logits over the rows before the window: no sink, no
// window in the denominator. Weights are logits here.
inline void mean_softmax(const scored_head& of, index_t n, std::span<float> out) noexcept {
  std::fill_n(out.begin(), n, 0.f);
  for (index_t w = 0; w < of.window; ++w) {
    float most = -std::numeric_limits<float>::infinity();
    for (index_t i = 0; i < n; ++i) most = std::max(most, of.weight(w, i));
    double sum = 0;
    for (index_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(of.weight(w, i) - most));
    const double scale = 1 / (sum * static_cast<double>(of.window));
    for (index_t i = 0; i < n; ++i)
      out[static_cast<std::size_t>(i)] +=
          static_cast<float>(std::exp(static_cast<double>(of.weight(w, i) - most)) * scale);
  }
}

// The mean over the window's queries of what they gave each of the first n rows.
inline void mean_weight(const scored_head& of, index_t n, std::span<float> out) noexcept {
  for (index_t i = 0; i < n; ++i) {
    double sum = 0;
    for (index_t w = 0; w < of.window; ++w) sum += static_cast<double>(of.weight(w, i));
    out[static_cast<std::size_t>(i)] = static_cast<float>(sum / static_cast<double>(std::max<index_t>(1, of.window)));
  }
}

}  // namespace detail

namespace policies {

// Chance, for comparison. A number for each token at each event, or one for its life, which samples the stream evenly.
// It depends on the seed, the layer, the KV head, the position and the event alone.
struct random final : token_scorer {
  std::uint64_t seed = 0, layer = 0;
  bool draw_once = false;

  random() = default;
  explicit random(std::uint64_t of_seed, std::uint64_t of_layer = 0, bool once = false)
      : seed(of_seed), layer(of_layer), draw_once(once) {}

  // SplitMix64 (Steele et al. 2014) of all of them, one after the other; 24 bits of it, from 0 to 1.
  static float draw(std::uint64_t seed, std::uint64_t layer, index_t kv_head, position_t seen,
                    position_t position) noexcept {
    std::uint64_t x = 0;
    for (const std::uint64_t part : {seed, layer, static_cast<std::uint64_t>(kv_head), static_cast<std::uint64_t>(seen),
                                     static_cast<std::uint64_t>(position)}) {
      x += part + 0x9e3779b97f4a7c15u;
      x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
      x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
      x ^= x >> 31;
    }
    return static_cast<float>(x >> 40) * 0x1p-24f;
  }

  scorer_needs needs() const noexcept override { return {}; }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    for (std::size_t i = 0; i < scores.size(); ++i)
      scores[i] = draw(seed, layer, head.kv_head, draw_once ? 0 : head.seen, head.at[i]);
  }
  std::string_view name() const noexcept override { return "random"; }
};

// What all queries since gave a token, its own included (H2O, Zhang et al. 2023, arXiv 2306.14048, section 4.2); or
// that divided by how long it has been there.
struct h2o final : token_scorer {
  bool lifetime = false;

  h2o() = default;
  explicit h2o(bool by_lifetime) : lifetime(by_lifetime) {}

  scorer_needs needs() const noexcept override { return {.sums = true, .compares_heads = true}; }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    for (std::size_t i = 0; i < scores.size(); ++i)
      scores[i] = static_cast<float>(head.sums[i] / (lifetime ? static_cast<double>(head.seen - head.at[i]) : 1));
  }
  std::string_view name() const noexcept override { return "h2o"; }
};

// What the event's last query gave a token, over all query heads of the layer: one set for all (TOVA, Oren et al. 2024,
// arXiv 2401.06104, section 3.2).
struct tova final : token_scorer {
  scorer_needs needs() const noexcept override { return {.last_query = true, .one_set = true}; }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    for (index_t i = 0; i < head.rows; ++i) scores[static_cast<std::size_t>(i)] = head.weight(0, i);
  }
  std::string_view name() const noexcept override { return "tova"; }
};

// What the newest `window` queries gave a token or its neighbours (SnapKV, Li et al. 2024, arXiv 2404.14469, section
// 4.2, in the decoding form of R-KV's repository); rkv_form: of the largest logit of a group, the window and the sink
// left out of the softmax, as there. A pinned sink lends its weight to its neighbours unless told otherwise.
struct snapkv final : token_scorer {
  index_t window = 8, kernel = 7;
  bool rkv_form = false, pool_pinned = true, average = false;  // average: pools as SnapKV's own code does

  snapkv() = default;
  explicit snapkv(index_t of_window, index_t of_kernel = 7, bool as_rkv = false, bool pools_pinned = true,
                  bool by_average = false)
      : window(of_window), kernel(of_kernel), rkv_form(as_rkv), pool_pinned(pools_pinned), average(by_average) {}

  scorer_needs needs() const noexcept override {
    return {.window = window,
            .group = rkv_form ? scorer_needs::over_group::max_logits : scorer_needs::over_group::mean,
            .together = !rkv_form,
            .compares_heads = true};
  }
  index_t scratch_floats(const scored_sizes& of) const noexcept override { return of.rows; }
  void require(status& found, const kv_geometry&, index_t, index_t) const noexcept override {
    found.require(window >= 1, "window", window, "at least 1");
    detail::require_kernel(found, kernel);
  }
  void score(const scored_head& head, std::span<float> scores) const noexcept override {
    const index_t n = head.rows - head.window;
    if (rkv_form)
      detail::mean_softmax(head, n, head.scratch);
    else
      for (index_t i = 0; i < n; ++i) head.scratch[static_cast<std::size_t>(i)] = head.weight(0, i);
    std::fill(scores.begin() + n, scores.end(), 0.f);
    if (average)
      detail::average_pool(head.scratch, n, kernel, scores);
    else
      detail::max_pool(head.scratch, n, kernel, head.pinned, pool_pinned, scores);
  }
  std::string_view name() const noexcept override { return "snapkv"; }
};

}  // namespace policies
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
