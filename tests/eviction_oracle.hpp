#pragma once

// Score-driven eviction by its literal definition: slow, in double, plain loops, nothing shared with the library.
//
// A stream goes in token by token: what each query attends to, and what every event scored and left, comes out. The
// decisions meant below are those of the reference on eviction (eviction-decisions.md), by number. What they leave
// open was read so:
//
//   1  With Ada-KV an event is due when the heads together hold more than their budgets together.
//   5  A free row: the smallest budget, less pinned tokens, less the newest that are protected (LagKV: 2 lag - 1), is
//      at least 1; an overlap of the two is not counted. pin() of a token that any head has evicted: false.
//   6  LagKV's own window: the last whole partition and the rows after it. The others': as many rows as queries.
//   8  pool_pinned=0: a pinned row is no candidate in the pools of others; it still has its place among neighbours.
//   9  Neighbours are rows next to each other among those held, however far apart in the stream.
//  10  Equal across heads (Ada-KV): the younger stays; of one position, that of the lower head. LagKV's ranks: the
//      younger of two equal rows of a partition ranks higher. Of NaNs, too, the younger stays.
//  11  A mean over the group leaves out the NaN weights, and still divides by the group; Expected Attention's moments
//      leave out a query that is not finite, and still divide by the count.
//  12  A key of length 0 has cosine 0 to everything. Rows carry the attention factor where they turn.
//  15  draw=once asks the hash with `seen` 0.
//  18  pool=avg (SnapKV's own) counts the padding as zeros. Fewer than W queries so far: the mean is over those. The
//      soft cap applies wherever a logit is computed, but in Expected Attention.
//  20  gkv: the weights are the model's own, as in 18; without an old score the new one is final in all three modes;
//  the
//      division is by the largest before the window, pinned rows included. Pools and redundancy come after the old
//      scores, which are remembered without them; the redundancy is divided by its largest, too. Window 8 (the
//      class's).
//  21  Expected Attention's |v|, and all that LagKV and mean key read, are of the rows as stored.
//  22  lag 0 (the default): min(128, (the head's budget - num_sink_tokens) / 4), at least 1. fifo: see below.
//  23  Covariance is divided by the count; no queries yet: mean and covariance are 0; sm_scale stands for 1 / sqrt(d).
//      After `seen` tokens the statistics hold those of positions num_sink_tokens to seen - J - 1.
//  25  Pinned and recent rows of a head are forced; int(alpha (its own budget - forced)) more are safe.
//  26  A remainder that ties goes to the lower layer. A short head (Duo) protects nothing but pinned tokens.
//  30  The largest finite |score| is over all scored rows, pinned and recent ones included.
//
// The formulas. A head has rows j = 0 .. n-1, oldest first; key k_j as stored, rotated to its true position; a logit is
// l_qj = cap(sm_scale q k_j), both rotated to where the mode has them; G query heads share the head.
//
//   lagkv: u_0 .. u_m-1 are the unpinned rows; P = floor(m / lag) partitions of `lag` rows from u_0 on. For row x of
//     partition p < P - 1, and lo, hi of partition p + 1: z_c = (x_c - lo_c) / (hi_c - lo_c), 0 where hi = lo;
//     t(x) = softmax over partition p of std_c(z_c), divisor d - 1; total = t(key) + v_ratio t(value).
//     rescore: score = rank of the total in its partition / lag, 0 the lowest. cross=1: the total itself.
//     fifo: rows are judged once, where an event is due. u is the unpinned rows not yet judged. Of each partition
//       p < P - 1 the best int(ratio lag) stay, the others leave, but for the newest `recent` (decision 7); all are
//       judged. Then, while the head holds more than its budget, its oldest row leaves that is neither pinned nor among
//       the newest max(recent, lag + m mod lag). Scores that are given out: the totals of rows judged at this event.
//   rkv: L_qj = max over G of l_qj for the last W queries; imp = mean_q softmax over j < n - W of L_qj, then max_pool;
//     C_ij = cos(k_i, k_j) over all n, C_ii = 0; in every row i the largest j with C_ij > 0.5 (0 if none) becomes 0;
//     red = softmax over all n of mean_i C_ij; score_j = lambda imp_j - (1 - lambda) red_j for j < n - W.
//   gkv: new_j = mean_q max over G of p_qj (causal) for j < n - W, divided by the largest; final = max(0.8 old, new)
//     (combine=mean: 0.8 old + 0.2 new; sum: 0.8 old + new). Optionally max_pool (kernel), and redundancy=1:
//     lambda final - (1 - lambda) red / max red, over j < n - W.
//   expected_attention: mu, Sigma of one head's queries before rotation; R = mean over t = 0 .. T-1 of the rotation at
//     f + t, times the attention factor, f = `seen` (absolute) or n (in_cache); z_j = sm_scale k_j.(R mu) +
//     sm_scale^2 / 2 k_j.(R Sigma R^T k_j), keys where the mode has them; p = softmax over unpinned j;
//     score_j = (mean over G of p_j + epsilon) |v_j|.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

namespace proof {

using doubles = std::vector<double>;
using stream_position = std::int64_t;

// The rows of a head at an event, the oldest first.
struct plain_rows {
  std::size_t kv_head = 0;
  stream_position seen = 0;
  std::vector<stream_position> at = {};
  std::vector<doubles> keys = {}, values = {};  // as stored, keys rotated to their true positions
  doubles sums = {};                            // what all queries gave
};

// "random" (draw=once), "h2o" (normalise=lifetime), "tova", "snapkv" (window, kernel, pool=avg, form=rkv, pool_pinned),
// "knorm", "keydiff", "mean_key", "lagkv" (lag, v_ratio, cross, mode=fifo, ratio), "expected_attention" (T, covariance,
// vnorm, epsilon), "rkv" (window, kernel, lambda), "gkv" (window, combine=max, mean, sum, decay, kernel, redundancy,
// lambda), "window" (the newest stay). Any other with its `scores`: of each row, the highest stay.
struct eviction_policy {
  std::string name;
  std::map<std::string, std::variant<double, std::string>> given = {};
  std::function<doubles(const plain_rows&)> scores = {};

  double number(const std::string& what, double otherwise) const;
  std::string word(const std::string& what, const std::string& otherwise) const;
  std::string text() const;  // for messages
};

struct eviction_setup {
  std::size_t kv_heads = 1, qo_heads = 1, d = 1, dv = 1;

  bool in_cache = true;  // tokens stand at their ranks among the rows that a head holds; false: at true positions
  doubles inv_freq = {};
  bool interleaved = false;  // dimension 2i turns with 2i + 1; else i with i + inv_freq.size()
  double attention_factor = 1;
  stream_position first_position = 0;

  double sm_scale = 1, soft_cap = 0;  // soft_cap 0: none
  doubles sink_logits = {};           // none: the standard softmax; a 0 for each query head: softmax1

  stream_position num_sink_tokens = 0, recent = 0, budget = 1, interval = 1;
  std::vector<stream_position> head_budgets = {};  // per KV head, instead of budget
  std::vector<bool> short_heads = {};              // Duo: these hold the pinned tokens and the newest
  std::optional<double> adaptive = {};             // Ada-KV's alpha
  stream_position rollback = 0;                    // so many queries are not yet in Expected Attention's statistics

  eviction_policy policy = {"knorm"};
  std::uint64_t seed = 0, layer = 0;
  std::function<double(std::uint64_t seed, std::uint64_t layer, std::size_t kv_head, stream_position seen,
                       stream_position at)>
      hash = {};  // of random

  // How a row reads back once stored: given a key rotated to its true position, or a value. None: as it is.
  std::function<doubles(const doubles&row, std::size_t kv_head, stream_position at)> stored_key = {}, stored_value = {};
};

struct eviction_answer {         // of one query head
  doubles out, weights;          // weights of the rows held
  double lse = 0, a = 0;         // a: the largest sm_scale |q| |k|
  double v_max = 0, v_norm = 0;  // the largest number, and the largest |v|, of the values held
};

struct head_event {
  bool due = false;  // it held more than its budget; else nothing was scored
  std::vector<stream_position> before, kept;
  doubles scores;  // of `before`; infinity for rows that the policy does not score
  std::vector<bool> forced;
  double largest = 0;  // finite |score|

  // How far from another choice, relative to the largest finite |score|: what float32 may decide otherwise below 2e-5.
  double margin = std::numeric_limits<double>::infinity();
  // How far scores are from a jump (ranks; cosines at 0.5): below 2e-5 float32 may give others.
  double steady = std::numeric_limits<double>::infinity();
};

struct eviction_event {
  stream_position seen = 0;
  std::vector<head_event> heads;
  double margin() const;  // the smallest
};

class eviction_oracle {
 public:
  explicit eviction_oracle(eviction_setup setup);

  // One token: q [qo_heads * d], k [kv_heads * d], v [kv_heads * dv], before rotation. Append, attend, observe, evict.
  std::vector<eviction_answer> feed(const doubles& q, const doubles& k, const doubles& v);

  bool pin(stream_position at);
  std::vector<stream_position> kept(std::size_t kv_head) const;
  stream_position seen() const { return seen_; }
  const std::vector<eviction_event>& events() const { return events_; }
  const eviction_setup& setup() const { return setup_; }

 private:
  struct held_row {
    stream_position at;
    doubles key_given, key, value;   // key: rotated to its true position, and stored
    double sum = 0;                  // H2O's
    std::optional<double> old = {};  // G-KV's
    bool judged = false;             // LagKV's fifo
  };
  using held_rows = std::vector<held_row>;
  struct head_scores {
    doubles score;                         // infinity: not scored
    std::vector<std::size_t> source = {};  // the row whose value each score copies
    doubles candidates = {};               // those values
    bool discrete = false;                 // scores are exact: only `margin` tells what float32 may change
    double margin = std::numeric_limits<double>::infinity(), steady = margin;
  };
  struct entry {  // one row in a choice
    std::size_t head, row;
    double score;
    stream_position at;
    bool kept;
  };

  std::size_t group() const { return setup_.qo_heads / setup_.kv_heads; }
  stream_position budget(std::size_t head) const;
  bool pinned(stream_position at) const;
  std::size_t lag(std::size_t head) const;  // LagKV's
  std::size_t query_window() const;
  std::size_t own_window(std::size_t head) const;
  stream_position most_protected(std::size_t head) const;
  bool is_short(std::size_t head) const;

  // Weights or logits of one query over a head's rows, both where the mode puts them.
  double place(const held_rows& rows, stream_position at) const;
  doubles logits(std::size_t qo_head, stream_position query, const held_rows& rows) const;
  doubles weights(std::size_t qo_head, stream_position query, const held_rows& rows, double* lse = nullptr) const;
  eviction_answer attend(std::size_t qo_head, const held_rows& rows) const;

  head_scores score(std::size_t head) const;
  plain_rows rows_of(std::size_t head) const;
  head_scores random(std::size_t head) const;
  head_scores h2o(std::size_t head) const;
  head_scores tova() const;
  head_scores snapkv(std::size_t head) const;
  head_scores key_alone(std::size_t head) const;
  head_scores lagkv(std::size_t head) const;
  head_scores expected_attention(std::size_t head) const;
  head_scores rkv(std::size_t head) const;
  head_scores gkv(std::size_t head, doubles* finals) const;

  doubles group_max_importance(std::size_t head, std::size_t window) const;
  doubles redundancy(const held_rows& rows, double* steady) const;
  void pool(const held_rows& rows, std::size_t n, std::size_t kernel, head_scores& scores) const;
  doubles lag_totals(const held_rows& rows, const std::vector<std::size_t>& part,
                     const std::vector<std::size_t>& reference) const;

  void evict();
  void choose(std::size_t head, const head_scores& scores, head_event& event) const;
  void choose_over_heads(const std::vector<head_scores>& scores, eviction_event& event) const;
  void choose_fifo(std::size_t head, head_event& event);
  static double margin(const std::vector<entry>& entries, const std::vector<head_scores>& scores, double largest);
  std::vector<bool> forced(std::size_t head) const;

  eviction_setup setup_;
  stream_position seen_ = 0;
  std::set<stream_position> pins_;
  std::vector<held_rows> heads_;
  std::vector<doubles> queries_;  // all of the stream, as given
  std::vector<eviction_event> events_;
};

// Ada-KV: which rows stay. Scores of every head's unforced rows, oldest first, with their positions; so many of each
// head are safe; `total` stay over all heads.
std::vector<std::vector<bool>> adaptive_choice(const std::vector<doubles>& scores,
                                               const std::vector<std::vector<stream_position>>& at,
                                               const std::vector<std::size_t>& safe, std::size_t total);

// PyramidKV: a budget a layer, `mean` on average, exactly; `fixed` of them in every layer.
std::vector<stream_position> pyramid_budgets(std::size_t layers, stream_position mean, stream_position fixed,
                                             double beta = 20);

// DuoAttention: a budget a head; a short head is sinks + newest.
std::vector<stream_position> duo_budgets(const std::vector<bool>& short_heads, stream_position full,
                                         stream_position sinks, stream_position newest);

}  // namespace proof
