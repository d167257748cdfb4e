// SPDX-License-Identifier: Apache-2.0
#include <cstddef>

#include "attend/dist/decode_context_parallel.h"
#include "attend/ops/merge.h"
#include "dist/dcp/attention_checks.h"
#include "dist/dcp/combine_parts.h"
#include "dist/dcp/gather_heads.h"
#include "dist/dcp/reserve.h"
#include "ops/attention_problem.h"

namespace attend {
namespace {

using dcp::AttentionPlans;
using dcp::AttentionSizes;
using dcp::HeadRun;
using dcp::reserve;

/// A partial result of the call.
struct Part {
  TensorView out, lse;
};

/// Intermediate results of one call; a thread reuses the memory.
struct Scratch {
  dcp::HeadBuffers queries;
  Buffer partial_out, partial_lse, context_out, context_lse, new_out, new_lse;
};
Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Part reserve_part(Buffer& out, Buffer& lse, const AttentionSizes& s, DType dtype,
                  std::int64_t heads) {
  return {reserve(out, dtype, {s.tokens, heads, s.dim_v}),
          reserve(lse, DType::f32, {s.tokens, heads})};
}

AttentionParams params_without_mask(const AttentionParams& params) {
  AttentionParams p = params;
  p.causal = false;  // each request's flag is in the plan
  return p;
}

/// Step 2: all heads over this rank's part of the context.
Part attend_to_context(const DcpAttentionArgs& a, const TensorView& all_q,
                       const AttentionPlan& plan, const AttentionSizes& s, Executor& executor) {
  Scratch& scratch = thread_scratch();
  const Part part =
      reserve_part(scratch.partial_out, scratch.partial_lse, s, a.q.dtype, s.all_heads());
  if (s.tokens == 0) return part;  // a block table of no rows may be null, which means ragged keys
  FlashAttnVarlenArgs f;
  f.q = all_q;
  f.k = a.k_cache;
  f.v = a.v_cache;
  f.out = part.out;
  f.lse = part.lse;
  f.block_table = a.block_table;
  f.params = params_without_mask(a.params);
  flash_attn_varlen(f, plan, ops::thread_workspace(plan.workspace_bytes), executor);
  return part;
}

/// Step 3: this rank's heads over the whole context.
Part combine_context(const Part& partial, const DcpAttentionArgs& a, const AttentionSizes& s,
                     Communicator& comm) {
  Scratch& scratch = thread_scratch();
  const Part whole = reserve_part(scratch.context_out, scratch.context_lse, s, a.q.dtype, s.heads);
  DcpCombineArgs c;
  c.out = partial.out;
  c.lse = partial.lse;
  c.combined = whole.out;
  c.combined_lse = whole.lse;
  dcp::combine_parts(c, a.combine, comm);
  return whole;
}

/// Step 4: this rank's heads over the new keys.
Part attend_to_new_keys(const DcpAttentionArgs& a, const AttentionPlans& plans,
                        const AttentionSizes& s, Executor& executor) {
  Scratch& scratch = thread_scratch();
  const Part part = reserve_part(scratch.new_out, scratch.new_lse, s, a.q.dtype, s.heads);
  for (std::size_t i = 0; i < plans.runs.size(); ++i) {
    const HeadRun& run = plans.runs[i];
    FlashAttnVarlenArgs f;
    f.q = a.q.slice(1, run.q_begin, run.q_count);
    f.k = a.k_new.slice(1, run.kv_begin, run.kv_count);
    f.v = a.v_new.slice(1, run.kv_begin, run.kv_count);
    f.out = part.out.slice(1, run.q_begin, run.q_count);
    f.lse = part.lse.slice(1, run.q_begin, run.q_count);
    f.params = params_without_mask(a.params);
    const AttentionPlan& plan = plans.new_keys[i];
    flash_attn_varlen(f, plan, ops::thread_workspace(plan.workspace_bytes), executor);
  }
  return part;
}

}  // namespace

void dcp_attention(const DcpAttentionArgs& a, Communicator& comm, Executor* executor,
                   const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  const dcp::AttentionCall call{.args = a};
  const AttentionSizes s = dcp::check_attention(call, comm);
  const AttentionPlans plans = dcp::plan_attention_steps(call, s, run_on.num_workers(), kernels);

  // Step 1.
  const TensorView all_q = dcp::gather_heads(a.q, comm, thread_scratch().queries);
  const Part partial = attend_to_context(a, all_q, plans.context, s, run_on);
  const Part context = combine_context(partial, a, s, comm);
  const Part fresh = attend_to_new_keys(a, plans, s, run_on);

  MergeAttnStatesArgs m;
  m.out = a.out;
  m.lse = a.lse;
  m.prefix_out = context.out;
  m.prefix_lse = context.lse;
  m.suffix_out = fresh.out;
  m.suffix_lse = fresh.lse;
  merge_attn_states(m, &run_on);
}

}  // namespace attend
