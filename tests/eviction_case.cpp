#include "eviction_case.hpp"

#include <fmt/format.h>
#include <sinkcache/named_policies.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <span>

#include "effort.hpp"

namespace proof {
namespace {

constexpr double uncertain = 2e-5;  // a margin that float32 may not see

struct event_copy {
  position_t seen;
  std::vector<position_t> before, kept;
  std::vector<float> scores;
  double mass, bound;
};

class recorder final : public eviction_reader {
 public:
  explicit recorder(index_t num_kv_heads) : of_head(as_size(num_kv_heads)) {}

  void read(const sinkcache::eviction_event& event) noexcept override {
    event_copy copy{event.seen, {event.at.begin(), event.at.end()},
                    {},         {event.scores.begin(), event.scores.end()},
                    event.mass, event.bound};
    for (std::size_t i = 0; i < event.at.size(); ++i)
      if (event.leaves[i] == 0) copy.kept.push_back(event.at[i]);
    of_head[as_size(event.kv_head)].push_back(copy);
  }

  // Tokens were taken back.
  void forget_after(position_t seen) {
    for (auto& events : of_head) std::erase_if(events, [&](const event_copy& event) { return event.seen > seen; });
  }

  std::vector<std::vector<event_copy>> of_head;
};

// By its name: the oracle's parameters are the library's.
std::shared_ptr<const token_scorer> scorer_of(const eviction_case& c) {
  if (c.scorer != nullptr) return c.scorer;
  const eviction_setup& setup = c.setup;
  std::vector<std::pair<std::string, std::string>> texts;
  for (const auto& [what, value] : setup.policy.given) {
    const auto* const number = std::get_if<double>(&value);
    texts.emplace_back(what, number ? fmt::format("{:g}", *number) : std::get<std::string>(value));
  }
  if (setup.policy.name == "random") {
    texts.emplace_back("seed", fmt::format("{}", setup.seed));
    texts.emplace_back("layer", fmt::format("{}", setup.layer));
  }
  const std::vector<policy_parameter> parameters(texts.begin(), texts.end());
  status found;
  auto scorer = make_policy(setup.policy.name, parameters, found);
  found.or_fail();
  return scorer;
}

// A scored cache of any format behind its base, and what the base has not.
struct scored {
  scored(const eviction_case& c, eviction_reader* of_events) : reader(of_events) {
    const auto make = [&]<class F>(F) { hold(scored_kv_cache<F>(c.config, c.rules, scorer_of(c))); };
    c.format == 0 ? make(f32{}) : c.format == 1 ? make(f16{}) : make(bf16{});
  }
  scored(const scored&) = delete;

  template <class F>
  void hold(scored_kv_cache<F>&& given) {
    auto made = std::make_unique<scored_kv_cache<F>>(std::move(given));
    scored_kv_cache<F>* const of = made.get();
    of->watch(reader);
    kept = [of](index_t head) { return std::vector<position_t>(of->kept(head).begin(), of->kept(head).end()); };
    pin = [of](position_t at) {
      bool pinned = false;
      return of->try_pin(at, pinned).ok() && pinned;
    };
    become_clone = [this, of] { hold(of->clone()); };
    cache = std::move(made);
  }

  eviction_reader* reader;
  std::unique_ptr<any_kv_cache> cache;
  std::function<std::vector<position_t>(index_t)> kept;
  std::function<bool(position_t)> pin;
  std::function<void()> become_clone;
};

void draw_shape(eviction_case& c, effort::dice& dice) {
  eviction_setup& s = c.setup;
  s.kv_heads = as_size(dice.from_to(1, 3));
  s.qo_heads = s.kv_heads * as_size(one_of<index_t>(dice, {1, 2, 3, 4, 8}));
  s.d = as_size(2 * dice.from_to(2, 16));
  s.dv = dice.one_in(2) ? s.d : as_size(dice.from_to(2, 32));
  s.in_cache = dice.one_in(2);
  const std::size_t pairs = dice.one_in(6) ? 0 : dice.one_in(2) ? s.d / 2 : as_size(dice.from_to(1, 2));
  std::vector<float> inv_freq;
  for (std::size_t i = 0; i < pairs; ++i)
    inv_freq.push_back(static_cast<float>(std::pow(1e4, -static_cast<double>(i) / static_cast<double>(pairs))));
  s.inv_freq.assign(inv_freq.begin(), inv_freq.end());
  s.interleaved = dice.one_in(2);
  s.attention_factor = dice.one_in(3) ? 1.25 : 1;
  s.first_position = one_of<position_t>(dice, {0, 0, 1000, 1 << 20});

  c.params.num_qo_heads = static_cast<index_t>(s.qo_heads);
  const int variant = static_cast<int>(dice.from_to(0, 2));
  std::vector<float> sinks;
  for (std::size_t i = 0; i < s.qo_heads && variant > 0; ++i)
    sinks.push_back(variant == 1 ? 0 : static_cast<float>(2 * normal(dice)));
  s.sink_logits.assign(sinks.begin(), sinks.end());
  if (variant == 1) c.params.softmax = softmax_variant::softmax1();
  if (variant == 2) c.params.softmax = softmax_variant::sink_logits(sinks);
  s.soft_cap = dice.one_in(4) ? 20 : 0;
  c.params.logits_soft_cap = static_cast<float>(s.soft_cap);
  const auto scale = static_cast<float>((dice.one_in(3) ? .7 : 1.) / std::sqrt(static_cast<double>(s.d)));
  s.sm_scale = static_cast<double>(scale);
  c.params.sm_scale = scale;

  c.config.num_kv_heads = static_cast<index_t>(s.kv_heads);
  c.config.head_dim = static_cast<index_t>(s.d);
  c.config.v_head_dim = static_cast<index_t>(s.dv);
  c.config.window = 0;
  c.config.positions = s.in_cache ? positions::in_cache : positions::absolute;
  c.config.inputs = dice.one_in(4) ? inputs::rotated : inputs::raw;
  // Of a rotated key as given the factor is a part.
  if (c.config.inputs == inputs::rotated && s.policy.name == "knorm") s.attention_factor = 1;
  c.config.first_position = s.first_position;
  c.config.rope.emplace(inv_freq, s.interleaved ? rope_pairing::interleaved : rope_pairing::half_split,
                        static_cast<float>(s.attention_factor));
}

void draw_rules(eviction_case& c, effort::dice& dice) {
  eviction_setup& s = c.setup;
  s.num_sink_tokens = dice.one_in(4) ? 0 : dice.from_to(1, 5);
  const scorer_needs needs = scorer_of(c)->needs();
  const index_t window = needs.window;
  const auto lag = static_cast<index_t>(s.policy.number("lag", 0));
  s.recent = one_of<index_t>(dice, {0, 3, window, window + 5, 12, 24});
  // LagKV with room for two pins beside its window, whatever lag it takes: whether that counts against pins is open.
  const index_t stays =
      s.num_sink_tokens + std::max({s.recent, window, 2 * lag, index_t{s.policy.name == "lagkv" ? 6 : 0}});
  s.budget = stays + dice.from_to(2, dice.one_in(2) ? 6 : 40);
  s.interval = one_of<index_t>(dice, {1, 2, 5, 16, 64});
  s.seed = dice.bits();
  s.layer = as_size(dice.from_to(0, 40));
  const bool one_set = needs.one_set, compares = needs.compares_heads;
  // Whether G-KV's old scores fade in a head that has room when others have none, no text says.
  if (!one_set && s.policy.name != "gkv" && dice.one_in(4))
    for (std::size_t i = 0; i < s.kv_heads; ++i) s.head_budgets.push_back(stays + dice.from_to(2, 30));
  if (compares && dice.one_in(3))
    s.adaptive = one_of(dice, {0., .2, .5, 1.});
  else if (!one_set && s.head_budgets.empty() && s.policy.name != "gkv" && dice.one_in(6)) {
    for (std::size_t i = 0; i < s.kv_heads; ++i) s.short_heads.push_back(dice.one_in(2));
    s.head_budgets = duo_budgets(s.short_heads, s.budget, s.num_sink_tokens, dice.from_to(4, 12));
  }

  c.config.num_sink_tokens = s.num_sink_tokens;
  c.config.rollback = dice.one_in(2) ? 0 : dice.from_to(0, 40);
  s.rollback = c.config.rollback;
  c.rules.budget = s.head_budgets.empty() ? s.budget : 0;
  c.rules.recent = s.recent;
  c.rules.interval = s.interval;
  c.rules.num_qo_heads = c.params.num_qo_heads;
  c.rules.head_budgets.assign(s.head_budgets.begin(), s.head_budgets.end());
  c.rules.adaptive = s.adaptive;
  c.rules.short_heads = s.short_heads;
  c.rules.accounts = dice.one_in(4);
  c.tokens = std::min<index_t>(s.budget + 3 * s.interval + dice.from_to(20, 120), 400);
  for (int i = 0; i < 2 && dice.one_in(4); ++i) {
    const position_t after = dice.from_to(1, c.tokens - 1);
    c.pins.emplace_back(after, std::max<position_t>(0, after + dice.from_to(-20, 10)));
  }
  std::sort(c.pins.begin(), c.pins.end());
}

// One head's row, rotated to its true position.
doubles rotated_to(const eviction_setup& setup, position_t token, doubles row) {
  oracle::layer layer;
  layer.inv_freq.assign(setup.inv_freq.begin(), setup.inv_freq.end());
  layer.interleaved = setup.interleaved;
  for (std::size_t i = 0; i < 2 * layer.inv_freq.size(); ++i) row[i] *= setup.attention_factor;
  oracle::rotate(layer, setup.first_position + token, row.data());
  return row;
}

// All heads of a token, as an engine turns them.
void rotate_row(const eviction_setup& setup, index_t token, matrix& m) {
  for (float* head = m.row(token).data(); head < m.row(token).data() + m.cols(); head += setup.d) {
    const doubles row = rotated_to(setup, token, {head, head + setup.d});
    std::transform(row.begin(), row.end(), head, [](double x) { return static_cast<float>(x); });
  }
}

doubles row_of(const matrix& m, index_t i) { return {m.row(i).data(), m.row(i).data() + m.cols()}; }

// All heads of a token that came rotated, as a cache stores them that rotates keys to their places later.
void rotate_back(const cache_config& config, index_t token, matrix& m) {
  rope::angles angles;
  config.rope->angles_at(-(config.first_position + token), false, angles);
  for (float* head = m.row(token).data(); head < m.row(token).data() + m.cols(); head += config.head_dim) {
    config.rope->rotate(angles, head, config.head_dim, head);
    for (index_t i = 0; i < config.rope->width(); ++i) head[i] /= config.rope->attention_factor();
  }
}

// What the oracle makes of a case. Rows read back as a plain cache of the same format stores them: rotated to their
// true positions, but as they are before rope where places change at every event.
struct expected {
  explicit expected(const eviction_case& c) {
    const bool unrotated = c.setup.in_cache;
    cache_config plain = c.config;
    plain.num_sink_tokens = 0;
    plain.window = c.tokens;
    plain.rollback = 0;
    matrix keys = c.k;
    if (unrotated && c.config.inputs == inputs::rotated)
      for (index_t i = 0; i < c.tokens; ++i) rotate_back(c.config, i, keys);
    if (unrotated) plain.rope = rope::none();
    const auto beside = make_cache(c.format, c.format, plain);
    beside->append(keys, c.v);
    eviction_setup setup = c.setup;
    setup.stored_key = [&](const doubles& given, std::size_t head, stream_position at) {
      std::vector<float> row(given.size());
      beside->key(static_cast<index_t>(head), at, row.data());
      const doubles stored(row.begin(), row.end());
      return unrotated ? rotated_to(c.setup, at, stored) : stored;
    };
    setup.stored_value = [&](const doubles& given, std::size_t head, stream_position at) {
      std::vector<float> row(given.size());
      beside->value(static_cast<index_t>(head), at, row.data());
      return doubles(row.begin(), row.end());
    };
    eviction_oracle oracle(setup);
    auto pin = c.pins.begin();
    for (index_t i = 0; i < c.tokens; ++i) {
      std::vector<oracle::answer> answer;
      v_norms.emplace_back();
      for (const eviction_answer& of : oracle.feed(row_of(c.raw_q, i), row_of(c.raw_k, i), row_of(c.v, i))) {
        answer.push_back({of.out, of.lse, of.a, of.v_max, of.weights});
        v_norms.back().push_back(of.v_norm);
      }
      answers.push_back(answer);
      for (; pin != c.pins.end() && pin->first == i + 1; ++pin) pinned.push_back(oracle.pin(pin->second));
    }
    events = oracle.events();
    short_heads = c.setup.short_heads;
    for (const eviction_event& event : events)
      if (event.margin() < uncertain) {
        certain_until = event.seen;
        break;
      }
  }

  bool is_short(std::size_t head) const { return head < short_heads.size() && short_heads[head]; }

  std::vector<std::vector<oracle::answer>> answers;
  std::vector<doubles> v_norms;  // the largest |v| that each query head saw
  std::vector<eviction_event> events;
  std::vector<bool> pinned, short_heads;
  stream_position certain_until = std::numeric_limits<stream_position>::max();  // tokens that see certain rows
};

std::string list(const std::vector<position_t>& positions) {
  std::string text;
  for (position_t p : positions) text += fmt::format(" {}", p);
  return text;
}

// One KV head at one event.
std::string head_differs(const head_event& of, bool is_short, const event_copy& found, bool certain,
                         eviction_tally& tally) {
  const std::vector<position_t> before(of.before.begin(), of.before.end()), kept(of.kept.begin(), of.kept.end());
  if (before != found.before) return "held" + list(found.before) + " instead of" + list(before);
  if (!of.due && kept == found.kept) return "";
  for (std::size_t j = 0; j < before.size() && of.steady >= uncertain && of.largest > 0 && !is_short; ++j) {
    if (of.forced[j] || !std::isfinite(of.scores[j])) continue;
    const double error = std::abs(static_cast<double>(found.scores[j]) - of.scores[j]) / (1e-5 * of.largest);
    if (!(error <= 1))
      return fmt::format("position {} scored {} instead of {}, {} times what is allowed; the largest is {}", before[j],
                         found.scores[j], of.scores[j], error, of.largest);
    tally.score = std::max(tally.score, error);
  }
  if (!certain) return "";
  ++tally.sets;
  if (kept != found.kept)
    return fmt::format("kept{} instead of{}, at a margin of {}; held were{}", list(found.kept), list(kept), of.margin,
                       list(before));
  return "";
}

// With accounts: what the last query gave all that leave.
std::string accounts_differ(const eviction_case& c, const expected& expected, const eviction_event& event,
                            std::size_t head, const event_copy& found) {
  const head_event& of = event.heads[head];
  const std::size_t group = c.setup.qo_heads / c.setup.kv_heads;
  double mass = 0, v_norm = 0, a = 0;
  for (std::size_t g = head * group; g < (head + 1) * group; ++g) {
    const oracle::answer& last = expected.answers[static_cast<std::size_t>(event.seen - 1)][g];
    double leaves = 0;
    for (std::size_t j = 0; j < of.before.size(); ++j)
      if (!std::binary_search(of.kept.begin(), of.kept.end(), of.before[j])) leaves += last.weights[j];
    mass = std::max(mass, leaves);
    v_norm = std::max(v_norm, expected.v_norms[static_cast<std::size_t>(event.seen - 1)][g]);
    a = std::max(a, last.a);
  }
  const double allowed = 16 * u * (1 + a) * mass + 1e-30;
  if (!(std::abs(found.mass - mass) <= allowed)) return fmt::format("a mass of {} instead of {}", found.mass, mass);
  const double bound = 2 * mass / (1 - mass) * v_norm;
  if (mass < .99 && !(std::abs(found.bound - bound) <= 2 * v_norm * (1e-6 * mass + allowed) / (1 - mass) / (1 - mass)))
    return fmt::format("a bound of {} instead of {}", found.bound, bound);
  return "";
}

std::string events_differ(const eviction_case& c, const expected& expected, const recorder& found,
                          eviction_tally& tally) {
  std::size_t told = 0;
  for (const eviction_event& event : expected.events) {
    if (event.seen > expected.certain_until) break;
    const bool certain = event.seen < expected.certain_until;
    ++tally.events;
    for (std::size_t head = 0; head < event.heads.size(); ++head) {
      const head_event& of = event.heads[head];
      const auto& events = found.of_head[head];
      const auto copy =
          std::find_if(events.begin(), events.end(), [&](const event_copy& other) { return other.seen == event.seen; });
      told += copy != events.end() && copy->kept != copy->before;
      if (copy == events.end()) {  // a head that is not full yet need not be told of
        if (of.due) return fmt::format("no event of head {} after {} tokens", head, event.seen);
        continue;
      }
      std::string wrong = head_differs(of, expected.is_short(head), *copy, certain, tally);
      if (wrong.empty() && certain && c.rules.accounts) wrong = accounts_differ(c, expected, event, head, *copy);
      if (!wrong.empty()) return fmt::format("{}; head {} after {} tokens", wrong, head, event.seen);
    }
  }
  tally.cut_short += expected.certain_until != std::numeric_limits<stream_position>::max();
  std::size_t all = 0;
  for (const auto& events : found.of_head)
    all += as_size(std::count_if(events.begin(), events.end(), [&](const event_copy& event) {
      return event.seen <= expected.certain_until && event.kept != event.before;
    }));
  return all == told ? "" : fmt::format("{} events of heads instead of {}", all, told);
}

// One way to feed a case.
enum class feeding { decoded, chunks, chunks_with_rewinds };

class case_feed {
 public:
  case_feed(const eviction_case& c, const expected& expected, feeding how, eviction_tally& tally)
      : case_(c),
        expected_(expected),
        how_(how),
        tally_(tally),
        dice_(c.seed + static_cast<std::uint64_t>(how)),
        events_(c.config.num_kv_heads),
        cache_(c, &events_),
        attention_(c.params),
        out_(c.tokens, c.params.num_qo_heads * c.config.v_head_dim),
        lse_(as_size(c.tokens * c.params.num_qo_heads)) {}

  // Tells what differs.
  std::string run() {
    const index_t longest = one_of<index_t>(dice_, {4, 30, 400});
    for (index_t first = 0, n = 0; first < case_.tokens; first += n) {
      n = how_ == feeding::decoded ? 1 : std::min(case_.tokens - first, dice_.from_to(1, longest));
      if (pin_ < case_.pins.size()) n = std::min(n, std::max<index_t>(1, case_.pins[pin_].first - first));
      feed(case_.q.middleRows(first, n), case_.k.middleRows(first, n), case_.v.middleRows(first, n),
           out_.middleRows(first, n),
           std::span(lse_).subspan(as_size(first * case_.params.num_qo_heads), as_size(n * case_.params.num_qo_heads)));
      std::string wrong = pin(first + n);
      if (wrong.empty() && how_ == feeding::chunks_with_rewinds) wrong = rewind(first + n);
      if (!wrong.empty()) return wrong;
    }
    cache_.cache->prepare();
    std::string wrong = events_differ(case_, expected_, events_, tally_);
    if (wrong.empty()) wrong = outputs_differ();
    return wrong.empty() ? kept_differ() : wrong;
  }

 private:
  void feed(const_matrix_view q, const_matrix_view k, const_matrix_view v, matrix_view out, std::span<float> lse) {
    if (q.rows() == 1) {
      cache_.cache->append(k, v);
      attention_.decode(q, *cache_.cache, out, workspace_, {.lse = lse});
    } else {
      attention_.prefill(q, k, v, *cache_.cache, out, workspace_, {.lse = lse});
    }
  }

  std::string pin(position_t seen) {
    for (; pin_ < case_.pins.size() && case_.pins[pin_].first == seen; ++pin_) {
      cache_.cache->prepare();  // the event comes before the pin
      const position_t at = case_.pins[pin_].second;
      if (cache_.pin(at) != expected_.pinned[pin_] && seen < expected_.certain_until)
        return fmt::format("pin({}) after {} tokens was {}", at, seen, !expected_.pinned[pin_]);
    }
    return "";
  }

  // Goes on as a clone, or feeds other tokens and takes them back: all is as it was.
  std::string rewind(position_t seen) {
    if (dice_.one_in(6)) {
      const auto become_clone = cache_.become_clone;
      become_clone();
    }
    if (case_.config.rollback == 0 || !dice_.one_in(3)) return "";
    const index_t n = dice_.from_to(1, case_.config.rollback);
    matrix q(n, case_.q.cols()), k(n, case_.k.cols()), v(n, case_.v.cols()), out(n, out_.cols());
    for (matrix* m : {&q, &k, &v})
      for (index_t i = 0; i < m->size(); ++i) m->data()[i] = static_cast<float>(3 * normal(dice_));
    for (index_t first = 0, m = 0; first < n; first += m) {
      m = dice_.from_to(1, n - first);
      feed(q.middleRows(first, m), k.middleRows(first, m), v.middleRows(first, m), out.middleRows(first, m), {});
    }
    if (cache_.cache->min_truncate() > seen) return fmt::format("{} of {} tokens could not be taken back", n, seen + n);
    cache_.cache->truncate(seen);
    events_.forget_after(seen);
    return "";
  }

  std::string outputs_differ() {
    for (index_t i = 0; i < case_.tokens && i < expected_.certain_until; ++i) {
      const auto& answers = expected_.answers[as_size(i)];
      if (std::any_of(answers.begin(), answers.end(), [](const auto& answer) { return std::isnan(answer.lse); }))
        continue;
      const std::string wrong =
          far_from(answers, out_.row(i).data(), lse_.data() + i * case_.params.num_qo_heads, &tally_.near);
      if (!wrong.empty()) return fmt::format("{}; token {}", wrong, i);
    }
    return "";
  }

  std::string kept_differ() const {
    if (expected_.events.empty() || expected_.certain_until <= case_.tokens) return "";
    const eviction_event& last = expected_.events.back();
    for (index_t head = 0; head < case_.config.num_kv_heads; ++head) {
      const auto& kept = last.heads[as_size(head)].kept;
      std::vector<position_t> now(kept.begin(), kept.end());
      for (position_t at = last.seen; at < case_.tokens; ++at) now.push_back(at);
      if (cache_.kept(head) != now)
        return fmt::format("kept({}) is{} instead of{}", head, list(cache_.kept(head)), list(now));
    }
    return "";
  }

  const eviction_case& case_;
  const expected& expected_;
  feeding how_;
  eviction_tally& tally_;
  effort::dice dice_;
  recorder events_;
  scored cache_;
  attention attention_;
  matrix out_;
  std::vector<float> lse_;
  workspace workspace_;
  std::size_t pin_ = 0;
};

}  // namespace

std::string eviction_case::name() const {
  const std::string shape =
      fmt::format("{} + {} heads of {} and {}, {}, {}, {} rotary pairs, from position {}, {} sink logits, soft cap {}",
                  setup.qo_heads, setup.kv_heads, setup.d, setup.dv, setup.in_cache ? "in_cache" : "absolute",
                  config.inputs == inputs::raw ? "raw" : "rotated", setup.inv_freq.size(), setup.first_position,
                  setup.sink_logits.size(), setup.soft_cap);
  const std::string which = fmt::format(
      "{} sinks, budget {}, {} head budgets, {} short, recent {}, interval {}, adaptive {}, rollback {}{}",
      setup.num_sink_tokens, setup.budget, setup.head_budgets.size(), setup.short_heads.size(), setup.recent,
      setup.interval, setup.adaptive.value_or(-1), config.rollback, rules.accounts ? ", with accounts" : "");
  return fmt::format("seed {}: {}; {}; {}; format {}, {} pins, {} tokens", seed, setup.policy.text(), shape, which,
                     format, pins.size(), tokens);
}

eviction_case draw_eviction(std::uint64_t seed, const eviction_policy& policy,
                            std::shared_ptr<const token_scorer> scorer) {
  effort::dice dice(seed);
  eviction_case c;
  c.seed = seed;
  c.scorer = std::move(scorer);
  c.setup.policy = policy;
  draw_shape(c, dice);
  draw_rules(c, dice);
  c.setup.hash = [](std::uint64_t of_seed, std::uint64_t layer, std::size_t head, stream_position seen,
                    stream_position at) {
    return static_cast<double>(policies::random::draw(of_seed, layer, static_cast<index_t>(head), seen, at));
  };
  c.format = dice.one_in(2) ? 0 : static_cast<int>(dice.from_to(1, 2));
  // Flat attention says little of H2O.
  c.q_scale = policy.name == "h2o" ? 8 : one_of(dice, {1., 3.});
  for (matrix* m : {&c.raw_q, &c.raw_k, &c.v}) {
    const std::size_t columns =
        m == &c.raw_q ? c.setup.qo_heads * c.setup.d : c.setup.kv_heads * (m == &c.raw_k ? c.setup.d : c.setup.dv);
    m->resize(c.tokens, static_cast<index_t>(columns));
    for (index_t i = 0; i < m->size(); ++i)
      m->data()[i] = static_cast<float>((m == &c.raw_q ? c.q_scale : 1) * normal(dice));
  }
  c.q = c.raw_q;
  c.k = c.raw_k;
  if (c.config.inputs == inputs::rotated)
    for (matrix* m : {&c.q, &c.k})
      for (index_t i = 0; i < c.tokens; ++i) rotate_row(c.setup, i, *m);
  return c;
}

std::string run_eviction_case(const eviction_case& c, eviction_tally& tally) {
  const expected expected(c);
  for (const feeding how : {feeding::decoded, feeding::chunks, feeding::chunks_with_rewinds}) {
    const std::string wrong = case_feed(c, expected, how, tally).run();
    if (!wrong.empty()) return fmt::format("{}; feeding {}; {}", wrong, static_cast<int>(how), c.name());
  }
  return "";
}

std::string run_eviction_cases(const eviction_policy& policy, std::uint64_t seed, int cases,
                               const std::shared_ptr<const token_scorer>& scorer) {
  eviction_tally tally;
  for (int i = 0; i < cases; ++i) {
    const std::string wrong =
        run_eviction_case(draw_eviction(seed + static_cast<std::uint64_t>(i), policy, scorer), tally);
    if (!wrong.empty()) return wrong;
  }
  const std::string compared = fmt::format(
      "{}: {} cases, {} events, {} sets, {} runs cut short; nearest: scores {:.3f} of 1e-5, out {:.3f}, lse "
      "{:.3f}",
      policy.text(), cases, tally.events, tally.sets, tally.cut_short, tally.score, tally.near.out, tally.near.lse);
  if (std::getenv("SINKCACHE_SHOW")) std::printf("%s\n", compared.c_str());
  const bool enough = tally.events >= 3 * cases && tally.sets >= 3 * cases && tally.cut_short <= 3 * cases / 2;
  return enough ? "" : "too little was compared: " + compared;
}

}  // namespace proof
