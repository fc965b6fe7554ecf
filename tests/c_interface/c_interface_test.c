/* The C interface from C11: against sums in double that share nothing with the library, against the bits of the C++
   classes, and with arguments that are wrong. */

#include <math.h>
#include <sinkcache/sinkcache.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int reference_stream(int number, int64_t prompt, int64_t tokens, const float* q, const float* k, const float* v,
                     float* out, float* lse);

enum { KV_HEADS = 2, QO_HEADS = 6, DIM = 16, V_DIM = 8, TOKENS = 90, PROMPT = 37 };
enum { Q = QO_HEADS * DIM, K = KV_HEADS * DIM, V = KV_HEADS * V_DIM, OUT = QO_HEADS * V_DIM };

static int failures = 0;
#define CHECK(holds)                                             \
  do {                                                           \
    if (!(holds)) {                                              \
      printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #holds); \
      ++failures;                                                \
    }                                                            \
  } while (0)

static sinkcache_error error;
#define OK(call)                                                                                            \
  do {                                                                                                      \
    if ((call) != SINKCACHE_OK) printf("%s:%d: refused: %s\n", __FILE__, __LINE__, error.text), ++failures; \
  } while (0)

/* That a call is refused, and says these words. */
static void refused(int line, sinkcache_status status, const char* words) {
  if (status == SINKCACHE_REFUSED && strstr(error.text, words) != NULL) return;
  printf("line %d: status %d, '%s' had to say '%s'\n", line, (int)status, error.text, words);
  ++failures;
}
#define REFUSED(call, words) refused(__LINE__, call, words)

static uint64_t state;
static float uniform(void) { /* splitmix64, from -1 to 1 */
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (float)((double)((z ^ (z >> 31)) >> 11) * 0x1p-52 - 1);
}

static float q[TOKENS * Q], k[TOKENS * K], v[TOKENS * V], out[TOKENS * OUT], lse[TOKENS * QO_HEADS];

static void fill(uint64_t seed) {
  state = seed;
  for (size_t i = 0; i < sizeof q / sizeof *q; ++i) q[i] = 2 * uniform();
  for (size_t i = 0; i < sizeof k / sizeof *k; ++i) k[i] = 2 * uniform();
  for (size_t i = 0; i < sizeof v / sizeof *v; ++i) v[i] = uniform();
  for (size_t i = 0; i < sizeof out / sizeof *out; ++i) out[i] = NAN;
  for (size_t i = 0; i < sizeof lse / sizeof *lse; ++i) lse[i] = NAN;
}

static sinkcache_input rows(const float* data, int64_t first, int64_t n, int64_t cols) {
  return (sinkcache_input){data + first * cols, n * cols, 0};
}
static sinkcache_output out_rows(float* data, int64_t first, int64_t n, int64_t cols) {
  return (sinkcache_output){data + first * cols, n * cols, 0};
}
static const sinkcache_output nowhere = {NULL, 0, 0};

static sinkcache_workspace* one_thread(void) {
  sinkcache_workspace* workspace = NULL;
  OK(sinkcache_workspace_create(1, &workspace, &error));
  return workspace;
}

/* Prefill of `prompt` tokens, then decode. */
static void stream(sinkcache_cache* cache, const sinkcache_attention* attention, sinkcache_workspace* workspace,
                   int64_t prompt) {
  if (prompt > 0)
    OK(sinkcache_prefill(attention, cache, prompt, rows(q, 0, prompt, Q), rows(k, 0, prompt, K), rows(v, 0, prompt, V),
                         out_rows(out, 0, prompt, OUT), out_rows(lse, 0, prompt, QO_HEADS), workspace, &error));
  for (int64_t i = prompt; i < TOKENS; ++i) {
    OK(sinkcache_append(cache, 1, rows(k, i, 1, K), rows(v, i, 1, V), &error));
    OK(sinkcache_decode(attention, cache, rows(q, i, 1, Q), out_rows(out, i, 1, OUT), out_rows(lse, i, 1, QO_HEADS),
                        workspace, &error));
  }
}

/* ---- By definition, in double --------------------------------------------------------------------------------------
 */

typedef struct {
  int64_t sinks, window;
  int absolute, interleaved, width;
  double theta, cap, scale;
  const float *sink_logits, *slopes; /* per query head, or NULL */
} definition;

static void rotate(const definition* of, int64_t position, double* row) {
  for (int i = 0; i < of->width / 2; ++i) {
    const double inv_freq = (float)(1 / pow(of->theta, 2.0 * i / of->width));
    const double c = cos((double)position * inv_freq), s = sin((double)position * inv_freq);
    double* const a = row + (of->interleaved ? 2 * i : i);
    double* const b = of->interleaved ? a + 1 : a + of->width / 2;
    const double x = *a, y = *b;
    *a = x * c - y * s;
    *b = y * c + x * s;
  }
}

/* The largest difference of token t's output and lse from what they have to be. */
static double difference(const definition* of, int64_t t) {
  double most = 0;
  for (int h = 0; h < QO_HEADS; ++h) {
    double logits[TOKENS], query[DIM];
    int64_t at[TOKENS], n = 0;
    for (int64_t p = 0; p <= t; ++p)
      if (p < of->sinks || p > t - of->window) at[n++] = p;
    for (int d = 0; d < DIM; ++d) query[d] = q[t * Q + h * DIM + d];
    rotate(of, of->absolute ? t : n - 1, query);
    double top = of->sink_logits != NULL ? of->sink_logits[h] : -INFINITY;
    for (int64_t j = 0; j < n; ++j) {
      double key[DIM], dot = 0;
      for (int d = 0; d < DIM; ++d) key[d] = k[at[j] * K + h / 3 * DIM + d];
      rotate(of, of->absolute ? at[j] : j, key);
      for (int d = 0; d < DIM; ++d) dot += query[d] * key[d];
      dot *= of->scale;
      if (of->cap > 0) dot = of->cap * tanh(dot / of->cap);
      if (of->slopes != NULL) dot -= of->slopes[h] * (double)(of->absolute ? t - at[j] : n - 1 - j);
      logits[j] = dot;
      top = fmax(top, dot);
    }
    double sum = of->sink_logits != NULL ? exp(of->sink_logits[h] - top) : 0, o[V_DIM] = {0};
    for (int64_t j = 0; j < n; ++j) {
      const double weight = exp(logits[j] - top);
      sum += weight;
      for (int d = 0; d < V_DIM; ++d) o[d] += weight * v[at[j] * V + h / 3 * V_DIM + d];
    }
    for (int d = 0; d < V_DIM; ++d) most = fmax(most, fabs(out[t * OUT + h * V_DIM + d] - o[d] / sum));
    most = fmax(most, fabs(lse[t * QO_HEADS + h] - (top + log(sum))));
    for (int d = 0; d < V_DIM; ++d)
      if (isnan(out[t * OUT + h * V_DIM + d])) return INFINITY;
    if (isnan(lse[t * QO_HEADS + h])) return INFINITY;
  }
  return most;
}

static void by_definition(void) {
  const float sinks[QO_HEADS] = {0.5f, -1, 0, 2, 1, -0.25f};
  const float slopes[QO_HEADS] = {0.5f, 0.25f, 0.125f, 0.0625f, 0.03125f, 0.015625f};
  const definition cases[] = {
      {.sinks = 4, .window = 20, .width = DIM, .theta = 10000, .scale = 0.25},
      {.sinks = 0, .window = 33, .width = DIM, .theta = 500, .scale = 0.25, .sink_logits = sinks},
      {.sinks = 2, .window = 11, .absolute = 1, .interleaved = 1, .width = 8, .theta = 100, .scale = 0.5, .cap = 3},
      {.sinks = 1, .window = 25, .width = 0, .theta = 0, .scale = 0.25, .slopes = slopes},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
    for (int64_t prompt = 0; prompt <= PROMPT; prompt += PROMPT) {
      const definition* const of = &cases[i];
      fill(100 * i + (uint64_t)prompt);
      const sinkcache_rope rope = {.size = sizeof rope,
                                   .type = of->width > 0 ? "plain" : "none",
                                   .width = of->width,
                                   .interleaved = of->interleaved,
                                   .theta = of->theta};
      const sinkcache_cache_config config = {.size = sizeof config,
                                             .policy = of->sinks > 0 ? NULL : "window",
                                             .k_format = "f32",
                                             .num_kv_heads = KV_HEADS,
                                             .head_dim = DIM,
                                             .v_head_dim = V_DIM,
                                             .num_sink_tokens = of->sinks,
                                             .window = of->window,
                                             .rollback = i == 2 ? -1 : 5,
                                             .positions = of->absolute,
                                             .rope = &rope};
      const sinkcache_attention_config params = {.size = sizeof params,
                                                 .num_qo_heads = QO_HEADS,
                                                 .sm_scale = i == 0 ? 0 : (float)of->scale,
                                                 .logits_soft_cap = (float)of->cap,
                                                 .softmax = of->sink_logits != NULL ? "sink_logits" : NULL,
                                                 .sink_logits = of->sink_logits,
                                                 .num_sink_logits = of->sink_logits != NULL ? QO_HEADS : 0,
                                                 .alibi_slopes = of->slopes,
                                                 .num_alibi_slopes = of->slopes != NULL ? QO_HEADS : 0};
      sinkcache_cache* cache = NULL;
      sinkcache_attention* attention = NULL;
      sinkcache_workspace* const workspace = one_thread();
      OK(sinkcache_cache_create(&config, &cache, &error));
      OK(sinkcache_attention_create(&params, &attention, &error));
      stream(cache, attention, workspace, prompt);
      CHECK(sinkcache_seen(cache) == TOKENS);
      CHECK(sinkcache_size(cache) == of->sinks + of->window);
      double most = 0;
      for (int64_t t = 0; t < TOKENS; ++t) most = fmax(most, difference(of, t));
      if (!(most < 2e-5)) printf("case %d, prompt %d: off by %g\n", (int)i, (int)prompt, most), ++failures;
      sinkcache_workspace_destroy(workspace);
      sinkcache_attention_destroy(attention);
      sinkcache_cache_destroy(cache);
    }
}

/* ---- What the C++ classes give ----------------------------------------------------------------------------------- */

static const sinkcache_rope yarn = {
    .size = sizeof yarn, .type = "yarn", .theta = 10000, .factor = 4, .original_max_position_embeddings = 64};
/* With all its fields but attention_factor, which would stand for the mscales. */
static const sinkcache_rope whole_yarn = {.size = sizeof whole_yarn,
                                          .type = "yarn",
                                          .theta = 100,
                                          .interleaved = 1,
                                          .width = 8,
                                          .factor = 4,
                                          .original_max_position_embeddings = 64,
                                          .no_truncate = 1,
                                          .beta_fast = 5,
                                          .beta_slow = 2,
                                          .mscale = 2,
                                          .mscale_all_dim = 0.5};
static const sinkcache_rope scaled_yarn = {.size = sizeof scaled_yarn,
                                           .type = "yarn",
                                           .theta = 10000,
                                           .factor = 4,
                                           .original_max_position_embeddings = 64,
                                           .attention_factor = 1.25};

static sinkcache_cache_config reference_config(int number) {
  const sinkcache_cache_config cases[] = {
      {.k_format = "f32"},
      {.k_format = "q8", .v_format = "f32", .positions = SINKCACHE_POSITIONS_ABSOLUTE},
      {.policy = "h2o:recent=5,interval=4", .k_format = "f32", .num_qo_heads = QO_HEADS},
  };
  sinkcache_cache_config config = cases[number];
  config.size = sizeof config;
  config.num_kv_heads = KV_HEADS;
  config.head_dim = DIM;
  config.v_head_dim = V_DIM;
  config.num_sink_tokens = 3;
  config.window = 20;
  config.rollback = 5;
  config.recent = 7;
  config.rope = number == 0 ? &yarn : number == 1 ? &whole_yarn : &scaled_yarn;
  return config;
}

static sinkcache_attention* reference_attention(void) {
  const float sinks[QO_HEADS] = {0.5f, -1, 0, 2, 1, -0.25f};
  const float bias[QO_HEADS] = {0.125f, 0.125f, 0.125f, 0.125f, 0.125f, 0.125f};
  const sinkcache_attention_config config = {.size = sizeof config,
                                             .num_qo_heads = QO_HEADS,
                                             .logits_soft_cap = 30,
                                             .softmax = "sink_logits",
                                             .sink_logits = sinks,
                                             .num_sink_logits = QO_HEADS,
                                             .sink_bias = bias,
                                             .num_sink_bias = QO_HEADS};
  sinkcache_attention* attention = NULL;
  OK(sinkcache_attention_create(&config, &attention, &error));
  return attention;
}

static sinkcache_cache* reference_cache(int number) {
  const sinkcache_cache_config config = reference_config(number);
  sinkcache_cache* cache = NULL;
  OK(sinkcache_cache_create(&config, &cache, &error));
  return cache;
}

/* Backwards, with a worker each in turn. */
static void run_backwards(void* host, int64_t n, sinkcache_work work, void* call) {
  for (int64_t item = n - 1; item >= 0; --item) work(call, item, item % 3);
  ++*(int*)host;
}

static void as_in_cpp(void) {
  static float expected[TOKENS * OUT], expected_lse[TOKENS * QO_HEADS];
  int runs = 0;
  const sinkcache_executor host = {sizeof host, 3, &run_backwards, &runs};
  sinkcache_attention* const attention = reference_attention();
  for (int number = 0; number < 3; ++number)
    for (int threads = 0; threads < 4; ++threads) {
      fill((uint64_t)number + 1);
      CHECK(reference_stream(number, PROMPT, TOKENS, q, k, v, expected, expected_lse) == 1);
      sinkcache_workspace* workspace = NULL;
      if (threads == 0)
        OK(sinkcache_workspace_create_on(&host, &workspace, &error));
      else
        OK(sinkcache_workspace_create(threads, &workspace, &error));
      sinkcache_cache* const cache = reference_cache(number);
      stream(cache, attention, workspace, PROMPT);
      CHECK(memcmp(out, expected, sizeof out) == 0);
      CHECK(memcmp(lse, expected_lse, sizeof lse) == 0);
      CHECK(sinkcache_nbytes(cache) > 0);
      sinkcache_cache_destroy(cache);
      sinkcache_workspace_destroy(workspace);
    }
  CHECK(runs > 0);
  sinkcache_attention_destroy(attention);
}

/* Rows of q, k and v of one matrix, as a fused projection leaves them, and a batch of three sequences. */
static void strided_and_batched(void) {
  enum { ALL = Q + K + V, SEQUENCES = 3 };
  static float fused[TOKENS * ALL], wide[TOKENS * (OUT + 5)];
  sinkcache_attention* const attention = reference_attention();
  sinkcache_workspace* const workspace = one_thread();
  fill(9);
  for (int64_t t = 0; t < TOKENS; ++t) {
    memcpy(fused + t * ALL, q + t * Q, sizeof(float) * Q);
    memcpy(fused + t * ALL + Q, k + t * K, sizeof(float) * K);
    memcpy(fused + t * ALL + Q + K, v + t * V, sizeof(float) * V);
  }
  sinkcache_cache *whole = reference_cache(0), *split = reference_cache(0);
  OK(sinkcache_prefill(attention, whole, TOKENS, rows(q, 0, TOKENS, Q), rows(k, 0, TOKENS, K), rows(v, 0, TOKENS, V),
                       out_rows(out, 0, TOKENS, OUT), nowhere, workspace, &error));
  const int64_t left = (TOKENS - 1) * ALL;
  OK(sinkcache_prefill(attention, split, TOKENS, (sinkcache_input){fused, left + Q, ALL},
                       (sinkcache_input){fused + Q, left + K, ALL}, (sinkcache_input){fused + Q + K, left + V, ALL},
                       (sinkcache_output){wide, TOKENS * (OUT + 5) - 5, OUT + 5}, nowhere, workspace, &error));
  for (int64_t t = 0; t < TOKENS; ++t) CHECK(memcmp(out + t * OUT, wide + t * (OUT + 5), sizeof(float) * OUT) == 0);

  float single[SEQUENCES][OUT], batched[SEQUENCES][OUT], batched_lse[SEQUENCES][QO_HEADS];
  sinkcache_cache* caches[SEQUENCES];
  sinkcache_decode_item items[SEQUENCES];
  for (int i = 0; i < SEQUENCES; ++i) {
    caches[i] = reference_cache(i == 1 ? 1 : 0);
    OK(sinkcache_append(caches[i], 10 + 20 * i, rows(k, i, 10 + 20 * i, K), rows(v, i, 10 + 20 * i, V), &error));
    OK(sinkcache_decode(attention, caches[i], rows(q, i, 1, Q), (sinkcache_output){single[i], OUT, 0}, nowhere,
                        workspace, &error));
    items[i] =
        (sinkcache_decode_item){caches[i], rows(q, i, 1, Q), {batched[i], OUT, 0}, {batched_lse[i], QO_HEADS, 0}};
  }
  OK(sinkcache_decode_batch(attention, SEQUENCES, items, workspace, &error));
  CHECK(memcmp(single, batched, sizeof single) == 0);
  OK(sinkcache_decode_batch(attention, 0, NULL, workspace, &error));
  REFUSED(sinkcache_decode_batch(attention, -1, items, workspace, &error), "num_items was -1");
  REFUSED(sinkcache_decode_batch(attention, 2, NULL, workspace, &error), "items was null");
  items[2].cache = caches[0];
  REFUSED(sinkcache_decode_batch(attention, SEQUENCES, items, workspace, &error), "a cache was given twice");
  items[2].cache = NULL;
  REFUSED(sinkcache_decode_batch(attention, SEQUENCES, items, workspace, &error), "cache was null");
  for (int i = 0; i < SEQUENCES; ++i) sinkcache_cache_destroy(caches[i]);
  sinkcache_cache_destroy(whole);
  sinkcache_cache_destroy(split);
  sinkcache_workspace_destroy(workspace);
  sinkcache_attention_destroy(attention);
}

/* ---- Taking back, copying, pinning ------------------------------------------------------------------------------- */

static void taken_back_and_copied(void) {
  sinkcache_attention* const attention = reference_attention();
  sinkcache_workspace* const workspace = one_thread();
  float before[OUT], after[OUT];
  const sinkcache_output to_before = {before, OUT, 0}, to_after = {after, OUT, 0};
  for (int number = 0; number < 3; ++number) {
    fill(20);
    sinkcache_cache *const cache = reference_cache(number), *copy = NULL;
    if (number == 2) { /* it has to see the queries */
      OK(sinkcache_prefill(attention, cache, 50, rows(q, 0, 50, Q), rows(k, 0, 50, K), rows(v, 0, 50, V),
                           out_rows(out, 0, 50, OUT), nowhere, workspace, &error));
    } else {
      OK(sinkcache_append(cache, 50, rows(k, 0, 50, K), rows(v, 0, 50, V), &error));
    }
    OK(sinkcache_decode(attention, cache, rows(q, 49, 1, Q), to_before, nowhere, workspace, &error));
    OK(sinkcache_cache_clone(cache, &copy, &error));
    CHECK(sinkcache_nbytes(copy) == sinkcache_nbytes(cache));
    OK(sinkcache_append(cache, 2, rows(k, 50, 2, K), rows(v, 50, 2, V), &error));
    CHECK(sinkcache_seen(cache) == 52);
    CHECK(sinkcache_min_truncate(cache) <= 50 && sinkcache_min_truncate(cache) >= 45);
    OK(sinkcache_truncate(cache, 50, &error));
    OK(sinkcache_decode(attention, cache, rows(q, 49, 1, Q), to_after, nowhere, workspace, &error));
    CHECK(memcmp(before, after, sizeof before) == 0);
    CHECK(sinkcache_seen(copy) == 50);
    OK(sinkcache_decode(attention, copy, rows(q, 49, 1, Q), to_after, nowhere, workspace, &error));
    CHECK(memcmp(before, after, sizeof before) == 0);
    REFUSED(sinkcache_truncate(cache, 20, &error), "seen was 20");
    REFUSED(sinkcache_truncate(cache, 51, &error), "seen was 51");
    REFUSED(sinkcache_truncate(cache, -1, &error), "seen was -1");
    CHECK(sinkcache_seen(cache) == 50);
    int32_t pinned = 7;
    if (number == 2) {
      OK(sinkcache_pin(cache, 49, &pinned, &error));
      CHECK(pinned == 1);
      OK(sinkcache_pin(cache, 60, NULL, &error));
      REFUSED(sinkcache_pin(cache, -1, &pinned, &error), "position was -1");
    } else {
      REFUSED(sinkcache_pin(cache, 49, &pinned, &error), "position was 49");
    }
    OK(sinkcache_clear(cache, &error));
    CHECK(sinkcache_seen(cache) == 0 && sinkcache_size(cache) == 0);
    sinkcache_cache_destroy(cache);
    sinkcache_cache_destroy(copy);
  }
  sinkcache_workspace_destroy(workspace);
  sinkcache_attention_destroy(attention);
}

/* 0 is the default of a count, -1 none of it. */
static void counts_that_are_zero(void) {
  fill(40);
  int64_t bytes[2];
  for (int none = 0; none < 2; ++none) {
    sinkcache_cache_config config = reference_config(1);
    config.rollback = config.recent = none ? -1 : 0;
    sinkcache_cache* cache = NULL;
    OK(sinkcache_cache_create(&config, &cache, &error));
    OK(sinkcache_append(cache, TOKENS, rows(k, 0, TOKENS, K), rows(v, 0, TOKENS, V), &error));
    CHECK(sinkcache_min_truncate(cache) == (none ? TOKENS : TOKENS - 63));
    bytes[none] = sinkcache_nbytes(cache);
    sinkcache_cache_destroy(cache);
  }
  CHECK(bytes[1] < bytes[0] / 2);
  /* The default of `recent` is 64. */
  sinkcache_cache_config config = reference_config(1);
  for (int i = 0; i < 3; ++i) {
    config.window = 80, config.rollback = -1, config.recent = i == 0 ? 0 : i == 1 ? 64 : 63;
    sinkcache_cache* cache = NULL;
    OK(sinkcache_cache_create(&config, &cache, &error));
    if (i == 0) bytes[0] = sinkcache_nbytes(cache);
    CHECK((sinkcache_nbytes(cache) == bytes[0]) == (i < 2));
    sinkcache_cache_destroy(cache);
  }
}

/* ---- What is wrong ----------------------------------------------------------------------------------------------- */

static void run_nothing(void* host, int64_t n, sinkcache_work work, void* call) {
  (void)host;
  work(call, n, 0); /* no such item */
  work(call, -1, 0);
  work(call, 0, 3); /* no such worker */
  work(NULL, 0, 0);
}

/* Asks for what there is not, then for all there is. */
static void run_more(void* host, int64_t n, sinkcache_work work, void* call) {
  run_nothing(host, n, work, call);
  for (int64_t item = 0; item < n; ++item) work(call, item, 0);
}
/* Leaves its first run out. */
static void run_later(void* host, int64_t n, sinkcache_work work, void* call) {
  const int runs = (*(int*)host)++;
  for (int64_t item = 0; item < n && runs > 0; ++item) work(call, item, 0);
}

static sinkcache_attention* used_attention;
static sinkcache_cache* used_cache;
static sinkcache_workspace* used_workspace;
static void run_inside(void* host, int64_t n, sinkcache_work work, void* call) {
  float inner[OUT];
  *(sinkcache_status*)host = sinkcache_decode(used_attention, used_cache, rows(q, 0, 1, Q),
                                              (sinkcache_output){inner, OUT, 0}, nowhere, used_workspace, &error);
  for (int64_t item = 0; item < n; ++item) work(call, item, 0);
}

static void wrong_configurations(void) {
  sinkcache_cache* cache = NULL;
#define WRONG(change, words)                                         \
  do {                                                               \
    sinkcache_cache_config config = reference_config(0);             \
    sinkcache_rope rope = yarn;                                      \
    config.rope = &rope;                                             \
    change;                                                          \
    cache = (sinkcache_cache*)&config;                               \
    REFUSED(sinkcache_cache_create(&config, &cache, &error), words); \
    CHECK(cache == NULL);                                            \
  } while (0)
  WRONG(config.size = 0, "config's size was 0");
  WRONG(config.size = sizeof config + 8, "config's size was");
  WRONG(config.policy = "sink", "the policy was 'sink'");
  WRONG(config.policy = "", "the policy was ''");
  WRONG(config.policy = "h2o:budget=x", "budget was 'x'");
  WRONG(config.k_format = NULL, "the format of keys was 'bf16', had to be f32 or q8"); /* of those compiled here */
  WRONG(config.k_format = "f33", "the format of keys was 'f33'");
  WRONG(config.v_format = "f8", "the format of values was 'f8'");
  WRONG(config.num_kv_heads = 0, "num_kv_heads was 0");
  WRONG(config.num_kv_heads = INT64_MAX, "had to fit");
  WRONG(config.num_kv_heads = INT64_MIN, "num_kv_heads was -9223372036854775808");
  WRONG((config.head_dim = 577, rope.width = DIM), "head_dim was 577");
  WRONG((config.head_dim = INT64_MAX, rope.width = 0), "head_dim was 9223372036854775807");
  WRONG((config.head_dim = INT64_MIN, rope.width = 0), "head_dim was -9223372036854775808");
  WRONG((config.head_dim = DIM - 1, rope.width = 0), "rope's width was 0");
  WRONG(config.v_head_dim = -1, "v_head_dim was -1");
  WRONG(config.num_sink_tokens = -1, "num_sink_tokens was -1");
  WRONG(config.window = 0, "window was 0");
  WRONG(config.rollback = -2, "rollback was -2");
  WRONG(config.recent = -2, "recent was -2");
  WRONG(config.first_position = -1, "first_position was -1");
  WRONG(config.positions = 2, "positions was 2");
  WRONG(config.inputs = -1, "inputs was -1");
  WRONG(config.rope = NULL, "rope was absent");
  WRONG(rope.size = 1, "rope's size was 1");
  WRONG(rope.type = "su", "rope's type was 'su'");
  WRONG(rope.type = "plain", "rope's factor was 4");
  WRONG(rope.type = "linear", "rope's original_max_position_embeddings was 64");
  WRONG(rope.low_freq_factor = 1, "rope's low_freq_factor was 1");
  WRONG(rope.interleaved = 2, "rope's interleaved was 2");
  WRONG(rope.theta = 0, "theta was 0");
  WRONG(rope.theta = NAN, "theta was nan");
  WRONG(rope.width = 7, "width was 7");
  WRONG(rope.width = INT64_MAX, "width was");
  WRONG(rope.width = 18, "rope's width was 18, had to be even and at most head_dim, which 0 stands for, 16");
  WRONG(rope.num_inv_freq = 3, "num_inv_freq was 3");
  WRONG(
      (rope = (sinkcache_rope){.size = sizeof rope, .type = "inv_freq", .factor = 4, .inv_freq = q, .num_inv_freq = 1}),
      "rope's factor was 4, had to be 0: type 'inv_freq' has none");
  WRONG((rope = (sinkcache_rope){.size = sizeof rope, .type = "inv_freq"}), "rope's num_inv_freq was 0");
  WRONG((rope = (sinkcache_rope){.size = sizeof rope, .theta = 100, .width = 7}), "rope's width was 7");
  WRONG((rope = (sinkcache_rope){.size = sizeof rope, .theta = 100, .width = -2}), "rope's width was -2");
  WRONG(config.v_format = "", "the format of values was ''");
  WRONG((rope = (sinkcache_rope){.size = sizeof rope, .type = "inv_freq", .inv_freq = q}), "num_inv_freq was 0");
  /* More than can be right are not looked at. */
  WRONG((rope = (sinkcache_rope){.size = sizeof rope, .type = "inv_freq", .inv_freq = q, .num_inv_freq = INT64_MAX}),
        "rope's num_inv_freq was 9223372036854775807");
  WRONG((rope = (sinkcache_rope){.size = sizeof rope, .type = "none", .theta = 1}), "rope's theta was 1");
#undef WRONG
  REFUSED(sinkcache_cache_create(NULL, &cache, &error), "config was null");
  const sinkcache_cache_config config = reference_config(0);
  REFUSED(sinkcache_cache_create(&config, NULL, &error), "cache was null");
  sinkcache_cache_config huge = config;
  huge.window = INT64_C(1) << 50;
  CHECK(sinkcache_cache_create(&huge, &cache, &error) == SINKCACHE_NO_MEMORY);
  CHECK(strstr(error.text, "bytes of the cache was") != NULL);
  CHECK(sinkcache_cache_create(&huge, &cache, NULL) == SINKCACHE_NO_MEMORY);

  sinkcache_attention* attention = NULL;
#define WRONG(change, words)                                                               \
  do {                                                                                     \
    sinkcache_attention_config params = {.size = sizeof params, .num_qo_heads = QO_HEADS}; \
    change;                                                                                \
    REFUSED(sinkcache_attention_create(&params, &attention, &error), words);               \
    CHECK(attention == NULL);                                                              \
  } while (0)
  WRONG(params.size = 3, "config's size was 3");
  WRONG(params.num_qo_heads = 0, "num_qo_heads was 0");
  WRONG(params.sm_scale = INFINITY, "sm_scale was inf");
  WRONG(params.logits_soft_cap = -1, "logits_soft_cap was -1");
  WRONG(params.softmax = "softmax2", "softmax was 'softmax2'");
  WRONG(params.softmax = "sink_logits", "sink_logits.size() was 0");
  WRONG((params.sink_logits = q, params.num_sink_logits = QO_HEADS), "num_sink_logits was 6");
  WRONG((params.softmax = "sink_logits", params.sink_logits = q, params.num_sink_logits = INT64_MAX),
        "num_sink_logits was 9223372036854775807");
  WRONG((params.alibi_slopes = q, params.num_alibi_slopes = 5), "alibi_slopes.size() was 5");
  WRONG((params.alibi_slopes = q, params.num_alibi_slopes = INT64_C(1) << 40), "num_alibi_slopes was 1099511627776");
  WRONG(params.alibi_slopes = q, "num_alibi_slopes was 0");
  WRONG(params.num_sink_bias = QO_HEADS, "num_sink_bias was 6");
  WRONG((params.sink_bias = q, params.num_sink_bias = -1), "num_sink_bias was -1");
  WRONG((params.sink_bias = q, params.num_sink_bias = INT64_MAX), "num_sink_bias was 9223372036854775807");
#undef WRONG
  REFUSED(sinkcache_attention_create(NULL, &attention, &error), "config was null");

  sinkcache_workspace* workspace = NULL;
  REFUSED(sinkcache_workspace_create(0, &workspace, &error), "threads was 0");
  REFUSED(sinkcache_workspace_create(-3, &workspace, &error), "threads was -3");
  REFUSED(sinkcache_workspace_create(1025, &workspace, &error), "threads was 1025");
  REFUSED(sinkcache_workspace_create(1, NULL, &error), "workspace was null");
  REFUSED(sinkcache_workspace_create_on(NULL, &workspace, &error), "executor was null");
  sinkcache_executor host = {sizeof host, 1, NULL, NULL};
  REFUSED(sinkcache_workspace_create_on(&host, &workspace, &error), "executor's run was null");
  host.run = &run_nothing, host.concurrency = 0;
  REFUSED(sinkcache_workspace_create_on(&host, &workspace, &error), "concurrency was 0");
  host.concurrency = 1, host.size = 0;
  REFUSED(sinkcache_workspace_create_on(&host, &workspace, &error), "executor's size was 0");
}

static void wrong_calls(void) {
  fill(30);
  sinkcache_attention* const attention = reference_attention();
  sinkcache_workspace* const workspace = one_thread();
  sinkcache_cache *const cache = reference_cache(0), *copy = NULL;
  const sinkcache_input q1 = rows(q, 0, 1, Q), k1 = rows(k, 0, 1, K), v1 = rows(v, 0, 1, V);
  const sinkcache_output out1 = out_rows(out, 0, 1, OUT), lse1 = out_rows(lse, 0, 1, QO_HEADS);
#define DECODE(a, c, q_, out_, lse_, w) sinkcache_decode(a, c, q_, out_, lse_, w, &error)
  REFUSED(DECODE(attention, cache, q1, out1, lse1, workspace), "tokens that the cache has seen was 0");

  REFUSED(sinkcache_append(NULL, 1, k1, v1, &error), "cache was null");
  REFUSED(sinkcache_append((sinkcache_cache*)attention, 1, k1, v1, &error), "cache was another handle");
  REFUSED(sinkcache_append(cache, -1, k1, v1, &error), "tokens was -1");
  REFUSED(sinkcache_append(cache, INT64_MAX, k1, v1, &error), "tokens was");
  REFUSED(sinkcache_append(cache, INT64_C(1) << 62, k1, v1, &error), "had to fit");
  REFUSED(sinkcache_append(cache, 2, k1, v1, &error), "k's size was 32, had to be at least 64");
  REFUSED(sinkcache_append(cache, 1, (sinkcache_input){NULL, K, 0}, v1, &error), "k's data was null");
  REFUSED(sinkcache_append(cache, 1, k1, (sinkcache_input){v, V - 1, 0}, &error), "v's size was 15");
  REFUSED(sinkcache_append(cache, 1, k1, (sinkcache_input){v, -1, 0}, &error), "v's size was -1");
  REFUSED(sinkcache_append(cache, 1, k1, (sinkcache_input){v, V, V - 1}, &error), "v's stride was 15");
  REFUSED(sinkcache_append(cache, 3, (sinkcache_input){k, 3 * K, INT64_MAX}, v1, &error), "had to fit");
  REFUSED(sinkcache_append(cache, 3, (sinkcache_input){k, 3 * K, INT64_MIN}, v1, &error), "k's stride was");
  CHECK(sinkcache_append(NULL, 1, k1, v1, NULL) == SINKCACHE_REFUSED);
  CHECK(sinkcache_seen(cache) == 0);
  OK(sinkcache_append(cache, 0, (sinkcache_input){NULL, 0, 0}, (sinkcache_input){NULL, 0, 0}, &error));
  OK(sinkcache_append(cache, 1, k1, v1, &error));
  CHECK(error.text[0] == '\0');

  REFUSED(DECODE(NULL, cache, q1, out1, lse1, workspace), "attention was null");
  REFUSED(DECODE(attention, NULL, q1, out1, lse1, workspace), "cache was null");
  REFUSED(DECODE(attention, cache, q1, out1, lse1, NULL), "workspace was null");
  REFUSED(DECODE((sinkcache_attention*)cache, cache, q1, out1, lse1, workspace), "attention was another handle");
  REFUSED(DECODE(attention, cache, q1, out1, lse1, (sinkcache_workspace*)cache), "workspace was another handle");
  REFUSED(DECODE(attention, cache, rows(q, 0, 0, Q), out1, lse1, workspace), "q's size was 0");
  REFUSED(DECODE(attention, cache, ((sinkcache_input){NULL, Q, 0}), out1, lse1, workspace), "q's data was null");
  REFUSED(DECODE(attention, cache, q1, nowhere, lse1, workspace), "out's data was null");
  REFUSED(DECODE(attention, cache, q1, ((sinkcache_output){out, OUT - 1, 0}), lse1, workspace), "out's size was 47");
  REFUSED(DECODE(attention, cache, q1, out1, ((sinkcache_output){lse, 5, 0}), workspace), "lse's size was 5");
  REFUSED(DECODE(attention, cache, q1, out1, ((sinkcache_output){NULL, 5, 0}), workspace), "lse's size was 5");
  REFUSED(DECODE(attention, cache, q1, out1, ((sinkcache_output){lse, 90, 7}), workspace), "lse's stride was 7");
  for (size_t i = 0; i < sizeof out / sizeof *out; ++i) CHECK(isnan(out[i]));

#define PREFILL(n, q_, k_, v_, out_, lse_) \
  sinkcache_prefill(attention, cache, n, q_, k_, v_, out_, lse_, workspace, &error)
  REFUSED(PREFILL(-1, q1, k1, v1, out1, lse1), "tokens was -1");
  REFUSED(PREFILL(2, q1, k1, v1, out1, lse1), "q's size was 96, had to be at least 192");
  REFUSED(PREFILL(1, q1, k1, v1, nowhere, lse1), "out's data was null");
  REFUSED(PREFILL(2, rows(q, 0, 2, Q), rows(k, 0, 2, K), rows(v, 0, 2, V), out_rows(out, 0, 2, OUT), lse1),
          "lse's size was 6, had to be at least 12");
  OK(PREFILL(0, q1, k1, v1, nowhere, nowhere));
  CHECK(sinkcache_seen(cache) == 1);
  for (size_t i = 0; i < sizeof out / sizeof *out; ++i) CHECK(isnan(out[i]));

  sinkcache_attention* odd = NULL;
  const sinkcache_attention_config of_odd = {.size = sizeof of_odd, .num_qo_heads = 5};
  OK(sinkcache_attention_create(&of_odd, &odd, &error));
  REFUSED(DECODE(odd, cache, q1, out1, nowhere, workspace), "num_qo_heads was 5");
  sinkcache_attention_destroy(odd);

  REFUSED(sinkcache_cache_clone(NULL, &copy, &error), "cache was null");
  REFUSED(sinkcache_cache_clone(cache, NULL, &error), "copy was null");
  REFUSED(sinkcache_truncate(NULL, 0, &error), "cache was null");
  REFUSED(sinkcache_clear(NULL, &error), "cache was null");
  REFUSED(sinkcache_pin(NULL, 0, NULL, &error), "cache was null");
  CHECK(sinkcache_seen(NULL) == -1 && sinkcache_size(NULL) == -1);
  CHECK(sinkcache_min_truncate(NULL) == -1 && sinkcache_nbytes((sinkcache_cache*)workspace) == -1);
  sinkcache_cache_destroy(NULL);
  sinkcache_attention_destroy(NULL);
  sinkcache_workspace_destroy(NULL);
  /* Handles of another kind are left alone: what follows uses them. */
  sinkcache_cache_destroy((sinkcache_cache*)workspace);
  sinkcache_cache_destroy((sinkcache_cache*)attention);
  sinkcache_attention_destroy((sinkcache_attention*)cache);
  sinkcache_attention_destroy((sinkcache_attention*)workspace);
  sinkcache_workspace_destroy((sinkcache_workspace*)cache);
  sinkcache_workspace_destroy((sinkcache_workspace*)attention);

  /* Policies by score have to see every query. */
  sinkcache_cache* const scored = reference_cache(2);
  REFUSED(sinkcache_append(scored, 60, rows(k, 0, 60, K), rows(v, 0, 60, V), &error), "");
  CHECK(sinkcache_seen(scored) == 0);
  sinkcache_cache_destroy(scored);

  /* Executors that leave out work, and a call from inside another one. */
  sinkcache_executor host = {sizeof host, 2, &run_nothing, NULL};
  sinkcache_workspace* lazy = NULL;
  OK(sinkcache_workspace_create_on(&host, &lazy, &error));
  REFUSED(DECODE(attention, cache, q1, out1, nowhere, lazy), "items that the executor left out was");
  sinkcache_workspace_destroy(lazy);
  OK(sinkcache_cache_clone(cache, &copy, &error));
  int runs = 0;
  host.run = &run_later, host.host = &runs;
  OK(sinkcache_workspace_create_on(&host, &lazy, &error));
  REFUSED(sinkcache_prefill(attention, copy, 1, q1, k1, v1, out1, nowhere, lazy, &error),
          "items that the executor left out was");
  CHECK(runs > 1);
  OK(DECODE(attention, copy, q1, out1, nowhere, lazy)); /* that was told already */
  sinkcache_workspace_destroy(lazy);
  sinkcache_cache_destroy(copy);
  float expected[OUT];
  OK(DECODE(attention, cache, q1, out1, nowhere, workspace));
  memcpy(expected, out, sizeof expected);
  memset(out, 0, sizeof expected);
  host.run = &run_more, host.host = NULL;
  OK(sinkcache_workspace_create_on(&host, &lazy, &error));
  OK(DECODE(attention, cache, q1, out1, nowhere, lazy));
  CHECK(memcmp(out, expected, sizeof expected) == 0);
  sinkcache_workspace_destroy(lazy);
  sinkcache_status inner = SINKCACHE_OK;
  host.run = &run_inside, host.host = &inner;
  OK(sinkcache_workspace_create_on(&host, &used_workspace, &error));
  used_attention = attention, used_cache = cache;
  OK(DECODE(attention, cache, q1, out1, nowhere, used_workspace));
  CHECK(inner == SINKCACHE_REFUSED);
  OK(DECODE(attention, cache, q1, out1, nowhere, used_workspace));
  sinkcache_workspace_destroy(used_workspace);

  sinkcache_cache_destroy(cache);
  sinkcache_workspace_destroy(workspace);
  sinkcache_attention_destroy(attention);
}

int main(void) {
  CHECK(sinkcache_c_version() == SINKCACHE_C_VERSION);
  CHECK(strlen(sinkcache_version()) >= 5 && strlen(sinkcache_isa()) >= 3);
  by_definition();
  as_in_cpp();
  strided_and_batched();
  taken_back_and_copied();
  counts_that_are_zero();
  wrong_configurations();
  wrong_calls();
  if (failures > 0) printf("%d failed\n", failures);
  return failures > 0;
}
