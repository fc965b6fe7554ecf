#pragma once

#include <cstddef>
#include <span>
#include <stdexcept>

#include "loaders/gguf.hpp"

namespace fuzz {

// Reads all that there is to read of a GGUF file, in every way. An error of the file is fine, anything else is not.
inline void read_gguf(std::span<const std::byte> bytes) {
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
    const loaders::gguf file = loaders::gguf::parse(bytes, "fuzzed");
    for (const std::string& key : file.keys())
      try_all([&] { file.string(key); }, [&] { file.integer(key, -5, 5); }, [&] { file.number(key, -5, 5); },
              [&] { file.flag(key); }, [&] { file.strings(key); }, [&] { file.integers(key); },
              [&] { file.numbers(key); });
    for (const std::string& name : file.names()) {
      std::int64_t values = 1;
      for (const std::int64_t dim : file.shape(name)) values *= dim;
      if (file.read(name).values.size() != static_cast<std::size_t>(values))
        throw std::logic_error("the values of a tensor do not fill its shape");
    }
  } catch (const loaders::file_error&) {
  }
}

}  // namespace fuzz
