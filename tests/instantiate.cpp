// Every template of the library once, all members of the class templates included: what clang-tidy reads.

#include <sinkcache/fmt.hpp>
#include <sinkcache/sinkcache.hpp>

template class sinkcache::kv_cache<sinkcache::f32>;
template class sinkcache::kv_cache<sinkcache::f16>;
template class sinkcache::kv_cache<sinkcache::bf16>;
template class sinkcache::kv_cache<sinkcache::f32, sinkcache::bf16>;  // keys and values in different formats

template class sinkcache::basic_matrix_view<float>;
template class sinkcache::basic_matrix_view<const float>;
template sinkcache::workspace::workspace(sinkcache::sequential&);
template struct fmt::formatter<sinkcache::kv_cache<sinkcache::f32>>;
