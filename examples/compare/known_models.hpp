#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

#include <string>

namespace compare {

// What --model may say: a file, a name in examples/models, or smollm2, which examples/get-model puts into the user's
// cache folder.
std::string model_file(const std::string& name);

// Where `file` is one that get-model gets and it is not there: on a terminal offers to get it, else throws, saying how.
void offer_missing_model(const std::string& file);

}  // namespace compare
