#pragma once

// sinkcache: KV caches that pin attention sinks, and the attention that reads them.
//
//   kv_cache.hpp          the cache: append, truncate, what is kept
//   cache_config.hpp      its configuration
//   any_kv_cache.hpp      a cache whose formats were chosen at run time
//   layer_caches.hpp      the caches of a model's layers, taken back and copied together
//   kv_view.hpp           keys and values in an engine's own memory, read in place
//   kv_memory.hpp         how that memory is described
//   joined.hpp            a shared prefix, or tokens without positions, in front of a cache
//   attention.hpp         decode and prefill over them, for standard softmax, softmax1 and learned sink logits
//   attention_params.hpp  what an attention layer is told once
//   source.hpp            the contract: all that attention sees of a cache, for sources of your own
//   policy.hpp            which tokens stay: pure functions of how many were seen
//   softmax.hpp           the mathematics: partial states, how they merge, where the sink enters
//   rope.hpp              rotary positions, exact at any distance from the start
//   format.hpp            how keys and values are stored: f32, f16, bf16, or a format of yours
//   with_formats.hpp      formats chosen at run time, by their names
//   quantized.hpp         rows of few bits, q8, q6, q4, q2, and the Hadamard transform that goes with them
//   ggml_formats.hpp      rows as ggml lays them out, q8_0 and q4_0, for a kv_view
//   workspace.hpp         scratch memory, and the hook for your threads
//   matrix.hpp            row-major views of Eigen matrices
//   status.hpp            status, what a check found; integer types
//   not_finite.hpp        whether what is stored is still numbers
//   storage.hpp           the one allocation behind a cache
//   tiered_storage.hpp    the one allocation behind that, and which token lies where
//   detail/erased.hpp     ranges that were dropped from the middle of a cache
//   detail/schedule.hpp   how a call is cut into work items
//   detail/query_block.hpp  how query rows go over the parts of a plan
//   detail/absorb.hpp     the hot loop
//
// Not included here, for what they cost to compile:
//   scored_kv_cache.hpp   a cache that evicts by score; eviction.hpp has its rules, scorer.hpp what a scorer is
//   policies.hpp, key_policies.hpp, redundancy_policies.hpp   scorers: H2O, TOVA, SnapKV, KeyDiff, LagKV, R-KV ...
//   named_policies.hpp    all of them by name
//   thread_pool.hpp       an executor with threads of its own
//   named_caches.hpp      any cache by the names of its policy and formats
//   rope_keys.hpp         rotary positions from the keys of a config.json or a GGUF file
//   host_threads.hpp      an executor over a host's pool; how threads that are in a call together share it
//   openmp.hpp            an executor over OpenMP's threads
//   sinkcache.h           the interface for C; sinkcache.cpp, which a host compiles, is what is behind it
//   fmt.hpp               prints caches, configurations and statuses; it alone needs fmt

#include "any_kv_cache.hpp"
#include "attention.hpp"
#include "attention_params.hpp"
#include "cache_config.hpp"
#include "format.hpp"
#include "ggml_formats.hpp"
#include "joined.hpp"
#include "kv_cache.hpp"
#include "kv_memory.hpp"
#include "kv_view.hpp"
#include "layer_caches.hpp"
#include "matrix.hpp"
#include "not_finite.hpp"
#include "policy.hpp"
#include "quantized.hpp"
#include "rope.hpp"
#include "softmax.hpp"
#include "source.hpp"
#include "status.hpp"
#include "storage.hpp"
#include "tiered_storage.hpp"
#include "version.hpp"
#include "with_formats.hpp"
#include "workspace.hpp"
