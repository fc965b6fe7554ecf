#pragma once

// What the benchmarks have in common as Google Benchmark programs: a row is measured in rounds of its own, which Google
// Benchmark sees as one iteration.

#include <benchmark/benchmark.h>

#include <cstdlib>
#include <string>
#include <string_view>

#include "measure.hpp"

namespace suite {

using sinkcache::index_t, sinkcache::matrix;

class row {
 public:
  row(benchmark::State& state, const measure::rounds& rounds, std::size_t contender) : state_(state), rounds_(rounds) {
    state_.SetIterationTime(rounds_.seconds(contender).median);
    state_.counters["rounds"] = static_cast<double>(rounds_.size());
  }

  void number(const std::string& name, double value) { state_.counters[name] = value; }
  void ratio(const std::string& name, const measure::spread& of) {
    number(name, of.median);
    number(name + "_p10", of.p10);
    number(name + "_p90", of.p90);
  }
  // Time of `limit` over that of `contender`.
  void percent(const std::string& name, std::size_t limit, std::size_t contender) {
    number(name, 100 * rounds_.ratio(limit, contender).median);
  }
  // How much of `contender` the longest of several limits takes.
  void percent_of_limit(const std::vector<std::size_t>& limits, std::size_t contender) {
    const measure::spread of = rounds_.of([&](const std::vector<double>& seconds) {
      double limit = 0;
      for (std::size_t i : limits) limit = std::max(limit, seconds[i]);
      return 100 * limit / seconds[contender];
    });
    ratio("limit%", of);
  }

 private:
  benchmark::State& state_;
  const measure::rounds& rounds_;
};

// --benchmark_min_time is how long a row takes at least, beside its 31 rounds. Below 0.1 seconds it asks whether the
// rows run at all: one round each, and none of the slow ones.
class program {
 public:
  program(int argc, char** argv) : argc_(argc), argv_(argv) {
    constexpr std::string_view flag = "--benchmark_min_time=";
    for (int i = 1; i < argc; ++i)
      if (const std::string_view arg = argv[i]; arg.starts_with(flag))
        effort_.seconds = std::atof(arg.substr(flag.size()).data());
    if (quick()) effort_.rounds = 1;
  }

  bool quick() const { return effort_.seconds < 0.1; }

  // run(state, effort) measures the row once.
  template <class Run>
  void add(const std::string& name, Run run) const {
    benchmark::RegisterBenchmark(name.c_str(),
                                 [run, effort = effort_](benchmark::State& state) {
                                   for (auto _ : state) run(state, effort);
                                 })
        ->Iterations(1)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  }
  template <class Run>
  void add_slow(const std::string& name, Run run) const {
    if (!quick()) add(name, std::move(run));
  }

  int main() {
    benchmark::Initialize(&argc_, argv_);
    if (benchmark::ReportUnrecognizedArguments(argc_, argv_)) return 1;
    benchmark::AddCustomContext("isa", sinkcache::isa());
    benchmark::RunSpecifiedBenchmarks();
    return 0;
  }

 private:
  int argc_;
  char** argv_;
  measure::effort effort_;
};

// f(format, name) for each format.
template <class... Formats, class F>
void for_each_format(const F& f) {
  (f(Formats(), std::string(Formats::name)), ...);
}

}  // namespace suite
