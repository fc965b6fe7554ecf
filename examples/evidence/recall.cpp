// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "recall.hpp"

#include <algorithm>
#include <random>
#include <stdexcept>

namespace evidence {
namespace {

// An odd number of them, so that none always comes with the same distance.
constexpr const char* names[] = {
    "Adam",   "Alice",   "Andrew", "Anna",   "Arthur", "Barbara", "Ben",   "Brian",    "Carl",   "Carol",  "Charles",
    "Claire", "Daniel",  "David",  "Diana",  "Edward", "Ellen",   "Emily", "Eric",     "Frank",  "George", "Grace",
    "Harry",  "Helen",   "Henry",  "Ivan",   "Jack",   "James",   "Jane",  "Jason",    "John",   "Joseph", "Julia",
    "Karen",  "Kevin",   "Laura",  "Leo",    "Linda",  "Louis",   "Lucy",  "Margaret", "Maria",  "Mark",   "Martin",
    "Mary",   "Michael", "Nancy",  "Oliver", "Oscar",  "Patrick", "Paul",  "Peter",    "Philip", "Rachel", "Richard",
    "Robert", "Rose",    "Samuel", "Sarah",  "Simon",  "Stephen", "Susan", "Thomas"};

std::vector<int> encoded(const compare::subject& s, const std::string& text) {
  if (s.tokenizer) return s.tokenizer->encode(text);
  return {text.begin(), text.end()};
}

struct pending {
  std::size_t fact, name;
  index_t due;
};

}  // namespace

recall_stream plant(const compare::subject& s, std::span<const int> text, index_t lead, const recall_setting& setting) {
  recall_stream stream;
  for (char digit = '0'; digit <= '9'; ++digit) {
    const std::vector<int> ids = encoded(s, std::string(1, digit));
    if (ids.size() != 1) throw std::runtime_error(fmt::format("{}: has no token for the digit {}", s.name, digit));
    stream.digit_ids.push_back(ids.front());
  }

  std::size_t read = 0;
  std::vector<int>& ids = stream.ids;
  const auto at = [&ids] { return static_cast<index_t>(ids.size()); };
  const auto write = [&ids](const std::vector<int>& more) { ids.insert(ids.end(), more.begin(), more.end()); };
  const auto sentence = [&](const char* name) {
    write(encoded(s, fmt::format("\n\nThe secret code of {} is ", name)));
  };
  const auto code = [&](const std::vector<int>& digits) {
    for (const int digit : digits) ids.push_back(stream.digit_ids[static_cast<std::size_t>(digit)]);
  };
  const std::vector<int> end = encoded(s, ".\n\n");
  index_t longest = 0;  // fact
  for (const char* name : names)
    longest = std::max(
        longest,
        static_cast<index_t>(encoded(s, fmt::format("\n\nThe secret code of {} is ", name)).size() + end.size()) +
            digits_of_a_fact);

  std::mt19937_64 random(1);
  std::vector<pending> asked;  // by the time that they are due
  const std::size_t all = setting.distances.size() * static_cast<std::size_t>(setting.facts);
  index_t next = lead;
  while (stream.facts.size() < all || !asked.empty()) {
    const std::size_t name = stream.facts.size() % std::size(names);
    const bool free = std::none_of(asked.begin(), asked.end(), [=](const pending& p) { return p.name == name; });
    if (!asked.empty() && asked.front().due <= at()) {
      fact& f = stream.facts[asked.front().fact];
      sentence(names[asked.front().name]);
      f.asked_first = at() - 1;
      code(f.digits);
      f.asked_last = at() - 2;
      write(end);
      asked.erase(asked.begin());
    } else if (stream.facts.size() < all && free && at() >= next &&
               (asked.empty() || asked.front().due >= at() + longest)) {
      fact f{setting.distances[stream.facts.size() % setting.distances.size()], at(), 0, 0, 0, {}};
      for (index_t i = 0; i < digits_of_a_fact; ++i) f.digits.push_back(static_cast<int>(random() % 10));
      sentence(names[name]);
      code(f.digits);
      f.last = at() - 1;
      write(end);
      const pending p{stream.facts.size(), name, at() + f.distance};
      asked.insert(std::upper_bound(asked.begin(), asked.end(), p,
                                    [](const pending& a, const pending& b) { return a.due < b.due; }),
                   p);
      stream.facts.push_back(std::move(f));
      next = at() + setting.spacing;
    } else {
      if (read == text.size())
        throw std::runtime_error(
            fmt::format("the text is too short to plant {} facts in: it has {} tokens", all, read));
      ids.push_back(text[read++]);
    }
  }
  return stream;
}

std::vector<int> recalled(const compare::subject& subject, const engine::cache_factory& caches,
                          const recall_stream& stream, const progress& on_tokens) {
  std::vector<const fact*> order;
  for (const fact& f : stream.facts) order.push_back(&f);
  std::sort(order.begin(), order.end(), [](const fact* a, const fact* b) { return a->asked_first < b->asked_first; });

  std::vector<int> right(stream.facts.size());
  auto next = order.begin();
  index_t i = 0;
  const auto each = [&](std::span<const float> logits) {
    const index_t after = i++;
    while (next != order.end() && (*next)->asked_last < after) ++next;
    if (next == order.end() || after < (*next)->asked_first) return;
    const auto logit = [&](int digit) {
      return logits[static_cast<std::size_t>(stream.digit_ids[static_cast<std::size_t>(digit)])];
    };
    const int truth = (*next)->digits[static_cast<std::size_t>(after - (*next)->asked_first)];
    bool likeliest = true;
    for (int digit = 0; digit < 10; ++digit) likeliest &= digit == truth || logit(digit) < logit(truth);
    right[static_cast<std::size_t>(*next - stream.facts.data())] += likeliest;
  };
  compare::evaluator(subject, caches, stream.ids).prefill(stream.ids.size(), each, on_tokens);
  return right;
}

}  // namespace evidence
