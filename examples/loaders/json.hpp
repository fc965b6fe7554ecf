#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace loaders {

// A JSON text from anybody, as a tree. Refused with a std::runtime_error that says why, as "nested more than 8 deep": a
// deep tree, which whoever walks over it would pay for with the stack, and a key that an object has twice.
nlohmann::json parse_json(const std::string& text);

}  // namespace loaders
