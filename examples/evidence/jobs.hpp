#pragma once

// The runs that the evidence is made of. The result of each is a file, so what is done need not be done again.

#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "measure.hpp"
#include "options.hpp"

namespace evidence {

using json = nlohmann::ordered_json;

using compare::decoded_tokens;  // after the fullest cache, so that the text has to have them

// What all runs have in common.
struct setting {
  const evidence::options& options;
  compare::subject subject;
  compare::token_stream stream;  // all of the text
};

struct job {
  enum class kind { loss, recompute, recall, shares, check, decode };

  kind is;
  compare::policy policy;
  index_t cache;
  index_t tokens = 0;  // of loss, where not all of options::tokens

  std::string name() const;  // loss-sinks4-256
};

// The longest ones first; those that are timed last.
std::vector<job> plan(const options&);

// About how long it takes, in tokens of prefill by one thread.
index_t work(const job&, const options&);

json measure(const job&, const setting&, const progress&);

// Reads `path`, where `keep` puts what `measure` gives; null where it is not there. Throws unless it is of this job and
// this setting.
json kept(const std::string& path, const job&, const setting&);

void keep(const std::string& path, const job&, const setting&, json result);

// The same of anything that depends on `inputs`; with what any run of a setting depends on.
json kept(const std::string& path, const json& inputs);
void keep(const std::string& path, const json& inputs, json result);
json inputs_of(const std::string& run, const setting&);

// When, where and by which code such files were made.
class origin {
 public:
  void add(const json& file);
  std::string text() const;  // Measured 2026-11-30 on ..., commit ....

 private:
  std::set<std::string> dates_, machines_, commits_;
};

std::string shown_texts(const std::vector<setting>&);  // a.txt and b.txt

}  // namespace evidence
