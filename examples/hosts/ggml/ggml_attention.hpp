#pragma once

// Attention over llama.cpp's KV cache as an operator of a ggml graph, on its CPU backend: what build_attn_mha asks of
// ggml_flash_attn_ext, without a mask.

#include <ggml.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <sinkcache/host_threads.hpp>
#include <sinkcache/sinkcache.hpp>
#include <span>
#include <utility>
#include <vector>

// What is where, as i32 tensors; llama.cpp has the same of its batch (inp_pos, seq_id) and in llama_kv_cells.
struct ggml_cells {
  ggml_tensor* positions = nullptr;       // of the queries, [tokens * streams]
  ggml_tensor* cell_positions = nullptr;  // [cells, streams], below 0 where a cell is empty
  ggml_tensor* sequences = nullptr;       // of the queries, [tokens * streams]; null: a stream is one sequence
  ggml_tensor* cell_sequences = nullptr;  // [words, cells, streams]: bit s % 32 of word s / 32 says that sequence s
                                          // has the cell; null where sequences is
};

// One layer's. Keys and values are read where they lie, at any strides: f32, f16, bf16, q8_0 or q4_0. Cells may lie in
// any order, lack positions, and belong to several sequences; runs of neighbouring positions are read fastest. Keys are
// rotated at the positions that the cells say, as they are after llama.cpp's context shift.
class ggml_attention {
 public:
  using index_t = sinkcache::index_t;
  using status = sinkcache::status;

  // Of the configuration counts num_sink_tokens, window (0 for none), positions and rope; shapes come from the tensors.
  // Workspaces, one for each thread, can be shared by all operators of a graph, which run one after the other.
  ggml_attention(sinkcache::attention_params params, const sinkcache::cache_config& config,
                 std::span<sinkcache::workspace> workspaces)
      : attention_(std::move(params)), config_(config), workspaces_(workspaces), threads_(workspaces.size()) {
    config_.inputs = sinkcache::inputs::rotated;
  }
  ggml_attention(const ggml_attention&) = delete;  // graphs point to it
  ggml_attention& operator=(const ggml_attention&) = delete;

  // Tensors as for ggml_flash_attn_ext, views and permuted ones too: q f32 [head_dim, tokens, heads, streams], k
  // [head_dim, cells, kv_heads, streams], v [v_head_dim, cells, kv_heads, streams]. Every query's own token has to be
  // in a cell. Gives f32 [v_head_dim, heads, tokens, streams], or null and in `found` why.
  ggml_tensor* build(ggml_context* graph, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, const ggml_cells& cells,
                     status& found) {
    found = check(q, k, v, cells);
    if (!found) return nullptr;
    for (per_thread& thread : threads_) thread.pieces.reserve(static_cast<std::size_t>(k->ne[1]));
    ggml_tensor* args[] = {q, k, v, cells.positions, cells.cell_positions, cells.sequences, cells.cell_sequences};
    return ggml_custom_4d(graph, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3], args,
                          cells.sequences == nullptr ? 5 : 7, &compute, static_cast<int>(workspaces_.size()), this);
  }

  // Ask after each compute: the first thing that was refused since the last time. What comes out then is not to be
  // used.
  status take_refused() noexcept {
    status first;
    for (per_thread& thread : threads_)
      if (const status taken = std::exchange(thread.refused, status()); first) first = taken;
    return first;
  }

 private:
  // What can be told before there is memory.
  status check(const ggml_tensor* q, const ggml_tensor* k, const ggml_tensor* v,
               const ggml_cells& cells) const noexcept {
    status found;
    const index_t heads = attention_.params().num_qo_heads;
    found.require(!workspaces_.empty(), "workspaces.size()", workspaces_.size(), "at least 1");
    found.require(q->type == GGML_TYPE_F32, "q's type", ggml_type_name(q->type), "f32");
    found.require(q->ne[0] == k->ne[0], "q->ne[0]", q->ne[0], "that of k,", k->ne[0]);
    found.require(q->ne[2] == heads, "q->ne[2]", q->ne[2], "num_qo_heads,", heads);
    found.require(heads % k->ne[2] == 0, "k->ne[2]", k->ne[2], "a divisor of num_qo_heads,", heads);
    found.require(q->nb[0] == sizeof(float), "q->nb[0]", q->nb[0], "4: dimensions side by side");
    found.require(q->nb[2] == q->nb[0] * static_cast<std::size_t>(q->ne[0]) || heads == 1, "q->nb[2]", q->nb[2],
                  "q->nb[0] * q->ne[0], a token's heads side by side:", q->nb[0] * static_cast<std::size_t>(q->ne[0]));
    found.require(q->nb[1] % sizeof(float) == 0, "q->nb[1]", q->nb[1], "a multiple of 4");
    found.require(k->ne[3] == q->ne[3], "k->ne[3]", k->ne[3], "that of q,", q->ne[3]);
    for (int i = 1; i < 4; ++i)
      found.require(v->ne[i] == k->ne[i], "v->ne[1], [2] or [3]", v->ne[i], "that of k,", k->ne[i]);
    for (const ggml_tensor* t : {k, v})
      found.require(!ggml_is_quantized(t->type) || t->nb[0] == ggml_type_size(t->type), "nb[0] of quantized cells",
                    t->nb[0], "a block's bytes, not transposed:", ggml_type_size(t->type));
    const index_t streams = q->ne[3];
    require_numbers(found, "positions", cells.positions, q->ne[1] * streams);
    require_numbers(found, "cell_positions", cells.cell_positions, k->ne[1] * streams);
    if (cells.sequences != nullptr || cells.cell_sequences != nullptr) {
      require_numbers(found, "sequences", cells.sequences, q->ne[1] * streams);
      if (found && cells.cell_sequences != nullptr)
        require_numbers(found, "cell_sequences", cells.cell_sequences,
                        cells.cell_sequences->ne[0] * k->ne[1] * streams);
      else
        found.refuse("cell_sequences was null, had to be given as sequences is");
    }
    if (!found) return found;
    return with_view(k, v, [](auto& view) { return view.try_set_seen(0); });
  }

  static void require_numbers(status& found, const char* name, const ggml_tensor* t, index_t size) noexcept {
    if (t == nullptr) return found.refuse("{} was null, had to be given", name);
    if (t->type != GGML_TYPE_I32) found.refuse("the type of {} was {}, had to be i32", name, ggml_type_name(t->type));
    if (!ggml_is_contiguous(t) || ggml_nelements(t) != size)
      found.refuse("{} had {} elements, had to have {}, side by side", name, ggml_nelements(t), size);
  }

  // Calls f with a view of such tensors that holds no tokens so far.
  template <class F>
  status with_view(const ggml_tensor* k, const ggml_tensor* v, F&& f) const noexcept {
    return sinkcache::try_with_formats<sinkcache::q8_0, sinkcache::q4_0>(
        ggml_type_name(k->type), ggml_type_name(v->type),
        [&]<sinkcache::viewed_format K, sinkcache::viewed_format V>(K, V) -> status {
          status found;
          sinkcache::cache_config config = config_;
          config.num_kv_heads = k->ne[2];
          config.head_dim = k->ne[0];
          config.v_head_dim = v->ne[0];
          const sinkcache::kv_layout layout{strides<K>(*k), strides<V>(*v)};
          std::optional view = sinkcache::kv_view<K, V>::try_create(config, layout, found);
          return view ? f(*view) : found;
        });
  }

  // In elements; of a quantised type nb[0] is a block's bytes.
  template <class F>
  static sinkcache::kv_strides strides(const ggml_tensor& t) noexcept {
    const index_t block = ggml_blck_size(t.type);
    const auto elements = [&](int i) {
      return static_cast<index_t>(t.nb[i]) / static_cast<index_t>(ggml_type_size(t.type)) * block;
    };
    return {elements(2), elements(1), sinkcache::unit_format<F> ? 1 : elements(0)};
  }

  // Called from C, by all threads of the graph at once.
  static void compute(ggml_tensor* out, int thread, int num_threads, void* self) {
    static_cast<ggml_attention*>(self)->compute(*out, thread, num_threads);
  }

  void compute(ggml_tensor& out, index_t thread, index_t num_threads) noexcept {
    num_threads = std::min(num_threads, static_cast<index_t>(workspaces_.size()));
    if (thread >= num_threads) return;
    const ggml_tensor &q = *out.src[0], &k = *out.src[1], &v = *out.src[2];
    const ggml_tensor *sequences = out.src[5], *cell_sequences = out.src[6];
    const index_t tokens = q.ne[1], words = cell_sequences == nullptr ? 0 : cell_sequences->ne[0];
    per_thread& own = threads_[static_cast<std::size_t>(thread)];
    const auto at = [](const ggml_tensor& t, std::size_t bytes) { return static_cast<std::byte*>(t.data) + bytes; };
    index_t done = 0;  // tokens of all streams
    const status found = with_view(&k, &v, [&](auto& view) {
      status stream_found;
      for (index_t stream = 0; stream < q.ne[3]; ++stream) {
        const auto s = static_cast<std::size_t>(stream);
        const std::int32_t* positions = numbers(*out.src[3]) + stream * tokens;
        const std::int32_t* of = sequences == nullptr ? nullptr : numbers(*sequences) + stream * tokens;
        cell_table cells{at(k, s * k.nb[3]),
                         at(v, s * v.nb[3]),
                         k.nb[1],
                         v.nb[1],
                         k.ne[1],
                         numbers(*out.src[4]) + stream * k.ne[1],
                         words == 0 ? nullptr : numbers(*cell_sequences) + stream * k.ne[1] * words,
                         words};
        for (index_t first = 0, n; first < tokens && stream_found; first += n) {
          // Tokens of one sequence that follow each other.
          for (n = 1; first + n < tokens && positions[first + n] == positions[first + n - 1] + 1 &&
                      (of == nullptr || of[first + n] == of[first]);)
            ++n;
          // All threads find the same, and none of them writes further.
          stream_found = find_pieces(cells, of == nullptr ? 0 : of[first], positions[first], n, own.pieces);
          if (stream_found)
            stream_found = view.try_assign(std::span<const sinkcache::kv_piece>(own.pieces), positions[first] + n);
          // Newest first, as many at once as see no further back than what was removed from the window.
          for (index_t end = n, rows; end > 0 && stream_found; end -= rows) {
            stream_found = view.try_set_seen(positions[first] + end);
            rows = std::min(end, static_cast<index_t>(view.seen() - view.min_truncate()) + 1);
            const auto row = static_cast<std::size_t>(first + end - rows);
            if (stream_found)
              stream_found = attention_.try_attend(
                  {reinterpret_cast<const float*>(at(q, s * q.nb[3] + row * q.nb[1])), rows, q.ne[2] * q.ne[0],
                   static_cast<index_t>(q.nb[1] / sizeof(float))},
                  view,
                  {reinterpret_cast<float*>(at(out, s * out.nb[3] + row * out.nb[2])), rows, out.ne[1] * out.ne[0]},
                  workspaces_[static_cast<std::size_t>(thread)], {},
                  sinkcache::part_of_thread(thread, num_threads, k.ne[2], rows));
          }
          if (stream_found) done += n;
        }
      }
      return stream_found;
    });
    if (found) return;
    const index_t row = out.ne[0] * out.ne[1], rest = q.ne[3] * tokens - done;
    if (thread == 0)
      std::fill_n(static_cast<float*>(out.data) + done * row, rest * row, std::numeric_limits<float>::quiet_NaN());
    if (own.refused) own.refused = found;
  }

  static const std::int32_t* numbers(const ggml_tensor& t) noexcept { return static_cast<const std::int32_t*>(t.data); }

  // Of one stream.
  struct cell_table {
    const std::byte *k, *v;
    std::size_t k_cell, v_cell;  // bytes from cell to cell
    index_t cells;
    const std::int32_t *positions, *sequences;
    index_t words;

    bool has(index_t cell, std::int32_t sequence) const noexcept {
      return positions[cell] >= 0 &&
             (words == 0 || (sequences[cell * words + sequence / 32] >> sequence % 32 & 1) != 0);
    }
  };

  // The cells of a sequence as pieces in the order of their positions, for queries at [first, first + n).
  static status find_pieces(const cell_table& cells, std::int32_t sequence, std::int32_t first, index_t n,
                            std::vector<sinkcache::kv_piece>& pieces) noexcept {
    status found;
    found.require(first >= 0, "a query's position", first, "at least 0");
    found.require(sequence >= 0 && (cells.words == 0 || sequence < 32 * cells.words), "a query's sequence", sequence,
                  "at least 0 and below the bits of cell_sequences,", 32 * cells.words);
    if (!found) return found;
    pieces.clear();
    index_t end_cell = -1;  // after the last piece's
    for (index_t cell = 0; cell < cells.cells; ++cell) {
      if (!cells.has(cell, sequence)) continue;
      const std::int32_t position = cells.positions[cell];
      if (cell == end_cell && position == pieces.back().first + pieces.back().tokens) {
        ++pieces.back().tokens;
      } else {
        const auto c = static_cast<std::size_t>(cell);
        pieces.push_back({position, 1, cells.k + c * cells.k_cell, cells.v + c * cells.v_cell});
      }
      end_cell = cell + 1;
    }
    const auto older = [](const sinkcache::kv_piece& a, const sinkcache::kv_piece& b) { return a.first < b.first; };
    if (!std::is_sorted(pieces.begin(), pieces.end(), older)) std::sort(pieces.begin(), pieces.end(), older);
    index_t held = 0, end = 0;
    for (const sinkcache::kv_piece& piece : pieces) {
      if (piece.first < end)
        found.refuse("position {} of sequence {} was in two cells, had to be in one", piece.first, sequence);
      end = piece.first + piece.tokens;
      held += std::max<index_t>(0, std::min<index_t>(end, first + n) - std::max<index_t>(piece.first, first));
    }
    if (held < n)
      found.refuse("of the queries at {} to {} of sequence {} the cells had {}, had to have all", first, first + n - 1,
                   sequence, held);
    return found;
  }

  struct per_thread {
    std::vector<sinkcache::kv_piece> pieces;
    status refused;
  };

  sinkcache::attention attention_;
  sinkcache::cache_config config_;
  std::span<sinkcache::workspace> workspaces_;
  std::vector<per_thread> threads_;
};
