#pragma once

// What the translation units of one program, each compiled for another instruction set, offer its main file. Only
// plain types cross: a matrix of Eigen's may be laid out otherwise there, and no type of the library is the same.

namespace isa_test {

constexpr int num_qo_heads = 4, num_kv_heads = 2, head_dim = 40, num_sink_tokens = 2, window = 33, num_tokens = 101;

struct unit {
  const char* isa;
  // Decodes num_tokens tokens; the rows of q, k and v and of what comes out lie one behind the other. `format` is 0
  // (f32), 1 (f16) or 2 (bf16).
  void (*decode)(int format, const float* q, const float* k, const float* v, float* out, float* lse);
  // What a bad configuration says, or nullptr where it would abort.
  const char* (*refusal)();
};

extern const unit x86_64, haswell, skylake_avx512, halves, aborts;

}  // namespace isa_test
