// Where the memory comes from, how it is shared out, and that it goes back.

#include <sinkcache/storage.hpp>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "counting_resource.hpp"
#include "plain_format.hpp"

using namespace sinkcache;

namespace {

constexpr index_t most = std::numeric_limits<index_t>::max();

bool aligned(const void* memory, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(memory) % alignment == 0;
}

TEST_CASE("default_resource: aligned, writable, for small and huge") {
  std::pmr::memory_resource* const resource = default_resource();
  REQUIRE(resource != nullptr);
  CHECK(resource == default_resource());
  CHECK(resource->is_equal(*default_resource()));
  CHECK(!resource->is_equal(*std::pmr::new_delete_resource()));

  constexpr std::size_t huge_page = std::size_t{2} << 20;
  for (std::size_t bytes : {std::size_t{1}, std::size_t{63}, std::size_t{64}, std::size_t{4096}, huge_page - 1,
                            huge_page, huge_page + 1, 5 * huge_page / 2})
    for (std::size_t alignment : {std::size_t{1}, std::size_t{16}, std::size_t{64}, std::size_t{4096}, 2 * huge_page}) {
      CAPTURE(bytes, alignment);
      auto* const memory = static_cast<unsigned char*>(resource->allocate(bytes, alignment));
      CHECK(aligned(memory, alignment));
      if (bytes >= huge_page) CHECK(aligned(memory, huge_page));
      memory[0] = memory[bytes - 1] = 1;
      resource->deallocate(memory, bytes, alignment);
    }
}

// Of two formats.
template <class K, class V>
struct rows_of : detail::storage {
  rows_of(index_t heads, index_t rows, index_t k_dim, index_t v_dim, std::pmr::memory_resource* resource)
      : storage(detail::row_format_of<K>, detail::row_format_of<V>, {heads, rows, k_dim, v_dim}, resource) {}
  static std::size_t required_bytes(index_t heads, index_t rows, index_t k_dim, index_t v_dim) {
    return storage::required_bytes(detail::row_format_of<K>, detail::row_format_of<V>, {heads, rows, k_dim, v_dim});
  }
};

using both = rows_of<f32, bf16>;
static_assert(!std::is_copy_constructible_v<both> && std::is_nothrow_move_constructible_v<both> &&
              std::is_nothrow_move_assignable_v<both>);

TEST_CASE("storage: one allocation of exactly the bytes it needs, 64-byte aligned, freed once") {
  counting_resource resource;
  for (index_t heads : {1, 3})
    for (index_t rows : {1, 7, 64})
      for (index_t k_dim : {1, 16, 17, 128})
        for (index_t v_dim : {1, 33}) {
          const std::size_t before = resource.allocations;
          {
            const both storage(heads, rows, k_dim, v_dim, &resource);
            const auto expected =
                static_cast<std::size_t>(heads * rows * (plain::row_bytes<f32>(k_dim) + plain::row_bytes<bf16>(v_dim)));
            REQUIRE(storage.nbytes() == expected);
            REQUIRE(both::required_bytes(heads, rows, k_dim, v_dim) == expected);
            REQUIRE((resource.last_bytes == expected && resource.last_alignment == 64));
            REQUIRE(resource.allocations == before + 1);
            REQUIRE(storage.data() == resource.last);
            REQUIRE(storage.resource() == &resource);

            // Every row 64-byte aligned, none over another; keys first, a head's rows together.
            std::byte* next = storage.data();
            for (index_t head = 0; head < heads; ++head)
              for (index_t row = 0; row < rows; ++row, next += storage.k_rows(0).block)
                REQUIRE(storage.k(head, row) == next);
            for (index_t head = 0; head < heads; ++head)
              for (index_t row = 0; row < rows; ++row, next += storage.v_rows(0).block)
                REQUIRE(storage.v(head, row) == next);
            REQUIRE(next == storage.data() + expected);
            REQUIRE((aligned(storage.data(), 64) && storage.k_rows(0).block % 64 == 0 &&
                     storage.v_rows(0).block % 64 == 0));
          }
          REQUIRE(resource.all_returned());
        }
}

TEST_CASE("storage: moves, and frees once") {
  counting_resource resource, other_resource;
  {
    both a(2, 5, 16, 16, &resource);
    std::byte* const memory = a.data();
    both b(std::move(a));
    CHECK(b.data() == memory);
    CHECK(resource.allocations == 1);

    both c(1, 3, 8, 8, &other_resource);
    c = std::move(b);
    CHECK(c.data() == memory);
    CHECK(c.resource() == &resource);
    CHECK(c.nbytes() == both::required_bytes(2, 5, 16, 16));
    CHECK(c.v(1, 4) == memory + 10 * 64 + 9 * 64);

    both& itself = c;
    c = std::move(itself);
    CHECK(c.data() == memory);
  }
  CHECK(resource.all_returned());
  CHECK(other_resource.all_returned());
}

TEST_CASE("storage: a resource that has no more") {
  counting_resource resource;
  resource.exhausted = true;
  CHECK_THROWS_AS(both(2, 5, 16, 16, &resource), std::bad_alloc);
  CHECK(resource.all_returned());
}

struct odd_blocks {  // of elements that are read where they lie
  static constexpr index_t block_rows = 1, element_bytes = 1;
  static constexpr index_t block_bytes(index_t dim) { return dim; }
  static void encode(const float*, index_t, std::byte*) {}
  static void decode(const std::byte*, index_t, index_t, float*) {}
  static float element(const std::byte*) { return 0; }
};
struct packed_blocks {  // of rows that are only decoded, or have kernels of their own
  static constexpr index_t block_rows = 1;
  static constexpr index_t block_bytes(index_t dim) { return dim; }
  static void encode(const float*, index_t, std::byte*) {}
  static void decode(const std::byte*, index_t, index_t, float*) {}
};

TEST_CASE("storage: sizes that do not fit are refused before anything is allocated") {
  counting_resource resource;
  CHECK_THROWS_WITH(both(2, most, 16, 16, &resource),
                    "sinkcache: num_kv_heads * tokens was 2 * 9223372036854775807, had to fit 63 bits");
  CHECK_THROWS_WITH(both(1, most, 16, 16, &resource),
                    "sinkcache: bytes of the cache was 9223372036854775807 * 128, had to fit 63 bits");
  CHECK_THROWS_WITH(both(most / 64, 64, 16, 16, &resource),
                    "sinkcache: bytes of the cache was 9223372036854775744 * 128, had to fit 63 bits");
  CHECK_THROWS_AS(both::required_bytes(index_t{1} << 31, index_t{1} << 31, 512, 512), std::invalid_argument);

  using odd = rows_of<odd_blocks, f32>;
  CHECK_THROWS_WITH(odd(1, 1, 65, 16, &resource),
                    "sinkcache: a format's block_bytes(dim) was 65, had to be a positive multiple of 64");
  CHECK_THROWS_AS(odd(1, 1, 0, 16, &resource), std::invalid_argument);
  CHECK_NOTHROW(odd(1, 1, 64, 16, &resource));
  CHECK(resource.allocations == 1);

  using packed = rows_of<packed_blocks, f32>;
  CHECK_THROWS_WITH(packed(1, 1, 0, 16, &resource),
                    "sinkcache: a format's block_bytes(dim) was 0, had to be at least 1");
  {
    const packed p(3, 1, 13, 16, &resource);
    CHECK(p.nbytes() == 64 + 3 * 64);  // values begin a line
    CHECK(p.v(0, 0) == p.k(0, 0) + 64);
  }
  CHECK(resource.all_returned());
}

}  // namespace
