#pragma once

// The mathematics, on one page. A sink is a virtual key whose value is zero. Attention over any set of tokens is a
// state {m, d, o}: a bound on the logits, the sum of exp(logit - m), and the sum of exp(logit - m) * value. States
// merge; the identity is {-inf, 0, 0}; `finish` merges the sink once, as one more state {sink, 1, 0}, and divides by d.
// So tiles, threads, caches and ranks make partial states and never see the sink.
//
// m is kept in base 2, logit * log2(e): the factor disappears into the query's scale. It is the largest logit rounded
// up to a whole number, so that bringing a state to another m multiplies by a power of two, which rounds nothing.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "detail/macros_off.hpp"
#include "detail/simd.hpp"
#include "matrix.hpp"
#include "status.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

// What stands in the softmax's denominator beside the visible tokens. A moved-from variant can be assigned to;
// everything else refuses it.
class softmax_variant {
 public:
  softmax_variant(const softmax_variant&) = default;
  softmax_variant& operator=(const softmax_variant&) = default;
  softmax_variant(softmax_variant&& from) noexcept
      : sink_(std::exchange(from.sink_, moved_from)), logits_(std::move(from.logits_)) {}
  softmax_variant& operator=(softmax_variant&& from) noexcept {
    logits_ = std::move(from.logits_);
    sink_ = std::exchange(from.sink_, moved_from);
    return *this;
  }

  static softmax_variant standard() { return softmax_variant(-std::numeric_limits<float>::infinity()); }

  // +1 in the denominator: a sink logit of 0 in every head (Miller 2023, "Attention Is Off By One").
  static softmax_variant softmax1() { return softmax_variant(0.f); }

  // One learned logit per query head (gpt-oss), copied. Not scaled, capped or masked; -inf means none, ln(n) softmax_n.
  static softmax_variant sink_logits(std::span<const float> logits) {
    validate(logits).or_fail();
    softmax_variant variant(0.f);
    variant.logits_.assign(logits.begin(), logits.end());
    return variant;
  }

  static std::optional<softmax_variant> try_sink_logits(std::span<const float> logits, status& found) noexcept {
    found = validate(logits);
    return detail::created(found, "sink logits", [&] { return sink_logits(logits); });
  }

  // Whether sink_logits takes these.
  static status validate(std::span<const float> logits) noexcept {
    status found;
    found.require(!logits.empty(), "sink_logits.size()", logits.size(), "one per query head");
    for (float logit : logits)
      found.require(logit < std::numeric_limits<float>::infinity(), "a sink logit", logit, "below infinity");
    return found;
  }

  float sink(index_t head) const { return logits_.empty() ? sink_ : logits_[static_cast<std::size_t>(head)]; }
  index_t num_sink_logits() const { return static_cast<index_t>(logits_.size()); }  // 0: the same for every head

  // Adds to `found` that this was moved from, if so.
  void require_given(status& found) const noexcept {
    found.require(sink_ == sink_, "softmax", "moved from", "one that was not");
  }

 private:
  static constexpr float moved_from = std::numeric_limits<float>::quiet_NaN();

  explicit softmax_variant(float sink) : sink_(sink) {}

  float sink_;
  std::vector<float> logits_;
};

namespace detail {

class schedule;

inline constexpr float log2_e = std::numbers::log2e_v<float>;
inline constexpr float no_logit = -std::numeric_limits<float>::infinity();

// States of several rows in somebody's memory: m and d [rows], o [rows, o_stride].
struct states {
  float *m, *d, *o;
  index_t o_stride;

  states from_row(index_t i) const { return {m + i, d + i, o + i * o_stride, o_stride}; }

  void clear(index_t rows, float bound = no_logit) const noexcept {
    std::fill_n(m, rows, bound);
    std::fill_n(d, rows, 0.f);
    std::fill_n(o, rows * o_stride, 0.f);
  }
};

// The factor that brings what was summed relative to `m` to a new maximum `to`.
inline float rescale(float m, float to) noexcept { return m == to ? 1.f : exp2_nonpositive(m - to); }

// Brings both to m, which is at least that of each.
inline void merge_state(const states& into, const states& from, index_t dim, float m) noexcept {
  const float a = rescale(*into.m, m), b = rescale(*from.m, m);
  *into.m = m;
  *into.d = *into.d * a + *from.d * b;
  for_each_index(dim, [&](index_t i) { into.o[i] = into.o[i] * a + from.o[i] * b; });
}
inline void merge_state(const states& into, const states& from, index_t dim) noexcept {
  merge_state(into, from, dim, *from.m > *into.m ? *from.m : *into.m);
}

// With m this far above the logits, sums that would not fit do: those of 2^32 tokens.
inline constexpr float headroom = 32;

inline void copy_state(const states& into, const states& from, index_t dim) noexcept {
  *into.m = *from.m;
  *into.d = *from.d;
  std::copy_n(from.o, dim, into.o);
}

// What `finish` finds beside the output: lse, the natural logarithm of the denominator, the sink included, the
// normalised weight of a logit that equals the state's m, and whether all of the output is finite.
struct finished {
  float lse, weight;
  bool finite;
};

// Nothing visible and no sink: zeros, lse -inf.
inline finished finish_state(const states& state, float sink, index_t dim, float* out) noexcept {
  // In double: where the sink rules, lse is the sink to the last bit.
  const double sink2 = static_cast<double>(sink) * std::numbers::log2e, state_m = static_cast<double>(*state.m);
  const double m = sink2 > state_m ? sink2 : state_m;
  const auto scale_of = [&](double from) { return from == m ? 1.f : exp2_nonpositive(static_cast<float>(from - m)); };
  const float scale = scale_of(state_m);
  const double d = static_cast<double>(*state.d) * static_cast<double>(scale) +
                   (sink == no_logit ? 0 : static_cast<double>(scale_of(sink2)));
  if (d == 0) {
    std::fill_n(out, dim, 0.f);
    return {no_logit, 0.f, true};
  }
  const auto weight = static_cast<float>(static_cast<double>(scale) / d);
  for_each_index(dim, [&](index_t i) { out[i] = state.o[i] * weight; });
  const auto lse = static_cast<float>((m + std::log2(d)) * std::numbers::ln2);
  if (all_finite(out, dim)) return {lse, weight, true};
  // What is finite is at most the largest value; rounding alone makes it more.
  constexpr float largest = std::numeric_limits<float>::max();
  for (index_t i = 0; i < dim; ++i)
    if (std::isfinite(state.o[i])) out[i] = std::clamp(out[i], -largest, largest);
  return {lse, weight, all_finite(out, dim)};
}

}  // namespace detail

// What `finish` returns: out [1, v_head_dim], and lse, natural, the sink included.
struct attention_output {
  matrix out;
  float lse;
};

// A partial result of attention for one query token: [num_heads, v_head_dim + 2] floats, m, d, o per head. Split the
// tokens as you like, over caches or machines, attend to each part, merge in any order, finish once. One that was moved
// from has no heads, and can be assigned to.
class attention_state {
 public:
  attention_state(index_t num_heads, index_t v_head_dim) : num_heads_(num_heads), v_head_dim_(v_head_dim) {
    validate(num_heads, v_head_dim).or_fail();
    floats_.resize(static_cast<std::size_t>(num_heads * stride()));
    clear();
  }
  static std::optional<attention_state> try_create(index_t num_heads, index_t v_head_dim, status& found) noexcept {
    found = validate(num_heads, v_head_dim);
    return detail::created(found, "an attention_state", [&] { return attention_state(num_heads, v_head_dim); });
  }
  static status validate(index_t num_heads, index_t v_head_dim) noexcept {
    status found;
    found.require(num_heads >= 1, "num_heads", num_heads, "at least 1");
    found.require(v_head_dim >= 1 && v_head_dim <= max_head_dim, "v_head_dim", v_head_dim, "from 1 to", max_head_dim);
    if (!found) return found;
    const index_t floats = detail::checked_product(found, "num_heads * v_head_dim", num_heads, v_head_dim + 2);
    detail::checked_product(found, "bytes of the state", floats, sizeof(float));
    return found;
  }

  attention_state(const attention_state&) = default;
  attention_state& operator=(const attention_state&) = default;
  attention_state(attention_state&& from) noexcept
      : num_heads_(std::exchange(from.num_heads_, 0)),
        v_head_dim_(std::exchange(from.v_head_dim_, 0)),
        floats_(std::move(from.floats_)) {}
  attention_state& operator=(attention_state&& from) noexcept {
    floats_ = std::move(from.floats_);
    num_heads_ = std::exchange(from.num_heads_, 0);
    v_head_dim_ = std::exchange(from.v_head_dim_, 0);
    return *this;
  }

  // Back to the identity: nothing seen yet.
  void clear() noexcept {
    for (index_t head = 0; head < num_heads_; ++head) row(head).clear(1);
  }

  void merge(const attention_state& other) { try_merge(other).or_fail(); }
  status try_merge(const attention_state& other) noexcept {
    status found;
    require_heads(found);
    found.require(other.num_heads_ == num_heads_, "other.num_heads()", other.num_heads_, "exactly", num_heads_);
    found.require(other.v_head_dim_ == v_head_dim_, "other.v_head_dim()", other.v_head_dim_, "exactly", v_head_dim_);
    for (index_t head = 0; head < num_heads_ && found; ++head)
      merge(head, const_cast<attention_state&>(other).row(head));
    return found;
  }

  // The head's output into `out`, v_head_dim floats; returns its lse. The state is left as it is.
  float finish(const softmax_variant& variant, index_t head, std::span<float> out) const {
    float lse = 0;
    try_finish(variant, head, out, lse).or_fail();
    return lse;
  }
  status try_finish(const softmax_variant& variant, index_t head, std::span<float> out, float& lse) const noexcept {
    status found;
    require_heads(found);
    variant.require_given(found);
    found.require(static_cast<index_t>(out.size()) == v_head_dim_, "out.size()", out.size(), "exactly", v_head_dim_);
    found.require(head >= 0 && head < num_heads_, "head", head, "from 0 to below", num_heads_);
    const index_t sinks = variant.num_sink_logits();
    found.require(sinks == 0 || sinks == num_heads_, "sink_logits.size()", sinks, "exactly", num_heads_);
    if (found)
      lse = detail::finish_state(const_cast<attention_state*>(this)->row(head), variant.sink(head), v_head_dim_,
                                 out.data())
                .lse;
    return found;
  }
  attention_output finish(const softmax_variant& variant, index_t head) const {
    attention_output result{matrix(1, v_head_dim_), 0.f};
    result.lse = finish(variant, head, {result.out.data(), static_cast<std::size_t>(v_head_dim_)});
    return result;
  }

  index_t num_heads() const { return num_heads_; }
  index_t v_head_dim() const { return v_head_dim_; }

  // [num_heads, v_head_dim + 2], to send or reduce elsewhere: m (in base 2), d, then o.
  std::span<float> data() { return floats_; }
  std::span<const float> data() const { return floats_; }

 private:
  friend class detail::schedule;

  void require_heads(status& found) const noexcept {
    found.require(num_heads_ > 0, "the state", "moved from", "one that has heads");
  }

  void merge(index_t head, const detail::states& from) noexcept {
    const detail::states into = row(head);
    const auto bound = [&](const detail::states& of) {  // under which sums of both fit
      const bool large =
          std::any_of(of.o, of.o + v_head_dim_, [](float x) { return std::isfinite(x) && std::abs(x) >= 0x1p126f; });
      return large ? *of.m + detail::headroom : *of.m;
    };
    detail::merge_state(into, from, v_head_dim_, std::max(bound(into), bound(from)));
  }

  index_t stride() const { return v_head_dim_ + 2; }
  detail::states row(index_t head) {
    float* const at = floats_.data() + head * stride();
    return {at, at + 1, at + 2, v_head_dim_};
  }

  index_t num_heads_, v_head_dim_;
  std::vector<float> floats_;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
