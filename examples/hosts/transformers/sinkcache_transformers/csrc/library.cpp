#include <optional>
#include <sinkcache/attention.hpp>
#include <sinkcache/kv_view.hpp>
#include <sinkcache/named_caches.hpp>
#include <sinkcache/with_formats.hpp>
#include <utility>

#include "library.hpp"

using sinkcache::status;

std::shared_ptr<const sinkcache::kv_source> library::view_of(std::string_view k_format, std::string_view v_format,
                                                             const sinkcache::cache_config& config,
                                                             const sinkcache::kv_layout& layout,
                                                             const sinkcache::kv_piece& keys,
                                                             sinkcache::position_t seen, status& found) {
  std::shared_ptr<const sinkcache::kv_source> result;
  found = sinkcache::try_with_formats(
      k_format, v_format, [&]<sinkcache::viewed_format K, sinkcache::viewed_format V>(K, V) -> status {
        using view = sinkcache::kv_view<K, V>;
        status of_view;
        std::optional<view> made = view::try_create(config, layout, keys, seen, of_view);
        if (made) result = std::make_shared<const view>(std::move(*made));
        return of_view;
      });
  return result;
}

std::unique_ptr<sinkcache::any_kv_cache> library::make_cache(const std::string& policy, const std::string& k_format,
                                                             const std::string& v_format,
                                                             const sinkcache::cache_config& config,
                                                             sinkcache::index_t num_qo_heads, status& found) {
  return sinkcache::try_make_cache({policy, k_format, v_format, config, num_qo_heads}, found);
}

status library::decode(const sinkcache::attention_params& params, std::span<const sinkcache::decode_item> batch,
                       sinkcache::workspace& workspace) {
  return sinkcache::attention(params).try_decode(batch, workspace);
}

status library::attend(const sinkcache::attention_params& params, sinkcache::const_matrix_view q,
                       const sinkcache::kv_source& keys, sinkcache::matrix_view out, sinkcache::workspace& workspace) {
  return sinkcache::attention(params).try_attend(q, keys, out, workspace);
}

status library::prefill(const sinkcache::attention_params& params, sinkcache::const_matrix_view q,
                        sinkcache::const_matrix_view k, sinkcache::const_matrix_view v, sinkcache::any_kv_cache& cache,
                        sinkcache::matrix_view out, sinkcache::workspace& workspace) {
  return sinkcache::attention(params).try_prefill(q, k, v, cache, out, workspace);
}
