// SPDX-License-Identifier: Apache-2.0
#include "ops/flash_mla_indices.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/flash_mla_rows.h"
#include "ops/sparse_run.h"
#include "plan/unit_layout.h"

namespace attend::ops {
namespace {

using Args = FlashMlaWithKvCacheArgs;

void check_indices(std::string_view op, const Args& a) {
  const std::int64_t reqs = a.q.shape[0], tokens = a.q.shape[1];
  check::require(!a.causal, {op, "causal"}, "false: indices say what is seen", "true");
  check::tensor({op, "indices"}, a.indices, 3, {DType::i32});
  check::shape({op, "indices"}, a.indices, {reqs, tokens, -1});
  const auto check_lengths = [&](std::string_view name, const ConstTensorView& t) {
    if (!t.defined()) return;
    check::tensor({op, name}, t, 1, {DType::i32});
    check::shape({op, name}, t, {reqs});
  };
  check_lengths("topk_length", a.topk_length);
  check_attn_sink(op, a.attn_sink, a.q.shape[2]);
  const bool extra = a.extra_k_cache.defined();
  check::require(extra == a.extra_indices.defined(), {op, "extra_indices"},
                 "given if and only if extra_k_cache is", extra ? "none" : "a tensor");
  check::require(extra || !a.extra_topk_length.defined(), {op, "extra_topk_length"},
                 "undefined: there is no extra_k_cache", "a tensor");
  if (!extra) return;
  check::tensor({op, "extra_k_cache"}, a.extra_k_cache, 4, {a.k_cache.dtype});
  check::shape({op, "extra_k_cache"}, a.extra_k_cache, {-1, -1, 1, a.k_cache.shape[3]});
  check::tensor({op, "extra_indices"}, a.extra_indices, 3, {DType::i32});
  check::shape({op, "extra_indices"}, a.extra_indices, {reqs, tokens, -1});
  check_lengths("extra_topk_length", a.extra_topk_length);
}

/// Tokens whose rows lie at one distance: those of all requests if each has one, else those of one
/// request.
class Slices {
 public:
  explicit Slices(const Args& a) : a_(a), one_token_(a.q.shape[1] == 1) {}
  std::int64_t count() const { return one_token_ ? 1 : a_.q.shape[0]; }
  int num_tokens() const { return static_cast<int>(a_.q.shape[one_token_ ? 0 : 1]); }

  template <typename View>
  View rows(const View& t, std::int64_t i) const {
    return one_token_ ? t.select(1, 0) : t.select(0, i);
  }
  /// [B, H, Sq] as [tokens, H].
  TensorView lse(std::int64_t i) const {
    if (one_token_) return a_.lse.select(2, 0);
    TensorView t = a_.lse.select(0, i);
    std::swap(t.shape[0], t.shape[1]);
    std::swap(t.strides[0], t.strides[1]);
    return t;
  }
  /// [B] as [tokens].
  ConstTensorView lengths(ConstTensorView t, std::int64_t i) const {
    if (!t.defined() || one_token_) return t;
    t.data = t.as<std::int32_t>() + i * t.strides[0];
    t.shape[0] = num_tokens();
    t.strides[0] = 0;
    return t;
  }
  SparseMlaArgs args(std::int64_t i) const {
    SparseMlaArgs s;
    s.q = rows(a_.q, i);
    s.kv_cache = a_.k_cache.select(2, 0);
    s.indices = rows(a_.indices, i);
    s.topk_length = lengths(a_.topk_length, i);
    s.out = rows(a_.out, i);
    s.lse = lse(i);
    s.sinks = a_.attn_sink;
    s.scale = a_.softmax_scale.value_or(1.0F / std::sqrt(static_cast<float>(a_.q.shape[3])));
    return s;
  }
  /// The same with the keys of the second scope.
  SparseMlaArgs extra_args(std::int64_t i) const {
    SparseMlaArgs s = args(i);
    s.kv_cache = a_.extra_k_cache.select(2, 0);
    s.indices = rows(a_.extra_indices, i);
    s.topk_length = lengths(a_.extra_topk_length, i);
    return s;
  }

 private:
  const Args& a_;
  bool one_token_;
};

}  // namespace

void flash_mla_with_indices(std::string_view op, const Args& a, Executor& executor,
                            const KernelOptions& kernels) {
  check_indices(op, a);
  const bool extra = a.extra_k_cache.defined();
  const Slices slices(a);
  for (std::int64_t i = 0; i < slices.count(); ++i) {
    check_sparse_tensors(op, "k_cache", slices.args(i));
    if (extra) check_sparse_tensors(op, "extra_k_cache", slices.extra_args(i));
  }
  SparseMlaPlanInput in;
  in.num_tokens = slices.num_tokens();
  in.topk = static_cast<int>(a.indices.shape[2]);
  in.num_heads = static_cast<int>(a.q.shape[2]);
  in.head_dim_qk = static_cast<int>(a.q.shape[3]);
  in.head_dim_v = a.head_dim_v;
  in.num_workers = executor.num_workers();
  in.isa = kernels.isa;
  in.arithmetic = kernels.arithmetic;
  const SparseMlaPlan plan = plan_sparse_mla(in);
  SparseMlaPlan extra_plan;
  if (extra) {
    in.topk = static_cast<int>(a.extra_indices.shape[2]);
    extra_plan = plan_sparse_mla(in);
  }
  check_arithmetic(op, plan.attention, a.q.dtype, a.k_cache.dtype, a.k_cache.dtype);
  const std::vector<float> sinks = finite_sinks(a.attn_sink);
  std::vector<float> state;
  std::vector<std::uint8_t> resumes;
  if (extra) {
    state.resize(static_cast<std::size_t>(in.num_tokens) * static_cast<std::size_t>(in.num_heads) *
                 static_cast<std::size_t>(in.head_dim_v + plan::kCarryHeader));
    resumes.assign(static_cast<std::size_t>(in.num_tokens), 1);
  }
  const Workspace workspace =
      thread_workspace(std::max(plan.workspace_bytes, extra_plan.workspace_bytes));
  const ConstTensorView finite(sinks.data(), DType::f32, {a.q.shape[2]});
  for (std::int64_t i = 0; i < slices.count(); ++i) {
    SparseMlaArgs s = slices.args(i);
    if (!sinks.empty()) s.sinks = finite;
    run_sparse(s, plan, workspace, executor, {state.empty() ? nullptr : state.data(), nullptr});
    if (extra) {
      s = slices.extra_args(i);
      if (!sinks.empty()) s.sinks = finite;
      run_sparse(s, extra_plan, workspace, executor, {state.data(), resumes.data()});
    }
    clear_sunk_heads(a.attn_sink, s.out);
  }
}

}  // namespace attend::ops
