#include "evaluate.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "caches.hpp"
#include "parallel.hpp"

namespace compare {
namespace {

constexpr double not_scored = std::numeric_limits<double>::quiet_NaN();

// A recomputed token costs a forward over the whole cache, so about this many of them stand for the others.
constexpr index_t wanted_samples = 512;
constexpr index_t timed_passes = 4;

index_t sample_stride(index_t cache, index_t tokens) { return std::max<index_t>(1, (tokens - cache) / wanted_samples); }

// Until the cache is full, recomputing is reading on. After that, a fresh pass over the first token and the newest
// ones.
void recompute_samples(run& r, evaluator& e, index_t cache, const progress& on_tokens) {
  const index_t tokens = static_cast<index_t>(r.loss_bits.size());
  const std::vector<double> read = e.by_prefill(static_cast<std::size_t>(std::min(cache, tokens)), on_tokens);
  std::copy(read.begin(), read.end(), r.loss_bits.begin());
  for (index_t i = cache; i < tokens; i += sample_stride(cache, tokens)) {
    r.loss_bits[static_cast<std::size_t>(i)] = e.recomputed(static_cast<std::size_t>(i), cache);
    on_tokens(cache);
  }
}

bool is_full(const policy& p) { return p.is == policy::kind::full; }
bool is_recompute(const policy& p) { return p.is == policy::kind::recompute; }

index_t cache_of(const policy& p, index_t cache, index_t tokens) {
  return is_full(p) ? tokens : p.cache > 0 ? p.cache : cache;
}

run loss_of(const subject& s, const policy& p, const token_stream& stream, index_t cache, index_t tokens,
            index_t threads, const progress& on_tokens) {
  const auto ids = std::span(stream.ids).first(static_cast<std::size_t>(tokens) + 1);
  const index_t own = cache_of(p, cache, tokens);
  run r{&s, p, own - p.num_sink_tokens, {}, cache_bytes(p, *s.model, own), 0};
  r.token_bytes.assign(stream.bytes.begin() + 1, stream.bytes.begin() + 1 + tokens);
  r.loss_bits.assign(static_cast<std::size_t>(tokens), not_scored);
  evaluator e(s, caches_of(p, own), ids, {.threads = threads});
  if (is_recompute(p))
    recompute_samples(r, e, own, on_tokens);
  else
    r.loss_bits = e.by_prefill(static_cast<std::size_t>(tokens), on_tokens);
  return r;
}

// A step of a small model is over before other threads are awake.
constexpr index_t small_model = 10'000'000;

// Alone, because runs share caches and memory.
double us_per_token(const subject& s, const policy& p, const token_stream& stream, index_t cache, index_t tokens,
                    index_t threads, const progress& on_tokens) {
  const auto ids = std::span(stream.ids).first(static_cast<std::size_t>(tokens) + 1);
  const index_t own = cache_of(p, cache, tokens), room = is_full(p) ? decoded_tokens : 0;
  engine::session session(*s.model, caches_of(p, own + room),
                          config_of(s, {.threads = s.model->num_parameters() < small_model ? 1 : threads}));
  return 1000 * (is_recompute(p) ? ms_per_pass(session, own, ids, timed_passes, on_tokens)
                                 : ms_per_token(session, own, ids, decoded_tokens, on_tokens));
}

// Sum and count of what was scored, from `first` on; with `like`, only of what was scored there too.
struct total {
  double bits = 0;
  index_t bytes = 0, tokens = 0;

  double mean() const { return bytes > 0 ? bits / static_cast<double>(bytes) : not_scored; }
};

index_t bytes_of(const run& r, std::size_t token) { return r.token_bytes.empty() ? 1 : r.token_bytes[token]; }

index_t bytes_of(const run& r, index_t first, index_t last) {
  index_t bytes = 0;
  for (index_t i = first; i < last; ++i) bytes += bytes_of(r, static_cast<std::size_t>(i));
  return bytes;
}

total total_loss(const run& r, index_t first, index_t last, const run* like = nullptr) {
  total t;
  for (std::size_t i = static_cast<std::size_t>(first); i < static_cast<std::size_t>(last); ++i) {
    if (std::isnan(r.loss_bits[i]) || (like && std::isnan(like->loss_bits[i]))) continue;
    t.bits += r.loss_bits[i];
    t.bytes += bytes_of(r, i);
    ++t.tokens;
  }
  return t;
}

}  // namespace

index_t work(std::span<const subject> subjects, std::span<const policy> policies, index_t cache, index_t tokens) {
  index_t total = 0;
  for (const policy& p : policies) {
    const index_t own = cache_of(p, cache, tokens), before = std::min(own, tokens),
                  stride = is_recompute(p) ? sample_stride(own, tokens) : 1;
    total += before + (tokens - before + stride - 1) / stride * (is_recompute(p) ? own : 1);
    total += is_recompute(p) ? timed_passes * own : decode_work * decoded_tokens;
  }
  return total * static_cast<index_t>(subjects.size());
}

std::vector<run> evaluate(std::span<const subject> subjects, std::span<const policy> policies,
                          std::span<const token_stream> streams, index_t cache, index_t tokens, std::size_t threads,
                          const progress& on_tokens) {
  std::vector<run> runs(subjects.size() * policies.size());
  const auto all = static_cast<index_t>(threads), each = std::max(index_t{1}, all / static_cast<index_t>(runs.size()));
  for_each_index(runs.size(), threads, [&](std::size_t i) {
    const std::size_t s = i / policies.size();
    runs[i] = loss_of(subjects[s], policies[i % policies.size()], streams[s], cache, tokens, each, on_tokens);
  });
  for (std::size_t i = 0; i < runs.size(); ++i)
    runs[i].us_per_token =
        us_per_token(*runs[i].subject, runs[i].policy, streams[i / policies.size()], cache, tokens, all,
                     [&](index_t n) { on_tokens(is_recompute(runs[i].policy) ? n : decode_work * n); });
  return runs;
}

loss_summary summarise(const run& r, const run* recompute, index_t cache) {
  const index_t tokens = static_cast<index_t>(r.loss_bits.size());
  const index_t border = std::min(cache, tokens);  // predicting ids[i + 1] follows i + 1 appended tokens
  const total before = total_loss(r, 0, border), after = total_loss(r, border, tokens);
  const auto bytes_after = static_cast<double>(bytes_of(r, border, tokens)),
             bytes_before = static_cast<double>(bytes_of(r, 0, border));
  const double weight = bytes_after / (bytes_before + bytes_after);
  return {.all = border == tokens ? before.mean() : (1 - weight) * before.mean() + weight * after.mean(),
          .before = before.mean(),
          .after = after.mean(),
          .after_sampled = recompute ? total_loss(r, border, tokens, recompute).mean() : not_scored,
          .tokens_scored = before.tokens + after.tokens};
}

std::vector<segment_loss> loss_by_segment(const run& r, index_t cache) {
  constexpr index_t shortest = 16;  // the mean of fewer tokens says little
  const index_t tokens = static_cast<index_t>(r.loss_bits.size());
  std::vector<index_t> edges = {0};
  for (int half_doublings = -40;; ++half_doublings) {
    const auto edge = static_cast<index_t>(std::lround(static_cast<double>(cache) * std::exp2(0.5 * half_doublings)));
    if (edge > tokens - shortest) break;
    if (edge == cache || edge - edges.back() >= shortest) edges.push_back(edge);
  }
  edges.push_back(tokens);

  std::vector<segment_loss> segments;
  for (std::size_t i = 1; i < edges.size(); ++i) {
    const total t = total_loss(r, edges[i - 1], edges[i]);
    segments.push_back({edges[i - 1], edges[i] - edges[i - 1], t.tokens, t.mean()});
  }
  return segments;
}

}  // namespace compare
