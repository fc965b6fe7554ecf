#pragma once

// How a format's rows are read: what the kernel knows of formats.

#include "macros_off.hpp"
#include "rotated_keys.hpp"
#include "tile_dots.hpp"
#include "tile_values.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {
namespace detail {

template <elementwise_format K>
void group_dots(const float* packed, index_t count, index_t dim, tile_rows k, index_t n, tile_rows next,
                float* logits) noexcept {
  in_groups(count, [&]<int Rows>(index_t r, index_t group) {
    dot_products<K, Rows>(packed + r * dim, dim, k, n, next, logits_of(logits, group));
  });
}

template <elementwise_format V>
void group_add(const float* weights, index_t count, tile_rows v, index_t offset, index_t n, index_t dim,
               const running_states& to, tile_rows next) noexcept {
  in_groups<cpu.value_rows>(count, [&]<int Rows>(index_t r, index_t group) {
    const running_states sums = to.from_row(r);
    const float* const of_group = logits_of(const_cast<float*>(weights), group);
    in_strips<Rows>(dim, [&]<int Vectors>(index_t column) {
      add_values<V, Rows, Vectors>(of_group, v, offset, n, column, sums, next);
    });
  });
}

template <kv_format F>
constexpr kv_reader make_reader() {
  if constexpr (in_vectors<F>)
    return {F::block_rows,  F::element_bytes, &F::block_bytes,  &load_rows<F>,         &packed_rows<F>,
            &group_dots<F>, &group_add<F>,    format_name<F>(), &rotated_group_dots<F>};
  else if constexpr (elementwise_format<F>)
    return {F::block_rows,   F::element_bytes, &F::block_bytes, &load_rows<F>,
            &packed_rows<F>, &group_dots<F>,   &group_add<F>,   format_name<F>()};
  else
    return {F::block_rows, 0, &F::block_bytes, &load_rows<F>, nullptr, nullptr, nullptr, format_name<F>()};
}

}  // namespace detail

template <kv_format F>
inline constexpr kv_reader reader_of = detail::make_reader<F>();

namespace detail {

// How rows of one format are written and read: what caches that are compiled once for all formats know of theirs.
struct row_format {
  const kv_reader* reader = nullptr;
  void (*encode)(const float* row, index_t dim, std::byte* to) noexcept = nullptr;
};

template <kv_format F>
inline constexpr row_format row_format_of{
    &reader_of<F>, [](const float* row, index_t dim, std::byte* to) noexcept { F::encode(row, dim, to); }};

}  // namespace detail
}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "macros_on.hpp"
