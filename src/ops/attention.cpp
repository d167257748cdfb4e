// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/attention.h"

#include <algorithm>
#include <vector>

#include "core/check.h"
#include "ops/attention_lengths.h"
#include "ops/attention_problem.h"
#include "plan/unit_layout.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "flash_attn_varlen";

bool is_paged(const FlashAttnVarlenArgs& a) { return a.block_table.defined(); }

/// The call ends in the rows' state, not in out and lse.
bool keeps_state(const FlashAttnVarlenArgs& a) { return a.carry.state.defined() && !a.carry.last; }

/// No written tensor may hold what tells where to read.
void check_side_inputs(const FlashAttnVarlenArgs& a) {
  for (const auto& [name, t] : {std::pair{"alibi_slopes", a.params.alibi_slopes},
                                {"sinks", a.params.sinks},
                                {"block_table", a.block_table},
                                {"query_start_loc", a.query_start_loc},
                                {"cu_seqlens_kv", a.cu_seqlens_kv},
                                {"q_descale", a.q_descale},
                                {"k_descale", a.k_descale},
                                {"v_descale", a.v_descale},
                                {"k_token_scale", a.k_token_scale},
                                {"v_token_scale", a.v_token_scale},
                                {"seq_lens", a.seq_lens}}) {
    if (!t.defined()) continue;
    for (const auto& [written, to] : {std::pair{"out", a.out}, {"lse", a.lse}}) {
      if (to.defined()) check::no_overlap({kOp, written}, to, name, t);
    }
    if (keeps_state(a)) check::no_overlap({kOp, "carry.state"}, a.carry.state, name, t);
  }
}

/// @pre k and v have been checked.
void check_token_scales(const FlashAttnVarlenArgs& a) {
  for (const auto& [name, t] :
       {std::pair{"k_token_scale", a.k_token_scale}, {"v_token_scale", a.v_token_scale}}) {
    const check::Where where{kOp, name};
    const bool codes = a.k.dtype == DType::i8 || is_fp8(a.k.dtype);
    check::require(!t.defined() || codes, where, "undefined: k and v are not codes", "a tensor");
    const bool wanted = a.k.dtype == DType::i8 || a.k_token_scale.defined();
    check::require(t.defined() == wanted, where,
                   wanted ? "f32, the shape of k without its last dimension"
                          : "undefined, as k_token_scale is",
                   wanted ? "an undefined tensor" : "a tensor");
    if (!wanted) continue;
    check::tensor(where, t, a.k.rank - 1, {DType::f32});
    if (is_paged(a)) {
      check::shape(where, t, {a.k.shape[0], a.k.shape[1], a.k.shape[2]});
    } else {
      check::shape(where, t, {a.k.shape[0], a.k.shape[1]});
    }
  }
}

/// Without a state the other fields say nothing.
void check_no_carry(const AttentionCarry& carry) {
  if (carry.state.defined()) return;
  check::require(!carry.resumes.defined(), {kOp, "carry.resumes"}, "undefined: there is no state",
                 "a tensor");
  check::require(carry.last, {kOp, "carry.last"}, "true: there is no state", "false");
}

/// Everything that needs no plan.
void check_tensors(const FlashAttnVarlenArgs& a) {
  check_no_carry(a.carry);
  const ops::KvTensors kv{"k", "v", a.k, a.v, is_paged(a), !keeps_state(a)};
  if (is_fp8(a.k.dtype)) {
    ops::check_qkv_fp8(kOp, a.q, kv, a.out, 3);
  } else if (a.k.dtype == DType::i8) {
    ops::check_qkv_int8(kOp, a.q, kv, a.out, 3);
  } else {
    ops::check_qkv(kOp, a.q, kv, a.out, 3);
  }
  check_token_scales(a);
  if (is_paged(a)) ops::check_block_size(kOp, "k", a.k);
  check::require(!a.lse.defined() || !keeps_state(a), {kOp, "lse"},
                 "undefined: the state is kept instead", "a tensor");
  if (a.lse.defined()) {
    check::tensor({kOp, "lse"}, a.lse, 2, {DType::f32});
    check::shape({kOp, "lse"}, a.lse, {a.q.shape[0], a.q.shape[1]});
    check::distinct_elements({kOp, "lse"}, a.lse);
    check::no_overlap({kOp, "lse"}, a.lse, "q", a.q);
    check::no_overlap({kOp, "lse"}, a.lse, "k", a.k);
    check::no_overlap({kOp, "lse"}, a.lse, "v", a.v);
    check::no_overlap({kOp, "lse"}, a.lse, "out", a.out);
  }
}

/// Requests with query tokens that go on from their state end before this token.
std::int64_t resumed_tokens(const AttentionCarry& carry, const AttentionPlan& plan) {
  std::int64_t end = 0;
  if (!carry.resumes.defined()) return end;
  const auto* resumes = carry.resumes.as<std::uint8_t>();
  for (std::size_t r = 0; r < plan.seq_lens.size(); ++r)
    if (resumes[r] != 0) end = plan.query_start_loc[r + 1];
  return end;
}

/// @pre q, k and v have been checked, and that the plan is for them.
void check_carry(const FlashAttnVarlenArgs& a, const AttentionPlan& plan) {
  const AttentionCarry& carry = a.carry;
  const check::Where state{kOp, "carry.state"}, resumes{kOp, "carry.resumes"};
  if (!carry.state.defined()) return;
  if (carry.resumes.defined()) {
    check::tensor(resumes, carry.resumes, 1, {DType::u8});
    check::shape(resumes, carry.resumes, {plan.num_reqs()});
    check::unit_last_stride(resumes, carry.resumes);
  }
  check::tensor(state, carry.state, 3, {DType::f32});
  check::shape(state, carry.state, {-1, plan.num_q_heads, plan.head_dim_v + plan::kCarryHeader});
  check::contiguous(state, carry.state);
  const std::int64_t tokens = carry.last ? resumed_tokens(carry, plan) : plan.num_tokens();
  check::require(
      carry.state.shape[0] >= tokens, state,
      [&] { return fmt::format("at least {} rows", tokens); },
      [&] { return describe(carry.state); });
  check::require(plan.shared_prefixes.empty(), {kOp, "shared_prefixes"},
                 "a plan without them (rows with a state do not share work)",
                 plan.shared_prefixes.size());
  for (const auto& [name, t] : {std::pair<const char*, ConstTensorView>{"q", a.q},
                                {"k", a.k},
                                {"v", a.v},
                                {"out", a.out},
                                {"lse", a.lse},
                                {"carry.resumes", carry.resumes}}) {
    if (t.defined()) check::no_overlap(state, carry.state, name, t);
  }
}

void check_plan_shape(const FlashAttnVarlenArgs& a, const AttentionPlan& plan) {
  ops::check_planned_shape(kOp, plan,
                           {a.q, a.k.shape[a.k.rank - 2], a.v.shape[a.v.rank - 1], a.params});
}

/// Lengths that are given again must be the planned ones.
void check_plan_lengths(const FlashAttnVarlenArgs& a, const AttentionPlan& plan) {
  ops::check_planned_lengths(kOp, "query_start_loc", a.query_start_loc, plan.query_start_loc);
  ops::check_planned_lengths(kOp, "seq_lens", a.seq_lens, plan.seq_lens);
}

cpu::AttentionProblem make_problem(const FlashAttnVarlenArgs& a, const AttentionPlan& plan) {
  cpu::AttentionProblem p = ops::base_problem(a.params, plan, a.q.dtype);
  p.k_dtype = p.v_dtype = a.k.dtype;
  p.q_descale = ops::kernel_descale(a.q_descale);
  p.k_descale = ops::kernel_descale(a.k_descale);
  p.v_descale = ops::kernel_descale(a.v_descale);
  ops::place_rows(p, a.q, a.out, a.lse);
  p.carry = a.carry.state.as<float>();
  p.carry_heads = plan.num_q_heads;
  p.resumes = a.carry.resumes.as<std::uint8_t>();
  p.keeps_state = keeps_state(a);
  p.k = a.k.data;
  p.v = a.v.data;
  if (is_paged(a)) {
    p.block_table = a.block_table.as<std::int32_t>();
    p.block_table_stride = a.block_table.strides[0];
    p.block_size = static_cast<int>(a.k.shape[1]);
  } else {
    p.kv_start =
        a.cu_seqlens_kv.defined() ? a.cu_seqlens_kv.as<std::int32_t>() : plan.key_start_loc.data();
  }
  p.k_strides = ops::kv_strides(a.k, is_paged(a));
  p.v_strides = ops::kv_strides(a.v, is_paged(a));
  p.k_scale = a.k_token_scale.as<float>();
  p.v_scale = a.v_token_scale.as<float>();
  p.k_scale_strides = ops::kv_strides(a.k_token_scale, is_paged(a));
  p.v_scale_strides = ops::kv_strides(a.v_token_scale, is_paged(a));
  return p;
}

AttentionPlan make_plan(const FlashAttnVarlenArgs& a, int num_workers,
                        const KernelOptions& kernels) {
  AttentionPlanInput in;
  std::vector<std::int32_t> lengths;
  ops::plan_lengths(kOp, {a.query_start_loc, a.cu_seqlens_kv, a.seq_lens, a.block_table}, in,
                    lengths);
  in.num_q_heads = static_cast<int>(a.q.shape[1]);
  in.num_kv_heads = static_cast<int>(a.k.shape[a.k.rank - 2]);
  in.head_dim_qk = static_cast<int>(a.q.shape[2]);
  in.head_dim_v = static_cast<int>(a.v.shape[a.v.rank - 1]);
  ops::plan_options(a.params, num_workers, kernels, in);
  return plan_attention(in);
}

/// All checks of a planned call; `a.q` passes check_tensors first.
void check_planned(const FlashAttnVarlenArgs& a, const AttentionPlan& plan, Workspace workspace,
                   const Executor& executor) {
  check_plan_shape(a, plan);
  check_plan_lengths(a, plan);
  ops::check_params(kOp, a.params, plan.num_reqs(), plan.num_q_heads);
  const auto descale = [&](std::string_view name, const ConstTensorView& t, DType scaled) {
    ops::check_descale(kOp, name, t, is_fp8(scaled), plan.num_reqs(), plan.num_kv_heads);
  };
  descale("q_descale", a.q_descale, a.q.dtype);
  descale("k_descale", a.k_descale, a.k.dtype);
  descale("v_descale", a.v_descale, a.v.dtype);
  if (is_paged(a)) {
    const auto block_size = static_cast<int>(a.k.shape[1]);
    ops::check_block_table(kOp, a.block_table, plan, block_size, a.k.shape[0]);
    ops::check_shared_blocks(kOp, a.block_table, plan, block_size);
  } else {
    check::require(plan.shared_prefixes.empty(), {kOp, "shared_prefixes"},
                   "a plan without them (ragged keys are not shared)", plan.shared_prefixes.size());
    ops::check_ragged(kOp, a.cu_seqlens_kv, a.k.shape[0], plan);
  }
  check_carry(a, plan);
  check_side_inputs(a);
  ops::check_arithmetic(kOp, plan, a.q.dtype, a.k.dtype, a.v.dtype);
  ops::check_resources(kOp, plan, workspace, executor);
}

}  // namespace

void validate(const FlashAttnVarlenArgs& args, const AttentionPlan& plan, Workspace workspace,
              const Executor& executor) {
  check_tensors(args);
  check_planned(args, plan, workspace, executor);
}

void flash_attn_varlen(const FlashAttnVarlenArgs& args, const AttentionPlan& plan,
                       Workspace workspace, Executor& executor) {
  validate(args, plan, workspace, executor);
  ops::run_plan(make_problem(args, plan), plan, workspace, executor);
}

void flash_attn_varlen(const FlashAttnVarlenArgs& args, Executor* executor,
                       const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  check_tensors(args);
  const AttentionPlan plan = make_plan(args, run_on.num_workers(), kernels);
  const Workspace workspace = ops::thread_workspace(plan.workspace_bytes);
  check_planned(args, plan, workspace, run_on);
  ops::run_plan(make_problem(args, plan), plan, workspace, run_on);
}

}  // namespace attend
