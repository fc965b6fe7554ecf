// Talks, or writes, for as long as it is let to, in constant memory: what a pinned sink token is worth, to be read
// live.

#include <fmt/format.h>

#include <exception>

#include "chat/options.hpp"
#include "chat/run.hpp"
#include "compare/options.hpp"
#include "text/utf8.hpp"

int main(int argc, char** argv) {
  try {
    if (const auto options = chat::parse_options(argc, argv)) chat::run(*options);
  } catch (const compare::usage_error& error) {
    fmt::print(stderr, "stream_chat: {}\nstream_chat --help tells more\n", text::harmless(error.what()));
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "stream_chat: {}\n", text::harmless(error.what()));
    return 1;
  }
}
