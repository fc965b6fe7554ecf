// Compiled once for each instruction set, with UNIT naming it.

#include "attend.hpp"

#include <sinkcache/sinkcache.hpp>

namespace {

template <class Format>
void decode_in(const float* q, const float* k, const float* v, float* out, float* lse) {
  using namespace isa_test;
  sinkcache::kv_cache<Format> cache({.num_kv_heads = num_kv_heads,
                                     .head_dim = head_dim,
                                     .num_sink_tokens = num_sink_tokens,
                                     .window = window,
                                     .positions = sinkcache::positions::absolute,
                                     .inputs = sinkcache::inputs::rotated});
  const sinkcache::attention attention({.num_qo_heads = num_qo_heads});
  sinkcache::workspace workspace;
  constexpr sinkcache::index_t q_dim = num_qo_heads * head_dim, kv_dim = num_kv_heads * head_dim;
  for (sinkcache::index_t token = 0; token < num_tokens; ++token) {
    cache.append(sinkcache::const_matrix_view(k + token * kv_dim, 1, kv_dim),
                 sinkcache::const_matrix_view(v + token * kv_dim, 1, kv_dim));
    attention.decode(sinkcache::const_matrix_view(q + token * q_dim, 1, q_dim), cache,
                     sinkcache::matrix_view(out + token * q_dim, 1, q_dim), workspace,
                     {.lse = {lse + token * num_qo_heads, static_cast<std::size_t>(num_qo_heads)}});
  }
}

void decode(int format, const float* q, const float* k, const float* v, float* out, float* lse) {
  if (format == 0) decode_in<sinkcache::f32>(q, k, v, out, lse);
  if (format == 1) decode_in<sinkcache::f16>(q, k, v, out, lse);
  if (format == 2) decode_in<sinkcache::bf16>(q, k, v, out, lse);
}

const char* refusal() {
#if defined(__cpp_exceptions)
  static std::string message;
  try {
    sinkcache::rope::plain(7, 10000.0);
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  return message.c_str();
#else
  return nullptr;
#endif
}

}  // namespace

const isa_test::unit isa_test::UNIT{sinkcache::isa(), decode, refusal};
