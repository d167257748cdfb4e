// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "attend/dist/mla.h"
#include "attend/ops/mla.h"
#include "core/check.h"
#include "dist/dcp/attention_checks.h"
#include "dist/dcp/combine_parts.h"
#include "dist/dcp/gather_heads.h"
#include "dist/dcp/layout.h"
#include "dist/dcp/request_checks.h"
#include "dist/dcp/reserve.h"
#include "ops/attention_problem.h"

namespace attend {
namespace {

using dcp::RankBlocks;
using dcp::reserve;

constexpr std::string_view kOp = "dcp_mla_decode";

/// Lengths of the requests, checked.
struct Lengths {
  std::span<const std::int32_t> starts, seq_lens;

  std::size_t requests() const noexcept { return seq_lens.size(); }
  std::int64_t query_len(std::size_t r) const noexcept {
    return std::int64_t{starts[r + 1]} - starts[r];
  }
};

/// Consecutive tokens of one request that see the same rows of this rank. To mla_decode each is a
/// request without a mask: how many rows a token sees here does not grow by one per token.
struct Runs {
  std::vector<std::int32_t> starts{0};   ///< [runs + 1], query tokens
  std::vector<std::int32_t> local_lens;  ///< rows that they see
  std::vector<std::int64_t> requests;    ///< whose they are
  std::int64_t columns = 0;              ///< blocks of the longest

  std::int64_t count() const noexcept { return static_cast<std::int64_t>(requests.size()); }
};

/// Intermediate results of one call; a thread reuses the memory.
struct Scratch {
  dcp::HeadBuffers queries;
  Buffer table, out, lse;
};
Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

RankBlocks rank_blocks(const DcpMlaDecodeArgs& a, const Communicator& comm) {
  return {a.kv_cache, a.block_table, {comm.size(), a.interleave}, comm.rank()};
}

/// This rank's arguments in the terms of mla_decode.
MlaDecodeArgs local_args(const DcpMlaDecodeArgs& a) {
  MlaDecodeArgs m;
  m.q = a.q;
  m.kv_cache = a.kv_cache;
  m.block_table = a.block_table;
  m.query_start_loc = a.query_start_loc;
  m.seq_lens = a.seq_lens;
  m.out = a.out;
  m.lse = a.lse;
  m.kv_scale = a.kv_scale;
  m.params = a.params;
  return m;
}

Lengths checked_lengths(const DcpMlaDecodeArgs& a) {
  Lengths lengths;
  lengths.starts = check::i32_array({kOp, "query_start_loc"}, a.query_start_loc, -1);
  dcp::check_starts(kOp, lengths.starts, a.q.shape[0]);
  lengths.seq_lens = check::i32_array({kOp, "seq_lens"}, a.seq_lens,
                                      static_cast<std::int64_t>(lengths.starts.size()) - 1);
  for (std::size_t r = 0; r < lengths.requests(); ++r) {
    check::require(
        lengths.seq_lens[r] >= lengths.query_len(r), {kOp, "seq_lens"},
        [&] {
          return fmt::format("at least {}, the query tokens, at index {}", lengths.query_len(r), r);
        },
        lengths.seq_lens[r]);
  }
  return lengths;
}

Lengths check_args(const DcpMlaDecodeArgs& a, const Communicator& comm) {
  ops::check_mla_decode(kOp, local_args(a));
  check::require(
      a.q.shape[1] <= dcp::kMaxHeads, {kOp, "q"},
      [] { return fmt::format("at most {} heads", dcp::kMaxHeads); }, a.q.shape[1]);
  dcp::check_supported(kOp, a.params);
  ops::check_params(kOp, a.params, 0, a.q.shape[1]);
  const Lengths lengths = checked_lengths(a);
  const RankBlocks blocks = rank_blocks(a, comm);
  dcp::check_blocks(kOp, "kv_cache", blocks, static_cast<std::int64_t>(lengths.requests()));
  for (std::size_t r = 0; r < lengths.requests(); ++r) {
    if (lengths.query_len(r) == 0) continue;
    dcp::check_positions(kOp, blocks, {static_cast<std::int64_t>(r), 0, lengths.seq_lens[r]});
  }
  return lengths;
}

Runs split_into_runs(const DcpMlaDecodeArgs& a, const Lengths& lengths, const RankBlocks& blocks) {
  Runs runs;
  for (std::size_t r = 0; r < lengths.requests(); ++r) {
    const std::int64_t context = lengths.seq_lens[r] - lengths.query_len(r);
    for (std::int64_t t = 0; t < lengths.query_len(r); ++t) {
      const std::int64_t visible = a.params.causal ? context + t + 1 : lengths.seq_lens[r];
      const auto local =
          static_cast<std::int32_t>(dcp::local_count(visible, blocks.rank, blocks.layout));
      if (t > 0 && local == runs.local_lens.back()) {
        ++runs.starts.back();
        continue;
      }
      runs.starts.push_back(runs.starts.back() + 1);
      runs.local_lens.push_back(local);
      runs.requests.push_back(static_cast<std::int64_t>(r));
      runs.columns =
          std::max(runs.columns, (local + blocks.block_size() - 1) / blocks.block_size());
    }
  }
  return runs;
}

AttentionPlan plan_runs(const DcpMlaDecodeArgs& a, const Runs& runs, std::int64_t all_heads,
                        int num_workers, const KernelOptions& kernels) {
  AttentionPlanInput in;
  in.op = kOp.data();
  in.query_start_loc = runs.starts;
  in.seq_lens = runs.local_lens;
  in.num_q_heads = static_cast<int>(all_heads);
  in.num_kv_heads = 1;
  in.head_dim_qk = static_cast<int>(a.q.shape[2]);
  in.head_dim_v = static_cast<int>(a.out.shape[2]);
  in.causal = false;
  in.num_workers = num_workers;
  in.isa = kernels.isa;
  in.arithmetic = kernels.arithmetic;
  const AttentionPlan plan = plan_mla_decode(in);
  ops::check_arithmetic(kOp, plan, a.q.dtype, a.kv_cache.dtype, a.kv_cache.dtype);
  return plan;
}

/// A row of the block table for each run. What its rows do not need is left as it is.
TensorView table_of_runs(const DcpMlaDecodeArgs& a, const Runs& runs) {
  const TensorView table =
      reserve(thread_scratch().table, DType::i32, {runs.count(), runs.columns});
  const std::int64_t block_size = a.kv_cache.shape[1];
  for (std::size_t i = 0; i < runs.requests.size(); ++i) {
    const auto* from =
        a.block_table.as<std::int32_t>() + runs.requests[i] * a.block_table.strides[0];
    std::copy_n(from, (runs.local_lens[i] + block_size - 1) / block_size,
                table.as<std::int32_t>() + static_cast<std::int64_t>(i) * runs.columns);
  }
  return table;
}

}  // namespace

void dcp_mla_decode(const DcpMlaDecodeArgs& a, Communicator& comm, Executor* executor,
                    const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  const Lengths lengths = check_args(a, comm);
  const Runs runs = split_into_runs(a, lengths, rank_blocks(a, comm));
  const std::int64_t tokens = a.q.shape[0], all_heads = comm.size() * a.q.shape[1];
  const AttentionPlan plan = plan_runs(a, runs, all_heads, run_on.num_workers(), kernels);

  Scratch& scratch = thread_scratch();
  MlaDecodeArgs m = local_args(a);
  m.q = dcp::gather_heads(a.q, comm, scratch.queries);
  m.block_table = table_of_runs(a, runs);
  m.query_start_loc = m.seq_lens = {};  // the plan has them
  m.out = reserve(scratch.out, a.out.dtype, {tokens, all_heads, a.out.shape[2]});
  m.lse = reserve(scratch.lse, DType::f32, {tokens, all_heads});
  m.params.causal = false;  // each run ends where its queries stop seeing
  mla_decode(m, plan, ops::thread_workspace(plan.workspace_bytes), run_on);

  DcpCombineArgs c;
  c.out = m.out;
  c.lse = m.lse;
  c.combined = a.out;
  c.combined_lse = a.lse;
  dcp::combine_parts(c, a.combine, comm);
}

}  // namespace attend
