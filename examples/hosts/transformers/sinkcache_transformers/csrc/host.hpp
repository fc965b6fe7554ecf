// What attention over the host's caches and attention over caches of this library's share of PyTorch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <string_view>

#include "library.hpp"

using sinkcache::index_t;
using sinkcache::position_t;
using sinkcache::status;

// PyTorch's own threads.
struct torch_threads {
  index_t concurrency() const { return at::get_num_threads(); }
  void run(index_t n, const sinkcache::work_ref& work) const {
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) work(item, at::get_thread_num());
    });
  }
};

// One for each thread that calls.
inline sinkcache::workspace& torch_workspace() {
  static torch_threads threads;
  thread_local std::optional<sinkcache::workspace> workspace;
  if (!workspace || workspace->concurrency() < threads.concurrency()) workspace.emplace(threads);
  return *workspace;
}

inline void require(const status& found) { TORCH_CHECK(found.ok(), found.c_str()); }

// By this library's names, or PyTorch's where it has none.
inline std::string_view format_name(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return "f32";
    case at::kHalf:
      return "f16";
    case at::kBFloat16:
      return "bf16";
    default:
      return toString(t.scalar_type());
  }
}

inline void require_float_type(status& found, const char* argument, const at::Tensor& t) {
  const std::string_view name = format_name(t);
  found.require(name == "f32" || name == "f16" || name == "bf16", argument, name, "f32, f16 or bf16");
}

inline sinkcache::attention_params attention_params(index_t heads, double scaling, double softcap,
                                                    const c10::optional<at::Tensor>& sinks) {
  sinkcache::attention_params params{
      .num_qo_heads = heads, .sm_scale = static_cast<float>(scaling), .logits_soft_cap = static_cast<float>(softcap)};
  if (sinks) {
    const at::Tensor logits = sinks->to(at::kFloat).contiguous();
    params.softmax =
        sinkcache::softmax_variant::sink_logits({logits.data_ptr<float>(), static_cast<std::size_t>(heads)});
  }
  return params;
}
