// What of this library is compiled apart from PyTorch's headers, so that compilers run side by side.
#pragma once

#include <memory>
#include <sinkcache/attention_params.hpp>
#include <sinkcache/kv_memory.hpp>
#include <sinkcache/workspace.hpp>
#include <span>
#include <string>
#include <string_view>

namespace library {

// A sinkcache::kv_view of formats that are f32, f16 or bf16; or null, and in `found` why.
std::shared_ptr<const sinkcache::kv_source> view_of(std::string_view k_format, std::string_view v_format,
                                                    const sinkcache::cache_config& config,
                                                    const sinkcache::kv_layout& layout, const sinkcache::kv_piece& keys,
                                                    sinkcache::position_t seen, sinkcache::status& found);

// sinkcache::try_make_cache.
std::unique_ptr<sinkcache::any_kv_cache> make_cache(const std::string& policy, const std::string& k_format,
                                                    const std::string& v_format, const sinkcache::cache_config& config,
                                                    sinkcache::index_t num_qo_heads, sinkcache::status& found);

// The calls of sinkcache::attention.
sinkcache::status decode(const sinkcache::attention_params& params, std::span<const sinkcache::decode_item> batch,
                         sinkcache::workspace& workspace);
sinkcache::status attend(const sinkcache::attention_params& params, sinkcache::const_matrix_view q,
                         const sinkcache::kv_source& keys, sinkcache::matrix_view out, sinkcache::workspace& workspace);
sinkcache::status prefill(const sinkcache::attention_params& params, sinkcache::const_matrix_view q,
                          sinkcache::const_matrix_view k, sinkcache::const_matrix_view v,
                          sinkcache::any_kv_cache& cache, sinkcache::matrix_view out, sinkcache::workspace& workspace);

}  // namespace library
