// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "attend/dist/decode_context_parallel.h"
#include "attend/plan/attention_plan.h"

namespace attend::dcp {

/// Most heads of a rank: far beyond any model, and safe to multiply.
inline constexpr std::int64_t kMaxHeads = 1 << 15;

/// What attention over several ranks is checked and planned from, plain or differential.
struct AttentionCall {
  const char* op = "dcp_attention";
  DcpAttentionArgs args;  ///< caches of two branches have a dimension for them in front
  int maps = 1;           ///< query heads that stay together: 2 are a pair
  int branches = 1;       ///< kv heads that they read, one from each branch of the caches
};

/// Sizes of a call.
struct AttentionSizes {
  int ranks = 1, rank = 0;
  std::int64_t tokens = 0, heads = 0, kv_heads = 0, dim = 0, dim_v = 0;
  int maps = 1, branches = 1;

  std::int64_t all_heads() const noexcept { return heads * ranks; }
};

/// Query heads [q_begin, q_begin + q_count) of this rank, which share the kv heads
/// [kv_begin, kv_begin + kv_count) evenly.
struct HeadRun {
  std::int64_t q_begin = 0, q_count = 0, kv_begin = 0, kv_count = 0;
};

/// What step 2 and step 4 run, made before anything is sent.
struct AttentionPlans {
  AttentionPlan context;                ///< all heads, this rank's part of the context
  std::vector<HeadRun> runs;            ///< of this rank's heads over the new keys
  std::vector<AttentionPlan> new_keys;  ///< one a run
};

/// @throws Unsupported with all reasons, if the parameters need what no rank has.
void check_supported(std::string_view op, const AttentionParams& params);

/// Checks dtypes, shapes, strides and overlap of every tensor. @throws InvalidArgument,
/// Unsupported.
AttentionSizes check_attention(const AttentionCall& call, const Communicator& communicator);

/// Plans, and checks lengths and the block table by them, and that there are such kernels.
/// @throws InvalidArgument, Unsupported.
AttentionPlans plan_attention_steps(const AttentionCall& call, const AttentionSizes& sizes,
                                    int num_workers, const KernelOptions& kernels);

}  // namespace attend::dcp
