#ifndef SINKCACHE_SINKCACHE_H
#define SINKCACHE_SINKCACHE_H

/*
 * The library in C: caches that pin attention sinks, and the attention over them. docs/c-interface.md has the loop.
 *
 * Compile sinkcache.cpp, which lies beside this file, into your program with a C++20 compiler, for your processor
 * (-O3 -march=native): include/ and Eigen are all that it needs. Programs that call it link the C++ runtime.
 *
 * Every call that can fail returns a status, and writes into `error`, which may be NULL, what was wrong, what it was
 * and what it had to be. A call that is refused changes nothing. NULL handles and rows, and buffers that are too small,
 * are refused like any other argument; no exception leaves a call, and none ends the program.
 *
 * Configurations are to be cleared to zeros: a field that is 0 is the default, and `size` says which fields there are.
 *
 * Threads: calls that only read a cache (sizes, clone) may run at the same time; others may not run beside any call on
 * the same cache. An attention may be shared by any number of calls, a workspace by none that overlap.
 */

#include <stddef.h>
#include <stdint.h>

/* Raised when something is added; what was there keeps its meaning, unless CHANGELOG.md says otherwise. */
#define SINKCACHE_C_VERSION 1

/* What exports a function, where the library is built as a shared one and its compiler has to be told. */
#ifndef SINKCACHE_API
#define SINKCACHE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum sinkcache_status {
  SINKCACHE_OK = 0,
  SINKCACHE_REFUSED = 1,  /* an argument, or the state of a cache, broke a rule */
  SINKCACHE_NO_MEMORY = 2 /* or threads */
} sinkcache_status;

/* Empty where the call was right. */
typedef struct sinkcache_error {
  char text[256];
} sinkcache_error;

typedef struct sinkcache_cache sinkcache_cache;         /* keys and values of one sequence and layer */
typedef struct sinkcache_attention sinkcache_attention; /* what an attention layer is told once */
typedef struct sinkcache_workspace sinkcache_workspace; /* scratch memory and threads of the calls made with it */

/* Of the library that was compiled: SINKCACHE_C_VERSION, "0.1.0", and the instruction set, "avx2". */
SINKCACHE_API int sinkcache_c_version(void);
SINKCACHE_API const char* sinkcache_version(void);
SINKCACHE_API const char* sinkcache_isa(void);

/* ---- Rows ------------------------------------------------------------------------------------------------------ */

/*
 * Rows of floats, [tokens, columns]: `size` floats from `data` on may be read or written, and row i starts at
 * data + i * stride. A stride of 0 is the number of columns: rows that lie one after the other. No output may overlap
 * an input.
 */
typedef struct sinkcache_input {
  const float* data;
  int64_t size, stride;
} sinkcache_input;

typedef struct sinkcache_output {
  float* data;
  int64_t size, stride;
} sinkcache_output;

/* ---- Caches ---------------------------------------------------------------------------------------------------- */

/* How keys and queries rotate with their position. Fields that its type does not list have to be 0. */
typedef struct sinkcache_rope {
  size_t size;         /* sizeof(sinkcache_rope) */
  const char* type;    /* NULL or "plain": theta. "linear": theta, factor. "llama3": theta, factor, low_freq_factor,
                          high_freq_factor, original_max_position_embeddings. "yarn": theta, factor,
                          original_max_position_embeddings, and those below it. "inv_freq": inv_freq, attention_factor.
                          "none": nothing */
  int64_t width;       /* dimensions of a head that rotate, the first ones; 0: all. Not of "inv_freq" */
  int32_t interleaved; /* 0: dimension i rotates with i + width / 2; 1: 2 i with 2 i + 1 */
  double theta;
  double factor;
  double low_freq_factor, high_freq_factor;
  double original_max_position_embeddings;
  int32_t no_truncate;           /* yarn: 1 where its ramp may end between pairs (gpt-oss) */
  double beta_fast, beta_slow;   /* yarn: 0 is 32 and 1 */
  double mscale, mscale_all_dim; /* yarn: 0 is not given */
  double attention_factor;       /* yarn, inv_freq: 0 is not given */
  const float* inv_freq;         /* the model's own, in radians per position */
  int64_t num_inv_freq;
} sinkcache_rope;

enum { SINKCACHE_POSITIONS_IN_CACHE = 0, SINKCACHE_POSITIONS_ABSOLUTE = 1 };
enum { SINKCACHE_INPUTS_RAW = 0, SINKCACHE_INPUTS_ROTATED = 1 };

typedef struct sinkcache_cache_config {
  size_t size;             /* sizeof(sinkcache_cache_config) */
  const char* policy;      /* NULL or "sinks": the first num_sink_tokens and the window newest. "window", or a policy
                              by score with its parameters, "snapkv:budget=512,recent=32": docs/eviction.md */
  const char* k_format;    /* f32, f16, bf16, q8, q6, q4, q2; NULL: bf16 */
  const char* v_format;    /* NULL: k_format */
  int64_t num_kv_heads;    /* at least 1 */
  int64_t head_dim;        /* of keys and queries, 1 to 576 */
  int64_t v_head_dim;      /* of values and outputs; 0: head_dim */
  int64_t num_sink_tokens; /* the first tokens, pinned for ever */
  int64_t window;          /* the newest tokens, the current one included. By score: with num_sink_tokens the rows that
                              are kept, unless the policy says budget=; then 0 */
  int64_t rollback;        /* evicted tokens kept a while longer, so that as many can be taken back, and prefill takes
                              one more at a time; 0: 63, -1: none */
  int64_t recent;          /* the newest tokens that formats of few bits spare; 0: 64, -1: none */
  int64_t first_position;  /* where the stream starts */
  int64_t num_qo_heads;    /* of the attention; for policies that look at queries */
  int32_t positions;       /* SINKCACHE_POSITIONS_IN_CACHE, or _ABSOLUTE */
  int32_t inputs;          /* SINKCACHE_INPUTS_RAW: not rotated yet; or _ROTATED */
  const sinkcache_rope* rope; /* NULL only where positions are absolute and inputs rotated */
} sinkcache_cache_config;

/* Makes an empty cache in *cache, which the caller destroys; NULL where it is refused. All memory is taken here. */
SINKCACHE_API sinkcache_status sinkcache_cache_create(const sinkcache_cache_config* config, sinkcache_cache** cache,
                                                      sinkcache_error* error);
/* A copy that goes on by itself. */
SINKCACHE_API sinkcache_status sinkcache_cache_clone(const sinkcache_cache* cache, sinkcache_cache** copy,
                                                     sinkcache_error* error);
/* NULL and handles of another kind are left alone, as by the other two. */
SINKCACHE_API void sinkcache_cache_destroy(sinkcache_cache* cache);

/* Stores tokens: k [tokens, num_kv_heads * head_dim], v [tokens, num_kv_heads * v_head_dim]. */
SINKCACHE_API sinkcache_status sinkcache_append(sinkcache_cache* cache, int64_t tokens, sinkcache_input k,
                                                sinkcache_input v, sinkcache_error* error);

/* Takes back tokens until `seen` are left. sinkcache_min_truncate says down to which count that can be done. */
SINKCACHE_API sinkcache_status sinkcache_truncate(sinkcache_cache* cache, int64_t seen, sinkcache_error* error);
/* Forgets all tokens. */
SINKCACHE_API sinkcache_status sinkcache_clear(sinkcache_cache* cache, sinkcache_error* error);

/* Policies by score: keeps the token at a position for ever, one that comes later too. *pinned, which may be NULL, is 0
   where it was evicted before. */
SINKCACHE_API sinkcache_status sinkcache_pin(sinkcache_cache* cache, int64_t position, int32_t* pinned,
                                             sinkcache_error* error);

/* Tokens seen so far, less those taken back; those that are visible now; the smallest argument down to which truncate
   takes any; bytes of memory. -1 where it is no cache. */
SINKCACHE_API int64_t sinkcache_seen(const sinkcache_cache* cache);
SINKCACHE_API int64_t sinkcache_size(const sinkcache_cache* cache);
SINKCACHE_API int64_t sinkcache_min_truncate(const sinkcache_cache* cache);
SINKCACHE_API int64_t sinkcache_nbytes(const sinkcache_cache* cache);

/* ---- Attention ------------------------------------------------------------------------------------------------- */

typedef struct sinkcache_attention_config {
  size_t size;              /* sizeof(sinkcache_attention_config) */
  int64_t num_qo_heads;     /* a multiple of the cache's num_kv_heads */
  float sm_scale;           /* 0: 1 / sqrt(head_dim) */
  float logits_soft_cap;    /* cap * tanh(logit / cap); 0: none */
  const char* softmax;      /* NULL or "standard"; "softmax1"; "sink_logits" */
  const float* sink_logits; /* one per query head, and how many there are; copied, as are the others */
  int64_t num_sink_logits;
  const float* alibi_slopes; /* one per query head, or NULL */
  int64_t num_alibi_slopes;
  const float* sink_bias; /* added to the logits of pinned tokens; one per query head, or NULL */
  int64_t num_sink_bias;
} sinkcache_attention_config;

SINKCACHE_API sinkcache_status sinkcache_attention_create(const sinkcache_attention_config* config,
                                                          sinkcache_attention** attention, sinkcache_error* error);
SINKCACHE_API void sinkcache_attention_destroy(sinkcache_attention* attention);

/*
 * A host's threads. run(host, n, work, call) calls work(call, item, worker) for every item from 0 to n - 1 once, in any
 * order and on any thread, and returns when all are done. Calls that overlap in time have different workers, from 0 to
 * concurrency - 1. A run that leaves out items is refused afterwards; clear the cache then.
 */
typedef void (*sinkcache_work)(void* call, int64_t item, int64_t worker);
typedef struct sinkcache_executor {
  size_t size;         /* sizeof(sinkcache_executor) */
  int64_t concurrency; /* 1 to 1024 */
  void (*run)(void* host, int64_t n, sinkcache_work work, void* call);
  void* host; /* passed on */
} sinkcache_executor;

/* With threads of its own, the caller's included: 1 to 1024. Results do not depend on it. */
SINKCACHE_API sinkcache_status sinkcache_workspace_create(int64_t threads, sinkcache_workspace** workspace,
                                                          sinkcache_error* error);
SINKCACHE_API sinkcache_status sinkcache_workspace_create_on(const sinkcache_executor* executor,
                                                             sinkcache_workspace** workspace, sinkcache_error* error);
SINKCACHE_API void sinkcache_workspace_destroy(sinkcache_workspace* workspace);

/*
 * Attention of the newest token, already stored: q [1, num_qo_heads * head_dim], out [1, num_qo_heads * v_head_dim],
 * lse [1, num_qo_heads], natural, the sink included; lse.data NULL: it is not wanted. A cache whose policy looks at
 * queries learns from this one.
 */
SINKCACHE_API sinkcache_status sinkcache_decode(const sinkcache_attention* attention, sinkcache_cache* cache,
                                                sinkcache_input q, sinkcache_output out, sinkcache_output lse,
                                                sinkcache_workspace* workspace, sinkcache_error* error);

/* The same for the newest token of each of several sequences at once, each a cache of its own. */
typedef struct sinkcache_decode_item {
  sinkcache_cache* cache;
  sinkcache_input q;
  sinkcache_output out, lse;
} sinkcache_decode_item;

SINKCACHE_API sinkcache_status sinkcache_decode_batch(const sinkcache_attention* attention, int64_t num_items,
                                                      const sinkcache_decode_item* items,
                                                      sinkcache_workspace* workspace, sinkcache_error* error);

/*
 * Stores tokens and attends to them, each seeing what it would see in decode: q [tokens, num_qo_heads * head_dim], k
 * and v as in append, out [tokens, num_qo_heads * v_head_dim], lse [tokens, num_qo_heads], without gaps between its
 * rows. Where memory runs out, some tokens may have been stored: sinkcache_seen says so.
 */
SINKCACHE_API sinkcache_status sinkcache_prefill(const sinkcache_attention* attention, sinkcache_cache* cache,
                                                 int64_t tokens, sinkcache_input q, sinkcache_input k,
                                                 sinkcache_input v, sinkcache_output out, sinkcache_output lse,
                                                 sinkcache_workspace* workspace, sinkcache_error* error);

#ifdef __cplusplus
}
#endif

#endif
