#pragma once

// What the benchmarks have in common as Google Benchmark programs: a row is measured in rounds of its own, which Google
// Benchmark sees as one iteration.

#include <benchmark/benchmark.h>

#include <cstdlib>
#include <string>
#include <string_view>

#include "cold.hpp"
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
  // Time of another contender over that of `contender`.
  void percent(const std::string& name, std::size_t other, std::size_t contender) {
    number(name, 100 * rounds_.ratio(other, contender).median);
  }
  // The machine's limits as parts of `contender`'s time, and which of them binds, as the row's label. The contender of
  // arithmetic does a `part`-th of it.
  void limits(std::size_t arithmetic, std::size_t reading, std::size_t contender, double part = 1) {
    const auto of_time = [&](std::size_t limit, double times) {
      return rounds_.of(
          [=](const std::vector<double>& seconds) { return 100 * times * seconds[limit] / seconds[contender]; });
    };
    const measure::spread fma = of_time(arithmetic, part), read = of_time(reading, 1);
    number("fma%", fma.median);
    number("read%", read.median);
    ratio("limit%", read.median > fma.median ? read : fma);
    state_.SetLabel(read.median > fma.median ? "bound by reading" : "bound by arithmetic");
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
    benchmark::AddCustomContext("cold", measure::cold().text);
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
