// Every template of the library once, all members of the class templates included: what clang-tidy reads.

#include <sinkcache/fmt.hpp>
#include <sinkcache/host_threads.hpp>
#include <sinkcache/named_caches.hpp>
#include <sinkcache/rope_keys.hpp>
#include <sinkcache/scored_kv_cache.hpp>
#include <sinkcache/sinkcache.hpp>

template class sinkcache::kv_cache<sinkcache::f32>;
template class sinkcache::kv_cache<sinkcache::f16>;
template class sinkcache::kv_cache<sinkcache::bf16>;
// Keys and values in different formats.
template class sinkcache::kv_cache<sinkcache::f32, sinkcache::bf16>;
template class sinkcache::kv_cache<sinkcache::bf16, sinkcache::f16>;

template class sinkcache::kv_view<sinkcache::f32>;
template class sinkcache::kv_view<sinkcache::f16, sinkcache::bf16>;

template class sinkcache::scored_kv_cache<sinkcache::f16, sinkcache::bf16>;
template class sinkcache::scored_kv_cache<sinkcache::q8, sinkcache::q4>;
template class sinkcache::kv_cache<sinkcache::q4>;

template sinkcache::layer_caches sinkcache::make_layer_caches<sinkcache::format_list<sinkcache::f32, sinkcache::q8>>(
    std::span<const sinkcache::named_cache>, std::pmr::memory_resource*);

template class sinkcache::static_tokens<sinkcache::f16, sinkcache::bf16>;

template class sinkcache::basic_matrix_view<float>;
template class sinkcache::basic_matrix_view<const float>;
template sinkcache::workspace::workspace(sinkcache::sequential&);

// An executor of a user's.
struct backwards {
  int concurrency() const { return 1; }
  void run(sinkcache::index_t n, const sinkcache::work_ref& work) {
    while (n > 0) work(--n, 0);
  }
};
template sinkcache::workspace::workspace(backwards&);

template struct fmt::formatter<sinkcache::kv_cache<sinkcache::f32>>;
