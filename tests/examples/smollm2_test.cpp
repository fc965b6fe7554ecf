// SmolLM2-135M as `examples/get-model smollm2` gets it, against what others compute of the same file.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../effort.hpp"
#include "compare/caches.hpp"
#include "engine/model.hpp"
#include "loaders/gguf.hpp"

namespace {

// SINKCACHE_SMOLLM2, or where get-model puts it; empty, and said so, where there is none.
std::string model_path() {
  std::string path;
  if (const char* const given = std::getenv("SINKCACHE_SMOLLM2")) {
    path = given;
  } else {
    const char* const cache = std::getenv("XDG_CACHE_HOME");
    const char* const home = std::getenv("HOME");
    path = (cache && *cache ? std::string(cache) : std::string(home ? home : "") + "/.cache") +
           "/sinkcache/SmolLM2-135M-Instruct.Q4_1.gguf";
  }
  if (effort::cases(10) < 10) {
    WARN("skipped: minutes where little effort was asked for");
    return "";
  }
  if (std::filesystem::exists(path)) return path;
  WARN("skipped: there is no " << path
                               << "; examples/get-model smollm2 gets it, SINKCACHE_SMOLLM2 names another place");
  return "";
}

// What tools/golden/smollm2.py wrote.
struct golden {
  explicit golden(const std::string& reference)
      : file(loaders::gguf::load(SINKCACHE_SOURCE_DIR "/tests/golden/smollm2-" + reference + ".gguf")),
        most_likely(static_cast<std::size_t>(file.integer("most_likely", 1, 1000).value())),
        drawn(static_cast<std::size_t>(file.integer("drawn", 1, 1000).value())),
        ids(file.integers("kept_ids").value()),
        log_p(file.numbers("kept_log_p").value()) {
    const std::vector<std::int64_t> read = file.integers("token_ids").value();
    tokens.assign(read.begin(), read.end());
    REQUIRE(tokens.size() == 512);
    REQUIRE(ids.size() == tokens.size() * (most_likely + drawn));
    REQUIRE(log_p.size() == ids.size());
  }

  loaders::gguf file;
  std::size_t most_likely, drawn;
  std::vector<int> tokens;
  std::vector<std::int64_t> ids;
  std::vector<double> log_p;  // of `ids`: the reference's log probabilities, normalised over the whole vocabulary
};

struct agreement {
  double mean_divergence = 0;  // KL(reference || ours), in nats
  int same_top = 0;
  double worst_tie =
      0;  // the largest difference in the reference's log p between its first and ours, where they differ
};

// Every term of sum_i p_i log(p_i / q_i) - p_i + q_i, which is the divergence as p and q both sum to 1, is at least 0.
// Those of the most likely tokens are added up; the mean over those drawn from the others, each with a probability in
// proportion to its p, times the p of all others, is an unbiased estimate of what is left.
void add_position(const golden& g, std::size_t position, std::span<const float> logits, agreement& to) {
  const std::size_t kept = g.most_likely + g.drawn;
  const std::int64_t* const ids = g.ids.data() + position * kept;
  const double* const log_p = g.log_p.data() + position * kept;
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  const double log_sum = largest + std::log(sum);
  const auto term = [&](std::size_t i) {  // over p
    const double ratio = logits[static_cast<std::size_t>(ids[i])] - log_sum - log_p[i];
    return std::expm1(ratio) - ratio;
  };
  double divergence = 0, others = 1, drawn = 0;
  for (std::size_t i = 0; i < g.most_likely; ++i) {
    divergence += std::exp(log_p[i]) * term(i);
    others -= std::exp(log_p[i]);
  }
  for (std::size_t i = g.most_likely; i < kept; ++i) drawn += term(i) / static_cast<double>(g.drawn);
  to.mean_divergence += (divergence + std::max(others, 0.) * drawn) / static_cast<double>(g.tokens.size());

  const auto top = std::max_element(logits.begin(), logits.end()) - logits.begin();
  to.same_top += top == ids[0];
  const std::int64_t* const found = std::find(ids, ids + g.most_likely, top);
  to.worst_tie = std::max(to.worst_tie, found == ids + g.most_likely ? INFINITY : log_p[0] - log_p[found - ids]);
}

}  // namespace

TEST_CASE("SmolLM2 predicts what others compute of the same file") {
  const std::string path = model_path();
  if (path.empty()) return;
  const golden numpy("numpy"), llama_cpp("llama_cpp");
  REQUIRE(numpy.tokens == llama_cpp.tokens);
  const engine::model model(path);
  engine::session session(model, compare::sink_window(0, 512), {.threads = 2});
  agreement with_numpy, with_llama_cpp;
  for (std::size_t i = 0; i < numpy.tokens.size(); ++i) {
    const std::span<const float> logits = session.decode(numpy.tokens[i]);
    add_position(numpy, i, logits, with_numpy);
    add_position(llama_cpp, i, logits, with_llama_cpp);
  }
  INFO("numpy in double, on the same weights: KL " << with_numpy.mean_divergence << ", the same first token "
                                                   << with_numpy.same_top << " times, else a tie within "
                                                   << with_numpy.worst_tie);
  INFO("llama.cpp, which rounds more: KL " << with_llama_cpp.mean_divergence << ", the same first token "
                                           << with_llama_cpp.same_top << " times");
  CHECK(with_numpy.mean_divergence > 0);
  CHECK(with_numpy.mean_divergence <= 1e-6);
  CHECK(with_numpy.worst_tie <= 1e-4);
  CHECK(with_llama_cpp.mean_divergence <= 5e-3);
  CHECK(with_llama_cpp.same_top >= 0.97 * 512);
}
