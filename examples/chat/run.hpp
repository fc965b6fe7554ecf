#pragma once

#include "options.hpp"

namespace chat {

// All that stream_chat does with its options, over stdin, stdout and stderr. Throws compare::usage_error where they do
// not fit the model.
void run(const options&);

}  // namespace chat
