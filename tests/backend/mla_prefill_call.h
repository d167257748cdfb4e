// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "attend/backend/mla_prefill.h"
#include "attend/core/executor.h"
#include "support/host_tensor.h"
#include "support/scale.h"

namespace attend::testing {

struct PrefillOptions {
  std::string backend = "FLASH_ATTN";
  std::string platform = "cpu";
  DType dtype = DType::bf16;
  MlaDims dims = {512, 128, 64, 128};
  int num_heads = 2;
  std::optional<float> scale = std::nullopt;
  std::vector<std::int32_t> query_lens = {1, 40, testing::scaled(300, 60)};
  std::vector<std::int32_t> key_lens = {1, 40, testing::scaled(300, 60)};
  bool causal = true;  ///< a call over new tokens; false = over a chunk of context
  bool quant_output = false;
  int num_workers = 2;
};

/// Tensors of one prefill call. NaN stands behind the keys, in the workspace, and in the outputs,
/// of which only every row's first V columns may be written.
class PrefillCall {
 public:
  explicit PrefillCall(const PrefillOptions& options);

  NewTokensArgs new_tokens() const;
  ContextChunkArgs context_chunk() const;
  /// Runs the one that `options` describe.
  void run() const;
  /// The same problem for the op and its oracle; `out` and `lse` are this call's.
  FlashAttnVarlenArgs op_args() const;
  bool gaps_are_untouched() const;

  PrefillOptions options;
  std::unique_ptr<Executor> executor;
  std::unique_ptr<MlaPrefill> impl;
  AttentionPlan plan;
  HostTensor q, k, v, wide_out, lse, query_start_loc, cu_seqlens_kv;
  TensorView out;  ///< first V columns of wide_out
  Buffer workspace;
};

}  // namespace attend::testing
