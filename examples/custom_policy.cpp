// An eviction policy of one's own, compared with the others:
//
//   cmake --preset release && cmake --build --preset release --target custom_policy
//   build/release/examples/custom_policy
//   build/release/examples/custom_policy --policies window,sinks:4,odd_first,odd_first:period=3,h2o --cache 64

#include <algorithm>
#include <cmath>
#include <memory>

#include "compare/program.hpp"
#include "compare/scored_policies.hpp"

namespace {

// Every second token leaves first, the oldest of them before the others: half of the cache reaches twice as far back.
// The library does the rest, for this scorer as for its own: events, pinned and recent tokens, memory, ties, rollback.
class odd_first final : public sinkcache::token_scorer {
 public:
  explicit odd_first(double period) : period_(std::max<sinkcache::position_t>(1, std::llround(period))) {}

  // What it wants to be told: nothing but where tokens stand, so attention does nothing for it. One that looks at what
  // queries gave tokens says {.window = 8}, or {.sums = true} for all of them; see sinkcache/scorer.hpp.
  sinkcache::scorer_needs needs() const noexcept override { return {}; }

  // A number for each row of one KV head, in the order of the stream. The highest stay.
  void score(const sinkcache::scored_head& head, std::span<float> scores) const noexcept override {
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const bool odd = head.at[i] % period_ != 0;
      scores[i] = static_cast<float>(head.at[i] - (odd ? head.seen : 0));
    }
  }

  std::string_view name() const noexcept override { return "odd_first"; }

 private:
  sinkcache::position_t period_;
};

}  // namespace

int main(int argc, char** argv) {
  compare::register_policy(
      {.name = "odd_first",
       .keeps = "every second token twice as long",
       .make = [](const compare::numbers& given) { return std::make_shared<const odd_first>(given.at("period")); },
       .parameters = {{"period", 2}}});
  return compare::compare_policies(argc, argv);
}
