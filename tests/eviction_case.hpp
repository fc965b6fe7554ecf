#pragma once

// Random layers, rules and streams to evict from, drawn from a seed, and the suite that every scorer has to pass
// (eviction_case.cpp): the same scores as the oracle's, the same tokens kept at every event, and attention over what is
// kept. Streams are compared up to the first event that float32 may decide otherwise.

#include <sinkcache/scored_kv_cache.hpp>
#include <sinkcache/sinkcache.hpp>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "eviction_oracle.hpp"
#include "random_case.hpp"

namespace proof {

// One layer, its rules and its stream.
struct eviction_case {
  std::uint64_t seed = 0;
  eviction_setup setup;                        // in the oracle's words
  std::shared_ptr<const token_scorer> scorer;  // of a user's; null: the library's by the policy's name
  cache_config config;
  eviction rules;
  attention_params params;
  int format = 0;  // of keys and values: f32, f16, bf16
  index_t tokens = 0;
  double q_scale = 1;
  matrix q, k, v;                                       // as they go in
  matrix raw_q, raw_k;                                  // and before they were rotated
  std::vector<std::pair<position_t, position_t>> pins;  // after so many tokens, which

  std::string name() const;
};

eviction_case draw_eviction(std::uint64_t seed, const eviction_policy& policy,
                            std::shared_ptr<const token_scorer> scorer = nullptr);

// How much of a policy was compared, and how near scores came to their bound.
struct eviction_tally {
  int events = 0, sets = 0, cut_short = 0;
  double score = 0;
  nearness near;
};

// Feeds a case token by token, in chunks, and in chunks with clones and tokens that are taken back. Tells what differs;
// empty if nothing does.
std::string run_eviction_case(const eviction_case&, eviction_tally&);

// That for so many cases, of which most have to be compared to their end. A scorer of a user's brings the same a second
// time, in eviction_policy::scores.
std::string run_eviction_cases(const eviction_policy& policy, std::uint64_t seed, int cases,
                               const std::shared_ptr<const token_scorer>& scorer = nullptr);

}  // namespace proof
