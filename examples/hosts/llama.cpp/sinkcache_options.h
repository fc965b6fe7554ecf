#pragma once

// Command-line options of llama.cpp's programs for what the environment says: docs/llama-cpp.md. For common/arg.cpp.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "arg.h"

inline void sinkcache_set(const char* variable, const std::string& value) {
#if defined(_WIN32)
  _putenv_s(variable, value.c_str());
#else
  setenv(variable, value.c_str(), 1);
#endif
}

inline void sinkcache_set_number(const char* variable, const std::string& value) {
  if (value.find_first_not_of("0123456789") != std::string::npos || value.size() > 9)
    throw std::invalid_argument("was '" + value + "', had to be a number from 0 to 999999999");
  sinkcache_set(variable, value);
}

template <class AddOption>
void sinkcache_options(const AddOption& add) {
  add(common_arg({"--sink-window"}, "N", "sinkcache: the newest tokens that are kept, in constant memory",
                 [](common_params& params, const std::string& value) {
                   sinkcache_set_number("SINKCACHE_WINDOW", value);
                   // llama-server would save states, which this memory cannot.
                   if (!value.empty()) params.cache_ram_mib = params.n_ctx_checkpoints = 0;
                 })
          .set_env("SINKCACHE_WINDOW"));
  add(common_arg({"--sink-tokens"}, "N", "sinkcache: the first tokens, which are kept too (default: 4)",
                 [](common_params&, const std::string& value) { sinkcache_set_number("SINKCACHE_SINK_TOKENS", value); })
          .set_env("SINKCACHE_SINK_TOKENS"));
  add(common_arg({"--sink-policy"}, "NAME",
                 "sinkcache: sinks, or a policy by score with its parameters (default: sinks)",
                 [](common_params&, const std::string& value) { sinkcache_set("SINKCACHE_POLICY", value); })
          .set_env("SINKCACHE_POLICY"));
}
