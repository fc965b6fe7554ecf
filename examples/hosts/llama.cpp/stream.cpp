// Text through llama.cpp, a chunk at a time, in a bounded cache: this library's or llama.cpp's own. Links to libllama
// only.
//
//   stream perplexity MODEL TEXT   how well tokens are predicted, those after --from, and how fast they go through
//   stream steps MODEL TEXT        milliseconds of a decode step after --cached tokens
//   stream compare MODEL TEXT      logits beside those of llama.cpp's full cache, for --sequences parts of the text at
//                                  once
//   stream sequences MODEL TEXT    seq_rm, seq_cp, seq_keep and clear: tokens that came so, beside those in one go
//   stream cells MODEL TEXT        the same history of llama.cpp's cells, context shift and shared prefix and all, with
//                                  its attention and with this library's
//
//   --memory M     sinkcache: this library's, --sinks tokens pinned of --cached (needs a hooked llama.cpp)
//                  shift: llama.cpp's with its context shift, --sinks tokens kept
//                  window: llama.cpp's, the oldest tokens removed
//                  full: llama.cpp's, all tokens kept
//                  cells: the same with this library's attention over llama.cpp's cells
//   --tokens N --cached N --sinks N --chunk N --threads N --flash on|off --type f32|f16|bf16 --policy NAME
//   --sequences N --from N
//   --plain-chunk N, of compare: the full cache's chunks, so that --memory full shows what llama.cpp's own rounding
//   does
//   --most X       the largest difference of a logit that is not a failure

#include <llama.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "stream: %s\n", what.c_str());
  std::exit(1);
}

using options = std::map<std::string, std::string>;

int number(const options& of, const char* name) { return std::atoi(of.at(name).c_str()); }

struct free_model {
  void operator()(llama_model* m) const { llama_model_free(m); }
};
struct free_context {
  void operator()(llama_context* c) const { llama_free(c); }
};
using model_ptr = std::unique_ptr<llama_model, free_model>;
using context_ptr = std::unique_ptr<llama_context, free_context>;

std::vector<llama_token> tokens_of(const llama_model* model, const std::string& path, std::size_t most) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot read " + path);
  std::string text((std::istreambuf_iterator<char>(file)), {});
  text.resize(std::min(text.size(), most * 16));
  const llama_vocab* const vocab = llama_model_get_vocab(model);
  std::vector<llama_token> tokens(text.size() + 8);
  const int n = llama_tokenize(vocab, text.c_str(), int(text.size()), tokens.data(), int(tokens.size()), true, false);
  if (n < int(most)) fail(path + " has " + std::to_string(n) + " tokens, had to have " + std::to_string(most));
  tokens.resize(most);
  return tokens;
}

context_ptr context_of(llama_model* model, const options& of, const std::string& memory, int n_ctx, int chunk) {
  if (memory == "sinkcache") {
    const int sinks = number(of, "sinks");
    setenv("SINKCACHE_SINK_TOKENS", std::to_string(sinks).c_str(), 1);
    setenv("SINKCACHE_WINDOW", std::to_string(number(of, "cached") - sinks).c_str(), 1);
    setenv("SINKCACHE_POLICY", of.at("policy").c_str(), 1);
  } else {
    for (const char* const each : {"SINKCACHE_SINK_TOKENS", "SINKCACHE_WINDOW", "SINKCACHE_POLICY"}) unsetenv(each);
  }
  setenv("SINKCACHE_CELLS", memory == "cells" ? "1" : "", 1);
  llama_context_params params = llama_context_default_params();
  const std::string& type = of.at("type");
  params.n_ctx = std::uint32_t(n_ctx), params.n_batch = params.n_ubatch = std::uint32_t(std::max(chunk, 1));
  params.n_seq_max = std::uint32_t(number(of, "sequences")), params.kv_unified = true;
  params.n_threads = params.n_threads_batch = number(of, "threads");
  params.flash_attn_type = of.at("flash") == "on" ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.type_k = params.type_v = type == "f32" ? GGML_TYPE_F32 : type == "bf16" ? GGML_TYPE_BF16 : GGML_TYPE_F16;
  params.swa_full = false;
  context_ptr context(llama_init_from_model(model, params));
  if (!context) fail("no context: see above");
  if (memory == "sinkcache" && llama_memory_can_shift(llama_get_memory(context.get())))
    fail("this llama.cpp is not hooked");
  return context;
}

struct batch {
  explicit batch(int most) : of(llama_batch_init(most, 0, 1)) {}
  ~batch() { llama_batch_free(of); }
  batch(const batch&) = delete;
  batch& operator=(const batch&) = delete;

  void add(llama_token token, llama_pos position, llama_seq_id sequence) {
    const int i = of.n_tokens++;
    of.token[i] = token, of.pos[i] = position, of.n_seq_id[i] = 1, of.seq_id[i][0] = sequence, of.logits[i] = 1;
  }
  void decode(llama_context* context) {
    if (const int code = llama_decode(context, of); code != 0) fail("llama_decode gave " + std::to_string(code));
    llama_synchronize(context);
  }

  llama_batch of;
};

// By the clock, and of the processor: on a machine that others use too the second says more.
struct times {
  double clock = 0, processor = 0;

  static times now() {
    return {std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(),
            double(std::clock()) / CLOCKS_PER_SEC};
  }
  times since(const times& start) const { return {clock - start.clock, processor - start.processor}; }
};

// In nats.
double loss(const float* logits, int n, llama_token next) {
  const float most = *std::max_element(logits, logits + n);
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += std::exp(double(logits[i] - most));
  return std::log(sum) - double(logits[next] - most);
}

int perplexity(llama_model* model, const std::vector<llama_token>& tokens, const options& of) {
  const std::string& memory = of.at("memory");
  const int cached = number(of, "cached"), keep = number(of, "sinks"), chunk = number(of, "chunk"),
            n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
  const auto from = std::size_t(number(of, "from"));
  if (from + 1 >= tokens.size()) fail("--from had to be below --tokens, less 1");
  const bool bounded = memory == "shift" || memory == "window";
  if (bounded && chunk > cached - keep) fail("a chunk does not fit beside what is kept");
  const context_ptr context =
      context_of(model, of, memory, memory == "sinkcache" || memory == "full" ? int(tokens.size()) : cached, chunk);
  llama_memory_t cells = llama_get_memory(context.get());
  const int n_ctx = int(llama_n_ctx(context.get()));
  batch next(chunk);
  double nats = 0;
  times time;
  llama_pos past = 0, oldest = 0;
  for (std::size_t i = 0, n; i + 1 < tokens.size(); i += n) {
    n = std::min<std::size_t>(std::size_t(chunk), tokens.size() - i);
    next.of.n_tokens = 0;
    const times start = times::now();
    if (memory == "shift" && past + int(n) > n_ctx) {
      const int discard = std::max((past - keep) / 2, past + int(n) - n_ctx);  // as llama.cpp's own programs do
      llama_memory_seq_rm(cells, 0, keep, keep + discard);
      llama_memory_seq_add(cells, 0, keep + discard, past, -discard);
      past -= discard;
    }
    if (memory == "window" && past - oldest + int(n) > n_ctx) {
      oldest = past + int(n) - n_ctx;
      llama_memory_seq_rm(cells, 0, 0, oldest);
    }
    for (std::size_t j = 0; j < n; ++j) next.add(tokens[i + j], past++, 0);
    next.decode(context.get());
    const times taken = times::now().since(start);
    time.clock += taken.clock, time.processor += taken.processor;
    for (std::size_t j = i < from ? std::min(n, from - i) : 0; j < n && i + j + 1 < tokens.size(); ++j)
      nats += loss(llama_get_logits_ith(context.get(), int(j)), n_vocab, tokens[i + j + 1]);
  }
  const double n = double(tokens.size());
  std::printf(
      "%s %d+%d, flash %s, chunk %d: perplexity %.4f, %.1f tokens a second, %.1f a second of the processor (%zu "
      "tokens)\n",
      memory.c_str(), keep, cached - keep, of.at("flash").c_str(), chunk, std::exp(nats / (n - 1 - double(from))),
      n / time.clock, n / time.processor, tokens.size());
  return 0;
}

int steps(llama_model* model, const std::vector<llama_token>& tokens, const options& of) {
  const std::string& memory = of.at("memory");
  const int cached = number(of, "cached"), num_steps = 24;
  const context_ptr context = context_of(model, of, memory, cached + 256, 256);
  batch next(256);
  llama_pos past = 0;
  while (past < cached - 1) {
    next.of.n_tokens = 0;
    for (int n = std::min(256, cached - 1 - past); n > 0; --n, ++past) next.add(tokens[std::size_t(past)], past, 0);
    next.decode(context.get());
  }
  std::vector<double> clock, processor;
  for (int step = 0; step < num_steps; ++step, ++past) {
    next.of.n_tokens = 0;
    next.add(tokens[std::size_t(past)], past, 0);
    const times start = times::now();
    next.decode(context.get());
    const times taken = times::now().since(start);
    clock.push_back(1e3 * taken.clock), processor.push_back(1e3 * taken.processor);
  }
  const auto median = [](std::vector<double>& of) { return std::sort(of.begin(), of.end()), of[of.size() / 2]; };
  std::printf("%s, flash %s: a decode step after %d tokens takes %.1f ms, %.1f of the processor (medians of %d)\n",
              memory.c_str(), of.at("flash").c_str(), cached, median(clock), median(processor), num_steps);
  return 0;
}

int compare(llama_model* model, const std::vector<llama_token>& tokens, const options& of) {
  const int sequences = number(of, "sequences"), plain_chunk = number(of, "plain-chunk");
  if (plain_chunk != 0 && sequences > 1) fail("--plain-chunk goes with one sequence");
  const auto each = tokens.size() / std::size_t(sequences);
  const auto n_vocab = std::size_t(llama_vocab_n_tokens(llama_model_get_vocab(model)));
  std::vector<float> logits[2];
  options plain = of;
  plain["flash"] = "off", plain["type"] = "f32";
  for (const int which : {0, 1}) {
    const int chunk = which == 0 && plain_chunk != 0 ? plain_chunk : number(of, "chunk");
    const context_ptr context = context_of(model, which == 0 ? plain : of, which == 0 ? "full" : of.at("memory"),
                                           int(tokens.size()) + 256, chunk * sequences);
    batch next(chunk * sequences);
    std::size_t past[64] = {};
    // Each sequence is a token behind the one before, so that batches hold different numbers of each.
    for (bool more = true; more;) {
      more = false;
      next.of.n_tokens = 0;
      for (int s = 0; s < sequences; ++s)
        for (std::size_t n = std::min(each - past[s], std::size_t(std::max(1, chunk - s))); n > 0;
             --n, ++past[s], more = true)
          next.add(tokens[std::size_t(s) * each + past[s]], llama_pos(past[s]), s);
      if (!more) break;
      next.decode(context.get());
      for (int i = 0; i < next.of.n_tokens; ++i) {
        const float* const row = llama_get_logits_ith(context.get(), i);
        logits[which].insert(logits[which].end(), row, row + n_vocab);
      }
    }
  }
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < logits[0].size(); ++i) {
    const double off = std::abs(double(logits[0][i]) - double(logits[1][i]));
    worst = off <= worst ? worst : off;  // NaN too
    largest = std::max(largest, std::abs(double(logits[0][i])));
  }
  std::printf("%s, %d sequences of %zu tokens, chunk %d%s, flash %s, %s: logits up to %.1f, off by at most %.2e\n",
              of.at("memory").c_str(), sequences, each, number(of, "chunk"),
              plain_chunk == 0 ? "" : (" against " + of.at("plain-chunk")).c_str(), of.at("flash").c_str(),
              of.at("type").c_str(), largest, worst);
  return worst <= std::atof(of.at("most").c_str()) ? 0 : 1;
}

// Histories of a sequence, each of which ends as if its tokens had come in one go.
int sequences(llama_model* model, const std::vector<llama_token>& tokens, const options& of) {
  const auto n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
  const int half = int(tokens.size()) / 2, end = int(tokens.size());
  options two = of;
  two["sequences"] = "4";
  const context_ptr context = context_of(model, two, of.at("memory"), 4 * end + 256, 64);
  llama_memory_t memory = llama_get_memory(context.get());
  const auto decode = [&](int first, int last, llama_seq_id s) {
    std::vector<float> logits;
    for (int i = first; i < last;) {
      batch next(64);
      for (int n = std::min(64, last - i); n > 0; --n, ++i) next.add(tokens[std::size_t(i)], i, s);
      next.decode(context.get());
      const float* const row = llama_get_logits_ith(context.get(), next.of.n_tokens - 1);
      logits.assign(row, row + n_vocab);
    }
    return logits;
  };
  const std::vector<float> expected = decode(0, end, 0);
  int failures = 0;
  const auto check = [&](const char* what, const std::vector<float>& logits) {
    double worst = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double off = std::abs(double(expected[i]) - double(logits[i]));
      worst = off <= worst ? worst : off;
    }
    const bool right = worst <= std::atof(of.at("most").c_str());
    failures += right ? 0 : 1;
    std::printf("%s: off by at most %.2e%s\n", what, worst, right ? "" : ", WRONG");
  };
  const auto require = [&](bool holds, const char* what) {
    failures += holds ? 0 : 1;
    if (!holds) std::printf("%s: WRONG\n", what);
  };
  require(llama_memory_seq_rm(memory, 0, end - 20, -1), "seq_rm of the newest 20");
  require(llama_memory_seq_pos_max(memory, 0) == end - 21, "seq_pos_max after it");
  check("seq_rm of the newest, then they again", decode(end - 20, end, 0));
  require(llama_memory_seq_rm(memory, 0, -1, -1), "seq_rm of all");
  decode(0, half, 0);
  llama_memory_seq_cp(memory, 0, 1, -1, -1);
  check("seq_cp, the copy goes on", decode(half, end, 1));
  check("and so does the first", decode(half, end, 0));
  llama_memory_seq_keep(memory, 1);
  require(llama_memory_seq_pos_max(memory, 0) == -1 && llama_memory_seq_pos_max(memory, 1) == end - 1, "seq_keep");
  llama_memory_seq_rm(memory, 1, end - 10, -1);
  check("seq_keep, then the kept one goes on", decode(end - 10, end, 1));
  llama_memory_clear(memory, true);
  check("clear", decode(0, end, 2));
  if (of.at("memory") == "sinkcache") {
    // What it does not serve it refuses.
    require(!llama_memory_can_shift(memory), "can_shift");
    require(!llama_memory_seq_rm(memory, 2, 10, 20), "seq_rm in the middle");
    llama_memory_seq_add(memory, 2, 10, -1, -5);
    batch next(1);
    next.add(tokens[0], end, 2);
    require(llama_decode(context.get(), next.of) != 0, "a token after seq_add");
    llama_memory_seq_rm(memory, 2, -1, -1);
    check("and then it is used again", decode(0, end, 2));
    llama_memory_seq_div(memory, 2, 10, -1, 2);
    require(llama_decode(context.get(), next.of) != 0, "a token after seq_div");
    std::vector<std::uint8_t> state(llama_state_seq_get_size(context.get(), 2));
    llama_state_seq_get_data(context.get(), state.data(), state.size(), 2);
    require(llama_state_seq_set_data(context.get(), state.data(), state.size(), 3) != state.size(), "a saved state");
    require(llama_state_get_size(context.get()) == 0, "the state of all sequences");
  }
  return failures;
}

int cells(llama_model* model, const std::vector<llama_token>& tokens, const options& of) {
  const auto n_vocab = std::size_t(llama_vocab_n_tokens(llama_model_get_vocab(model)));
  options three = of;
  three["sequences"] = "3";
  std::vector<float> logits[2];
  for (const int which : {0, 1}) {
    const context_ptr context = context_of(model, three, which == 0 ? "full" : "cells", 512, 64);
    llama_memory_t memory = llama_get_memory(context.get());
    std::size_t read = 0;
    llama_pos past[3] = {};
    const auto decode = [&](std::vector<llama_seq_id> sequences, int steps, int each) {
      for (int step = 0; step < steps; ++step) {
        batch next(64);
        for (const llama_seq_id s : sequences)
          for (int i = 0; i < each; ++i) next.add(tokens[read++], past[s]++, s);
        next.decode(context.get());
        for (int i = 0; i < next.of.n_tokens; ++i) {
          const float* const row = llama_get_logits_ith(context.get(), i);
          logits[which].insert(logits[which].end(), row, row + n_vocab);
        }
      }
    };
    const auto drop = [&](llama_seq_id s, llama_pos first, llama_pos last) {  // a context shift
      llama_memory_seq_rm(memory, s, first, last);
      llama_memory_seq_add(memory, s, last, past[s], first - last);
      past[s] -= last - first;
    };
    decode({0}, 4, 25);
    drop(0, 20, 50);
    decode({0}, 3, 7);
    llama_memory_seq_cp(memory, 0, 1, -1, -1), past[1] = past[0];
    decode({0, 1}, 8, 1);
    decode({2, 1}, 3, 9);
    llama_memory_seq_rm(memory, 1, past[1] - 12, -1), past[1] -= 12;
    decode({1, 2, 0}, 5, 2);
    llama_memory_seq_rm(memory, 0, -1, -1), past[0] = 0;
    decode({0, 2}, 4, 16);  // in the cells that others left
  }
  double worst = 0;
  for (std::size_t i = 0; i < logits[0].size(); ++i) {
    const double off = std::abs(double(logits[0][i]) - double(logits[1][i]));
    worst = off <= worst ? worst : off;
  }
  std::printf("one history of cells, flash %s, %s: logits off by at most %.2e\n", of.at("flash").c_str(),
              of.at("type").c_str(), worst);
  return worst <= std::atof(of.at("most").c_str()) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  options of = {{"memory", "sinkcache"}, {"tokens", "4096"}, {"cached", "512"}, {"sinks", "4"},
                {"chunk", "16"},         {"threads", "1"},   {"flash", "off"},  {"type", "f16"},
                {"policy", "sinks"},     {"sequences", "1"}, {"from", "0"},     {"plain-chunk", "0"},
                {"most", "1e30"}};
  if (argc < 4 || argc % 2 != 0) fail("see the top of stream.cpp: COMMAND MODEL TEXT [--OPTION VALUE]...");
  for (int i = 4; i < argc; i += 2) {
    const std::string name = std::string(argv[i]).substr(0, 2) == "--" ? argv[i] + 2 : "";
    if (of.count(name) == 0) fail(std::string("unknown option ") + argv[i]);
    of[name] = argv[i + 1];
  }
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level >= GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_CONT) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  llama_model_params params = llama_model_default_params();
  const model_ptr model(llama_model_load_from_file(argv[2], params));
  if (!model) fail(std::string("cannot load ") + argv[2]);
  const std::string command = argv[1];
  const int cached = number(of, "cached");
  const auto tokens =
      tokens_of(model.get(), argv[3], std::size_t(command == "steps" ? cached + 64 : number(of, "tokens")));
  return command == "perplexity"  ? perplexity(model.get(), tokens, of)
         : command == "steps"     ? steps(model.get(), tokens, of)
         : command == "compare"   ? compare(model.get(), tokens, of)
         : command == "cells"     ? cells(model.get(), tokens, of)
         : command == "sequences" ? sequences(model.get(), tokens, of)
                                  : (fail("no such command: " + command), 1);
}
