// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/differential.h"

#include <array>
#include <utility>
#include <vector>

#include "core/check.h"
#include "ops/attention_lengths.h"
#include "ops/attention_problem.h"
#include "ops/differential_checks.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "differential_attention";

bool is_paged(const DifferentialAttentionArgs& a) { return a.block_table.defined(); }
bool has_branches(const DifferentialAttentionArgs& a) {
  return a.variant == DifferentialVariant::v1;
}
ops::PairShape pair_shape(const DifferentialAttentionArgs& a) {
  return {a.variant, a.pairing, a.q.shape[0], a.q.shape[1], a.q.shape[2]};
}
/// kv heads of the model.
std::int64_t num_kv_heads(const DifferentialAttentionArgs& a) {
  const std::int64_t heads = a.k.shape[a.k.rank - 2];
  return is_paged(a) && has_branches(a) ? 2 * heads : heads;
}

/// Keys or values of a branch of a paged cache, else as they are.
ConstTensorView first_branch(const DifferentialAttentionArgs& a, const ConstTensorView& t) {
  return is_paged(a) && has_branches(a) ? t.select(0, 0) : t;
}

void check_branches(const DifferentialAttentionArgs& a) {
  if (!is_paged(a) || !has_branches(a)) return;
  for (const auto& [name, t] : {std::pair{"k", a.k}, {"v", a.v}}) {
    check::tensor({kOp, name}, t, 5, {});
    check::shape({kOp, name}, t, {2, -1, -1, -1, -1});
  }
}

void check_qkv(const DifferentialAttentionArgs& a) {
  check_branches(a);
  const ops::KvTensors kv{"k", "v", first_branch(a, a.k), first_branch(a, a.v), is_paged(a), false};
  if (is_fp8(a.k.dtype)) {
    ops::check_qkv_fp8(kOp, a.q, kv, {}, 3);
  } else {
    ops::check_qkv(kOp, a.q, kv, {}, 3);
  }
  if (is_paged(a)) ops::check_block_size(kOp, "k", kv.k);
  check::require(
      a.v.shape[a.v.rank - 1] == a.q.shape[2], {kOp, "v"},
      [&] { return fmt::format("the head size of q, {}", a.q.shape[2]); },
      [&] { return describe(a.v); });
}

void check_heads(const DifferentialAttentionArgs& a) {
  ops::check_pairing(kOp, pair_shape(a));
  AttentionPlanInput unused;
  differential_plan_shape(unused, a.variant, static_cast<int>(a.q.shape[1]),
                          static_cast<int>(num_kv_heads(a)), static_cast<int>(a.q.shape[2]));
}

/// Tensors that the call writes, by name.
std::array<std::pair<const char*, TensorView>, 3> written(const DifferentialAttentionArgs& a) {
  return {{{"out", a.out}, {"maps", a.maps}, {"lse", a.lse}}};
}

void check_written(const DifferentialAttentionArgs& a) {
  const ops::PairShape shape = pair_shape(a);
  // A tensor of no tokens may have no memory.
  const bool one = a.out.defined() != a.maps.defined();
  check::require(one || (shape.tokens == 0 && !a.out.defined()), {kOp, "out"},
                 "exactly one of out and maps", a.out.defined() ? "both" : "neither");
  if (a.maps.defined()) {
    check::tensor({kOp, "maps"}, a.maps, 3, {DType::f32});
    check::shape({kOp, "maps"}, a.maps, {shape.tokens, shape.heads, shape.width()});
    check::unit_last_stride({kOp, "maps"}, a.maps);
  } else if (is_fp8(a.q.dtype)) {
    check::tensor({kOp, "out"}, a.out, 3, {DType::f32, DType::f16, DType::bf16});
  } else {
    check::tensor({kOp, "out"}, a.out, 3, {a.q.dtype});
  }
  if (a.out.defined()) {
    ops::check_combine(kOp, shape, a.combine);
    ops::check_combined(kOp, shape, a.combine, a.out);
  }
  if (a.lse.defined()) {
    check::tensor({kOp, "lse"}, a.lse, 2, {DType::f32});
    check::shape({kOp, "lse"}, a.lse, {shape.tokens, shape.heads});
  }
}

/// No written tensor may be read, or be written twice.
void check_apart(const DifferentialAttentionArgs& a) {
  for (const auto& [name, to] : written(a)) {
    if (!to.defined()) continue;
    const check::Where where{kOp, name};
    check::distinct_elements(where, to);
    for (const auto& [other, t] : {std::pair<const char*, ConstTensorView>{"q", a.q},
                                   {"k", a.k},
                                   {"v", a.v},
                                   {"alibi_slopes", a.params.alibi_slopes},
                                   {"sinks", a.params.sinks},
                                   {"block_table", a.block_table},
                                   {"query_start_loc", a.query_start_loc},
                                   {"cu_seqlens_kv", a.cu_seqlens_kv},
                                   {"seq_lens", a.seq_lens},
                                   {"q_descale", a.q_descale},
                                   {"k_descale", a.k_descale},
                                   {"v_descale", a.v_descale}})
      if (t.defined()) check::no_overlap(where, to, other, t);
  }
  if (!a.lse.defined()) return;
  const TensorView& results = a.out.defined() ? a.out : a.maps;
  check::no_overlap({kOp, "lse"}, a.lse, a.out.defined() ? "out" : "maps", results);
  for (const auto& [other, t] :
       {std::pair{"token_lambda", a.combine.token_lambda}, {"norm_weight", a.combine.norm_weight}})
    if (a.out.defined() && t.defined()) check::no_overlap({kOp, "lse"}, a.lse, other, t);
}

/// Everything that needs no plan.
void check_tensors(const DifferentialAttentionArgs& a) {
  check_qkv(a);
  check_heads(a);
  check_written(a);
  check_apart(a);
}

/// All checks of a planned call; `a` passes check_tensors first.
void check_planned(const DifferentialAttentionArgs& a, const AttentionPlan& plan,
                   Workspace workspace, const Executor& executor) {
  const ops::PairShape shape = pair_shape(a);
  const std::int64_t kv_heads = num_kv_heads(a) / shape.branches();
  ops::check_planned_shape(kOp, plan, {a.q, kv_heads, shape.width(), a.params, shape.branches()});
  ops::check_planned_lengths(kOp, "query_start_loc", a.query_start_loc, plan.query_start_loc);
  ops::check_planned_lengths(kOp, "seq_lens", a.seq_lens, plan.seq_lens);
  ops::check_params(kOp, a.params, plan.num_reqs(), plan.num_q_heads);
  const auto descale = [&](std::string_view name, const ConstTensorView& t, DType scaled) {
    ops::check_descale(kOp, name, t, is_fp8(scaled), plan.num_reqs(), num_kv_heads(a));
  };
  descale("q_descale", a.q_descale, a.q.dtype);
  descale("k_descale", a.k_descale, a.k.dtype);
  descale("v_descale", a.v_descale, a.v.dtype);
  if (is_paged(a)) {
    const ConstTensorView k = first_branch(a, a.k);
    const auto block_size = static_cast<int>(k.shape[1]);
    ops::check_block_table(kOp, a.block_table, plan, block_size, k.shape[0]);
    ops::check_shared_blocks(kOp, a.block_table, plan, block_size);
  } else {
    check::require(plan.shared_prefixes.empty(), {kOp, "shared_prefixes"},
                   "a plan without them (ragged keys are not shared)", plan.shared_prefixes.size());
    ops::check_ragged(kOp, a.cu_seqlens_kv, a.k.shape[0], plan);
  }
  ops::check_exact(kOp, plan.arithmetic);
  ops::check_arithmetic(kOp, plan, a.q.dtype, a.k.dtype, a.v.dtype);
  ops::check_resources(kOp, plan, workspace, executor);
}

/// Strides of k or v, and how far the second branch is behind the first.
struct Placed {
  cpu::KvStrides strides;
  std::int64_t branch;
};
Placed place(const DifferentialAttentionArgs& a, const ConstTensorView& t) {
  if (!has_branches(a)) return {ops::kv_strides(t, is_paged(a)), 0};
  if (is_paged(a)) return {ops::kv_strides(t.select(0, 0), true), t.strides[0]};
  cpu::KvStrides strides = ops::kv_strides(t, false);
  const std::int64_t head = strides.head;
  if (a.pairing == HeadPairing::halves) return {strides, t.shape[1] / 2 * head};
  strides.head = 2 * head;
  return {strides, head};
}

cpu::Descale place_descale(const DifferentialAttentionArgs& a, const ConstTensorView& t) {
  cpu::Descale d = ops::kernel_descale(t);
  if (!t.defined() || !has_branches(a)) return d;
  const bool halves = a.pairing == HeadPairing::halves;
  d.stride_branch = halves ? t.shape[1] / 2 * d.stride_head : d.stride_head;
  if (!halves) d.stride_head *= 2;
  return d;
}

cpu::AttentionProblem make_problem(const DifferentialAttentionArgs& a, const AttentionPlan& plan) {
  cpu::AttentionProblem p = ops::base_problem(a.params, plan, a.q.dtype);
  p.k_dtype = p.v_dtype = a.k.dtype;
  ops::place_pairs(p, pair_shape(a), a.combine);
  p.differential.writes_maps = a.maps.defined();
  ops::place_rows(p, a.q, a.maps.defined() ? a.maps : a.out, a.lse);
  p.q_descale = place_descale(a, a.q_descale);
  p.k_descale = place_descale(a, a.k_descale);
  p.v_descale = place_descale(a, a.v_descale);
  p.k = a.k.data;
  p.v = a.v.data;
  const Placed k = place(a, a.k), v = place(a, a.v);
  p.k_strides = k.strides;
  p.differential.k_branch = k.branch;
  p.v_strides = v.strides;
  p.differential.v_branch = v.branch;
  if (is_paged(a)) {
    p.block_table = a.block_table.as<std::int32_t>();
    p.block_table_stride = a.block_table.strides[0];
    p.block_size = static_cast<int>(first_branch(a, a.k).shape[1]);
  } else {
    p.kv_start =
        a.cu_seqlens_kv.defined() ? a.cu_seqlens_kv.as<std::int32_t>() : plan.key_start_loc.data();
  }
  return p;
}

AttentionPlan make_plan(const DifferentialAttentionArgs& a, int num_workers,
                        const KernelOptions& kernels) {
  AttentionPlanInput in;
  std::vector<std::int32_t> lengths;
  ops::plan_lengths(kOp, {a.query_start_loc, a.cu_seqlens_kv, a.seq_lens, a.block_table}, in,
                    lengths);
  differential_plan_shape(in, a.variant, static_cast<int>(a.q.shape[1]),
                          static_cast<int>(num_kv_heads(a)), static_cast<int>(a.q.shape[2]));
  ops::plan_options(a.params, num_workers, kernels, in);
  return plan_attention(in);
}

}  // namespace

void differential_plan_shape(AttentionPlanInput& in, DifferentialVariant variant, int num_q_heads,
                             int num_kv_heads, int head_size) {
  const auto at = [](std::string_view argument) { return check::Where{kOp, argument}; };
  const bool branches = variant == DifferentialVariant::v1;
  check::require(num_q_heads > 0 && num_q_heads % 2 == 0, at("num_q_heads"),
                 "an even number of heads, which are pairs", num_q_heads);
  check::require(num_kv_heads > 0 && (!branches || num_kv_heads % 2 == 0), at("num_kv_heads"),
                 branches ? "an even number of heads, which are pairs" : "at least 1",
                 num_kv_heads);
  const int step = branches ? num_kv_heads : 2 * num_kv_heads;
  check::require(
      num_q_heads % step == 0, at("num_q_heads"),
      [&] {
        return fmt::format("a multiple of {} ({} kv heads{})", step, num_kv_heads,
                           branches ? "" : ", each of whole pairs");
      },
      num_q_heads);
  check::require(
      head_size > 0 && head_size % 8 == 0 && head_size <= kMaxDifferentialHeadDim, at("head_size"),
      [] { return fmt::format("a multiple of 8 in [8, {}]", kMaxDifferentialHeadDim); }, head_size);
  in.num_q_heads = num_q_heads;
  in.num_kv_heads = branches ? num_kv_heads / 2 : num_kv_heads;
  in.head_dim_qk = head_size;
  in.head_dim_v = branches ? 2 * head_size : head_size;
  in.branches = branches ? 2 : 1;
}

void validate(const DifferentialAttentionArgs& args, const AttentionPlan& plan, Workspace workspace,
              const Executor& executor) {
  check_tensors(args);
  check_planned(args, plan, workspace, executor);
}

void differential_attention(const DifferentialAttentionArgs& args, const AttentionPlan& plan,
                            Workspace workspace, Executor& executor) {
  validate(args, plan, workspace, executor);
  ops::run_plan(make_problem(args, plan), plan, workspace, executor);
}

void differential_attention(const DifferentialAttentionArgs& args, Executor* executor,
                            const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  check_tensors(args);
  const AttentionPlan plan = make_plan(args, run_on.num_workers(), kernels);
  const Workspace workspace = ops::thread_workspace(plan.workspace_bytes);
  check_planned(args, plan, workspace, run_on);
  ops::run_plan(make_problem(args, plan), plan, workspace, run_on);
}

}  // namespace attend
