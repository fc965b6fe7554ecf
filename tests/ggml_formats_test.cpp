// Rows as ggml lays them out, against its rules in plain words, and read in place by views.

#include <fmt/format.h>
#include <sinkcache/sinkcache.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

#include "catch.hpp"
#include "effort.hpp"
#include "oracle.hpp"
#include "plain_format.hpp"
#include "random_case.hpp"

namespace proof {
namespace {

// What a block's codes mean.
template <class F>
std::vector<double> plain_values(const std::byte* block) {
  std::vector<double> values(32);
  const double d = plain::element<f16>(block, 0);
  for (int i = 0; i < 32; ++i) {
    if (F::unit_bytes == 34) {
      const int code = static_cast<int>(block[2 + i]);
      values[as_size(i)] = d * (code < 128 ? code : code - 256);
    } else {
      const int byte = static_cast<int>(block[2 + i % 16]);
      values[as_size(i)] = d * ((i < 16 ? byte % 16 : byte / 16) - 8);
    }
  }
  return values;
}

template <class F>
void check_rows() {
  effort::dice dice(41);
  for (int i = 0; i < effort::cases(300); ++i) {
    const index_t dim = dice.one_in(2) ? 32 * dice.from_to(1, 18) : dice.from_to(1, 200);
    std::vector<float> row(as_size(dim)), decoded(as_size(dim));
    for (float& x : row) x = static_cast<float>(normal(dice));
    if (dice.one_in(10)) row.assign(row.size(), 0.f);
    std::vector<std::byte> bytes(as_size(F::block_bytes(dim)));
    F::encode(row.data(), dim, bytes.data());
    F::decode(bytes.data(), 0, dim, decoded.data());
    for (index_t d = 0; d < dim; ++d) {
      const std::byte* const block = bytes.data() + d / 32 * F::unit_bytes;
      REQUIRE(static_cast<double>(decoded[as_size(d)]) == plain_values<F>(block)[as_size(d % 32)]);
      // Half a step, one at the end that has no code; and what the scale was rounded by.
      const double step = std::abs(plain::element<f16>(block, 0));
      const double steps = F::unit_bytes == 34 ? 0.5 : 1;
      REQUIRE(std::abs(static_cast<double>(decoded[as_size(d)] - row[as_size(d)])) <= step * (steps + 0.07) + 1e-7);
    }
  }
}

TEST_CASE("ggml's rows: q8_0 and q4_0 mean what ggml says") {
  static_assert(q8_0::block_bytes(64) == 68 && q4_0::block_bytes(64) == 36);
  check_rows<q8_0>();
  check_rows<q4_0>();
  // ggml's own rule on numbers that are easy: d = 127 / 127 = 1; d = -8 / -8 = 1.
  std::vector<float> row(32, 0.f);
  row[0] = 127, row[1] = -3.4f, row[31] = 2.6f;
  std::byte block[34];
  q8_0::encode(row.data(), 32, block);
  CHECK(block[0] == std::byte{0x00});
  CHECK(block[1] == std::byte{0x3c});
  CHECK(block[2] == std::byte{127});
  CHECK(block[3] == std::byte{0xfd});
  CHECK(block[33] == std::byte{3});
  row[0] = -8;
  q4_0::encode(row.data(), 32, block);
  CHECK(block[1] == std::byte{0x3c});
  CHECK(block[2] == std::byte{0x80});
  CHECK(block[3] == std::byte{0x85});
  CHECK(block[17] == std::byte{0xb8});
}

template <class F>
void check_view() {
  constexpr index_t heads = 2, dim = 64, tokens = 90, group = 3;
  effort::dice dice(42);
  // llama.cpp's cells: [tokens, heads * dim], and a page table over the same memory.
  const index_t row_bytes = F::block_bytes(dim);
  std::vector<std::byte> k(as_size(tokens * heads * row_bytes)), v(k.size());
  std::vector<float> keys(as_size(tokens * heads * dim)), values(keys.size());
  for (std::vector<std::byte>* store : {&k, &v})
    for (index_t i = 0; i < tokens * heads; ++i) {
      std::vector<float> row(dim);
      for (float& x : row) x = static_cast<float>(normal(dice));
      F::encode(row.data(), dim, store->data() + i * row_bytes);
      F::decode(store->data() + i * row_bytes, 0, dim, (store == &k ? keys : values).data() + i * dim);
    }
  const cache_config config{.num_kv_heads = heads,
                            .head_dim = dim,
                            .num_sink_tokens = 3,
                            .window = 40,
                            .positions = positions::absolute,
                            .inputs = inputs::rotated};
  const kv_layout layout{{dim, heads * dim}, {dim, heads * dim}};
  kv_view<F> view(config, layout);
  view.assign(kv_piece{.tokens = tokens, .k = k.data(), .v = v.data()}, tokens);
  matrix q(1, heads * group * dim), out(1, heads * group * dim), paged(1, heads * group * dim);
  for (index_t i = 0; i < q.size(); ++i) q.data()[i] = static_cast<float>(normal(dice));
  const attention attention({.num_qo_heads = heads * group});
  workspace w;
  attention.decode(q, view, out, w);
  oracle::layer layer;
  layer.num_qo_heads = heads * group;
  layer.num_kv_heads = heads;
  layer.head_dim = layer.v_head_dim = dim;
  layer.in_cache = false;
  layer.q_rotated = true;
  layer.sm_scale = 1 / std::sqrt(static_cast<double>(dim));
  const auto expected =
      oracle::attend(layer, q.data(), tokens - 1, plain_sink_window(3, 40).visible(tokens), keys.data(), values.data());
  for (index_t head = 0; head < heads * group; ++head)
    for (index_t d = 0; d < dim; ++d) {
      const oracle::answer& e = expected[as_size(head)];
      REQUIRE(std::abs(static_cast<double>(out(0, head * dim + d)) - e.out[as_size(d)]) <=
              16 * u * (1 + e.a) * e.v_max);
    }
  const std::int32_t table[] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
  kv_view<F> pages(config, layout);
  const index_t page = 10 * heads * dim;
  pages.assign(kv_pages{k.data(), v.data(), page, page, 9, 10, table}, tokens);
  attention.decode(q, pages, paged, w);
  CHECK((paged - out).cwiseAbs().maxCoeff() < 1e-5f);
  // Units are whole.
  CHECK(kv_view<F>::validate(config, {{dim, heads * dim, 2}, {dim, heads * dim}}).message() ==
        "sinkcache: layout.k.dim was 2, had to be 1: this format has units of elements");
  CHECK(kv_view<F>::validate(config, {{dim, heads * dim}, {dim, 130}}).message() ==
        "sinkcache: a stride of layout.v, or its head_dim, was 130, had to be a multiple of 32");
  cache_config odd = config;
  odd.head_dim = 80;
  CHECK(!kv_view<F>::validate(odd, {{96, 192}, {96, 192}}));
  CHECK(pages.try_assign(kv_pages{k.data(), v.data(), page, 33, 9, 10, table}, tokens).message() ==
        "sinkcache: v_page was 33, had to be a multiple of 32");
}

TEST_CASE("ggml's rows: a view reads them where they lie") {
  check_view<q8_0>();
  check_view<q4_0>();
}

}  // namespace
}  // namespace proof
