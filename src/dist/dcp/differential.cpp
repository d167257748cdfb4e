// SPDX-License-Identifier: Apache-2.0
#include "attend/dist/differential.h"

#include <cstddef>
#include <utility>

#include "attend/ops/merge.h"
#include "core/check.h"
#include "dist/dcp/attention_checks.h"
#include "dist/dcp/combine_parts.h"
#include "dist/dcp/gather_heads.h"
#include "dist/dcp/reserve.h"
#include "ops/attention_problem.h"
#include "ops/differential_checks.h"

namespace attend {
namespace {

using dcp::AttentionCall;
using dcp::AttentionPlans;
using dcp::AttentionSizes;
using dcp::HeadRun;
using dcp::reserve;

using Args = DcpDifferentialAttentionArgs;

constexpr const char* kOp = "dcp_differential_attention";

/// Maps of heads, and their LSEs; f32.
struct Part {
  TensorView maps, lse;
};

/// Intermediate results of one call; a thread reuses the memory.
struct Scratch {
  dcp::HeadBuffers queries;
  Buffer q, k, v;
  Buffer partial_maps, partial_lse, context_maps, context_lse, new_maps, new_lse;
};
Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

AttentionCall attention_call(const Args& a) {
  AttentionCall call{.op = kOp, .args = {}, .maps = 2};
  call.branches = a.variant == DifferentialVariant::v1 ? 2 : 1;
  DcpAttentionArgs& c = call.args;
  c.q = a.q;
  c.k_cache = a.k_cache;
  c.v_cache = a.v_cache;
  c.k_new = a.k_new;
  c.v_new = a.v_new;
  c.out = a.out;
  c.lse = a.lse;
  c.query_start_loc = a.query_start_loc;
  c.seq_lens = a.seq_lens;
  c.block_table = a.block_table;
  c.request_causal = a.request_causal;
  c.interleave = a.interleave;
  c.params = a.params;
  return call;
}

/// What makes a call differential.
void check_pairs(const Args& a, const AttentionSizes& s) {
  const ops::PairShape shape{a.variant, a.pairing, s.tokens, s.heads, s.dim};
  check::require(
      s.dim_v == s.dim, {kOp, "v_cache"},
      [&] { return fmt::format("the head size of q, {}", s.dim); }, s.dim_v);
  ops::check_pairing(kOp, shape);
  ops::check_combine(kOp, shape, a.combine);
  ops::check_combined(kOp, shape, a.combine, a.out);
  for (const auto& [name, t] :
       {std::pair{"token_lambda", a.combine.token_lambda}, {"norm_weight", a.combine.norm_weight}})
    if (a.lse.defined() && t.defined()) check::no_overlap({kOp, "lse"}, a.lse, name, t);
}

/// Every second head of [T, H, *], from `first` on.
template <typename View>
View every_second(const View& t, std::int64_t first) {
  View r = t.slice(1, first, t.shape[1] / 2);
  r.strides[1] *= 2;
  return r;
}

/// The heads of [T, H, D] with those of a pair side by side, as a copy if they are not.
ConstTensorView side_by_side(const ConstTensorView& t, HeadPairing pairing, Buffer& memory) {
  if (pairing == HeadPairing::interleaved) return t;
  const std::int64_t pairs = t.shape[1] / 2;
  const TensorView r = reserve(memory, t.dtype, {t.shape[0], t.shape[1], t.shape[2]});
  for (int map = 0; map < 2; ++map)
    dcp::copy_heads(every_second(r, map), t.slice(1, map * pairs, pairs));
  return r;
}

Part reserve_part(Buffer& maps, Buffer& lse, const AttentionSizes& s, std::int64_t heads) {
  return {reserve(maps, DType::f32, {s.tokens, heads, s.branches * s.dim}),
          reserve(lse, DType::f32, {s.tokens, heads})};
}

DifferentialAttentionArgs local_args(const Args& a, const Part& part) {
  DifferentialAttentionArgs d;
  d.maps = part.maps;
  d.lse = part.lse;
  d.variant = a.variant;
  d.params = a.params;
  d.params.causal = false;  // each request's flag is in the plan
  return d;
}

/// Step 2 of dcp_attention().
Part attend_to_context(const Args& a, const TensorView& all_q, const AttentionPlan& plan,
                       const AttentionSizes& s, Executor& executor) {
  Scratch& scratch = thread_scratch();
  const Part part = reserve_part(scratch.partial_maps, scratch.partial_lse, s, s.all_heads());
  if (s.tokens == 0) return part;  // a block table of no rows may be null, which means ragged keys
  DifferentialAttentionArgs d = local_args(a, part);
  d.q = all_q;
  d.k = a.k_cache;
  d.v = a.v_cache;
  d.block_table = a.block_table;
  differential_attention(d, plan, ops::thread_workspace(plan.workspace_bytes), executor);
  return part;
}

/// Step 3.
Part combine_context(const Part& partial, const Args& a, const AttentionSizes& s,
                     Communicator& comm) {
  Scratch& scratch = thread_scratch();
  const Part whole = reserve_part(scratch.context_maps, scratch.context_lse, s, s.heads);
  DcpCombineArgs c;
  c.out = partial.maps;
  c.lse = partial.lse;
  c.combined = whole.maps;
  c.combined_lse = whole.lse;
  dcp::combine_parts(c, a.exchange, comm);
  return whole;
}

/// Step 4.
Part attend_to_new_keys(const Args& a, const ConstTensorView& q, const AttentionPlans& plans,
                        const AttentionSizes& s, Executor& executor) {
  Scratch& scratch = thread_scratch();
  const Part part = reserve_part(scratch.new_maps, scratch.new_lse, s, s.heads);
  const bool branches = s.branches > 1;
  const ConstTensorView k = branches ? side_by_side(a.k_new, a.pairing, scratch.k) : a.k_new;
  const ConstTensorView v = branches ? side_by_side(a.v_new, a.pairing, scratch.v) : a.v_new;
  for (std::size_t i = 0; i < plans.runs.size(); ++i) {
    const HeadRun& run = plans.runs[i];
    DifferentialAttentionArgs d = local_args(a, {part.maps.slice(1, run.q_begin, run.q_count),
                                                 part.lse.slice(1, run.q_begin, run.q_count)});
    d.q = q.slice(1, run.q_begin, run.q_count);
    d.k = k.slice(1, run.kv_begin, run.kv_count);
    d.v = v.slice(1, run.kv_begin, run.kv_count);
    const AttentionPlan& plan = plans.new_keys[i];
    differential_attention(d, plan, ops::thread_workspace(plan.workspace_bytes), executor);
  }
  return part;
}

/// LSEs by the heads of q. `lse` has those of a pair side by side.
void write_lse(const Args& a, const TensorView& lse) {
  const std::int64_t pairs = lse.shape[1] / 2;
  for (std::int64_t h = 0; h < lse.shape[1]; ++h) {
    const std::int64_t to = a.pairing == HeadPairing::halves ? h % 2 * pairs + h / 2 : h;
    for (std::int64_t t = 0; t < lse.shape[0]; ++t)
      *a.lse.select(0, t).select(0, to).as<float>() = *lse.select(0, t).select(0, h).as<float>();
  }
}

}  // namespace

void dcp_differential_attention(const Args& a, Communicator& comm, Executor* executor,
                                const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  const AttentionCall call = attention_call(a);
  const AttentionSizes s = dcp::check_attention(call, comm);
  check_pairs(a, s);
  ops::check_exact(kOp, kernels.arithmetic);
  const AttentionPlans plans = dcp::plan_attention_steps(call, s, run_on.num_workers(), kernels);

  // Side by side, so that the heads of a rank are consecutive among all.
  const ConstTensorView q = side_by_side(a.q, a.pairing, thread_scratch().q);
  const TensorView all_q = dcp::gather_heads(q, comm, thread_scratch().queries);
  const Part partial = attend_to_context(a, all_q, plans.context, s, run_on);
  const Part context = combine_context(partial, a, s, comm);
  const Part fresh = attend_to_new_keys(a, q, plans, s, run_on);

  MergeAttnStatesArgs m;
  m.out = context.maps;
  m.lse = context.lse;
  m.prefix_out = context.maps;
  m.prefix_lse = context.lse;
  m.suffix_out = fresh.maps;
  m.suffix_lse = fresh.lse;
  merge_attn_states(m, &run_on);
  if (a.lse.defined()) write_lse(a, context.lse);
  differential_combine(
      {.maps = context.maps, .out = a.out, .variant = a.variant, .combine = a.combine}, &run_on,
      kernels.isa);
}

}  // namespace attend
