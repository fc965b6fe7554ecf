#pragma once

// The smallest example model, and evidence about it from the start of the held-out text.

#include <string>

#include "compare/files.hpp"
#include "evidence/jobs.hpp"

namespace nano {

inline const std::string held_out = SINKCACHE_SOURCE_DIR "/examples/data/sotu-heldout.txt";
inline const std::string file = SINKCACHE_SOURCE_DIR "/examples/models/nano-softmax.safetensors";

inline compare::subject subject() {
  static const engine::model model(file);
  return {&model, "nano-softmax"};
}
inline const engine::model& model() { return *subject().model; }
inline compare::token_stream text(std::size_t bytes) {
  return compare::read_by(subject(), compare::read_file(held_out).substr(0, bytes));
}

inline evidence::options options() {
  evidence::options o;
  o.model = file;
  o.text = held_out;
  return o;
}

}  // namespace nano
