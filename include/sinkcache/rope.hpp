#pragma once

// Rotary positions (Su et al. 2021, arXiv 2104.09864) that stay exact at any position.
//
// Phases are 64-bit fixed-point turns, phase = position * turns_per_position, and wrap as unsigned integers do: the
// phase between two positions depends on their distance alone, be they 5 or 2^62. The quadrant is taken off in
// integers, only what is left goes to sine and cosine.
//
// Where the engine has rotated the rows itself (inputs::rotated), only gaps are rotated here, exactly. The rounding of
// its own angles stays, and grows with the position if they are float32: docs/rope.md says how far.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numbers>
#include <optional>
#include <span>

#include "detail/macros_off.hpp"
#include "detail/simd.hpp"
#include "status.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

enum class rope_pairing {
  half_split,  // dimension i is rotated with i + width / 2 (GPT-NeoX, HF Llama, gpt-oss)
  interleaved  // dimension 2i is rotated with 2i + 1 (the paper, llama2.c, GPT-J)
};

// How queries and keys are rotated by their position. About 2 KB, copied by value.
class rope {
 public:
  static constexpr index_t max_pairs = 256;

  // Cosines and sines for one position, one per pair.
  struct angles {
    alignas(64) float cos[max_pairs];
    alignas(64) float sin[max_pairs];
  };

  // The model's own `inv_freq`, in radians per position, each from 0 to 2^32: recomputing it elsewhere, in another
  // precision, is 0.1 rad off at four million tokens. The first 2 * inv_freq.size() dimensions of a head are rotated,
  // the others pass. `attention_factor` (YaRN) scales the rotated dimensions of both q and k.
  explicit rope(std::span<const float> inv_freq, rope_pairing pairing = rope_pairing::half_split,
                float attention_factor = 1)
      : pairs_(static_cast<index_t>(inv_freq.size())), pairing_(pairing), attention_factor_(attention_factor) {
    validate(inv_freq, attention_factor).or_fail();
    for (std::size_t i = 0; i < inv_freq.size(); ++i) turns_per_position_[i] = turns(inv_freq[i]);
  }

  // Whether the constructor takes these.
  static status validate(std::span<const float> inv_freq, float attention_factor = 1) noexcept {
    status found;
    found.require(inv_freq.size() <= static_cast<std::size_t>(max_pairs), "inv_freq.size()", inv_freq.size(), "at most",
                  max_pairs);
    found.require(std::isfinite(attention_factor) && attention_factor > 0, "attention_factor", attention_factor,
                  "finite and above 0");
    for (const float f : inv_freq) found.require(f >= 0 && f <= 0x1p32f, "an inv_freq", f, "from 0 to 2^32");
    return found;
  }

  // The same, or nothing and in `found` why. All factories below have such a twin.
  static std::optional<rope> try_create(std::span<const float> inv_freq, status& found,
                                        rope_pairing pairing = rope_pairing::half_split,
                                        float attention_factor = 1) noexcept {
    found = validate(inv_freq, attention_factor);
    std::optional<rope> result;
    if (found) result = rope(inv_freq, pairing, attention_factor);
    return result;
  }

  // Nothing is rotated: models without positions (NoPE), or with ALiBi.
  static rope none() { return rope(std::span<const float>()); }

  // inv_freq[i] = theta^(-2i / width), computed in double and rounded once. `width` is how many dimensions of a head
  // are rotated, here and below: head_dim, or head_dim * partial_rotary_factor.
  static rope plain(index_t width, double theta, rope_pairing pairing = rope_pairing::half_split) {
    return checked([&](status& found) { return try_plain(width, theta, found, pairing); });
  }
  static std::optional<rope> try_plain(index_t width, double theta, status& found,
                                       rope_pairing pairing = rope_pairing::half_split) noexcept {
    found = status();
    require_width(found, width);
    found.require(std::isfinite(theta) && theta >= 1, "theta", theta, "finite and at least 1");
    return of_pairs(found, width, pairing, 1, [&](index_t i) {
      return rounded(1 / std::pow(theta, static_cast<double>(2 * i) / static_cast<double>(width)));
    });
  }

  // The scalings of Hugging Face's config.json, with the numbers that it gives, in the same float32 operations, each
  // correctly rounded: the bits of the model's own inv_freq, but where the pow that computed those was not
  // (docs/rope.md).

  // Positions count as 1 / factor. A factor of 1 is HF's "default".
  static rope linear(index_t width, double theta, double factor, rope_pairing pairing = rope_pairing::half_split) {
    return checked([&](status& found) { return try_linear(width, theta, factor, found, pairing); });
  }
  static std::optional<rope> try_linear(index_t width, double theta, double factor, status& found,
                                        rope_pairing pairing = rope_pairing::half_split) noexcept {
    found = status();
    require_scaling(found, width, theta, factor);
    return of_pairs(found, width, pairing, 1,
                    [&](index_t i) { return divided(inverse(power(width, theta, i)), factor); });
  }

  // Llama 3.1: pairs that turn fewer than low_freq_factor times in the original context are slowed down by factor,
  // those that turn more than high_freq_factor times stay as they are, and in between it is interpolated.
  struct llama3_scaling {
    double factor = 0, low_freq_factor = 0, high_freq_factor = 0, original_max_position_embeddings = 0;
  };
  static rope llama3(index_t width, double theta, const llama3_scaling& by,
                     rope_pairing pairing = rope_pairing::half_split) {
    return checked([&](status& found) { return try_llama3(width, theta, by, found, pairing); });
  }
  static std::optional<rope> try_llama3(index_t width, double theta, const llama3_scaling& by, status& found,
                                        rope_pairing pairing = rope_pairing::half_split) noexcept {
    const double low = by.low_freq_factor, high = by.high_freq_factor, original = by.original_max_position_embeddings;
    found = status();
    require_scaling(found, width, theta, by.factor);
    require_original(found, original);
    found.require(std::isfinite(high), "high_freq_factor", high, "finite");
    found.require(low > 0 && low < high, "low_freq_factor", low, "above 0 and below high_freq_factor,", high);
    return of_pairs(found, width, pairing, 1, [&](index_t i) {
      const float inv_freq = inverse(power(width, theta, i));
      const float wavelength = times(inverse(inv_freq), 2 * std::numbers::pi);
      if (wavelength > rounded(original / low)) return divided(inv_freq, by.factor);
      if (wavelength < rounded(original / high)) return inv_freq;
      const float smooth = divided(minus(times(inverse(wavelength), original), low), high - low);
      return plus(divided(times(minus(1, smooth), inv_freq), by.factor), times(smooth, inv_freq));
    });
  }

  // YaRN (Peng et al. 2023, arXiv 2309.00071): as llama3, but interpolated along the pairs, from the one that turns
  // beta_fast times in the original context to the one that turns beta_slow times. gpt-oss has truncate = false.
  struct yarn_scaling {
    double factor = 0, original_max_position_embeddings = 0, beta_fast = 32, beta_slow = 1;
    bool truncate = true;                                   // the ramp starts and ends at whole pairs
    double mscale = 0, mscale_all_dim = 0;                  // 0: not given; only both together have an effect
    std::optional<double> attention_factor = std::nullopt;  // 0.1 ln(factor) + 1, or what the mscales say
  };
  static rope yarn(index_t width, double theta, const yarn_scaling& by,
                   rope_pairing pairing = rope_pairing::half_split) {
    return checked([&](status& found) { return try_yarn(width, theta, by, found, pairing); });
  }
  static std::optional<rope> try_yarn(index_t width, double theta, const yarn_scaling& by, status& found,
                                      rope_pairing pairing = rope_pairing::half_split) noexcept {
    const double original = by.original_max_position_embeddings;
    found = status();
    require_scaling(found, width, theta, by.factor);
    require_original(found, original);
    found.require(theta > 1, "theta", theta, "above 1");
    found.require(by.beta_slow > 0, "beta_slow", by.beta_slow, "above 0");
    found.require(std::isfinite(by.beta_fast) && by.beta_fast > by.beta_slow, "beta_fast", by.beta_fast,
                  "finite and above beta_slow,", by.beta_slow);
    for (double mscale : {by.mscale, by.mscale_all_dim})
      found.require(std::isfinite(mscale) && mscale >= 0, "an mscale", mscale, "finite and at least 0");

    const auto pair_rotation = [&](double times_in_context) {
      return static_cast<double>(width) * std::log(original / (times_in_context * 2 * std::numbers::pi)) /
             (2 * std::log(theta));
    };
    double low = pair_rotation(by.beta_fast), high = pair_rotation(by.beta_slow);
    if (by.truncate) low = std::floor(low), high = std::ceil(high);
    low = std::max(low, 0.), high = std::min(high, static_cast<double>(width - 1));
    found.require(low <= high, "original_max_position_embeddings", original,
                  "such that pairs turn from beta_slow to beta_fast times in it");
    if (low == high) high += 0.001;

    const auto attention_factor = [&](double mscale) { return 0.1 * mscale * std::log(by.factor) + 1; };
    const bool given = by.mscale > 0 && by.mscale_all_dim > 0;
    const double factor =
        given ? attention_factor(by.mscale) / attention_factor(by.mscale_all_dim) : attention_factor(1);
    return of_pairs(found, width, pairing, rounded(by.attention_factor.value_or(factor)), [&](index_t i) {
      const float power_i = power(width, theta, i);
      const float fast = inverse(power_i), slow = inverse(times(power_i, by.factor));
      const float ramp = std::clamp(divided(minus(static_cast<float>(i), low), high - low), 0.f, 1.f);
      const float keep = minus(1, ramp);
      return plus(times(slow, minus(1, keep)), times(fast, keep));
    });
  }

  bool operator==(const rope&) const = default;

  index_t width() const { return 2 * pairs_; }  // dimensions that are rotated
  float attention_factor() const { return attention_factor_; }
  rope_pairing pairing() const { return pairing_; }

  // The angles of `position`; `scaled` says whether they carry the attention factor. Each within 1e-7.
  void angles_at(position_t position, bool scaled, angles& out) const noexcept {
    const float factor = scaled ? attention_factor_ : 1.f;
    detail::for_each_index(pairs_, [&](index_t i) {
      const std::uint64_t phase =
          static_cast<std::uint64_t>(position) * turns_per_position_[static_cast<std::size_t>(i)];
      // A quarter turn is 2^62: round to the nearest one, and keep the signed rest in units of 2^-32 turns.
      const std::uint32_t high = static_cast<std::uint32_t>(phase >> 32);
      const std::uint32_t quadrant = (high + (1u << 29)) >> 30;
      const float x = static_cast<float>(static_cast<std::int32_t>(high - (quadrant << 30))) * 1.4629180792671596e-9f;
      const float x2 = x * x;
      // Minimax over [-pi/4, pi/4], error below 2e-9 before rounding.
      const float s = x + x * x2 * (-0.16666650669f + x2 * (0.00833197866f - x2 * 0.00019495635f));
      const float c = 1.f + x2 * (-0.5f + x2 * (0.04166664687f + x2 * (-0.00138873675f + x2 * 0.00002443845f)));
      const bool swapped = quadrant & 1u;
      const float cos = swapped ? s : c, sin = swapped ? c : s;
      out.cos[i] = ((quadrant + 1) & 2u ? -cos : cos) * factor;
      out.sin[i] = (quadrant & 2u ? -sin : sin) * factor;
    });
  }

  // Rotates one row of a head, `dim` floats; `to` may be `from`.
  void rotate(const angles& by, const float* from, index_t dim, float* to) const noexcept {
    if (pairing_ == rope_pairing::half_split)
      rotate_pairs<1>(by, from, pairs_, to);
    else
      rotate_pairs<2>(by, from, 1, to);
    for (index_t i = width(); i < dim; ++i) to[i] = from[i];
  }
  [[deprecated("its name is rotate now")]] void turn(const angles& by, const float* from, index_t dim,
                                                     float* to) const noexcept {
    rotate(by, from, dim, to);
  }

  // The angles of the ranks 0 to 63, with the attention factor: for keys that are stored as they were before rope, and
  // rotated as they are loaded (kv_part::rank_angles). For each rank sixteen cosines and sixteen sines by turns;
  // fastest at a multiple of 64 bytes.
  static constexpr index_t num_ranks = 64;
  index_t rank_floats() const { return 2 * detail::round_up(pairs_, 16); }  // of one of them
  index_t rank_angles_size() const { return num_ranks * rank_floats(); }
  void rank_angles(std::span<float> to) const {
    detail::check(static_cast<index_t>(to.size()) == rank_angles_size(), "to.size()", to.size(), "exactly",
                  rank_angles_size());
    angles at;
    std::fill(to.begin(), to.end(), 0.f);
    for (index_t rank = 0; rank < num_ranks; ++rank) {
      angles_at(rank, true, at);
      for (index_t i = 0; i < pairs_; ++i) {
        float* const pair = to.data() + rank * rank_floats() + i / 16 * 32 + i % 16;
        pair[0] = at.cos[i], pair[16] = at.sin[i];
      }
    }
  }

 private:
  // Pairs of dimensions that lie `apart`, Step dimensions from pair to pair.
  template <int Step>
  void rotate_pairs(const angles& by, const float* from, index_t apart, float* to) const noexcept {
    // `to` may be `from`, but no pair touches another.
    detail::for_each_index(pairs_, [&](index_t i) {
      const float a = from[i * Step], b = from[i * Step + apart];
      to[i * Step] = multiply_add(a, by.cos[i], -(b * by.sin[i]));
      to[i * Step + apart] = multiply_add(b, by.cos[i], a * by.sin[i]);
    });
  }

  // One float32 operation each; volatile, or compilers contract two of them into one that rounds once.
  static float rounded(double x) {
    volatile float result = static_cast<float>(x);
    return result;
  }
  static float inverse(float x) { return rounded(1 / x); }
  static float times(float a, double b) { return rounded(a * rounded(b)); }
  static float divided(float a, double b) { return rounded(a / rounded(b)); }
  static float plus(float a, float b) { return rounded(a + b); }
  static float minus(float a, double b) { return rounded(a - rounded(b)); }

  // theta^(2i / width) of floats.
  static float power(index_t width, double theta, index_t i) {
    const double exponent = divided(static_cast<float>(2 * i), static_cast<double>(width));
    return rounded(std::pow(static_cast<double>(rounded(theta)), exponent));
  }

  static void require_width(status& found, index_t width) noexcept {
    found.require(width >= 2 && width <= 2 * max_pairs && width % 2 == 0, "width", width, "even and from 2 to",
                  2 * max_pairs);
  }
  static void require_scaling(status& found, index_t width, double theta, double factor) noexcept {
    require_width(found, width);
    found.require(theta >= 1 && theta <= 0x1p64, "theta", theta, "from 1 to 2^64");
    found.require(factor >= 1 && factor <= 0x1p64, "factor", factor, "from 1 to 2^64");
  }
  static void require_original(status& found, double original) noexcept {
    found.require(original >= 1 && original <= 0x1p64, "original_max_position_embeddings", original, "from 1 to 2^64");
  }

  template <class Try>
  static rope checked(const Try& try_make) {
    status found;
    const std::optional<rope> result = try_make(found);
    found.or_fail();
    return *result;
  }

  template <class InvFreq>
  static std::optional<rope> of_pairs(status& found, index_t width, rope_pairing pairing, float attention_factor,
                                      const InvFreq& inv_freq_of) noexcept {
    if (!found) return std::nullopt;
    std::array<float, max_pairs> inv_freq{};
    for (index_t i = 0; i < width / 2; ++i) inv_freq[static_cast<std::size_t>(i)] = inv_freq_of(i);
    return try_create({inv_freq.data(), static_cast<std::size_t>(width / 2)}, found, pairing, attention_factor);
  }

  // a * b + c, the same bits wherever it is inlined: of two products g++ fuses one here and the other there.
  static float multiply_add(float a, float b, float c) noexcept {
#if defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
  }

  // floor(inv_freq * 2^64 / 2 pi) modulo 2^64.
  static std::uint64_t turns(float inv_freq) {
    if (inv_freq == 0) return 0;
    int exponent = 0;
    const auto mantissa = static_cast<std::uint64_t>(std::ldexp(std::frexp(inv_freq, &exponent), 24));
    exponent -= 24;  // inv_freq == mantissa * 2^exponent, mantissa < 2^24
    // mantissa / 2 pi in units of 2^-128, as 64-bit limbs; 1 / 2 pi to 128 bits is 0x28be60db9391054a 7f09d5f47d4d3770.
    __extension__ typedef unsigned __int128 wide;
    const wide low = wide{0x7f09d5f47d4d3770u} * mantissa;
    const wide high = wide{0x28be60db9391054au} * mantissa + (low >> 64);
    const std::uint64_t limb[3] = {static_cast<std::uint64_t>(low), static_cast<std::uint64_t>(high),
                                   static_cast<std::uint64_t>(high >> 64)};
    // The bits of 2^-64 turns start at bit 64 - exponent.
    const int start = 64 - exponent;
    std::uint64_t turns = 0;
    for (int bit = 0; bit < 64; ++bit) {
      const int from = start + bit;
      if (from >= 0 && from < 192) turns |= (limb[from / 64] >> (from % 64) & 1u) << bit;
    }
    return turns;
  }

  std::array<std::uint64_t, max_pairs> turns_per_position_{};
  index_t pairs_;
  rope_pairing pairing_;
  float attention_factor_;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
