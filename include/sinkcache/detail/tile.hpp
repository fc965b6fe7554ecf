#pragma once

// What the loops over one tile of keys and values share: sums in registers, vectors of a row, groups of query rows.

#include <concepts>
#include <cstdint>
#include <utility>

#include "macros_off.hpp"
#include "tile_rows.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// Brings a line into the L2, while there is arithmetic to do: on the way to the L1 fewer may be under way, and those
// too many are dropped. Integers: it may lie behind the end.
[[gnu::always_inline]] inline void prefetch(const std::byte* from, index_t offset) noexcept {
  const std::uintptr_t line = reinterpret_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(offset);
  __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);  // NOLINT(performance-no-int-to-ptr)
}

// Zeros. `= {}` is a slow string instruction, and g++ keeps in memory what it does not unroll early.
template <class V, int Rows, int Columns>
[[gnu::always_inline]] inline void clear(V (&sums)[Rows][Columns]) noexcept {
#pragma GCC unroll 32
  for (int i = 0; i < Rows * Columns; ++i) sums[i / Columns][i % Columns] = V{};
}
template <int Rows, int Columns>
[[gnu::always_inline]] inline void add(vfloat (&to)[Rows][Columns], const vfloat (&sums)[Rows][Columns]) noexcept {
#pragma GCC unroll 32
  for (int i = 0; i < Rows * Columns; ++i) to[i / Columns][i % Columns] += sums[i / Columns][i % Columns];
}

template <class V, int Rows, int Columns>
[[gnu::always_inline]] inline void copy(V (&to)[Rows][Columns], const V (&sums)[Rows][Columns]) noexcept {
#pragma GCC unroll 32
  for (int i = 0; i < Rows * Columns; ++i) to[i / Columns][i % Columns] = sums[i / Columns][i % Columns];
}

// Whether two vectors of a row are loaded as elements of even and of odd number. With AVX2 that takes as many
// instructions as neighbours, and a register more.
template <class F>
concept in_pairs = elementwise_format<F> && lanes != 8 && requires(const std::byte* from) {
  { F::load_even(from) } -> std::same_as<vfloat>;
  { F::load_odd(from) } -> std::same_as<vfloat>;
};

// Whether keys are multiplied in vectors of eight though others have sixteen.
template <class F>
concept in_eights = elementwise_format<F> && requires(const std::byte* from) {
  { F::load_eight(from) } -> std::same_as<voct>;
};

// Vector i of the `count` that begin there: of a format in pairs every two hold even and odd elements, a last one alone
// neighbours.
template <class F, class V = vfloat>
[[gnu::always_inline]] inline V load_vector(const std::byte* from, int i, int count) noexcept {
  constexpr index_t bytes = width_of<V> * F::element_bytes;
  if constexpr (!std::same_as<V, vfloat>) {
    return F::load_eight(from + i * bytes);
  } else {
    if constexpr (in_pairs<F>) {
      if (i % 2 == 1) return F::load_odd(from + (i - 1) * bytes);
      if (i + 1 < count) return F::load_even(from + i * bytes);
    }
    return F::load(from + i * bytes);
  }
}

// Calls f<Rows>(row, group) for groups of up to four of `count` rows.
template <class F>
void in_groups(index_t count, const F& f) {
  index_t group = 0;
  for (index_t row = 0; row < count; ++group) {
    const index_t left = count - row;
    if (left % 4 == 0)
      f.template operator()<4>(row, group), row += 4;
    else if (left >= 3)
      f.template operator()<3>(row, group), row += 3;
    else if (left == 2)
      f.template operator()<2>(row, group), row += 2;
    else
      f.template operator()<1>(row, group), row += 1;
  }
}

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "macros_on.hpp"
