#include "eviction_oracle.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace proof {
namespace {

constexpr double infinite = std::numeric_limits<double>::infinity();

double dot(const doubles& a, const doubles& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

double norm(const doubles& a) { return std::sqrt(dot(a, a)); }

doubles slice(const doubles& row, std::size_t head, std::size_t size) {
  const auto first = row.begin() + static_cast<std::ptrdiff_t>(head * size);
  return {first, first + static_cast<std::ptrdiff_t>(size)};
}

doubles finite_or_zero(const doubles& row) {
  const bool finite = std::all_of(row.begin(), row.end(), [](double x) { return std::isfinite(x); });
  return finite ? row : doubles(row.size());
}

// The angles of `by` positions for each pair, applied to one row of a head.
doubles rotated(const eviction_setup& setup, doubles row, double by, double factor) {
  const std::size_t pairs = setup.inv_freq.size();
  for (std::size_t i = 0; i < pairs; ++i) {
    double& x = row[setup.interleaved ? 2 * i : i];
    double& y = row[setup.interleaved ? 2 * i + 1 : i + pairs];
    const double a = x, b = y, cos = std::cos(by * setup.inv_freq[i]), sin = std::sin(by * setup.inv_freq[i]);
    x = factor * (a * cos - b * sin);
    y = factor * (b * cos + a * sin);
  }
  return row;
}

doubles softmax(const doubles& logits) {
  double largest = -infinite, sum = 0;
  for (double x : logits) largest = std::max(largest, x);
  doubles p;
  for (double x : logits) p.push_back(std::exp(x - largest));
  for (double x : p) sum += x;
  for (double& x : p) x /= sum;
  return p;
}

// Whether a row is to stay rather than another: scores as float32, NaN the lowest; equal: the younger.
bool stays_before(double score, stream_position at, double other, stream_position other_at) {
  const float a = static_cast<float>(score), b = static_cast<float>(other);
  if (std::isnan(a) && std::isnan(b)) return at > other_at;
  if (std::isnan(a) || std::isnan(b)) return std::isnan(b);
  return a != b ? a > b : at > other_at;
}

doubles add(doubles a, const doubles& b, double times = 1) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += times * b[i];
  return a;
}

doubles divided(doubles a, double by) {
  for (double& x : a) x /= by;
  return a;
}

std::vector<std::size_t> counted(std::size_t n) {
  std::vector<std::size_t> list(n);
  std::iota(list.begin(), list.end(), std::size_t{0});
  return list;
}

double largest_finite(const doubles& scores) {
  double largest = 0;
  for (double x : scores)
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  return largest;
}

// Standard deviation of a row over its channels, each brought to its reference's range; divisor d - 1.
double spread(const doubles& x, const doubles& low, const doubles& high) {
  doubles z;
  for (std::size_t c = 0; c < x.size(); ++c) z.push_back(high[c] == low[c] ? 0 : (x[c] - low[c]) / (high[c] - low[c]));
  const auto count = static_cast<double>(z.size());
  double mean = 0, squares = 0;
  for (double value : z) mean += value / count;
  for (double value : z) squares += (value - mean) * (value - mean);
  return std::sqrt(squares / (count - 1));
}

// Of each row of a partition, against the rows that follow it.
doubles lag_spreads(const std::vector<doubles>& part, const std::vector<doubles>& reference) {
  doubles low = reference.front(), high = low, result;
  for (const doubles& row : reference)
    for (std::size_t c = 0; c < row.size(); ++c) {
      low[c] = std::min(low[c], row[c]);
      high[c] = std::max(high[c], row[c]);
    }
  for (const doubles& row : part) result.push_back(spread(row, low, high));
  return softmax(result);
}

}  // namespace

double eviction_policy::number(const std::string& what, double otherwise) const {
  const auto found = given.find(what);
  return found == given.end() ? otherwise : std::get<double>(found->second);
}

std::string eviction_policy::word(const std::string& what, const std::string& otherwise) const {
  const auto found = given.find(what);
  return found == given.end() ? otherwise : std::get<std::string>(found->second);
}

std::string eviction_policy::text() const {
  std::string text = name;
  for (const auto& [what, value] : given) {
    const auto* const number = std::get_if<double>(&value);
    text += " " + what + "=" + (number ? std::to_string(*number) : std::get<std::string>(value));
  }
  return text;
}

double eviction_event::margin() const {
  double least = infinite;
  for (const head_event& head : heads) least = std::min(least, head.margin);
  return least;
}

eviction_oracle::eviction_oracle(eviction_setup setup) : setup_(std::move(setup)), heads_(setup_.kv_heads) {}

stream_position eviction_oracle::budget(std::size_t head) const {
  return setup_.head_budgets.empty() ? setup_.budget : setup_.head_budgets[head];
}

bool eviction_oracle::is_short(std::size_t head) const {
  return !setup_.short_heads.empty() && setup_.short_heads[head];
}

bool eviction_oracle::pinned(stream_position at) const { return at < setup_.num_sink_tokens || pins_.count(at) > 0; }

std::size_t eviction_oracle::lag(std::size_t head) const {
  const double given = setup_.policy.number("lag", 0);
  const stream_position quarter = (budget(head) - setup_.num_sink_tokens) / 4;
  return static_cast<std::size_t>(given > 0 ? static_cast<stream_position>(given)
                                            : std::max<stream_position>(1, std::min<stream_position>(128, quarter)));
}

std::size_t eviction_oracle::query_window() const {
  const std::string& name = setup_.policy.name;
  const bool looks = name == "snapkv" || name == "rkv" || name == "gkv";
  return looks ? static_cast<std::size_t>(setup_.policy.number("window", 8)) : 0;
}

// How many of the newest rows are not scored.
std::size_t eviction_oracle::own_window(std::size_t head) const {
  const held_rows& rows = heads_[head];
  if (setup_.policy.name != "lagkv") return std::min(rows.size(), query_window());
  std::vector<std::size_t> unpinned;
  for (std::size_t j = 0; j < rows.size(); ++j)
    if (!pinned(rows[j].at) && !rows[j].judged) unpinned.push_back(j);
  const std::size_t m = unpinned.size(), last = std::min(m, lag(head) + m % lag(head));
  return last == 0 ? 0 : rows.size() - unpinned[m - last];
}

// How many of the newest rows may be forced at an event.
stream_position eviction_oracle::most_protected(std::size_t head) const {
  if (is_short(head)) return 0;
  const std::size_t window = setup_.policy.name == "lagkv" ? 2 * lag(head) - 1 : query_window();
  return std::max(setup_.recent, static_cast<stream_position>(window));
}

bool eviction_oracle::pin(stream_position at) {
  if (pinned(at)) return true;
  for (const held_rows& rows : heads_)
    if (at < seen_ && std::none_of(rows.begin(), rows.end(), [&](const held_row& row) { return row.at == at; }))
      return false;
  stream_position least = std::numeric_limits<stream_position>::max();
  for (std::size_t head = 0; head < setup_.kv_heads; ++head)
    least = std::min(least, budget(head) - most_protected(head));
  const auto pins = static_cast<stream_position>(pins_.size()) + 1;
  if (least - setup_.num_sink_tokens - pins < 1) return false;
  pins_.insert(at);
  return true;
}

std::vector<stream_position> eviction_oracle::kept(std::size_t kv_head) const {
  std::vector<stream_position> list;
  for (const held_row& row : heads_[kv_head]) list.push_back(row.at);
  return list;
}

// Attention.

// Where the token at a position of the stream stands among a head's rows. Queries are held tokens themselves.
double eviction_oracle::place(const held_rows& rows, stream_position at) const {
  if (!setup_.in_cache) return static_cast<double>(setup_.first_position + at);
  std::size_t rank = 0;
  while (rank < rows.size() && rows[rank].at < at) ++rank;
  return static_cast<double>(rank);
}

// Of the rows that the query sees: those not younger than it.
doubles eviction_oracle::logits(std::size_t qo_head, stream_position query, const held_rows& rows) const {
  const doubles q = rotated(setup_, slice(queries_[static_cast<std::size_t>(query)], qo_head, setup_.d),
                            place(rows, query), setup_.attention_factor);
  doubles result;
  for (const held_row& row : rows) {
    if (row.at > query) break;
    const double from = static_cast<double>(setup_.first_position + row.at);
    double logit = setup_.sm_scale * dot(q, rotated(setup_, row.key, place(rows, row.at) - from, 1));
    if (setup_.soft_cap > 0) logit = setup_.soft_cap * std::tanh(logit / setup_.soft_cap);
    result.push_back(logit);
  }
  return result;
}

// The model's own: the sink has a column, which is dropped. 0 for rows that the query does not see.
doubles eviction_oracle::weights(std::size_t qo_head, stream_position query, const held_rows& rows, double* lse) const {
  doubles columns = logits(qo_head, query, rows);
  const std::size_t seen = columns.size();
  if (!setup_.sink_logits.empty()) columns.push_back(setup_.sink_logits[qo_head]);
  doubles p = softmax(columns);
  if (lse != nullptr) {
    const std::size_t largest = static_cast<std::size_t>(std::max_element(p.begin(), p.end()) - p.begin());
    *lse = columns[largest] - std::log(p[largest]);
  }
  p.resize(seen);
  p.resize(rows.size(), 0);
  return p;
}

eviction_answer eviction_oracle::attend(std::size_t qo_head, const held_rows& rows) const {
  eviction_answer answer;
  answer.weights = weights(qo_head, seen_ - 1, rows, &answer.lse);
  answer.out.assign(setup_.dv, 0);
  const doubles q = rotated(setup_, slice(queries_.back(), qo_head, setup_.d), 0, setup_.attention_factor);
  for (std::size_t j = 0; j < rows.size(); ++j) {
    answer.out = add(answer.out, rows[j].value, answer.weights[j]);
    answer.a = std::max(answer.a, std::abs(setup_.sm_scale) * norm(q) * norm(rows[j].key));
    answer.v_norm = std::max(answer.v_norm, norm(rows[j].value));
    for (double x : rows[j].value) answer.v_max = std::max(answer.v_max, std::abs(x));
  }
  return answer;
}

std::vector<eviction_answer> eviction_oracle::feed(const doubles& q, const doubles& k, const doubles& v) {
  for (std::size_t head = 0; head < setup_.kv_heads; ++head) {
    held_row row{.at = seen_, .key_given = slice(k, head, setup_.d), .key = {}, .value = slice(v, head, setup_.dv)};
    row.key =
        rotated(setup_, row.key_given, static_cast<double>(setup_.first_position + seen_), setup_.attention_factor);
    if (setup_.stored_key) row.key = setup_.stored_key(row.key, head, seen_);
    if (setup_.stored_value) row.value = setup_.stored_value(row.value, head, seen_);
    heads_[head].push_back(row);
  }
  queries_.push_back(q);
  ++seen_;

  std::vector<eviction_answer> answers;
  for (std::size_t qo_head = 0; qo_head < setup_.qo_heads; ++qo_head) {
    held_rows& rows = heads_[qo_head / group()];
    answers.push_back(attend(qo_head, rows));
    for (std::size_t j = 0; j < rows.size(); ++j)
      if (const double p = answers.back().weights[j]; !std::isnan(p)) rows[j].sum += p / static_cast<double>(group());
  }
  if (seen_ % setup_.interval == 0) evict();
  return answers;
}

// Scores.

eviction_oracle::head_scores eviction_oracle::score(std::size_t head) const {
  const std::string& name = setup_.policy.name;
  if (is_short(head) || name == "window") {
    head_scores scores;
    for (const held_row& row : heads_[head]) scores.score.push_back(static_cast<double>(row.at));
    scores.discrete = true;
    return scores;
  }
  if (setup_.policy.scores) return {.score = setup_.policy.scores(rows_of(head))};
  if (name == "random") return random(head);
  if (name == "h2o") return h2o(head);
  if (name == "tova") return tova();
  if (name == "snapkv") return snapkv(head);
  if (name == "lagkv") return lagkv(head);
  if (name == "expected_attention") return expected_attention(head);
  if (name == "rkv") return rkv(head);
  if (name == "gkv") return gkv(head, nullptr);
  return key_alone(head);
}

plain_rows eviction_oracle::rows_of(std::size_t head) const {
  plain_rows rows{.kv_head = head, .seen = seen_};
  for (const held_row& row : heads_[head]) {
    rows.at.push_back(row.at);
    rows.keys.push_back(row.key);
    rows.values.push_back(row.value);
    rows.sums.push_back(row.sum);
  }
  return rows;
}

eviction_oracle::head_scores eviction_oracle::random(std::size_t head) const {
  const bool once = setup_.policy.word("draw", "fresh") == "once";
  head_scores scores;
  scores.discrete = true;
  for (const held_row& row : heads_[head])
    scores.score.push_back(setup_.hash(setup_.seed, setup_.layer, head, once ? 0 : seen_, row.at));
  return scores;
}

eviction_oracle::head_scores eviction_oracle::h2o(std::size_t head) const {
  const bool lifetime = setup_.policy.word("normalise", "no") == "lifetime";
  head_scores scores;
  for (const held_row& row : heads_[head])
    scores.score.push_back(lifetime ? row.sum / static_cast<double>(seen_ - row.at) : row.sum);
  return scores;
}

// One set for the layer: all heads hold the same rows.
eviction_oracle::head_scores eviction_oracle::tova() const {
  head_scores scores{.score = doubles(heads_[0].size())};
  for (std::size_t qo_head = 0; qo_head < setup_.qo_heads; ++qo_head)
    scores.score = add(scores.score, weights(qo_head, seen_ - 1, heads_[qo_head / group()]));
  scores.score = divided(scores.score, static_cast<double>(setup_.qo_heads));
  return scores;
}

// The mean over the last queries of softmax over the rows before the window of the group's largest logits.
doubles eviction_oracle::group_max_importance(std::size_t head, std::size_t window) const {
  const held_rows& rows = heads_[head];
  const std::size_t n = rows.size() - std::min(rows.size(), window);
  const auto queries = std::min<stream_position>(seen_, static_cast<stream_position>(window));
  doubles mean(n);
  for (stream_position query = seen_ - queries; query < seen_; ++query) {
    doubles largest(n, -infinite);
    for (std::size_t g = 0; g < group(); ++g) {
      const doubles one = logits(head * group() + g, query, rows);
      for (std::size_t j = 0; j < n; ++j) largest[j] = std::max(largest[j], one[j]);
    }
    mean = add(mean, softmax(largest));
  }
  return divided(mean, static_cast<double>(queries));
}

// The largest (or the mean, zeros around) of the first n scores' neighbourhoods.
void eviction_oracle::pool(const held_rows& rows, std::size_t n, std::size_t kernel, head_scores& scores) const {
  const doubles from = scores.candidates =
      doubles(scores.score.begin(), scores.score.begin() + static_cast<std::ptrdiff_t>(n));
  const bool average = setup_.policy.word("pool", "max") == "avg";
  const bool with_pinned = setup_.policy.number("pool_pinned", 1) != 0;
  const std::size_t reach = kernel / 2;
  scores.source = counted(scores.score.size());
  for (std::size_t j = 0; j < n; ++j) {
    double sum = 0, largest = -infinite;
    for (std::size_t i = j < reach ? 0 : j - reach; i < n && i <= j + reach; ++i) {
      if (i != j && !with_pinned && pinned(rows[i].at)) continue;
      sum += from[i];
      if (from[i] > largest) {
        largest = from[i];
        if (!average) scores.source[j] = i;
      }
      if (std::isnan(from[i])) largest = sum = from[i];
    }
    scores.score[j] = average ? sum / static_cast<double>(kernel) : largest;
  }
  if (average) scores.candidates.clear();
}

eviction_oracle::head_scores eviction_oracle::snapkv(std::size_t head) const {
  const held_rows& rows = heads_[head];
  const auto window = static_cast<std::size_t>(setup_.policy.number("window", 8));
  const auto kernel = static_cast<std::size_t>(setup_.policy.number("kernel", 7));
  const std::size_t n = rows.size() - own_window(head);
  doubles mean(n);
  if (setup_.policy.word("form", "") == "rkv") {
    mean = group_max_importance(head, window);
  } else {
    const auto queries = std::min<stream_position>(seen_, static_cast<stream_position>(window));
    for (stream_position query = seen_ - queries; query < seen_; ++query)
      for (std::size_t g = 0; g < group(); ++g) mean = add(mean, weights(head * group() + g, query, rows));
    mean = divided(mean, static_cast<double>(queries) * static_cast<double>(group()));
  }
  head_scores scores{.score = mean};
  scores.score.resize(rows.size(), infinite);
  pool(rows, n, kernel, scores);
  return scores;
}

// What looks at keys alone: knorm, keydiff, mean_key.
eviction_oracle::head_scores eviction_oracle::key_alone(std::size_t head) const {
  const held_rows& rows = heads_[head];
  const auto count = static_cast<double>(rows.size());
  head_scores scores;
  doubles anchor(setup_.d), mean(setup_.d);
  for (const held_row& row : rows) {
    const double length = norm(row.key);
    if (length > 0) anchor = add(anchor, row.key, 1 / (length * count));
    mean = add(mean, row.key, 1 / count);
  }
  for (const held_row& row : rows) {
    const double lengths = norm(row.key) * norm(anchor);
    if (setup_.policy.name == "knorm") scores.score.push_back(-norm(row.key_given));
    if (setup_.policy.name == "keydiff") scores.score.push_back(lengths == 0 ? 0 : -dot(row.key, anchor) / lengths);
    if (setup_.policy.name == "mean_key") scores.score.push_back(norm(add(row.key, mean, -1)));
  }
  return scores;
}

doubles eviction_oracle::lag_totals(const held_rows& rows, const std::vector<std::size_t>& part,
                                    const std::vector<std::size_t>& reference) const {
  std::vector<doubles> keys, values, next_keys, next_values;
  for (std::size_t j : part) keys.push_back(rows[j].key), values.push_back(rows[j].value);
  for (std::size_t j : reference) next_keys.push_back(rows[j].key), next_values.push_back(rows[j].value);
  return add(lag_spreads(keys, next_keys), lag_spreads(values, next_values), setup_.policy.number("v_ratio", 1));
}

eviction_oracle::head_scores eviction_oracle::lagkv(std::size_t head) const {
  const held_rows& rows = heads_[head];
  const std::size_t lag = this->lag(head);
  const bool cross = setup_.policy.number("cross", 0) != 0;
  std::vector<std::size_t> unpinned;
  for (std::size_t j = 0; j < rows.size(); ++j)
    if (!pinned(rows[j].at)) unpinned.push_back(j);
  head_scores scores{.score = doubles(rows.size(), infinite), .discrete = !cross};
  const auto partition = [&](std::size_t p) {
    const auto first = unpinned.begin() + static_cast<std::ptrdiff_t>(p * lag);
    return std::vector<std::size_t>(first, first + static_cast<std::ptrdiff_t>(lag));
  };
  for (std::size_t p = 0; (p + 2) * lag <= unpinned.size(); ++p) {
    const std::vector<std::size_t> part = partition(p);
    const doubles totals = lag_totals(rows, part, partition(p + 1));
    const double largest = largest_finite(totals);
    std::vector<std::size_t> order = counted(lag);  // the highest first
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return stays_before(totals[a], rows[part[a]].at, totals[b], rows[part[b]].at);
    });
    for (std::size_t i = 0; i < lag; ++i) {
      const double rank = static_cast<double>(lag - 1 - i) / static_cast<double>(lag);
      scores.score[part[order[i]]] = cross ? totals[order[i]] : rank;
      if (i > 0 && !cross) scores.steady = std::min(scores.steady, (totals[order[i - 1]] - totals[order[i]]) / largest);
    }
  }
  if (!cross) scores.margin = scores.steady;
  return scores;
}

eviction_oracle::head_scores eviction_oracle::expected_attention(std::size_t head) const {
  const held_rows& rows = heads_[head];
  const std::size_t d = setup_.d, n = rows.size();
  const auto horizon = static_cast<std::size_t>(setup_.policy.number("T", 512));
  const double next = setup_.in_cache ? static_cast<double>(n) : static_cast<double>(setup_.first_position + seen_);

  // The mean rotation: column c is what becomes of the c-th unit vector.
  std::vector<doubles> mean_rotation(d, doubles(d));
  for (std::size_t c = 0; c < d; ++c)
    for (std::size_t t = 0; t < horizon; ++t) {
      doubles unit(d);
      unit[c] = 1;
      mean_rotation[c] =
          add(mean_rotation[c], rotated(setup_, unit, next + static_cast<double>(t), setup_.attention_factor),
              1 / static_cast<double>(horizon));
    }

  head_scores scores{.score = doubles(n)};
  std::vector<std::size_t> unpinned;
  for (std::size_t j = 0; j < n; ++j)
    if (!pinned(rows[j].at)) unpinned.push_back(j);
  for (std::size_t g = 0; g < group(); ++g) {
    std::vector<doubles> queries;
    for (stream_position at = setup_.num_sink_tokens; at < seen_ - setup_.rollback; ++at)
      queries.push_back(finite_or_zero(slice(queries_[static_cast<std::size_t>(at)], head * group() + g, d)));
    doubles mean(d);
    for (const doubles& q : queries) mean = add(mean, q, 1 / static_cast<double>(queries.size()));

    doubles z;
    for (std::size_t j : unpinned) {
      const double turn = place(rows, rows[j].at) - static_cast<double>(setup_.first_position + rows[j].at);
      const doubles key = rotated(setup_, rows[j].key, turn, 1);
      doubles back;  // R^T k: k.(R x) = (R^T k).x
      for (std::size_t c = 0; c < d; ++c) back.push_back(dot(mean_rotation[c], key));
      double squares = 0;  // k R Sigma R^T k
      for (const doubles& q : queries) {
        const double deviation = dot(back, add(q, mean, -1));
        squares += deviation * deviation / static_cast<double>(queries.size());
      }
      if (setup_.policy.number("covariance", 1) == 0) squares = 0;
      z.push_back(setup_.sm_scale * dot(back, mean) + setup_.sm_scale * setup_.sm_scale * squares / 2);
    }
    const doubles p = softmax(z);
    for (std::size_t i = 0; i < p.size(); ++i) scores.score[unpinned[i]] += p[i] / static_cast<double>(group());
  }
  for (std::size_t j : unpinned)
    if (setup_.policy.number("vnorm", 1) != 0)
      scores.score[j] = (scores.score[j] + setup_.policy.number("epsilon", 0)) * norm(rows[j].value);
  for (std::size_t j = 0; j < n; ++j)
    if (pinned(rows[j].at)) scores.score[j] = infinite;
  return scores;
}

// R-KV's: how like the others a key is, its newest copies not counted. Of all rows.
doubles eviction_oracle::redundancy(const held_rows& rows, double* steady) const {
  const std::size_t n = rows.size();
  doubles mean(n);
  for (std::size_t i = 0; i < n; ++i) {
    doubles like(n);
    std::size_t newest = 0;
    for (std::size_t j = 0; j < n; ++j) {
      const double lengths = norm(rows[i].key) * norm(rows[j].key);
      if (i != j && lengths > 0) like[j] = dot(rows[i].key, rows[j].key) / lengths;
      if (like[j] > 0.5) newest = j;
      *steady = std::min(*steady, std::abs(like[j] - 0.5));
    }
    like[newest] = 0;
    mean = add(mean, like, 1 / static_cast<double>(n));
  }
  return softmax(mean);
}

eviction_oracle::head_scores eviction_oracle::rkv(std::size_t head) const {
  const held_rows& rows = heads_[head];
  const double lambda = setup_.policy.number("lambda", 0.07);
  const std::size_t n = rows.size() - own_window(head);
  head_scores scores;
  scores.score = group_max_importance(head, static_cast<std::size_t>(setup_.policy.number("window", 8)));
  scores.score.resize(rows.size(), infinite);
  pool(rows, n, static_cast<std::size_t>(setup_.policy.number("kernel", 7)), scores);
  const doubles red = redundancy(rows, &scores.steady);
  for (std::size_t j = 0; j < n; ++j) scores.score[j] = lambda * scores.score[j] - (1 - lambda) * red[j];
  scores.source.clear();  // no two scores are copies
  scores.candidates.clear();
  scores.margin = scores.steady;
  return scores;
}

eviction_oracle::head_scores eviction_oracle::gkv(std::size_t head, doubles* finals) const {
  const held_rows& rows = heads_[head];
  const auto window = static_cast<stream_position>(setup_.policy.number("window", 8));
  const auto kernel = static_cast<std::size_t>(setup_.policy.number("kernel", 1));
  const double decay = setup_.policy.number("decay", 0.8), lambda = setup_.policy.number("lambda", 0.1);
  const std::string combine = setup_.policy.word("combine", "max");
  const stream_position queries = std::min(seen_, window);
  const std::size_t n = rows.size() - own_window(head);
  doubles score(n);
  for (stream_position query = seen_ - queries; query < seen_; ++query) {
    doubles largest(n);
    for (std::size_t g = 0; g < group(); ++g) {
      const doubles p = weights(head * group() + g, query, rows);
      for (std::size_t j = 0; j < n; ++j) largest[j] = std::max(largest[j], p[j]);
    }
    score = add(score, largest, 1 / static_cast<double>(queries));
  }
  score = divided(score, *std::max_element(score.begin(), score.end()));
  for (std::size_t j = 0; j < n; ++j) {
    if (!rows[j].old) continue;
    if (combine == "max") score[j] = std::max(decay * *rows[j].old, score[j]);
    if (combine == "mean") score[j] = decay * *rows[j].old + (1 - decay) * score[j];
    if (combine == "sum") score[j] = decay * *rows[j].old + score[j];
  }
  if (finals != nullptr) *finals = score;
  head_scores scores{.score = score};
  scores.score.resize(rows.size(), infinite);
  if (kernel > 1) pool(rows, n, kernel, scores);
  if (setup_.policy.number("redundancy", 0) != 0) {
    const doubles red = redundancy(rows, &scores.steady);
    const double largest = *std::max_element(red.begin(), red.begin() + static_cast<std::ptrdiff_t>(n));
    for (std::size_t j = 0; j < n; ++j) scores.score[j] = lambda * scores.score[j] - (1 - lambda) * red[j] / largest;
    scores.source.clear();
    scores.candidates.clear();
    scores.margin = scores.steady;
  }
  return scores;
}

// The choice.

std::vector<bool> eviction_oracle::forced(std::size_t head) const {
  const held_rows& rows = heads_[head];
  const std::size_t newest = is_short(head) ? 0 : std::max(static_cast<std::size_t>(setup_.recent), own_window(head));
  std::vector<bool> result;
  for (std::size_t j = 0; j < rows.size(); ++j) result.push_back(pinned(rows[j].at) || j + newest >= rows.size());
  return result;
}

// The border between what stays and what leaves. Two equal scores that are copies of one value tie in any arithmetic,
// unless another candidate comes near that value.
double eviction_oracle::margin(const std::vector<entry>& entries, const std::vector<head_scores>& scores,
                               double largest) {
  const entry *stays = nullptr, *leaves = nullptr;
  for (const entry& e : entries) {
    const auto before = [&](const entry* other) { return stays_before(e.score, e.at, other->score, other->at); };
    if (e.kept && (stays == nullptr || !before(stays))) stays = &e;
    if (!e.kept && (leaves == nullptr || before(leaves))) leaves = &e;
  }
  double least = infinite;
  for (const head_scores& of : scores) least = std::min(least, of.margin);
  if (stays == nullptr || leaves == nullptr || std::isnan(leaves->score)) return least;
  const head_scores& of = scores[stays->head];
  if (of.discrete) return least;
  const bool copies =
      stays->head == leaves->head && !of.source.empty() && of.source[stays->row] == of.source[leaves->row];
  if (!copies) return std::min(least, (stays->score - leaves->score) / largest);
  for (std::size_t i = 0; i < of.candidates.size(); ++i)
    if (i != of.source[stays->row]) least = std::min(least, std::abs(of.candidates[i] - stays->score) / largest);
  return least;
}

void eviction_oracle::choose(std::size_t head, const head_scores& scores, head_event& event) const {
  const held_rows& rows = heads_[head];
  std::vector<entry> entries;
  for (std::size_t j = 0; j < rows.size(); ++j)
    if (!event.forced[j]) entries.push_back({0, j, scores.score[j], rows[j].at, false});
  std::sort(entries.begin(), entries.end(),
            [](const entry& a, const entry& b) { return stays_before(a.score, a.at, b.score, b.at); });
  const std::size_t forced = rows.size() - entries.size(), all = static_cast<std::size_t>(budget(head));
  std::vector<bool> stays = event.forced;
  for (std::size_t i = 0; i < entries.size() && forced + i < all; ++i) {
    entries[i].kept = true;
    stays[entries[i].row] = true;
  }
  for (std::size_t j = 0; j < rows.size(); ++j)
    if (stays[j]) event.kept.push_back(rows[j].at);
  event.margin = margin(entries, {scores}, event.largest);
}

void eviction_oracle::choose_over_heads(const std::vector<head_scores>& scores, eviction_event& event) const {
  std::vector<doubles> free_scores(heads_.size());
  std::vector<std::vector<stream_position>> at(heads_.size());
  std::vector<std::vector<std::size_t>> row_of(heads_.size());
  std::vector<std::size_t> safe;
  stream_position total = 0;
  for (std::size_t head = 0; head < heads_.size(); ++head) {
    const head_event& of = event.heads[head];
    for (std::size_t j = 0; j < of.before.size(); ++j) {
      if (of.forced[j]) continue;
      free_scores[head].push_back(scores[head].score[j]);
      at[head].push_back(of.before[j]);
      row_of[head].push_back(j);
    }
    const auto forced = static_cast<stream_position>(of.before.size() - at[head].size());
    safe.push_back(static_cast<std::size_t>(*setup_.adaptive * static_cast<double>(budget(head) - forced)));
    total += budget(head) - forced;
  }
  const auto stays = adaptive_choice(free_scores, at, safe, static_cast<std::size_t>(total));
  std::vector<entry> all;
  double largest = 0;
  for (std::size_t head = 0; head < heads_.size(); ++head) {
    head_event& of = event.heads[head];
    std::vector<entry> entries;
    std::vector<bool> kept = of.forced;
    for (std::size_t i = 0; i < stays[head].size(); ++i) {
      entries.push_back({head, row_of[head][i], free_scores[head][i], at[head][i], stays[head][i]});
      if (stays[head][i]) kept[row_of[head][i]] = true;
    }
    for (std::size_t j = 0; j < kept.size(); ++j)
      if (kept[j]) of.kept.push_back(of.before[j]);
    of.margin = margin(entries, scores, of.largest);
    largest = std::max(largest, of.largest);
    // A safe row says nothing of the border over all heads.
    std::sort(entries.begin(), entries.end(),
              [](const entry& a, const entry& b) { return stays_before(a.score, a.at, b.score, b.at); });
    entries.erase(entries.begin(), entries.begin() + static_cast<std::ptrdiff_t>(std::min(safe[head], entries.size())));
    all.insert(all.end(), entries.begin(), entries.end());
  }
  const double over_heads = margin(all, scores, largest);
  for (head_event& head : event.heads) head.margin = std::min(head.margin, over_heads);
}

void eviction_oracle::choose_fifo(std::size_t head, head_event& event) {
  held_rows& rows = heads_[head];
  const std::size_t lag = this->lag(head);
  const auto best = static_cast<std::size_t>(setup_.policy.number("ratio", 0.5) * static_cast<double>(lag));
  std::vector<std::size_t> unjudged;
  for (std::size_t j = 0; j < rows.size(); ++j)
    if (!pinned(rows[j].at) && !rows[j].judged) unjudged.push_back(j);
  const std::vector<bool> protected_rows = forced(head);
  std::vector<bool> stays(rows.size(), true);
  event.scores.assign(rows.size(), infinite);
  for (std::size_t p = 0; (p + 2) * lag <= unjudged.size(); ++p) {
    const auto first = unjudged.begin() + static_cast<std::ptrdiff_t>(p * lag),
               end = first + static_cast<std::ptrdiff_t>(lag);
    const std::vector<std::size_t> part(first, end), next(end, end + static_cast<std::ptrdiff_t>(lag));
    const doubles totals = lag_totals(rows, part, next);
    std::vector<entry> entries;
    for (std::size_t i = 0; i < lag; ++i) entries.push_back({0, part[i], totals[i], rows[part[i]].at, false});
    std::sort(entries.begin(), entries.end(),
              [](const entry& a, const entry& b) { return stays_before(a.score, a.at, b.score, b.at); });
    for (std::size_t i = 0; i < lag; ++i) {
      const std::size_t row = entries[i].row;
      event.scores[row] = entries[i].score;
      entries[i].kept = i < best;
      rows[row].judged = true;
      stays[row] = i < best || row + static_cast<std::size_t>(setup_.recent) >= rows.size();
    }
    event.margin = std::min(event.margin, margin(entries, {head_scores{}}, largest_finite(totals)));
  }
  auto count = static_cast<stream_position>(std::count(stays.begin(), stays.end(), true));
  for (std::size_t j = 0; j < rows.size() && count > budget(head); ++j)
    if (stays[j] && !protected_rows[j]) stays[j] = false, --count;
  for (std::size_t j = 0; j < rows.size(); ++j)
    if (stays[j]) event.kept.push_back(rows[j].at);
}

void eviction_oracle::evict() {
  eviction_event event{.seen = seen_, .heads = std::vector<head_event>(heads_.size())};
  stream_position held = 0, allowed = 0;
  for (std::size_t head = 0; head < heads_.size(); ++head) {
    event.heads[head].before = event.heads[head].kept = kept(head);
    event.heads[head].due = static_cast<stream_position>(heads_[head].size()) > budget(head);
    held += static_cast<stream_position>(heads_[head].size());
    allowed += budget(head);
  }
  if (setup_.adaptive)
    for (head_event& head : event.heads) head.due = held > allowed;
  if (std::none_of(event.heads.begin(), event.heads.end(), [](const head_event& head) { return head.due; })) return;

  const bool fifo = setup_.policy.word("mode", "") == "fifo";
  std::vector<head_scores> scores(heads_.size());
  for (std::size_t head = 0; head < heads_.size(); ++head) {
    head_event& of = event.heads[head];
    if (!of.due) continue;
    of.kept.clear();
    of.forced = forced(head);
    if (fifo && !is_short(head)) {
      choose_fifo(head, of);
      continue;
    }
    doubles finals;
    scores[head] = setup_.policy.name == "gkv" && !is_short(head) ? gkv(head, &finals) : score(head);
    for (std::size_t j = 0; j < finals.size(); ++j) heads_[head][j].old = finals[j];
    of.scores = scores[head].score;
    of.largest = largest_finite(of.scores);
    of.steady = scores[head].steady;
    if (!setup_.adaptive) choose(head, scores[head], of);
  }
  if (setup_.adaptive) choose_over_heads(scores, event);
  for (std::size_t head = 0; head < heads_.size(); ++head)
    std::erase_if(heads_[head], [&](const held_row& row) {
      const auto& stay = event.heads[head].kept;
      return std::find(stay.begin(), stay.end(), row.at) == stay.end();
    });
  events_.push_back(event);
}

// Budgets.

std::vector<std::vector<bool>> adaptive_choice(const std::vector<doubles>& scores,
                                               const std::vector<std::vector<stream_position>>& at,
                                               const std::vector<std::size_t>& safe, std::size_t total) {
  struct candidate {
    std::size_t head, i;
  };
  std::vector<std::vector<bool>> stays(scores.size());
  std::vector<candidate> rest;
  const auto before = [&](const candidate& a, const candidate& b) {
    return stays_before(scores[a.head][a.i], at[a.head][a.i], scores[b.head][b.i], at[b.head][b.i]);
  };
  for (std::size_t head = 0; head < scores.size(); ++head) {
    std::vector<candidate> rows;
    for (std::size_t i = 0; i < scores[head].size(); ++i) rows.push_back({head, i});
    std::sort(rows.begin(), rows.end(), before);
    stays[head].assign(rows.size(), false);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (i >= safe[head]) {
        rest.push_back(rows[i]);
      } else {
        stays[head][rows[i].i] = true;
        --total;
      }
    }
  }
  std::stable_sort(rest.begin(), rest.end(), before);  // of equals, the lower head first
  for (std::size_t i = 0; i < rest.size() && i < total; ++i) stays[rest[i].head][rest[i].i] = true;
  return stays;
}

std::vector<stream_position> pyramid_budgets(std::size_t layers, stream_position mean, stream_position fixed,
                                             double beta) {
  const auto cap = static_cast<double>(mean - fixed);
  const double least = cap / beta, most = 2 * cap - least;
  std::vector<stream_position> budgets;
  doubles remainders;
  stream_position left = (mean - fixed) * static_cast<stream_position>(layers);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    const double share =
        layers == 1 ? cap : most - static_cast<double>(layer) * (most - least) / static_cast<double>(layers - 1);
    budgets.push_back(static_cast<stream_position>(std::floor(share)));
    remainders.push_back(share - std::floor(share));
    left -= budgets.back();
  }
  for (; left > 0; --left) {
    const auto largest = std::max_element(remainders.begin(), remainders.end());
    ++budgets[static_cast<std::size_t>(largest - remainders.begin())];
    *largest = -1;
  }
  for (stream_position& budget : budgets) budget += fixed;
  return budgets;
}

std::vector<stream_position> duo_budgets(const std::vector<bool>& short_heads, stream_position full,
                                         stream_position sinks, stream_position newest) {
  std::vector<stream_position> budgets;
  for (bool is_short : short_heads) budgets.push_back(is_short ? sinks + newest : full);
  return budgets;
}

}  // namespace proof
