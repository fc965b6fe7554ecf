// A host that chooses at run time: the same file, attend.cpp, compiled for several instruction sets, in one program.
// Every unit that this processor can run is held against a plain loop. With an argument the others run as well, and are
// expected to die.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "attend.hpp"

using namespace isa_test;

namespace {

constexpr int group_size = num_qo_heads / num_kv_heads, q_dim = num_qo_heads * head_dim,
              kv_dim = num_kv_heads * head_dim;

int passed = 0, failed = 0, skipped = 0;

void expect(bool holds, const char* unit, const char* what) {
  ++(holds ? passed : failed);
  if (!holds) std::printf("failed: %s: %s\n", unit, what);
}

// Multiples of 1/8 from -2 to 2: every format holds them exactly.
std::vector<float> eighths(int rows, int dim, unsigned state) {
  std::vector<float> values(static_cast<std::size_t>(rows) * static_cast<std::size_t>(dim));
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int>((state >> 16) % 33) - 16) / 8;
  }
  return values;
}

const std::vector<float> q = eighths(num_tokens, q_dim, 1), k = eighths(num_tokens, kv_dim, 2),
                         v = eighths(num_tokens, kv_dim, 3);

// The largest error of a unit's outputs and lse, in units of the bound 16 u (1 + A), which is max|v| times that for
// outputs.
double error(const unit& unit, int format) {
  std::vector<float> out(q.size()), lse(static_cast<std::size_t>(num_tokens * num_qo_heads));
  unit.decode(format, q.data(), k.data(), v.data(), out.data(), lse.data());
  double worst = 0;
  for (int token = 0; token < num_tokens; ++token)
    for (int head = 0; head < num_qo_heads; ++head) {
      const float* const query = q.data() + token * q_dim + head * head_dim;
      std::vector<double> sums(head_dim);
      double weights = 0, largest = 0;
      const auto row = [&](const std::vector<float>& of, int key) {
        return of.data() + key * kv_dim + head / group_size * head_dim;
      };
      for (int key = 0; key <= token; ++key) {
        if (key >= num_sink_tokens && key <= token - window) continue;
        double logit = 0;
        for (int d = 0; d < head_dim; ++d) logit += double{query[d]} * double{row(k, key)[d]};
        logit /= std::sqrt(double{head_dim});
        largest = std::max(largest, std::abs(logit));
        weights += std::exp(logit);
        for (int d = 0; d < head_dim; ++d)
          sums[static_cast<std::size_t>(d)] += std::exp(logit) * double{row(v, key)[d]};
      }
      const double bound = 16 * 0x1p-24 * (1 + largest);
      worst = std::max(
          worst,
          std::abs(double{lse[static_cast<std::size_t>(token * num_qo_heads + head)]} - std::log(weights)) / bound);
      for (int d = 0; d < head_dim; ++d)
        worst = std::max(worst, std::abs(double{out[static_cast<std::size_t>(token * q_dim + head * head_dim + d)]} -
                                         sums[static_cast<std::size_t>(d)] / weights) /
                                    (2 * bound));
    }
  return worst;
}

void check(const unit& unit, const char* name, const char* isa, bool supported) {
  expect(std::strcmp(unit.isa, isa) == 0, name, "isa() is another");
  if (!supported) {
    std::printf("%-16s %-8s not run: this processor lacks it\n", name, unit.isa);
    ++skipped;
    return;
  }
  double worst = 0;
  for (int format = 0; format < 3; ++format) worst = std::max(worst, error(unit, format));
  expect(worst <= 1, name, "far from the plain loop");
  const char* const refusal = unit.refusal();
  expect(refusal == nullptr ? &unit == &aborts : std::strstr(refusal, "width was 7") != nullptr, name,
         "an error's message is wrong");
  std::printf("%-16s %-8s error %.3f of the bound\n", name, unit.isa, worst);
}

}  // namespace

int main(int argc, char**) {
  const bool all = argc > 1;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  check(x86_64, "x86-64", "sse2", true);
  check(haswell, "haswell", "avx2", avx2 || all);
  check(skylake_avx512, "skylake-avx512", "avx512", avx512 || all);
  check(halves, "avx512 in halves", "avx512", avx512 || all);
  check(aborts, "no exceptions", "sse2", true);
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return failed == 0 ? 0 : 1;
}
