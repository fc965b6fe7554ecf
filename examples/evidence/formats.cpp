// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "formats.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <memory>
#include <sinkcache/ggml_formats.hpp>
#include <stdexcept>

#include "../engine/model.hpp"

namespace evidence {
namespace {

using compare::kv_formats, compare::kv_formats_of;

constexpr index_t chunk = 256;         // of the lockstep; the floats' logits of so many tokens are held
constexpr index_t part_tokens = 8192;  // a run of these is what an interruption may cost
constexpr index_t block_tokens = 128;  // that the bootstrap draws as one
constexpr index_t least_side_tokens = 1024;

// A format as it would be without its rotation.
template <sinkcache::kv_format F>
struct unrotated : F {
  static constexpr const sinkcache::row_transform* transform = nullptr;
};

const std::vector<kv_formats>& others() {
  using namespace sinkcache;
  static const std::vector<compare::kv_formats> all = {kv_formats_of<unrotated<q8>, unrotated<q8>>("unrotated q8"),
                                                       kv_formats_of<unrotated<q6>, unrotated<q4>>("unrotated q6/q4"),
                                                       kv_formats_of<unrotated<q4>, unrotated<q4>>("unrotated q4"),
                                                       kv_formats_of<unrotated<q4>, unrotated<q2>>("unrotated q4/q2"),
                                                       kv_formats_of<unrotated<q2>, unrotated<q2>>("unrotated q2"),
                                                       kv_formats_of<q8, f32>("q8/f32"),
                                                       kv_formats_of<q6, f32>("q6/f32"),
                                                       kv_formats_of<q4, f32>("q4/f32"),
                                                       kv_formats_of<q2, f32>("q2/f32"),
                                                       kv_formats_of<f32, q8>("f32/q8"),
                                                       kv_formats_of<f32, q6>("f32/q6"),
                                                       kv_formats_of<f32, q4>("f32/q4"),
                                                       kv_formats_of<f32, q2>("f32/q2"),
                                                       kv_formats_of<tiered<q8_0, bf16>, tiered<q8_0, bf16>>("q8_0"),
                                                       kv_formats_of<tiered<q4_0, bf16>, tiered<q4_0, bf16>>("q4_0")};
  return all;
}

engine::cache_factory caches_of(const cell& c, index_t cache) {
  return [=](const engine::layer_info& layer) {
    sinkcache::cache_config config = layer.cache;
    config.num_sink_tokens = c.pinned;
    config.window = cache - c.pinned;
    config.recent = c.recent;
    return c.formats->make(config);
  };
}

struct block {
  double tokens = 0, bits = 0, nats = 0, same = 0;
};

// What a cache of floats predicts of one token; others are compared with it.
class predictions {
 public:
  explicit predictions(std::span<const float> logits) : logits_(view(logits)) {
    const float most = logits_.maxCoeff(&likeliest_);
    p_ = (logits_ - most).exp();
    const double sum = p_.cast<double>().sum();
    p_ /= static_cast<float>(sum);
    log_sum_ = static_cast<double>(most) + std::log(sum);
  }

  double bits(int target) const { return (log_sum_ - static_cast<double>(logits_[target])) / std::log(2.0); }

  // Their divergence is sum p (log p - log q), without the difference of two sums that are nearly equal.
  void compare_with(std::span<const float> others, int target, block& to) const {
    const auto q = view(others);
    index_t likeliest;
    q.maxCoeff(&likeliest);
    const Eigen::ArrayXd p = p_.cast<double>(), more = q.cast<double>() - logits_.cast<double>();
    const double all = p.sum(), mean = (p * more).sum() / all;  // all: 1, but for rounding
    const Eigen::ArrayXf ratios = (more - mean).cast<float>().exp();
    const double nats = std::log((p * ratios.cast<double>()).sum() / all);
    to.bits += (log_sum_ + mean + nats - static_cast<double>(q[target])) / std::log(2.0);
    to.nats += nats;
    to.same += likeliest == likeliest_;
    to.tokens += 1;
  }

 private:
  static Eigen::Map<const Eigen::ArrayXf> view(std::span<const float> logits) {
    return {logits.data(), static_cast<index_t>(logits.size())};
  }

  Eigen::ArrayXf logits_, p_;
  index_t likeliest_ = 0;
  double log_sum_ = 0;
};

json of_blocks(const std::vector<block>& blocks) {
  json tokens = json::array(), bits = json::array(), nats = json::array(), same = json::array();
  for (const block& b : blocks) {
    tokens.push_back(b.tokens);
    bits.push_back(b.bits);
    nats.push_back(b.nats);
    same.push_back(b.same);
  }
  return {{"tokens", tokens}, {"bits", bits}, {"nats", nats}, {"same", same}};
}

}  // namespace

std::string cell::name() const { return fmt::format("{} p{} r{}", formats->name, pinned, recent); }

std::string formats_job::name() const {
  return fmt::format("{}-{}-p{}-{}", is_main ? "main" : "side", cache, pinned, first / part_tokens);
}

const compare::kv_formats& formats_named(const std::string& name) {
  for (const std::span<const kv_formats> all : {compare::all_kv_formats(), std::span<const kv_formats>(others())})
    for (const kv_formats& each : all)
      if (each.name == name) return each;
  throw std::logic_error("no formats are called " + name);
}

std::vector<cell> main_cells() {
  std::vector<cell> all = {{&formats_named("bf16"), 1, 64}};
  for (const char* name : few_bits) all.push_back({&formats_named(name), 1, 64});
  return all;
}

std::vector<cell> spared_cells() {
  std::vector<cell> all;
  for (const char* name : few_bits)
    for (const index_t pinned : pinned_tokens)
      for (const index_t recent : recent_tokens)
        if (pinned != 1 || recent != 64) all.push_back({&formats_named(name), pinned, recent});
  return all;
}

std::vector<cell> unlike_cells() {
  std::vector<cell> all;
  for (const kv_formats& each : others()) all.push_back({&each, 1, 64});
  all.push_back({&formats_named("q8_0"), 1, 0});
  all.push_back({&formats_named("q4_0"), 1, 0});
  return all;
}

std::vector<formats_job> formats_plan(const options& o) {
  const index_t side_tokens = std::min({o.tokens, part_tokens, std::max(least_side_tokens, o.tokens / 8)});
  std::vector<formats_job> all;
  for (const index_t cache : o.caches) {
    const auto add = [&](index_t pinned, index_t first, index_t tokens, bool is_main, std::vector<cell> cells) {
      std::erase_if(cells, [=](const cell& c) { return c.pinned != pinned; });
      all.push_back({cache, pinned, first, tokens, is_main, std::move(cells)});
    };
    for (index_t first = 0; first < o.tokens; first += part_tokens)
      add(1, first, std::min(part_tokens, o.tokens - first), true, main_cells());
    std::vector<cell> side = spared_cells();
    for (const cell& c : unlike_cells()) side.push_back(c);
    for (const index_t pinned : pinned_tokens) add(pinned, 0, side_tokens, false, side);
  }
  std::stable_partition(all.begin(), all.end(), [](const formats_job& j) { return j.is_main; });
  return all;
}

index_t work(const formats_job& j) { return (j.cache + j.tokens) * static_cast<index_t>(1 + j.cells.size()); }

json inputs(const formats_job& j, const setting& s) {
  json in = inputs_of(j.name(), s);
  in["cache"] = j.cache;
  in["tokens"] = j.tokens;
  for (const cell& c : j.cells) in["cells"].push_back(c.name());
  return in;
}

json measure(const formats_job& j, const setting& s, const progress& on_tokens) {
  const engine::model& model = *s.subject.model;
  const cell floats{&formats_named("f32"), j.pinned, 0};
  engine::session reference(model, caches_of(floats, j.cache));
  std::vector<std::unique_ptr<engine::session>> sessions;
  for (const cell& c : j.cells) sessions.push_back(std::make_unique<engine::session>(model, caches_of(c, j.cache)));

  const std::span<const int> ids = std::span(s.stream.ids).subspan(static_cast<std::size_t>(j.first));
  for (index_t i = 0; i < j.cache; i += chunk) {
    const auto some = ids.subspan(static_cast<std::size_t>(i), static_cast<std::size_t>(std::min(chunk, j.cache - i)));
    reference.prefill(some);
    for (const auto& each : sessions) {
      on_tokens(static_cast<index_t>(some.size()));
      each->prefill(some);
    }
    on_tokens(static_cast<index_t>(some.size()));
  }

  std::vector<std::vector<block>> blocks(
      1 + sessions.size(), std::vector<block>(static_cast<std::size_t>((j.tokens + block_tokens - 1) / block_tokens)));
  std::vector<predictions> expected;
  for (index_t i = 0; i < j.tokens; i += chunk) {
    const std::size_t at = static_cast<std::size_t>(j.cache + i);
    const auto some = ids.subspan(at, static_cast<std::size_t>(std::min(chunk, j.tokens - i)));
    const auto target = [&](std::size_t n) { return ids[at + n + 1]; };
    const auto block_of = [&](std::size_t c, std::size_t n) -> block& {
      return blocks[c][(static_cast<std::size_t>(i) + n) / static_cast<std::size_t>(block_tokens)];
    };
    expected.clear();
    reference.prefill(some, [&](std::span<const float> logits) {
      block& b = block_of(0, expected.size());
      b.bits += expected.emplace_back(logits).bits(target(expected.size() - 1));
      b.tokens += 1, b.same += 1;
    });
    on_tokens(static_cast<index_t>(some.size()));
    for (std::size_t c = 0; c < sessions.size(); ++c) {
      std::size_t n = 0;
      sessions[c]->prefill(some, [&](std::span<const float> logits) {
        expected[n].compare_with(logits, target(n), block_of(c + 1, n));
        ++n;
      });
      on_tokens(static_cast<index_t>(some.size()));
    }
  }
  for (const auto& of_cell : blocks)
    for (const block& b : of_cell)
      if (!std::isfinite(b.bits) || !std::isfinite(b.nats))
        throw std::runtime_error(fmt::format("{}: {}: a prediction is not finite", s.subject.name, j.name()));

  json cells = json::object();
  cells["f32"] = of_blocks(blocks[0]);
  for (std::size_t c = 0; c < j.cells.size(); ++c) cells[j.cells[c].name()] = of_blocks(blocks[c + 1]);
  return {{"block_tokens", block_tokens}, {"cells", std::move(cells)}};
}

}  // namespace evidence
