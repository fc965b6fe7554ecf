#pragma once

// Two readers of weights as one.

#include <algorithm>

#include "../any_kv_cache.hpp"
#include "macros_off.hpp"

namespace sinkcache::inline SINKCACHE_TAG::detail {

// A cache's own reader of weights, and the caller's.
class learning final : public weight_reader {
 public:
  learning(any_kv_cache& cache, weight_reader* other) noexcept : learner_(cache.learner()), other_(other) {}

  // Null where nobody wants any.
  weight_reader* reader() const noexcept {
    if (learner_ == nullptr) return other_;
    return other_ == nullptr ? learner_ : const_cast<learning*>(this);
  }
  bool wants(position_t query) const noexcept override { return learner_->wants(query) || other_->wants(query); }
  index_t num_queries_again() const noexcept override {
    return std::max(learner_->num_queries_again(), other_->num_queries_again());
  }
  bool wants_sums(position_t first, position_t last) const noexcept override {
    return learner_->wants_sums(first, last) || other_->wants_sums(first, last);
  }
  void read_sums(const weight_sums& sums) noexcept override {
    const position_t last = sums.query + sums.num_queries - 1;
    if (learner_->wants_sums(sums.query, last)) learner_->read_sums(sums);
    if (other_->wants_sums(sums.query, last)) other_->read_sums(sums);
  }
  void read(const weight_tile& tile) noexcept override {
    if (learner_->wants(tile.query)) learner_->read(tile);
    if (other_->wants(tile.query)) other_->read(tile);
  }
  void require(status& found, const attention_call& call) const noexcept override {
    learner_->require(found, call);
    other_->require(found, call);
  }
  void begin(const attention_call& call) noexcept override {
    learner_->begin(call);
    other_->begin(call);
  }
  void end(const attention_call& call, const attention& by, workspace& memory) noexcept override {
    learner_->end(call, by, memory);
    other_->end(call, by, memory);
  }

 private:
  weight_reader *learner_, *other_;
};

}  // namespace sinkcache::inline SINKCACHE_TAG::detail

#include "macros_on.hpp"
