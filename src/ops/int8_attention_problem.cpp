// SPDX-License-Identifier: Apache-2.0
#include "ops/int8_attention_problem.h"

#include <array>
#include <cmath>
#include <utility>

#include "core/check.h"
#include "ops/attention_problem.h"

namespace attend::ops {
namespace {

/// [num_blocks, Hkv, block_size, D] in the order of the other ops.
ConstTensorView tokens_first(const ConstTensorView& cache) { return cache.permute({0, 2, 1, 3}); }

void check_v_scale(std::string_view op, const FlashAttnVarlenInt8Args& a) {
  const check::Where where{op, "v_scale"};
  if (a.v.dtype != DType::i8) {
    check::require(!a.v_scale.defined(), where, "undefined: the values are not int8", "a tensor");
    return;
  }
  check::require(a.v_scale.defined(), where, "f32 [Hkv, Dv]: the values are int8",
                 "an undefined tensor");
  check::tensor(where, a.v_scale, 2, {DType::f32});
  check::shape(where, a.v_scale, {a.v.shape[1], a.v.shape[3]});
  check::unit_last_stride(where, a.v_scale);
  for (std::int64_t h = 0; h < a.v_scale.shape[0]; ++h) {
    for (std::int64_t d = 0; d < a.v_scale.shape[1]; ++d) {
      const float x = a.v_scale.as<float>()[h * a.v_scale.strides[0] + d];
      check::require(std::isfinite(x) && x > 0.0F, where, "finite values > 0",
                     [&] { return fmt::format("{} at [{}, {}]", x, h, d); });
    }
  }
}

/// Scales of queries and keys may be anything: they come with the codes, and a NaN marks a row that
/// could not be quantised.
void check_scales(std::string_view op, const FlashAttnVarlenInt8Args& a) {
  check::tensor({op, "q_scale"}, a.q_scale, 2, {DType::f32});
  check::shape({op, "q_scale"}, a.q_scale, {a.q.shape[1], a.q.shape[0]});
  check::tensor({op, "k_scale"}, a.k_scale, 3, {DType::f32});
  check::shape({op, "k_scale"}, a.k_scale, {a.k.shape[0], a.k.shape[1], a.k.shape[2]});
  check_v_scale(op, a);
}

void check_k_mean(std::string_view op, const FlashAttnVarlenInt8Args& a, std::int64_t num_reqs) {
  if (!a.k_mean.defined()) return;
  const check::Where where{op, "k_mean"};
  check::tensor(where, a.k_mean, 3, {DType::f32});
  check::shape(where, a.k_mean, {num_reqs, a.k.shape[1], a.k.shape[3]});
  check::unit_last_stride(where, a.k_mean);
}

void check_written(std::string_view op, const FlashAttnVarlenInt8Args& a) {
  if (a.lse.defined()) {
    check::tensor({op, "lse"}, a.lse, 2, {DType::f32});
    check::shape({op, "lse"}, a.lse, {a.q.shape[0], a.q.shape[1]});
    check::distinct_elements({op, "lse"}, a.lse);
    check::no_overlap({op, "lse"}, a.lse, "out", a.out);
  }
  for (const auto& [name, t] : {std::pair{"q", a.q},
                                {"k", a.k},
                                {"v", a.v},
                                {"q_scale", a.q_scale},
                                {"k_scale", a.k_scale},
                                {"v_scale", a.v_scale},
                                {"k_mean", a.k_mean},
                                {"alibi_slopes", a.params.alibi_slopes},
                                {"sinks", a.params.sinks},
                                {"block_table", a.block_table},
                                {"query_start_loc", a.query_start_loc},
                                {"seq_lens", a.seq_lens}}) {
    if (!t.defined()) continue;
    check::no_overlap({op, "out"}, a.out, name, t);
    if (a.lse.defined()) check::no_overlap({op, "lse"}, a.lse, name, t);
  }
}

}  // namespace

void check_int8_tensors(std::string_view op, const FlashAttnVarlenInt8Args& a) {
  check::tensor({op, "q"}, a.q, 3, {DType::i8});
  check::tensor({op, "k"}, a.k, 4, {DType::i8});
  check::tensor({op, "v"}, a.v, 4, {DType::i8, DType::f16, DType::bf16});
  check::tensor({op, "out"}, a.out, 3, {DType::f32, DType::f16, DType::bf16});
  const KvTensors kv{"k", "v", tokens_first(a.k), tokens_first(a.v), true};
  check_qkv_shapes(op, a.q, kv, a.out, 3);
  check_block_size(op, "k", kv.k);
  check_scales(op, a);
  check_written(op, a);
}

AttentionPlan plan_int8(std::string_view op, const FlashAttnVarlenInt8Args& a, int num_workers,
                        std::optional<IsaLevel> isa) {
  AttentionPlanInput in;
  in.op = op.data();
  in.query_start_loc = check::i32_array({op, "query_start_loc"}, a.query_start_loc, -1);
  in.seq_lens = check::i32_array({op, "seq_lens"}, a.seq_lens,
                                 static_cast<std::int64_t>(in.query_start_loc.size()) - 1);
  in.num_q_heads = static_cast<int>(a.q.shape[1]);
  in.num_kv_heads = static_cast<int>(a.k.shape[1]);
  in.head_dim_qk = static_cast<int>(a.q.shape[2]);
  in.head_dim_v = static_cast<int>(a.v.shape[3]);
  in.causal = a.params.causal;
  in.window_left = a.params.window_left;
  in.window_right = a.params.window_right;
  in.num_workers = num_workers;
  in.isa = isa;
  return plan_attention(in);
}

void check_int8_planned(std::string_view op, const FlashAttnVarlenInt8Args& a,
                        const AttentionPlan& plan, Workspace workspace, const Executor& executor) {
  check_planned_shape(op, plan, {a.q, a.k.shape[1], a.v.shape[3], a.params});
  check_planned_lengths(op, "query_start_loc", a.query_start_loc, plan.query_start_loc);
  check_planned_lengths(op, "seq_lens", a.seq_lens, plan.seq_lens);
  check_params(op, a.params, plan.num_reqs(), plan.num_q_heads);
  check_k_mean(op, a, plan.num_reqs());
  check_block_table(op, a.block_table, plan, static_cast<int>(a.k.shape[2]), a.k.shape[0]);
  check_shared_blocks(op, a.block_table, plan, static_cast<int>(a.k.shape[2]));
  check_arithmetic(op, plan, a.q.dtype, a.k.dtype, a.v.dtype);
  check_resources(op, plan, workspace, executor);
}

cpu::AttentionProblem int8_problem(const FlashAttnVarlenInt8Args& a, const AttentionPlan& plan) {
  cpu::AttentionProblem p = base_problem(a.params, plan, DType::i8);
  p.v_dtype = a.v.dtype;
  place_rows(p, a.q, a.out, a.lse);
  p.k = a.k.data;
  p.v = a.v.data;
  p.q_scale = a.q_scale.as<float>();
  p.q_scale_layout = {true, 0, a.q_scale.strides[1], a.q_scale.strides[0]};
  p.k_scale = a.k_scale.as<float>();
  p.k_scale_strides = {a.k_scale.strides[0], a.k_scale.strides[2], a.k_scale.strides[1]};
  if (a.v_scale.defined()) {
    p.v_channel_scale = a.v_scale.as<float>();
    p.v_channel_scale_stride = a.v_scale.strides[0];
  }
  if (a.k_mean.defined()) {
    p.k_mean = a.k_mean.as<float>();
    p.k_mean_stride_request = a.k_mean.strides[0];
    p.k_mean_stride_head = a.k_mean.strides[1];
  }
  p.block_table = a.block_table.as<std::int32_t>();
  p.block_table_stride = a.block_table.strides[0];
  p.block_size = static_cast<int>(a.k.shape[2]);
  p.k_strides = {a.k.strides[0], a.k.strides[2], a.k.strides[1]};
  p.v_strides = {a.v.strides[0], a.v.strides[2], a.v.strides[1]};
  return p;
}

}  // namespace attend::ops
