#pragma once

// What may be fed any bytes. An error that the code under test is there to tell is fine; a crash, what a sanitizer
// finds and any other exception is not. tests/examples/fuzz_test.cpp replays the corpus of each: add to it what a
// fuzzer finds.

#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "chat/options.hpp"
#include "chat/run.hpp"
#include "compare/caches.hpp"
#include "compare/options.hpp"
#include "engine/model.hpp"
#include "evidence/options.hpp"
#include "loaders/gguf.hpp"
#include "loaders/json.hpp"
#include "loaders/safetensors.hpp"
#include "text/tokenizer.hpp"

namespace fuzz {

using bytes = std::span<const std::byte>;

inline std::string_view as_text(bytes input) { return {reinterpret_cast<const char*>(input.data()), input.size()}; }

inline void require(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

inline void check_shape(const std::vector<std::int64_t>& shape, std::size_t values) {
  std::int64_t product = 1;
  for (const std::int64_t dim : shape) product *= dim;
  require(static_cast<std::size_t>(product) == values, "the values of a tensor do not fill its shape");
}

// Reads all that there is to read of a GGUF file, in every way.
inline void gguf(bytes input) {
  const auto try_all = [](const auto&... reads) {
    const auto try_one = [](const auto& read) {
      try {
        read();
      } catch (const loaders::file_error&) {
      }
    };
    (try_one(reads), ...);
  };
  try {
    const loaders::gguf file = loaders::gguf::parse(input, "fuzzed");
    for (const std::string& key : file.keys())
      try_all([&] { file.string(key); }, [&] { file.integer(key, -5, 5); }, [&] { file.number(key, -5, 5); },
              [&] { file.flag(key); }, [&] { file.strings(key); }, [&] { file.integers(key); },
              [&] { file.numbers(key); });
    for (const std::string& name : file.names()) check_shape(file.shape(name), file.read(name).values.size());
  } catch (const loaders::file_error&) {
  }
}

inline void safetensors(bytes input) {
  try {
    const loaders::safetensors file = loaders::safetensors::parse(input, "fuzzed");
    for (const std::string& name : file.names()) check_shape(file.shape(name), file.read(name).values.size());
  } catch (const loaders::file_error&) {
  }
}

inline void json(bytes input) {
  try {
    loaders::parse_json(std::string(as_text(input))).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  } catch (const std::runtime_error&) {
  }
}

// A file for as long as this lives.
class temporary_file {
 public:
  explicit temporary_file(bytes content)
      : path_(std::filesystem::temp_directory_path() / ("sinkcache_fuzz_" + std::to_string(::getpid()))) {
    std::ofstream(path_, std::ios::binary).write(reinterpret_cast<const char*>(content.data()), std::ssize(content));
  }
  temporary_file(const temporary_file&) = delete;
  temporary_file& operator=(const temporary_file&) = delete;
  ~temporary_file() { std::filesystem::remove(path_); }

  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

// A model in either format: what loads is run for some tokens.
inline void model(bytes input) {
  const temporary_file file(input);
  try {
    const engine::model model(file.path());
    engine::session session(model, compare::sink_window(1, 3));
    const auto vocab = static_cast<int>(model.config().vocab_size);
    for (int i = 0; i < 6; ++i)
      require(session.decode(i % vocab).size() == static_cast<std::size_t>(vocab), "a token without its logits");
  } catch (const loaders::file_error&) {
  }
}

// Metadata, a NUL, and a text; where the first are none of a tokenizer, all of it is text to SmolLM2's.
inline void tokenizer(bytes input) {
  static const text::tokenizer smollm2(loaders::gguf::load(SINKCACHE_SOURCE_DIR "/tests/data/smollm2-vocab.gguf"));
  const auto encode = [](const text::tokenizer& t, std::string_view text) {
    for (const auto mode : {text::tokenizer::special::as_text, text::tokenizer::special::parsed}) {
      const std::vector<int> tokens = t.encode(text, mode);
      for (const int token : tokens) require(token >= 0 && token < t.size(), "a token that is none");
      require(tokens.size() <= text::valid_utf8(text).size(), "more tokens than bytes");
      const std::string decoded = t.decode(tokens);
      require(text::valid_utf8(decoded) == decoded, "decoded to what is no UTF-8");
    }
  };
  try {
    const text::tokenizer t(loaders::gguf::parse(input, "fuzzed"));
    encode(t, as_text(input));
    for (int token = 0; token < t.size(); ++token) encode(t, t.bytes(token));
  } catch (const loaders::file_error&) {
    encode(smollm2, as_text(input));
  }
}

// One argument a line, for each of the programs.
inline void command_line(bytes input) {
  std::vector<std::string> lines = {"program"};
  std::string line;
  for (const char c : as_text(input)) {
    if (c != '\n' && c != '\0') {
      line += c;
    } else {
      lines.push_back(line);
      line.clear();
    }
  }
  std::vector<const char*> arguments;
  for (const std::string& each : lines) arguments.push_back(each.c_str());
  const auto parse = [&](const auto& parsed_by) {
    try {
      parsed_by(static_cast<int>(arguments.size()), arguments.data());
    } catch (const compare::usage_error&) {
    }
  };
  parse([](int argc, const char* const* argv) { compare::parse_options(argc, argv); });
  parse([](int argc, const char* const* argv) { chat::parse_options(argc, argv); });
  parse([](int argc, const char* const* argv) { evidence::parse_options(argc, argv); });
}

// stdin is a file, and what is printed goes nowhere, as long as this lives.
class redirected {
 public:
  explicit redirected(const std::string& in) {
    const int files[] = {::open(in.c_str(), O_RDONLY | O_CLOEXEC), ::open("/dev/null", O_WRONLY | O_CLOEXEC)};
    std::fflush(nullptr);
    for (int fd = 0; fd < 3; ++fd) {
      saved_[fd] = ::dup(fd);
      ::dup2(files[fd > 0], fd);
    }
    for (const int file : files) ::close(file);
  }
  redirected(const redirected&) = delete;
  redirected& operator=(const redirected&) = delete;
  ~redirected() {
    std::fflush(nullptr);
    for (int fd = 0; fd < 3; ++fd) {
      ::dup2(saved_[fd], fd);
      ::close(saved_[fd]);
    }
  }

 private:
  int saved_[3];
};

// All of stream_chat over a model's file, which is also what is said to it: once it talks, once it writes.
inline void stream_chat(bytes input) {
  const temporary_file file(input);
  const redirected streams(file.path());
  for (const bool writes : {false, true}) {
    chat::options o;
    o.model = file.path();
    o.policy = writes ? "sinks:4" : "sinks:system";
    o.cache = 64;
    o.tokens = 20;
    o.threads = 1;
    if (writes) o.prompt = "The";
    try {
      chat::run(o);
    } catch (const std::runtime_error&) {
    }
  }
}

struct target {
  const char* name;
  void (*run)(bytes);
};
inline constexpr target targets[] = {{"gguf", gguf},
                                     {"safetensors", safetensors},
                                     {"json", json},
                                     {"model", model},
                                     {"tokenizer", tokenizer},
                                     {"command_line", command_line},
                                     {"stream_chat", stream_chat}};

}  // namespace fuzz
