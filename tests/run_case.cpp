#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "random_case.hpp"

namespace proof {

std::string far_from(const std::vector<oracle::answer>& expected, const float* out, const float* lse, nearness* near) {
  for (std::size_t head = 0; head < expected.size(); ++head) {
    const oracle::answer& e = expected[head];
    const double bound = 16 * u * (1 + e.a);
    for (double x : e.out) {
      const double error = std::abs(static_cast<double>(*out++) - x);
      if (!(error <= bound * e.v_max))
        return fmt::format("head {}: output {} instead of {}, {} times the bound; A {}, max|v| {}", head, out[-1], x,
                           error / (bound * e.v_max), e.a, e.v_max);
      if (near && e.v_max > 0) near->out = std::max(near->out, error / (bound * e.v_max));
    }
    const double error = static_cast<double>(lse[head]) == e.lse ? 0 : std::abs(static_cast<double>(lse[head]) - e.lse);
    if (!(error <= bound))
      return fmt::format("head {}: lse {} instead of {}, {} times the bound; A {}", head, lse[head], e.lse,
                         error / bound, e.a);
    if (near) near->lse = std::max(near->lse, error / bound);
  }
  return "";
}

namespace {

// A run of one random case: the cache under test, fed in chunks, and one fed token by token beside it.
class case_run {
 public:
  case_run(const random_case& c, const cache_maker& make, const plain_policy& policy, storage_error k, storage_error v,
           nearness* near)
      : case_(c),
        policy_(policy),
        k_error_(k),
        v_error_(v),
        near_(near),
        dice_(c.seed + 2),
        raw_layer_(c.layer),
        cache_(make(c.config)),
        token_by_token_(make(c.config)),
        attention_(c.params),
        owner_(as_size(policy.slots), -1) {
    raw_layer_.k_rotated = raw_layer_.q_rotated = false;
    // A query costs the oracle a sine and a cosine for each key and pair, and the products of every head.
    const auto visible = static_cast<double>(std::min<index_t>(policy.slots, c.tokens));
    const auto dims = static_cast<double>(c.layer.head_dim + c.layer.v_head_dim);
    const double cost = visible * (20 * static_cast<double>(c.layer.inv_freq.size()) +
                                   dims * static_cast<double>(c.layer.num_kv_heads + c.layer.num_qo_heads));
    check_rate_ = std::min(1., 5e6 / (cost * static_cast<double>(c.tokens)));
  }

  std::string run() {
    for (index_t fed = 0; fed < case_.tokens;) {
      index_t n = std::min(case_.tokens - fed, dice_.from_to(1, one_of<index_t>(dice_, {1, 1, 20, 100, 700})));
      if (case_.rewinds && dice_.one_in(4)) {
        if (std::string wrong = rewind(); !wrong.empty()) return wrong + at();
      }
      std::string wrong = n > 1 && dice_.one_in(4) ? append_all(n) : n > 1 ? prefill(n) : decode();
      if (wrong.empty() && seen() != cache_->get().seen()) wrong = "seen() is off";
      if (wrong.empty() && !std::equal(cache_->bytes().begin(), cache_->bytes().end(), token_by_token_->bytes().begin(),
                                       token_by_token_->bytes().end()))
        wrong = "bytes differ from those of appending token by token";
      if (wrong.empty() && cache_->get().size() != static_cast<index_t>(policy_.visible(seen()).size()))
        wrong = "size() is off";
      if (!wrong.empty()) return wrong + at();
      fed += n;
    }
    return "";
  }

 private:
  position_t seen() const { return static_cast<position_t>(keys_.size() / key_floats()); }
  std::size_t key_floats() const { return case_.layer.num_kv_heads * case_.layer.head_dim; }
  std::size_t value_floats() const { return case_.layer.num_kv_heads * case_.layer.v_head_dim; }
  std::string at() const { return fmt::format("; {} tokens seen", seen()); }

  // Appends to the cache beside, and notes what it stored.
  std::string note(const tokens& t, index_t count) {
    for (index_t i = 0; i < count; ++i) {
      const position_t p = seen();
      const index_t slot = policy_.slot(p);
      token_by_token_->append(t.k.row(i), t.v.row(i));
      owner_[as_size(slot)] = p;
      keys_.resize(keys_.size() + key_floats());
      values_.resize(values_.size() + value_floats());
      raw_keys_.insert(raw_keys_.end(), t.raw_k.row(i).data(), t.raw_k.row(i).data() + key_floats());
      for (index_t head = 0; head < case_.config.num_kv_heads; ++head) {
        const index_t k_at = head * case_.config.head_dim, v_at = head * case_.config.v_head_dim;
        float* const k = keys_.data() + keys_.size() - key_floats() + k_at;
        float* const v = values_.data() + values_.size() - value_floats() + v_at;
        token_by_token_->key(head, slot, k);
        token_by_token_->value(head, slot, v);
        if (!dice_.one_in(8)) continue;
        std::vector<double> to_store(t.k.row(i).data() + k_at, t.k.row(i).data() + k_at + case_.config.head_dim);
        double rotating = 0;
        if (!case_.layer.q_rotated && !case_.layer.inv_freq.empty()) {
          rotating = 8 * u;
          for (std::size_t d = 0; d < 2 * case_.layer.inv_freq.size(); ++d)
            to_store[d] *= static_cast<double>(case_.layer.attention_factor);
          oracle::rotate(case_.layer, case_.layer.first_position + p, to_store.data());
        }
        if (!stored(to_store, k, {k_error_.relative, k_error_.of_row + rotating})) return "a key is not what was given";
        to_store.assign(t.v.row(i).data() + v_at, t.v.row(i).data() + v_at + case_.config.v_head_dim);
        if (!stored(to_store, v, v_error_)) return "a value is not what was given";
      }
    }
    return "";
  }

  static bool stored(const std::vector<double>& given, const float* found, storage_error allowed) {
    double largest = 0;
    for (double x : given) largest = std::max(largest, std::abs(x));
    for (std::size_t i = 0; i < given.size(); ++i)
      if (!(std::abs(static_cast<double>(found[i]) - given[i]) <=
            allowed.relative * std::abs(given[i]) + allowed.of_row * largest))
        return false;
    return true;
  }

  // One query token's outputs against the oracle on the stored rows and, where storing changed nothing, on the raw
  // ones.
  std::string compare(const tokens& t, index_t row, position_t query, const float* out, const float* lse) {
    const bool tie = query % tie_period == 0;
    if (dice_.uniform() >= check_rate_ * (tie ? 4 : 1)) return "";
    const std::vector<position_t> visible = policy_.visible(query + 1);
    std::string wrong =
        far_from(oracle::attend(case_.layer, t.q.row(row).data(), query, visible, keys_.data(), values_.data()), out,
                 lse, near_);
    if (wrong.empty() && case_.k_format == 0 && !case_.layer.q_rotated && dice_.one_in(2)) {
      wrong =
          far_from(oracle::attend(raw_layer_, t.q.row(row).data(), query, visible, raw_keys_.data(), values_.data()),
                   out, lse, near_);
      if (!wrong.empty()) wrong = "against raw keys: " + wrong;
    }
    return wrong.empty() ? wrong : fmt::format("token {}, row {}: {}", query, row, wrong);
  }

  std::string decode() {
    const position_t query = seen();
    const tokens t = draw_tokens(case_, dice_, query, 1);
    cache_->append(t.k, t.v);
    return decode(t, 0);
  }
  std::string decode(const tokens& t, index_t row) {
    const position_t before = seen();
    std::string wrong = note(t, row + 1);
    matrix out = matrix::Constant(1, static_cast<index_t>(case_.layer.num_qo_heads * case_.layer.v_head_dim), infinity);
    std::vector<float> lse(case_.layer.num_qo_heads, infinity);
    attention_.decode(t.q.row(row), cache_->get(), out, workspace_, {.lse = lse});
    std::vector<float> alone(lse.size());
    matrix none;
    attention_.decode(t.q.row(row), std::as_const(cache_->get()), none, workspace_, {.lse = alone, .out = false});
    if (wrong.empty() && std::memcmp(alone.data(), lse.data(), lse.size() * sizeof(float)) != 0)
      return "without an output lse is another";
    return !wrong.empty() ? wrong : compare(t, row, before + row, out.data(), lse.data());
  }

  // Many tokens appended at once; only the last one's query is asked.
  std::string append_all(index_t n) {
    const tokens t = draw_tokens(case_, dice_, seen(), n);
    cache_->append(t.k, t.v);
    return decode(t, n - 1);
  }

  std::string prefill(index_t n) {
    const position_t first = seen();
    const tokens t = draw_tokens(case_, dice_, first, n);
    // All matrices are blocks of wider ones, and nothing is written beside them.
    const index_t heads = static_cast<index_t>(case_.layer.num_qo_heads);
    const auto in_wider = [](const matrix& m) {
      matrix wider = matrix::Constant(m.rows(), m.cols() + 3, std::numeric_limits<float>::quiet_NaN());
      wider.leftCols(m.cols()) = m;
      return wider;
    };
    const matrix q = in_wider(t.q), k = in_wider(t.k), v = in_wider(t.v);
    matrix out = matrix::Constant(n, heads * case_.config.v_head_dim + 3, infinity);
    std::vector<float> lse(as_size(n * heads) + 1, infinity);
    attention_.prefill(q.leftCols(t.q.cols()), k.leftCols(t.k.cols()), v.leftCols(t.v.cols()), cache_->get(),
                       out.leftCols(out.cols() - 3), workspace_, {.lse = std::span(lse).first(as_size(n * heads))});
    if (!(out.rightCols(3).array() == infinity).all() || lse.back() != infinity) return "written beside the output";
    std::string wrong = note(t, n);
    for (index_t i = 0; i < n && wrong.empty(); ++i)
      wrong = compare(t, i, first + i, out.row(i).data(), lse.data() + i * heads);
    return wrong;
  }

  // Whether all that was visible after `back` tokens is still where it was.
  bool recoverable(position_t back) const {
    for (position_t p : policy_.visible(back))
      if (owner_[as_size(policy_.slot(p))] != p) return false;
    return true;
  }

  std::string rewind() {
    position_t back = seen() - std::min<position_t>(seen(), dice_.from_to(0, one_of<index_t>(dice_, {2, 20, 50, 500})));
    if (dice_.one_in(10)) back = dice_.from_to(0, std::min<position_t>(seen(), 10));
    if (dice_.one_in(40)) {
      back = 0;
      cache_->clear();
      token_by_token_->clear();
    } else {
      position_t smallest = seen();
      while (smallest > 0 && recoverable(smallest - 1)) --smallest;
      if (cache_->min_truncate() != smallest)
        return fmt::format("min_truncate() is {} instead of {}", cache_->min_truncate(), smallest);
      bool refused = false;
      try {
        cache_->truncate(back);
      } catch (const std::invalid_argument& e) {
        refused = true;
        const std::string message = e.what() + std::string(",");
        if (message.find(fmt::format("seen was {}, had to be at least {}", back, smallest)) != 11) return message;
      }
      if (refused == recoverable(back)) return fmt::format("{} a way back to {}", refused ? "refused" : "took", back);
      if (refused) return cache_->get().seen() == seen() ? "" : "a refused truncate changed seen()";
      token_by_token_->truncate(back);
    }
    keys_.resize(as_size(back) * key_floats());
    raw_keys_.resize(keys_.size());
    values_.resize(as_size(back) * value_floats());
    return cache_->get().seen() == back ? "" : "truncate left seen() wrong";
  }

  const random_case& case_;
  const plain_policy& policy_;
  storage_error k_error_, v_error_;
  nearness* near_;
  effort::dice dice_;
  oracle::layer raw_layer_;
  std::unique_ptr<open_cache> cache_, token_by_token_;
  attention attention_;
  workspace workspace_;
  double check_rate_ = 1;
  std::vector<float> keys_, raw_keys_, values_;  // of every token of the stream: as stored, and keys as given
  std::vector<position_t> owner_;                // which token lies in a slot
};

}  // namespace

std::string run_case(const random_case& c, const cache_maker& make, const plain_policy& policy, storage_error k,
                     storage_error v, nearness* near) {
  return case_run(c, make, policy, k, v, near).run();
}

std::string run_library_case(const random_case& c, nearness* near) {
  // Half a unit in the last place; f16 has none below 2^-24, far below the largest number of any row here.
  static constexpr storage_error errors[] = {{0, 0}, {0x1p-11, 0x1p-20}, {0x1p-8, 0}};
  return run_case(
      c, [&](const cache_config& config) { return make_cache(c.k_format, c.v_format, config); },
      plain_sink_window(c.config.num_sink_tokens, c.config.window, c.config.rollback), errors[c.k_format],
      errors[c.v_format], near);
}

}  // namespace proof
