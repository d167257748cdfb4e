// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string_view>
#include <vector>

#include "attend/ops/attention.h"
#include "kernels/cpu/attention/attention.h"

/// Lengths of ops that attend to ragged or paged keys.
namespace attend::ops {

/// As FlashAttnVarlenArgs has them.
struct Lengths {
  ConstTensorView query_start_loc, cu_seqlens_kv, seq_lens, block_table;
};

/// Checks how they go together and puts them into `in`; `storage` keeps what they are counted out
/// of. `op` ends with a null character.
void plan_lengths(std::string_view op, const Lengths& lengths, AttentionPlanInput& in,
                  std::vector<std::int32_t>& storage);

/// Mask, workers and kernels of a call that plans for itself.
void plan_options(const AttentionParams& params, int num_workers, const KernelOptions& kernels,
                  AttentionPlanInput& in);

/// cu_seqlens_kv against the plan's lengths and the rows of k that there are.
void check_ragged(std::string_view op, const ConstTensorView& cu_seqlens_kv, std::int64_t rows,
                  const AttentionPlan& plan);

/// Strides of a cache [blocks, tokens, Hkv, ..], or of ragged rows [S, Hkv, ..].
cpu::KvStrides kv_strides(const ConstTensorView& t, bool paged);

}  // namespace attend::ops
