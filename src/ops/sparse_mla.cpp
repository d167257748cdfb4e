// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/sparse_mla.h"

#include <limits>
#include <vector>

#include "attend/ops/mla.h"
#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/latent_checks.h"
#include "ops/sparse_keys.h"
#include "ops/sparse_run.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "sparse_mla_attention";

ops::LatentTensors latents(std::string_view cache_name, const SparseMlaArgs& a) {
  return {cache_name, a.q, a.kv_cache, a.out};
}

ops::SparseKeys sparse_keys(std::string_view cache_name, const SparseMlaArgs& a) {
  return {a.kv_cache, a.indices, a.topk_length, cache_name, "indices", "topk_length"};
}

AttentionParams params(const SparseMlaArgs& a) {
  AttentionParams p;
  p.scale = a.scale;
  p.sinks = a.sinks;
  return p;
}

void check_written(std::string_view op, std::string_view cache_name, const SparseMlaArgs& a) {
  const auto check_one = [&](std::string_view name, const TensorView& t) {
    const check::Where where{op, name};
    check::distinct_elements(where, t);
    for (const auto& [other, input] : {std::pair<std::string_view, ConstTensorView>{"q", a.q},
                                       {cache_name, a.kv_cache},
                                       {"indices", a.indices},
                                       {"topk_length", a.topk_length},
                                       {"kv_scale", a.kv_scale},
                                       {"sinks", a.sinks}}) {
      if (input.defined()) check::no_overlap(where, t, other, input);
    }
  };
  check_one("out", a.out);
  for (const auto& [name, t] : {std::pair{"lse", a.lse}, {"max_logits", a.max_logits}}) {
    if (!t.defined()) continue;
    check::tensor({op, name}, t, 2, {DType::f32});
    check::shape({op, name}, t, {a.q.shape[0], a.q.shape[1]});
    check_one(name, t);
    check::no_overlap({op, name}, t, "out", a.out);
  }
  if (a.lse.defined() && a.max_logits.defined())
    check::no_overlap({op, "max_logits"}, a.max_logits, "lse", a.lse);
}

void check_tensors(const SparseMlaArgs& a) {
  ops::check_sparse_tensors(kOp, "kv_cache", a);
  check::require(a.scale.has_value(), {kOp, "scale"},
                 "a value (that of the model's heads before absorption)", "none");
  ops::check_params(kOp, params(a), a.q.shape[0], a.q.shape[1]);
}

}  // namespace

void ops::check_sparse_tensors(std::string_view op, std::string_view cache_name,
                               const SparseMlaArgs& a) {
  check_latents(op, latents(cache_name, a));
  check_latent_scale(op, latents(cache_name, a), a.kv_scale);
  check::require(a.q.shape[0] <= std::numeric_limits<std::int32_t>::max(), {op, "q"},
                 "fewer than 2^31 tokens", a.q.shape[0]);
  check_sparse_keys(op, sparse_keys(cache_name, a), a.q.shape[0]);
  check_written(op, cache_name, a);
}

void ops::check_sparse_planned(std::string_view op, const SparseMlaArgs& a,
                               const SparseMlaPlan& plan, Workspace workspace,
                               const Executor& executor) {
  const AttentionParams p = params(a);
  const AttentionPlan& attention = plan.attention;
  check::require(
      a.out.shape[2] == attention.head_dim_v, {op, "out"},
      [&] { return fmt::format("a last dimension of {}, as planned", attention.head_dim_v); },
      a.out.shape[2]);
  check_planned_shape(op, attention, {a.q, attention.num_kv_heads, a.out.shape[2], p});
  check::require(
      a.indices.shape[1] == plan.topk, {op, "indices"},
      [&] { return fmt::format("{} indices a token, as planned", plan.topk); }, a.indices.shape[1]);
  check_arithmetic(op, attention, a.q.dtype, a.kv_cache.dtype, a.kv_cache.dtype);
  check_resources(op, attention, workspace, executor);
  check::require(
      workspace.size >= plan.workspace_bytes, {op, "workspace"},
      [&] { return fmt::format("at least {} bytes", plan.workspace_bytes); },
      [&] { return fmt::format("{} bytes", workspace.size); });
}

void ops::run_sparse(const SparseMlaArgs& a, const SparseMlaPlan& plan, Workspace workspace,
                     Executor& executor, const SparseCarry& carry) {
  cpu::AttentionProblem p = base_problem(params(a), plan.attention, a.q.dtype);
  if (a.kv_scale.defined()) p.k_descale = p.v_descale = {a.kv_scale.as<float>(), 0, 0};
  place_rows(p, a.q, a.out, a.lse);
  if (a.max_logits.defined()) {
    p.max_logits = a.max_logits.as<float>();
    p.max_logits_layout = {true, 0, a.max_logits.strides[0], a.max_logits.strides[1]};
  }
  if (carry.state != nullptr) {
    p.carry = carry.state;
    p.carry_heads = plan.attention.num_q_heads;
    p.resumes = carry.resumes;
    p.keeps_state = carry.resumes == nullptr;
  }
  // The table lies behind what the attention needs.
  auto* table = reinterpret_cast<std::int32_t*>(static_cast<std::byte*>(workspace.data) +
                                                plan.attention.workspace_bytes);
  place_sparse_keys(p, sparse_keys("kv_cache", a), table, executor);
  run_plan(p, plan.attention, workspace, executor);
}

SparseMlaPlan plan_sparse_mla(const SparseMlaPlanInput& input) {
  constexpr std::string_view op = "plan_sparse_mla";
  check::require(input.num_tokens >= 0, {op, "num_tokens"}, ">= 0", input.num_tokens);
  check::require(input.topk >= 1 && input.topk <= (1 << 30), {op, "topk"}, "from 1 to 2^30",
                 input.topk);
  const auto tokens = static_cast<std::size_t>(input.num_tokens);
  std::vector<std::int32_t> starts(tokens + 1);
  for (std::size_t t = 0; t <= tokens; ++t) starts[t] = static_cast<std::int32_t>(t);
  const std::vector<std::int32_t> lengths(tokens, input.topk);
  AttentionPlanInput in;
  in.op = op.data();
  in.query_start_loc = starts;
  in.seq_lens = lengths;
  in.num_q_heads = input.num_heads;
  in.num_kv_heads = 1;
  in.head_dim_qk = input.head_dim_qk;
  in.head_dim_v = input.head_dim_v;
  in.causal = false;
  in.num_workers = input.num_workers;
  in.isa = input.isa;
  in.arithmetic = input.arithmetic;
  SparseMlaPlan plan;
  plan.attention = plan_mla_decode(in);
  plan.topk = input.topk;
  plan.attention.workspace_bytes = (plan.attention.workspace_bytes + 63) / 64 * 64;
  plan.workspace_bytes =
      plan.attention.workspace_bytes + ops::sparse_table_bytes(input.num_tokens, input.topk);
  return plan;
}

void validate(const SparseMlaArgs& args, const SparseMlaPlan& plan, Workspace workspace,
              const Executor& executor) {
  check_tensors(args);
  ops::check_sparse_planned(kOp, args, plan, workspace, executor);
}

void sparse_mla_attention(const SparseMlaArgs& args, const SparseMlaPlan& plan, Workspace workspace,
                          Executor& executor) {
  validate(args, plan, workspace, executor);
  ops::run_sparse(args, plan, workspace, executor);
}

void sparse_mla_attention(const SparseMlaArgs& args, Executor* executor,
                          const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  check_tensors(args);
  const SparseMlaPlan plan = plan_sparse_mla({.num_tokens = static_cast<int>(args.q.shape[0]),
                                              .topk = static_cast<int>(args.indices.shape[1]),
                                              .num_heads = static_cast<int>(args.q.shape[1]),
                                              .head_dim_qk = static_cast<int>(args.q.shape[2]),
                                              .head_dim_v = static_cast<int>(args.out.shape[2]),
                                              .num_workers = run_on.num_workers(),
                                              .isa = kernels.isa,
                                              .arithmetic = kernels.arithmetic});
  const Workspace workspace = ops::thread_workspace(plan.workspace_bytes);
  ops::check_sparse_planned(kOp, args, plan, workspace, run_on);
  ops::run_sparse(args, plan, workspace, run_on);
}

}  // namespace attend
