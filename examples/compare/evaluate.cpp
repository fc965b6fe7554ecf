// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "evaluate.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "parallel.hpp"

namespace compare {
namespace {

using clock = std::chrono::steady_clock;

constexpr double not_scored = std::numeric_limits<double>::quiet_NaN();

// A recomputed token costs a forward over the whole cache, so about this many of them stand for the others.
constexpr index_t wanted_samples = 512;

index_t sample_stride(index_t cache, index_t tokens) { return std::max<index_t>(1, (tokens - cache) / wanted_samples); }

struct stopwatch {
  clock::duration total{};
  index_t tokens = 0;

  template <class F>
  auto time(F&& f) {
    const clock::time_point start = clock::now();
    const auto result = f();
    total += clock::now() - start;
    ++tokens;
    return result;
  }
  double us_per_token() const {
    return std::chrono::duration<double, std::micro>(total).count() / static_cast<double>(std::max<index_t>(tokens, 1));
  }
};

double checked_loss(const subject& s, std::span<const float> logits, int target, index_t i) {
  const double loss = engine::loss_bits(logits, target);
  if (!std::isfinite(loss))
    throw std::runtime_error(fmt::format("{}: the logits after token {} are not finite", s.name, i));
  return loss;
}

void decode_all(run& r, engine::session& session, std::span<const int> ids, const std::function<void()>& on_token) {
  stopwatch watch;
  for (std::size_t i = 0; i < r.loss_bits.size(); ++i) {
    const std::span<const float> logits = watch.time([&] { return session.decode(ids[i]); });
    r.loss_bits[i] = checked_loss(*r.subject, logits, ids[i + 1], static_cast<index_t>(i));
    on_token();
  }
  r.us_per_token = watch.us_per_token();
}

// Until the cache is full, recomputing is decoding. After that, a fresh pass over the first token and the newest ones.
void recompute_samples(run& r, engine::session& session, std::span<const int> ids, index_t cache,
                       const std::function<void()>& on_token) {
  const index_t tokens = static_cast<index_t>(r.loss_bits.size());
  std::vector<int> context(static_cast<std::size_t>(cache));
  stopwatch decoding, recomputing;
  const auto score = [&](std::size_t i, std::span<const float> logits) {
    r.loss_bits[i] = checked_loss(*r.subject, logits, ids[i + 1], static_cast<index_t>(i));
    on_token();
  };
  for (std::size_t i = 0; i < static_cast<std::size_t>(std::min(cache, tokens)); ++i)
    score(i, decoding.time([&] { return session.decode(ids[i]); }));
  for (index_t i = cache; i < tokens; i += sample_stride(cache, tokens)) {
    const auto newest = ids.subspan(static_cast<std::size_t>(i - cache + 2), static_cast<std::size_t>(cache - 1));
    context.front() = ids.front();
    std::copy(newest.begin(), newest.end(), context.begin() + 1);
    score(static_cast<std::size_t>(i), recomputing.time([&] {
      session.clear();
      return session.prefill(context);
    }));
  }
  r.us_per_token = (recomputing.tokens > 0 ? recomputing : decoding).us_per_token();
}

run evaluate_one(const subject& s, const policy& p, const token_stream& stream, index_t cache, index_t tokens,
                 index_t threads, const std::function<void()>& on_token) {
  const auto ids = std::span(stream.ids).first(static_cast<std::size_t>(tokens) + 1);
  const bool recompute = p.is == policy::kind::recompute;
  run r{&s, p, p.is == policy::kind::full ? tokens : cache - p.num_sink_tokens, {}, 0, 0};
  r.token_bytes.assign(stream.bytes.begin() + 1, stream.bytes.begin() + 1 + tokens);
  r.loss_bits.assign(static_cast<std::size_t>(tokens), not_scored);

  // Recomputing pins nothing: its first token is simply the first of every pass.
  engine::session_config config{
      .num_sink_tokens = recompute ? 0 : p.num_sink_tokens, .window = recompute ? cache : r.window, .threads = threads};
  if (s.remedy_removed) config.softmax = sinkcache::softmax_variant::standard();
  engine::session session(*s.model, config);
  r.cache_bytes = session.cache_bytes();
  if (recompute)
    recompute_samples(r, session, ids, cache, on_token);
  else
    decode_all(r, session, ids, on_token);
  return r;
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

token_stream read_by(const subject& s, const std::string& text) {
  const engine::model_config& config = s.model->config();
  token_stream stream;
  if (const std::optional<int> first = config.bos_token_id ? config.bos_token_id : s.first_token)
    stream = {{*first}, {0}};
  if (s.tokenizer) {
    for (const int id : s.tokenizer->encode(text)) {
      stream.ids.push_back(id);
      stream.bytes.push_back(static_cast<int>(s.tokenizer->bytes(id).size()));
    }
    return stream;
  }
  for (std::size_t i = 0; i < text.size(); ++i) {
    const int byte = static_cast<unsigned char>(text[i]);
    if (byte >= config.vocab_size)
      throw std::runtime_error(
          fmt::format("byte {} of the text is {}, the model's vocabulary ends at {}", i, byte, config.vocab_size - 1));
    stream.ids.push_back(byte);
    stream.bytes.push_back(1);
  }
  return stream;
}

index_t work(std::span<const subject> subjects, std::span<const policy> policies, index_t cache, index_t tokens) {
  index_t total = 0;
  for (const policy& p : policies) {
    const index_t stride = p.is == policy::kind::recompute ? sample_stride(cache, tokens) : 1;
    const index_t before = std::min(cache, tokens);
    total += before + (tokens - before + stride - 1) / stride;
  }
  return total * static_cast<index_t>(subjects.size());
}

std::vector<run> evaluate(std::span<const subject> subjects, std::span<const policy> policies,
                          std::span<const token_stream> streams, index_t cache, index_t tokens, std::size_t threads,
                          const std::function<void()>& on_token) {
  std::vector<run> runs(subjects.size() * policies.size());
  const auto threads_each = static_cast<index_t>(std::max<std::size_t>(1, threads / runs.size()));
  for_each_index(runs.size(), threads, [&](std::size_t i) {
    const std::size_t s = i / policies.size();
    runs[i] =
        evaluate_one(subjects[s], policies[i % policies.size()], streams[s], cache, tokens, threads_each, on_token);
  });
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
