#pragma once

// What the properties of attention are stated with: small layers with numbers chosen by hand, what a random stream
// gives, and how far apart two of these are.

#include <fmt/format.h>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "random_case.hpp"

namespace proof {

// One KV head of `dim`, plain rows, rope::none(): for numbers chosen by hand.
struct small_layer {
  explicit small_layer(index_t dim, index_t num_sink_tokens, index_t window) {
    c.config.num_kv_heads = 1;
    c.config.head_dim = dim;
    c.config.num_sink_tokens = num_sink_tokens;
    c.config.window = window;
    c.config.rope = rope::none();
    c.layer.head_dim = c.layer.v_head_dim = as_size(dim);
    c.layer.sm_scale = 1 / std::sqrt(static_cast<double>(dim));
    set_params(c);
  }
  // Prefills (or appends all but the last row and decodes that) and compares the last row.
  std::string wrong(const matrix& q, const matrix& k, const matrix& v, bool decode) {
    kv_cache<f32> cache(c.config);
    const attention attention(c.params);
    const index_t n = k.rows(), asked = decode ? 1 : q.rows();
    matrix out(asked, v.cols());
    std::vector<float> lse(as_size(asked));
    cache.append(k.topRows(n - asked), v.topRows(n - asked));
    if (decode) cache.append(k.bottomRows(1), v.bottomRows(1));
    if (decode)
      attention.decode(q.bottomRows(1), cache, out, w, {.lse = lse});
    else
      attention.prefill(q, k.bottomRows(asked), v.bottomRows(asked), cache, out, w, {.lse = lse});
    const std::vector<position_t> visible = plain_sink_window(c.config.num_sink_tokens, c.config.window).visible(n);
    return far_from(oracle::attend(c.layer, q.row(q.rows() - 1).data(), n - 1, visible, k.data(), v.data()),
                    out.row(asked - 1).data(), &lse.back());
  }

  random_case c;
  workspace w;
};

// What a stream of tokens gives, fed in chunks drawn from a seed: chunks of one are decoded, longer ones prefilled.
struct outputs {
  matrix out;
  std::vector<float> lse;

  bool same_bits(index_t token, index_t head, const outputs& other) const {
    const index_t heads = static_cast<index_t>(lse.size()) / out.rows(), v_dim = out.cols() / heads;
    const auto same = [](const float* a, const float* b, index_t n) {
      return std::memcmp(a, b, as_size(n) * sizeof(float)) == 0;
    };
    return same(&out(token, head * v_dim), &other.out(token, head * v_dim), v_dim) &&
           same(&lse[as_size(token * heads + head)], &other.lse[as_size(token * heads + head)], 1);
  }
  bool operator==(const outputs& other) const {
    return out.rows() == other.out.rows() && out.cols() == other.out.cols() && lse.size() == other.lse.size() &&
           std::memcmp(out.data(), other.out.data(), as_size(out.size()) * sizeof(float)) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

inline constexpr std::uint64_t decode_only = 0;

inline outputs feed(open_cache& cache, const attention& attention, const tokens& t, std::uint64_t chunks,
                    workspace& w) {
  effort::dice dice(chunks);
  const bool decodes = chunks == decode_only;
  const index_t n = t.q.rows(), heads = attention.params().num_qo_heads;
  outputs all{matrix(n, heads * cache.get().geometry().v_head_dim), std::vector<float>(as_size(n * heads))};
  for (index_t first = 0, size = 0; first < n; first += size) {
    size = std::min<index_t>(n - first,
                             decodes || dice.one_in(2) ? 1 : dice.from_to(2, one_of<index_t>(dice, {4, 30, 200})));
    const matrix q = t.q.middleRows(first, size), k = t.k.middleRows(first, size), v = t.v.middleRows(first, size);
    const extra_outputs lse{.lse = std::span(all.lse).subspan(as_size(first * heads), as_size(size * heads))};
    if (size == 1) {
      cache.append(k, v);
      attention.decode(q, cache.get(), all.out.middleRows(first, 1), w, lse);
    } else {
      attention.prefill(q, k, v, cache.get(), all.out.middleRows(first, size), w, lse);
    }
  }
  return all;
}
inline outputs feed(const random_case& c, const tokens& t, std::uint64_t chunks = 1) {
  workspace w;
  return feed(*make_cache(c.k_format, c.v_format, c.config), attention(c.params), t, chunks * c.seed, w);
}

// A random case for a property, and its tokens: small, but of every eight one is longer than a slice of decode, and two
// may have groups that make panels.
struct property_case {
  explicit property_case(std::uint64_t seed)
      : c(draw_case(seed, seed % 8 == 0   ? limits{.max_head_dim = 16, .max_group = 3, .max_window = 1200}
                          : seed % 8 <= 2 ? limits{.max_head_dim = 24, .max_group = 71, .max_window = 60}
                                          : limits{.max_head_dim = 96, .max_group = 9, .max_window = 60})) {
    if (seed % 8 == 0) {
      c.config.window += 600;
      c.tokens = c.config.window + 100;
    }
    c.config.first_position = std::min<position_t>(c.config.first_position, 1 << 24);
    c.layer.first_position = c.config.first_position;
    draw();
  }
  void draw() {
    effort::dice dice(c.seed + 3);
    t = draw_tokens(c, dice, 0, c.tokens);
  }
  void no_rope() {
    c.layer.inv_freq.clear();
    c.config.rope = rope::none();
  }

  random_case c;
  tokens t;
};

template <class Check>
void for_property_cases(int usual, const Check& check) {
  for (int i = 0; i < effort::cases(usual); ++i) {
    property_case p(50000 + static_cast<std::uint64_t>(i));
    INFO(p.c.name());
    check(p);
  }
}

// Every `step`-th token of both, within twice the bound of each other; keys are stored in whatever format.
inline std::string far_apart(const property_case& p, const outputs& one, const outputs& other, index_t step) {
  oracle::layer layer = p.c.layer;
  layer.k_rotated = layer.q_rotated;
  const plain_policy policy = plain_sink_window(p.c.config.num_sink_tokens, p.c.config.window);
  const index_t heads = p.c.params.num_qo_heads, v_dim = p.c.config.v_head_dim;
  for (index_t i = p.c.tokens - 1; i >= 0; i -= step) {
    const auto exact = oracle::attend(layer, p.t.q.row(i).data(), i, policy.visible(i + 1), p.t.k.data(), p.t.v.data());
    for (index_t head = 0; head < heads; ++head) {
      const oracle::answer& e = exact[as_size(head)];
      const double bound = 1.01 * 2 * 16 * u * (1 + e.a);
      const auto apart = [](float a, float b) { return a == b ? 0 : std::abs(static_cast<double>(a - b)); };
      const std::size_t lse = as_size(i * heads + head);
      bool near = apart(one.lse[lse], other.lse[lse]) <= bound;
      for (index_t d = head * v_dim; d < (head + 1) * v_dim; ++d)
        near &= apart(one.out(i, d), other.out(i, d)) <= bound * e.v_max;
      if (!near) return fmt::format("token {}, head {}", i, head);
    }
  }
  return "";
}

// Unit-normal q, k, v, one KV head and one query head, `n` tokens, all visible.
struct normal_layer {
  normal_layer(std::uint64_t seed, index_t dim, index_t n, bool with_rope) : layer(dim, 0, n) {
    effort::dice dice(seed);
    for (matrix* m : {&q, &k, &v}) {
      m->resize(m == &q ? 1 : n, dim);
      for (index_t i = 0; i < m->size(); ++i) m->data()[i] = static_cast<float>(normal(dice));
    }
    if (with_rope) {
      for (index_t i = 0; i < dim / 2; ++i)
        layer.c.layer.inv_freq.push_back(
            static_cast<float>(std::pow(10000., -2 * static_cast<double>(i) / static_cast<double>(dim))));
      layer.c.config.rope.emplace(layer.c.layer.inv_freq);
      layer.c.layer.k_rotated = false;
    }
    for (index_t i = 0; i < n; ++i) visible.push_back(i);
  }
  // Output of the newest token's decode.
  matrix decode() {
    kv_cache<f32> cache(layer.c.config);
    matrix out(1, v.cols());
    cache.append(k, v);
    attention(layer.c.params).decode(q, cache, out, layer.w);
    return out;
  }
  oracle::answer exact() const {
    return oracle::attend(layer.c.layer, q.data(), k.rows() - 1, visible, k.data(), v.data())[0];
  }
  oracle::answer naive() const {
    return oracle::attend_naively(layer.c.layer, q.data(), k.rows() - 1, visible, k.data(), v.data())[0];
  }

  small_layer layer;
  matrix q, k, v;
  std::vector<position_t> visible;
};

template <class Row>
double distance(const Row& from, const std::vector<double>& to) {
  double sum = 0;
  for (std::size_t i = 0; i < to.size(); ++i) {
    const double error = static_cast<double>(from[i]) - to[i];
    sum += error * error;
  }
  return std::sqrt(sum);
}

}  // namespace proof
