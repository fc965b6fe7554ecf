#include "json.hpp"

#include <fmt/core.h>

#include <set>
#include <stdexcept>
#include <vector>

#include "file.hpp"

namespace loaders {

nlohmann::json parse_json(const std::string& text) {
  using event = nlohmann::json::parse_event_t;
  constexpr int deepest = 8;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, event e, const nlohmann::json& parsed) {
    if (e == event::object_start || e == event::array_start) {
      if (depth >= deepest) throw std::runtime_error(fmt::format("nested more than {} deep", deepest));
      keys.resize(static_cast<std::size_t>(depth) + 1);
      keys.back().clear();
    } else if (e == event::key) {
      keys.resize(static_cast<std::size_t>(depth));
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second)
        throw std::runtime_error(fmt::format("an object that has {} twice", quote(key)));
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text, check);
  } catch (const nlohmann::json::parse_error&) {
    throw std::runtime_error("no JSON");
  } catch (const nlohmann::json::out_of_range&) {
    throw std::runtime_error("JSON with a number that no double holds");
  }
}

}  // namespace loaders
