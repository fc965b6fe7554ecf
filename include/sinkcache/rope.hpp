#pragma once

// Rotary positions (Su et al. 2021, arXiv 2104.09864) that stay exact at any position.
//
// Phases are 64-bit fixed-point turns, phase = position * turns_per_position, and wrap as unsigned integers do: the
// phase between two positions depends on their distance alone, be they 5 or 2^62. The quadrant is taken off in
// integers, only what is left goes to sine and cosine.

#include <array>
#include <bit>
#include <cmath>
#include <span>

#include "config.hpp"

namespace sinkcache::inline SINKCACHE_TAG {

enum class rope_pairing {
  half_split,  // dimension i turns with i + width / 2 (GPT-NeoX, HF Llama, gpt-oss)
  interleaved  // dimension 2i turns with 2i + 1 (the paper, llama2.c, GPT-J)
};

// How queries and keys turn with their position. A value of about 2 KB.
class rope {
 public:
  static constexpr index_t max_pairs = max_head_dim / 2;

  // Cosines and sines for one position, one per pair.
  struct angles {
    alignas(64) float cos[max_pairs];
    alignas(64) float sin[max_pairs];
  };

  // The model's own `inv_freq`, in radians per position, each from 0 to 2^32: recomputing it elsewhere, in another
  // precision, is 0.1 rad off at four million tokens. The first 2 * inv_freq.size() dimensions of a head turn, the
  // others pass. `attention_factor` (YaRN) scales the turned dimensions of both q and k.
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

  // Nothing turns: models without positions (NoPE), or with ALiBi.
  static rope none() { return rope(std::span<const float>()); }

  // inv_freq[i] = theta^(-2i / head_dim), computed in double and rounded to float, as the models hold it.
  static rope plain(index_t head_dim, double theta) {
    detail::check(head_dim >= 2 && head_dim <= max_head_dim && head_dim % 2 == 0, "head_dim", head_dim,
                  "even and from 2 to", max_head_dim);
    detail::check(std::isfinite(theta) && theta >= 1, "theta", theta, "finite and at least 1");
    std::array<float, max_pairs> inv_freq{};
    const index_t pairs = head_dim / 2;
    for (index_t i = 0; i < pairs; ++i)
      inv_freq[static_cast<std::size_t>(i)] =
          static_cast<float>(1 / std::pow(theta, static_cast<double>(2 * i) / static_cast<double>(head_dim)));
    return rope(std::span<const float>(inv_freq.data(), static_cast<std::size_t>(pairs)));
  }

  index_t width() const { return 2 * pairs_; }  // dimensions that turn

  // The angles of `position`; `scaled` says whether they carry the attention factor. Each within 1e-7.
  void angles_at(position_t position, bool scaled, angles& out) const noexcept {
    const float factor = scaled ? attention_factor_ : 1.f;
    for (index_t i = 0; i < pairs_; ++i) {
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
    }
  }

  // Turns one row of a head, `dim` floats; `to` may be `from`.
  void turn(const angles& by, const float* from, index_t dim, float* to) const noexcept {
    const index_t apart = pairing_ == rope_pairing::half_split ? pairs_ : 1;
    const index_t step = pairing_ == rope_pairing::half_split ? 1 : 2;
    for (index_t i = 0; i < pairs_; ++i) {
      const float a = from[i * step], b = from[i * step + apart];
      to[i * step] = a * by.cos[i] - b * by.sin[i];
      to[i * step + apart] = b * by.cos[i] + a * by.sin[i];
    }
    for (index_t i = width(); i < dim; ++i) to[i] = from[i];
  }

 private:
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

}  // namespace sinkcache::inline SINKCACHE_TAG
