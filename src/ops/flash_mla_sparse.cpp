// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "attend/ops/flash_mla.h"
#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/flash_mla_rows.h"
#include "ops/sparse_run.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "flash_mla_sparse_fwd";
constexpr float kInf = std::numeric_limits<float>::infinity();

/// In the terms of sparse_mla_attention.
SparseMlaArgs sparse_args(const FlashMlaSparseFwdArgs& a) {
  SparseMlaArgs s;
  s.q = a.q;
  s.kv_cache = a.kv;
  s.indices = a.indices.select(1, 0);
  s.topk_length = a.topk_length;
  s.out = a.out;
  s.lse = a.lse;
  s.max_logits = a.max_logits;
  s.sinks = a.attn_sink;
  s.scale = a.sm_scale;
  return s;
}

void check_tensors(const FlashMlaSparseFwdArgs& a) {
  check::tensor({kOp, "q"}, a.q, 3, {DType::f32, DType::f16, DType::bf16});
  check::tensor({kOp, "kv"}, a.kv, 3, {a.q.dtype});
  check::shape({kOp, "kv"}, a.kv, {-1, 1, -1});
  check::tensor({kOp, "indices"}, a.indices, 3, {DType::i32});
  check::shape({kOp, "indices"}, a.indices, {a.q.shape[0], 1, -1});
  check::tensor({kOp, "lse"}, a.lse, 2, {DType::f32});
  check::tensor({kOp, "max_logits"}, a.max_logits, 2, {DType::f32});
  check::tensor({kOp, "out"}, a.out, 3, {a.q.dtype});
  check::shape({kOp, "out"}, a.out, {a.q.shape[0], a.q.shape[1], a.d_v});
  check::require(std::isfinite(a.sm_scale) && a.sm_scale > 0.0F, {kOp, "sm_scale"},
                 "a finite value > 0", a.sm_scale);
  ops::check_sparse_tensors(kOp, "kv", sparse_args(a));
  ops::check_attn_sink(kOp, a.attn_sink, a.q.shape[1]);
}

}  // namespace

void ops::check_attn_sink(std::string_view op, const ConstTensorView& sink, std::int64_t heads) {
  if (!sink.defined()) return;
  const check::Where where{op, "attn_sink"};
  check::tensor(where, sink, 1, {DType::f32});
  check::shape(where, sink, {heads});
  for (std::int64_t h = 0; h < heads; ++h) {
    const float x = sink.as<float>()[h * sink.strides[0]];
    check::require(!std::isnan(x), where, "no NaN", [&] { return fmt::format("NaN at {}", h); });
  }
}

std::vector<float> ops::finite_sinks(const ConstTensorView& sink) {
  std::vector<float> sinks;
  for (std::int64_t h = 0; sink.defined() && h < sink.shape[0]; ++h) {
    const float x = sink.as<float>()[h * sink.strides[0]];
    sinks.push_back(x == kInf ? -kInf : x);
  }
  return sinks;
}

void ops::clear_sunk_heads(const ConstTensorView& sink, const TensorView& out) {
  for (std::int64_t h = 0; sink.defined() && h < sink.shape[0]; ++h) {
    if (sink.as<float>()[h * sink.strides[0]] != kInf) continue;
    for (std::int64_t t = 0; t < out.shape[0]; ++t) {
      auto* row = static_cast<std::byte*>(out.select(0, t).select(0, h).data);
      std::fill_n(row, static_cast<std::size_t>(out.shape[2]) * size_of(out.dtype), std::byte{0});
    }
  }
}

void flash_mla_sparse_fwd(const FlashMlaSparseFwdArgs& args, Executor* executor,
                          const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  check_tensors(args);
  const SparseMlaPlan plan = plan_sparse_mla({.num_tokens = static_cast<int>(args.q.shape[0]),
                                              .topk = static_cast<int>(args.indices.shape[2]),
                                              .num_heads = static_cast<int>(args.q.shape[1]),
                                              .head_dim_qk = static_cast<int>(args.q.shape[2]),
                                              .head_dim_v = args.d_v,
                                              .num_workers = run_on.num_workers(),
                                              .isa = kernels.isa,
                                              .arithmetic = kernels.arithmetic});
  std::vector<float> sinks = ops::finite_sinks(args.attn_sink);
  SparseMlaArgs sparse = sparse_args(args);
  if (!sinks.empty()) sparse.sinks = {sinks.data(), DType::f32, {args.q.shape[1]}};
  const Workspace workspace = ops::thread_workspace(plan.workspace_bytes);
  ops::check_sparse_planned(kOp, sparse, plan, workspace, run_on);
  ops::run_sparse(sparse, plan, workspace, run_on);
  ops::clear_sunk_heads(args.attn_sink, args.out);
  for (std::int64_t t = 0; t < args.lse.shape[0]; ++t) {
    for (std::int64_t h = 0; h < args.lse.shape[1]; ++h) {
      float& lse = *args.lse.select(0, t).select(0, h).as<float>();
      if (lse == -kInf) lse = kInf;
    }
  }
}

}  // namespace attend
