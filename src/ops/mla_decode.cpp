// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/mla.h"
#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/latent_checks.h"
#include "ops/mla_rows.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "mla_decode";

/// Heads of a group at most: more rows do not make packing a piece cheaper beside using it.
constexpr int kMostGroupHeads = 128;
/// And at least, where there is a choice: fewer would not fill a tile.
constexpr int kLeastGroupHeads = 16;

ops::LatentTensors latents(const MlaDecodeArgs& a) { return {"kv_cache", a.q, a.kv_cache, a.out}; }

void check_written(std::string_view op, const MlaDecodeArgs& a) {
  const auto check_one = [&](std::string_view name, const TensorView& t) {
    const check::Where where{op, name};
    check::distinct_elements(where, t);
    for (const auto& [other, input] : {std::pair<const char*, ConstTensorView>{"q", a.q},
                                       {"kv_cache", a.kv_cache},
                                       {"block_table", a.block_table},
                                       {"query_start_loc", a.query_start_loc},
                                       {"seq_lens", a.seq_lens},
                                       {"kv_scale", a.kv_scale},
                                       {"alibi_slopes", a.params.alibi_slopes},
                                       {"sinks", a.params.sinks}}) {
      if (input.defined()) check::no_overlap(where, t, other, input);
    }
  };
  check_one("out", a.out);
  if (!a.lse.defined()) return;
  check::tensor({op, "lse"}, a.lse, 2, {DType::f32});
  check::shape({op, "lse"}, a.lse, {a.q.shape[0], a.q.shape[1]});
  check_one("lse", a.lse);
  check::no_overlap({op, "lse"}, a.lse, "out", a.out);
}

void check_planned(const MlaDecodeArgs& a, const AttentionPlan& plan, Workspace workspace,
                   const Executor& executor) {
  check::require(
      a.out.shape[2] == plan.head_dim_v, {kOp, "out"},
      [&] { return fmt::format("a last dimension of {}, as planned", plan.head_dim_v); },
      a.out.shape[2]);
  ops::check_planned_shape(kOp, plan, {a.q, plan.num_kv_heads, a.out.shape[2], a.params});
  ops::check_planned_lengths(kOp, "query_start_loc", a.query_start_loc, plan.query_start_loc);
  ops::check_planned_lengths(kOp, "seq_lens", a.seq_lens, plan.seq_lens);
  ops::check_params(kOp, a.params, plan.num_reqs(), plan.num_q_heads);
  const auto block_size = static_cast<int>(a.kv_cache.shape[1]);
  ops::check_block_table(kOp, a.block_table, plan, block_size, a.kv_cache.shape[0]);
  ops::check_shared_blocks(kOp, a.block_table, plan, block_size);
  ops::check_arithmetic(kOp, plan, a.q.dtype, a.kv_cache.dtype, a.kv_cache.dtype);
  ops::check_resources(kOp, plan, workspace, executor);
}

cpu::AttentionProblem make_problem(const MlaDecodeArgs& a, const AttentionPlan& plan) {
  cpu::AttentionProblem p = ops::base_problem(a.params, plan, a.q.dtype);
  if (a.kv_scale.defined()) p.k_descale = p.v_descale = {a.kv_scale.as<float>(), 0, 0};
  ops::place_rows(p, a.q, a.out, a.lse);
  ops::place_latents(p, a.kv_cache, a.block_table);
  return p;
}

}  // namespace

void ops::check_mla_decode(std::string_view op, const MlaDecodeArgs& a) {
  check_latents(op, latents(a));
  check_block_size(op, "kv_cache", a.kv_cache);
  check_latent_scale(op, latents(a), a.kv_scale);
  check_written(op, a);
  check::require(a.params.scale.has_value(), {op, "scale"},
                 "a value (that of the model's heads before absorption)", "none");
}

cpu::CodedRows ops::coded_rows(const ConstTensorView& cache) noexcept {
  if (cache.dtype != DType::u8) return {};
  // Of a single block the stride may be any number.
  const std::int64_t block_bytes =
      cache.shape[0] > 1 ? cache.strides[0] : cache.shape[1] * cache.shape[2];
  return {find_row_format(cache.shape[2]), block_bytes, static_cast<int>(cache.shape[1])};
}

void ops::place_latents(cpu::AttentionProblem& p, const ConstTensorView& cache,
                        const ConstTensorView& block_table) {
  p.k_dtype = p.v_dtype = cache.dtype;
  p.k = p.v = cache.data;
  p.values_in_keys = true;
  p.block_table = block_table.as<std::int32_t>();
  p.block_table_stride = block_table.strides[0];
  p.block_size = static_cast<int>(cache.shape[1]);
  // All groups of heads have the same keys.
  p.k_strides = p.v_strides = {cache.strides[0], mla_rows::row_stride(cache), 0};
  p.coded = coded_rows(cache);
}

int mla_head_groups(int num_heads, int num_reqs, int num_workers) noexcept {
  int groups = 1;
  const auto may_halve = [&] {
    const int heads = num_heads / groups;
    return num_heads % (2 * groups) == 0 && heads / 2 >= kLeastGroupHeads;
  };
  const auto too_few = [&] {
    return num_heads / groups > kMostGroupHeads || groups * num_reqs < num_workers;
  };
  while (too_few() && may_halve()) groups *= 2;
  return groups;
}

AttentionPlan plan_mla_decode(AttentionPlanInput input) {
  check::require(input.num_kv_heads == 1, {input.op, "num_kv_heads"},
                 "1: all heads share the rows of the cache", input.num_kv_heads);
  if (input.num_q_heads > 0 && input.num_workers > 0)
    input.num_kv_heads = mla_head_groups(input.num_q_heads, static_cast<int>(input.seq_lens.size()),
                                         input.num_workers);
  return plan_attention(input);
}

void validate(const MlaDecodeArgs& args, const AttentionPlan& plan, Workspace workspace,
              const Executor& executor) {
  ops::check_mla_decode(kOp, args);
  check_planned(args, plan, workspace, executor);
}

void mla_decode(const MlaDecodeArgs& args, const AttentionPlan& plan, Workspace workspace,
                Executor& executor) {
  validate(args, plan, workspace, executor);
  ops::run_plan(make_problem(args, plan), plan, workspace, executor);
}

void mla_decode(const MlaDecodeArgs& args, Executor* executor, const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  ops::check_mla_decode(kOp, args);
  AttentionPlanInput in;
  in.op = kOp.data();
  in.query_start_loc = check::i32_array({kOp, "query_start_loc"}, args.query_start_loc, -1);
  in.seq_lens = check::i32_array({kOp, "seq_lens"}, args.seq_lens,
                                 static_cast<std::int64_t>(in.query_start_loc.size()) - 1);
  in.num_q_heads = static_cast<int>(args.q.shape[1]);
  in.num_kv_heads = 1;
  in.head_dim_qk = static_cast<int>(args.q.shape[2]);
  in.head_dim_v = static_cast<int>(args.out.shape[2]);
  in.causal = args.params.causal;
  in.window_left = args.params.window_left;
  in.window_right = args.params.window_right;
  in.num_workers = run_on.num_workers();
  in.isa = kernels.isa;
  in.arithmetic = kernels.arithmetic;
  const AttentionPlan plan = plan_mla_decode(in);
  const Workspace workspace = ops::thread_workspace(plan.workspace_bytes);
  check_planned(args, plan, workspace, run_on);
  ops::run_plan(make_problem(args, plan), plan, workspace, run_on);
}

}  // namespace attend
