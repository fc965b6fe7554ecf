// The caches of one layer of a model, one for each sequence of a batch, as a class of PyTorch: torch.classes.sinkcache.
// cache.py makes transformers' Cache of a model's layers.

#include <torch/custom_class.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "host.hpp"

namespace {

using caches = std::vector<std::unique_ptr<sinkcache::any_kv_cache>>;

class layer final : public torch::CustomClassHolder {
 public:
  // The first num_sink_tokens and the newest `window`, or as the policy says, for keys and queries before their rotary
  // embedding, of which inv_freq and `interleaved` are; attention factors are in the keys already. Holds no sequence.
  layer(std::string policy, std::string k_format, std::string v_format, int64_t num_kv_heads, int64_t num_qo_heads,
        int64_t head_dim, int64_t v_head_dim, int64_t num_sink_tokens, int64_t window, int64_t rollback, int64_t recent,
        bool absolute, const at::Tensor& inv_freq, bool interleaved)
      : policy_(std::move(policy)),
        k_format_(std::move(k_format)),
        v_format_(std::move(v_format)),
        config_{.num_kv_heads = num_kv_heads,
                .head_dim = head_dim,
                .v_head_dim = v_head_dim,
                .num_sink_tokens = num_sink_tokens,
                .window = window,
                .positions = absolute ? sinkcache::positions::absolute : sinkcache::positions::in_cache,
                .rollback = rollback,
                .recent = recent},
        num_qo_heads_(num_qo_heads) {
    const at::Tensor frequencies = inv_freq.to(at::kFloat).contiguous();
    config_.rope =
        sinkcache::rope({frequencies.data_ptr<float>(), static_cast<std::size_t>(frequencies.numel())},
                        interleaved ? sinkcache::rope_pairing::interleaved : sinkcache::rope_pairing::half_split);
    make();  // tells now what could not be made later
  }

  // Forgets what there is, and holds so many sequences.
  void resize(int64_t batch) {
    caches made;
    for (int64_t i = 0; i < batch; ++i) made.push_back(make());
    caches_ = std::move(made);
  }

  // q [batch, num_qo_heads, tokens, head_dim], k and v [batch, num_kv_heads, tokens, head_dim or v_head_dim]: of
  // sequence i rows [first[i], end[i]) are tokens that follow its others, the rest is padding; all where they are
  // empty. Gives [batch, tokens, num_qo_heads, v_head_dim] in q's type, zeros for padding.
  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::vector<int64_t>& first,
                    const std::vector<int64_t>& end, double scaling, double softcap,
                    const c10::optional<at::Tensor>& sinks) {
    status found;
    const auto require_shape = [&](const char* what, const at::Tensor& t, int64_t heads, int64_t dim) {
      found.require(t.dim() == 4, what, t.dim(), "a tensor of 4 dimensions");
      if (!found) return;
      found.require(t.size(0) == std::ssize(caches_), what, t.size(0), "as many sequences as the cache,",
                    std::ssize(caches_));
      found.require(t.size(1) == heads, what, t.size(1), "of so many heads:", heads);
      found.require(t.size(2) == q.size(2), what, t.size(2), "as many tokens as query,", q.size(2));
      found.require(t.size(3) == dim, what, t.size(3), "of so many dimensions:", dim);
      require_float_type(found, what, t);
    };
    require_shape("query", q, num_qo_heads_, config_.head_dim);
    require_shape("key", k, config_.num_kv_heads, config_.head_dim);
    require_shape("value", v, config_.num_kv_heads, config_.v_head_dim);
    if (sinks) found.require(sinks->numel() == num_qo_heads_, "sinks", sinks->numel(), "one per query head");
    require(found);

    const auto rows_of = [](const at::Tensor& t) { return t.transpose(1, 2).to(at::kFloat).contiguous().flatten(2); };
    const at::Tensor q_rows = rows_of(q), k_rows = rows_of(k), v_rows = rows_of(v);
    const int64_t batch = q.size(0), tokens = q.size(2);
    at::Tensor out = at::zeros({batch, tokens, num_qo_heads_, config_.v_head_dim}, q_rows.options());
    const sinkcache::attention_params params = attention_params(num_qo_heads_, scaling, softcap, sinks);
    sinkcache::workspace& workspace = torch_workspace();

    const bool padded = !first.empty();
    std::vector<sinkcache::decode_item> items;
    for (int64_t i = 0; i < batch && found; ++i) {
      const auto at = static_cast<std::size_t>(i);
      sinkcache::any_kv_cache& cache = *caches_[at];
      const int64_t row = padded ? first.at(at) : 0, n = (padded ? end.at(at) : tokens) - row;
      if (n == 0) continue;
      found.require(row >= 0 && n > 0 && row + n <= tokens, "a sequence's first token", row, "inside of the call's",
                    tokens);
      if (!found) break;
      const auto view = [&](const at::Tensor& t) {
        return sinkcache::const_matrix_view(t.data_ptr<float>() + (i * tokens + row) * t.size(2), n, t.size(2));
      };
      const int64_t out_cols = num_qo_heads_ * config_.v_head_dim;
      float* const to = out.data_ptr<float>() + (i * tokens + row) * out_cols;
      if (n > 1 || tokens > 1) {
        found = library::prefill(params, view(q_rows), view(k_rows), view(v_rows), cache, {to, n, out_cols}, workspace);
        continue;
      }
      found = cache.try_append(view(k_rows), view(v_rows));
      items.push_back({.q = {view(q_rows).row(0), static_cast<std::size_t>(q_rows.size(2))},
                       .keys = &cache,
                       .out = {to, static_cast<std::size_t>(out_cols)},
                       .weights = cache.learner()});
    }
    if (found) found = library::decode(params, items, workspace);  // all sequences at once
    require(found);
    return out.to(q.scalar_type());
  }

  // Tokens of each sequence.
  std::vector<int64_t> seen() const {
    std::vector<int64_t> result;
    for (const auto& cache : caches_) result.push_back(cache->seen());
    return result;
  }
  // Why truncate would be refused, or "".
  std::string why_not_truncate(const std::vector<int64_t>& seen) const {
    status found;
    found.require(seen.size() == caches_.size(), "counts of tokens", seen.size(), "one per sequence,", caches_.size());
    for (std::size_t i = 0; i < caches_.size() && found; ++i) caches_[i]->require_truncate(found, seen[i]);
    return std::string(found.message());
  }
  // Takes back tokens until each sequence has so many.
  void truncate(const std::vector<int64_t>& seen) {
    const std::string why_not = why_not_truncate(seen);
    TORCH_CHECK(why_not.empty(), why_not);
    for (std::size_t i = 0; i < caches_.size(); ++i) require(caches_[i]->try_truncate(seen[i]));
  }
  void clear() { caches_.clear(); }

  // Sequence i becomes what sequence indices[i] was.
  void select(const std::vector<int64_t>& indices) {
    status found;
    for (const int64_t index : indices)
      found.require(index >= 0 && index < std::ssize(caches_), "a sequence", index, "from 0 and below",
                    std::ssize(caches_));
    require(found);
    caches selected(indices.size());
    const auto source = [&](std::size_t i) { return static_cast<std::size_t>(indices[i]); };
    for (std::size_t i = 0; i < indices.size(); ++i)  // all but the last of each are copies
      if (std::count(indices.begin() + static_cast<std::ptrdiff_t>(i) + 1, indices.end(), indices[i]) > 0)
        selected[i] = copy(*caches_[source(i)]);
    for (std::size_t i = 0; i < indices.size(); ++i)
      if (selected[i] == nullptr) selected[i] = std::move(caches_[source(i)]);
    caches_ = std::move(selected);
  }
  c10::intrusive_ptr<layer> clone() const {
    auto result = c10::make_intrusive<layer>(*this);
    for (const auto& cache : caches_) result->caches_.push_back(copy(*cache));
    return result;
  }
  int64_t nbytes() const {
    std::size_t bytes = 0;
    for (const auto& cache : caches_) bytes += cache->nbytes();
    return static_cast<int64_t>(bytes);
  }

  // Of the same kind, and without sequences.
  layer(const layer& like)
      : policy_(like.policy_),
        k_format_(like.k_format_),
        v_format_(like.v_format_),
        config_(like.config_),
        num_qo_heads_(like.num_qo_heads_) {}

 private:
  std::unique_ptr<sinkcache::any_kv_cache> make() const {
    status found;
    auto made = library::make_cache(policy_, k_format_, v_format_, config_, num_qo_heads_, found);
    require(found);
    return made;
  }
  static std::unique_ptr<sinkcache::any_kv_cache> copy(const sinkcache::any_kv_cache& cache) {
    status found;
    auto made = cache.try_clone_any(found);
    require(found);
    return made;
  }

  std::string policy_, k_format_, v_format_;
  sinkcache::cache_config config_;
  index_t num_qo_heads_;
  caches caches_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(sinkcache, m) {
  m.class_<layer>("layer")
      .def(torch::init<std::string, std::string, std::string, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int64_t, int64_t, bool, const at::Tensor&, bool>())
      .def("resize", &layer::resize)
      .def("attend", &layer::attend)
      .def("seen", &layer::seen)
      .def("why_not_truncate", &layer::why_not_truncate)
      .def("truncate", &layer::truncate)
      .def("clear", &layer::clear)
      .def("select", &layer::select)
      .def("clone", &layer::clone)
      .def("nbytes", &layer::nbytes);
}
