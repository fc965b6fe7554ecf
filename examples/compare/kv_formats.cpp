// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "kv_formats.hpp"

#include <vector>

namespace compare {
namespace {

template <class K, class... V>
void add(std::vector<kv_formats>& all) {
  all.push_back(scored_kv_formats_of<K, K>(K::name.data()));
  (all.push_back(scored_kv_formats_of<K, V>(fmt::format("{}/{}", K::name, V::name))), ...);
}

}  // namespace

std::span<const kv_formats> all_kv_formats() {
  using namespace sinkcache;
  static const std::vector<compare::kv_formats> all = [] {
    std::vector<compare::kv_formats> made;
    add<f32>(made), add<f16>(made), add<bf16>(made);
    add<q8, q6, q4, q2>(made), add<q6, q4, q2>(made), add<q4, q2>(made), add<q2>(made);
    return made;
  }();
  return all;
}

}  // namespace compare
