#pragma once

// What the lines that `hook` inserts into llama.cpp call. C++17, as llama.cpp is; sinkcache_llama.cpp is C++20.

#include "llama-graph.h"
#include "llama-memory.h"

struct llama_model;
struct llama_cparams;

// The memory of this library, where SINKCACHE_WINDOW is set; else null. Throws what it cannot serve. For create_memory.
llama_memory_i* sinkcache_memory(const llama_model& model, const llama_memory_params& params,
                                 const llama_cparams& cparams);

// The input of a graph over that memory; null if the graph's memory is llama.cpp's. For build_attn_inp_kv and _iswa.
template <class Input>
Input* sinkcache_input(const llm_graph_context& graph);

// Appends and attends; null if `inp` is not of this memory, nor SINKCACHE_CELLS set. For build_attn.
ggml_tensor* sinkcache_attention(const llm_graph_context& graph, llm_graph_input_i* inp, ggml_tensor* wo,
                                 ggml_tensor* wo_b, ggml_tensor* wo_s, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                                 ggml_tensor* kq_b, ggml_tensor* sinks, ggml_tensor* v_mla, float kq_scale, int il);

// The same over llama.cpp's own cells, where SINKCACHE_CELLS is set; without what follows the product.
ggml_tensor* sinkcache_cells_attention(const llm_graph_context& graph, llm_graph_input_i* inp, ggml_tensor* q,
                                       ggml_tensor* k, ggml_tensor* v, ggml_tensor* kq_b, ggml_tensor* sinks,
                                       ggml_tensor* v_mla, float kq_scale, int il);
