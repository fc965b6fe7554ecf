#pragma once

// The contract between what keeps tokens and the attention that reads them (docs/architecture.md has it on one page).
//
// A source answers one question: which rows hold the tokens that these queries of this KV head may see? The answer is a
// short list of parts, plain data that points into the source's memory. A part is rows that lie alike and are seen by
// one rule: the query at p sees the row at x if seen_from <= p - x < seen_until. A pinned prefix, half a ring, a paged
// pool, a scattered kept set are one part each. Positions in cache order are derived by attention, which counts the
// tokens of later parts; so sources are joined by listing the parts of one after those of another.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "detail/macros_off.hpp"
#include "format.hpp"
#include "matrix.hpp"
#include "rope.hpp"

namespace sinkcache {
inline namespace SINKCACHE_TAG {

class attention;
class workspace;
struct attention_params;

enum class positions {
  in_cache,  // tokens count as neighbours of those that are still visible before and after them (StreamingLLM)
  absolute   // tokens keep their true positions (gpt-oss and other models trained with a window)
};

enum class inputs {
  raw,     // keys and queries come without rotary positions; the library rotates them
  rotated  // the engine has rotated them, at their true positions
};

// An orthogonal transform of a row of `dim` floats, in place: stored rows may be transformed, for formats that spread
// outliers over a row (a Hadamard transform). Queries then go through that of keys after their rotary position, outputs
// back through that of values.
struct row_transform {
  void (*apply)(float* row, index_t dim) noexcept;
  void (*undo)(float* row, index_t dim) noexcept;
};

namespace detail {

// What rows go through before a format encodes them; null: nothing.
template <kv_format F>
constexpr const row_transform* transform_of() noexcept {
  if constexpr (requires {
                  { F::transform } -> std::convertible_to<const row_transform*>;
                })
    return F::transform;
  else
    return nullptr;
}

}  // namespace detail

// What attention has to know of every source: sizes, and what positions mean.
struct kv_geometry {
  index_t num_kv_heads = 0, head_dim = 0, v_head_dim = 0;
  sinkcache::positions positions = sinkcache::positions::in_cache;
  sinkcache::inputs inputs = sinkcache::inputs::raw;
  std::optional<sinkcache::rope> rope = std::nullopt;  // may be absent where positions are absolute and inputs rotated
  position_t first_position = 0;                       // true position of token 0
  const row_transform *k_transform = nullptr, *v_transform = nullptr;  // of stored rows; null: none

  bool rotates() const { return rope.has_value() && rope->width() > 0; }
};

namespace detail {
struct running_states;
struct key_rotations;
}  // namespace detail

// Rows of a tile where a kernel reads them: `stride` bytes apart, each of `bytes` for round_up(dim, 16) elements.
struct tile_rows {
  const std::byte* data;
  index_t stride, bytes;

  const std::byte* row(index_t i) const { return data + i * stride; }
  tile_rows from_row(index_t i) const { return {row(i), stride, bytes}; }
};

struct kv_rows;

// How rows of one format are read; reader_of<F> is that of a format F. `block_bytes` is the format's, `element_bytes` 0
// where rows cannot be read element by element.
//   load   the rows [first, first + n) as floats [n, stride], zero from `dim` to round_up(dim, 16).
// The others work on rows where they lie, and are null where a format is only loaded. `dim` is a multiple of 16,
// `count` at most 32.
//   pack   lays `count` query rows [count, dim] out for dots, in `to` or where they are;
//   dots   logits [n, rows of a group] of each group of up to four query rows;
//   add    adds values times weights, which lie as dots' logits do, to the query rows' sums.
//   rotated_dots  as dots, of keys that it rotates on the way (kv_part::rank_angles); null: load, then rotate.
// All prefetch `next` meanwhile.
struct kv_reader {
  index_t block_rows, element_bytes;
  index_t (*block_bytes)(index_t dim);
  void (*load)(const kv_rows& from, index_t first, index_t n, index_t dim, index_t stride, float* to) noexcept;
  const float* (*pack)(const float* rows, index_t count, index_t dim, float* to) noexcept;
  void (*dots)(const float* packed, index_t count, index_t dim, tile_rows k, index_t n, tile_rows next,
               float* logits) noexcept;
  void (*add)(const float* weights, index_t count, tile_rows v, index_t offset, index_t n, index_t dim,
              const detail::running_states& to, tile_rows next) noexcept;
  std::string_view name = "custom";
  void (*rotated_dots)(const float* packed, index_t count, index_t dim, const detail::key_rotations& rotations,
                       position_t place, tile_rows k, index_t n, tile_rows next, index_t done,
                       float* logits) noexcept = nullptr;
};

// Where the keys, or the values, of a part lie. Strides in bytes.
struct kv_rows {
  const kv_reader* reader = nullptr;  // of keys and values both null: tokens that lie elsewhere, counted but not read
  const std::byte* base = nullptr;    // row 0 of the KV head that was asked for (of page 0, where there are pages)
  index_t block = 0;                  // from row to row; from block to block where the format has several rows a block
  index_t step = 0;  // from element to element, in an engine's memory; 0: rows as the format wrote them
  index_t head = 0;  // from KV head to KV head
  index_t page = 0;  // from page to page
};

// Rows [row, row + rows) that lie alike and are seen by one rule.
struct kv_part {
  static constexpr position_t always = max_position;  // farther than any token

  kv_rows k, v;
  index_t row = 0, rows = 0;
  position_t first = 0;  // position of the first row, the others follow one by one; with `at`, of the oldest

  // For rows in any order: the position of each, and what is added to it; `last` comes after the newest, with that
  // added, and `first` is the oldest's. `rank` is each row's place by age, from 0; none where rows lie in that order.
  // Under in_cache `seen_until` has to be `always` then.
  std::span<const position_t> at = {};
  position_t at_offset = 0, last = 0;
  std::span<const std::int32_t> rank = {};

  // Keys that are stored as they were before rope: rope::rank_angles of the geometry's. Under in_cache attention
  // rotates each, as it is loaded, to its place among all that a query sees; a k_transform is undone first. Rows lie in
  // the order of their age, so there is no `rank`. Empty: keys are stored rotated to their true positions.
  std::span<const float> rank_angles = {};

  // For rows in pages: row r lies in page pages[r / page_rows] as its row r % page_rows.
  std::span<const std::int32_t> pages = {};
  index_t page_rows = 0;

  // The query at p sees the row at x if seen_from <= p - x < seen_until.
  position_t seen_from = 0, seen_until = always;
  position_t as_of = always;  // queries after this one see what it does: of a prefix that no longer changes
  index_t pinned = 0;         // the number of first rows that take sink_bias
  bool placeless = false;     // no positions: always seen, by queries as they were before rope; counts nowhere
  std::int32_t mark = 0;      // the source's own; comes back with weights

  position_t position(index_t i) const { return at.empty() ? first + i : at[static_cast<std::size_t>(i)] + at_offset; }
  position_t end() const { return at.empty() ? first + rows : last; }
};

// The parts of a plan, oldest first, in the caller's memory. What one query sees of a part is older than what it
// sees of the next.
class part_list {
 public:
  part_list(kv_part* memory, index_t capacity) noexcept : parts_(memory), capacity_(capacity) {}

  // Parts without rows are left out. A source that lists more than its max_parts() ends the program.
  void push_back(const kv_part& part) noexcept {
    if (part.rows > 0) emplace_back() = part;
  }
  // A part to be filled in, which has to have rows.
  kv_part& emplace_back() noexcept {
    if (size_ == capacity_) detail::broken_source("a plan has more parts than the source's max_parts()");
    return *std::construct_at(parts_ + size_++);
  }
  void clear() noexcept { size_ = 0; }
  index_t size() const { return size_; }
  kv_part& operator[](index_t i) { return parts_[i]; }
  const kv_part& operator[](index_t i) const { return parts_[i]; }
  const kv_part* begin() const { return parts_; }
  const kv_part* end() const { return parts_ + size_; }

 private:
  kv_part* parts_;
  index_t capacity_, size_ = 0;
};

// How far a plan holds: for how many KV heads from the one asked for (the base of the i-th is `i * head` further), and
// for how many queries from the first. At least 1 of each.
struct plan_end {
  index_t kv_heads, queries;
};

// Stored tokens of one sequence and layer, as attention reads them: those of a cache, of an engine's own memory, or of
// several sources in a row. Const calls may run concurrently.
class kv_source {
 public:
  const kv_geometry& geometry() const { return geometry_; }
  virtual position_t seen() const noexcept { return seen_; }         // tokens stored so far, less those taken back
  index_t size() const noexcept { return num_visible(seen() - 1); }  // tokens visible now

  // Most tokens that a query can see, in any KV head; of a part whose rows have positions of their own, all rows count.
  virtual index_t capacity() const noexcept = 0;

  // How many tokens the query at `query` sees, in the KV head where that is most. Work is divided by it; results do not
  // depend on it.
  virtual index_t num_visible(position_t query) const noexcept {
    return static_cast<index_t>(std::min<position_t>(detail::seen_by(query), capacity()));
  }

  // The smallest n such that, for every count from n to seen(), all that was visible is still stored.
  virtual position_t min_truncate() const noexcept = 0;

  // The oldest query whose plan is still what it was. Where a cache has since put rows aside, older queries have none,
  // though it could take the rows back.
  virtual position_t oldest_query() const noexcept { return std::max<position_t>(0, min_truncate() - 1); }

  // Adds to `found` why this source cannot be read: it was moved from, so it holds nothing and can be assigned to; or
  // what it is made of has changed.
  virtual void require_memory(status& /*found*/) const noexcept {}

  // The most parts that a plan has.
  virtual index_t max_parts() const noexcept = 0;

  // Whether its newest tokens are those of `cache`, which may grow at the end of it.
  virtual bool ends_with(const kv_source& cache) const noexcept { return this == &cache; }

  // Appends to `parts` what the queries [first, last] of a KV head may see. Each was seen, and first is at least
  // oldest_query(); from -1 to -1 where nothing was seen. What is listed may reach further than what any of them sees;
  // the parts' rules say what each does. Parts are valid until the source changes.
  virtual plan_end plan(index_t kv_head, position_t first, position_t last, part_list& parts) const noexcept = 0;

 protected:
  explicit kv_source(const kv_geometry& geometry) noexcept : geometry_(geometry) {}
  kv_source(kv_source&& from) noexcept : geometry_(from.geometry_), seen_(from.seen_) { from.seen_ = 0; }
  kv_source& operator=(kv_source&& from) noexcept {
    geometry_ = from.geometry_;
    seen_ = from.seen_;
    from.seen_ = 0;
    return *this;
  }
  ~kv_source() = default;

  kv_geometry geometry_;
  position_t seen_ = 0;
};

// What one query gives tokens [first, first + n) of a part, normalised with the model's own denominator: of a query's
// weights and the sink's share the sum is 1. w[i * stride + j] is what query head first_qo_head + i gives token first +
// j of the part; 0 where the query does not see it.
struct weight_tile {
  index_t kv_head;
  position_t query;
  const kv_part* part;
  index_t first, n;
  index_t first_qo_head, num_qo_heads, stride;
  std::span<const float> w;

  position_t position(index_t j) const { return part->position(first + j); }
  float weight(index_t j, index_t head) const { return w[static_cast<std::size_t>(head * stride + j)]; }
};

// The same, summed over the queries from `query` on and over all query heads that read the KV head: sums[j] is of token
// first + j of the part. NaN counts nothing.
struct weight_sums {
  index_t kv_head;
  position_t query;
  index_t num_queries;
  const kv_part* part;
  index_t first, n;
  std::span<const float> sums;

  position_t position(index_t j) const { return part->position(first + j); }
};

// A call of attention, as those are told who learn from it: rows of q [tokens, num_qo_heads * head_dim], the first of
// which is the query at `first` of `keys`, and the KV heads that it is for.
struct attention_call {
  const attention_params& params;
  const kv_source& keys;
  const_matrix_view q;
  position_t first;
  index_t first_kv_head, num_kv_heads;
  index_t following = 0;  // tokens that the same call will store after these
};

// Who wants to know what queries give tokens. Tiles of one KV head come one after the other, those of others may come
// from other threads meanwhile.
class weight_reader {
 public:
  virtual bool wants(position_t query) const noexcept = 0;
  virtual void read(const weight_tile& tile) noexcept = 0;

  // For those who learn from queries, too. Every call asks first whether it may be made, then tells of its queries
  // before it attends and when it has; `end` may itself attend with what it is given. Calls for other KV heads may run
  // meanwhile.
  virtual void require(status& /*found*/, const attention_call& /*call*/) const noexcept {}
  virtual void begin(const attention_call& /*call*/) noexcept {}
  virtual void end(const attention_call& /*call*/, const attention& /*by*/, workspace& /*memory*/) noexcept {}

  // The most queries that `end` attends with, as one call.
  virtual index_t num_queries_again() const noexcept { return 0; }

  // Whether it wants sums over the queries from `first` to `last`, none of which is wanted by itself, or over one
  // query. Many queries then stay together, at less than twice the time; of one, or a few, sums come query by query.
  virtual bool wants_sums(position_t, position_t) const noexcept { return false; }
  virtual void read_sums(const weight_sums&) noexcept {}

 protected:
  weight_reader() = default;
  weight_reader(const weight_reader&) = default;
  weight_reader& operator=(const weight_reader&) = default;
  ~weight_reader() = default;
};

}  // namespace SINKCACHE_TAG
}  // namespace sinkcache

#include "detail/macros_on.hpp"
