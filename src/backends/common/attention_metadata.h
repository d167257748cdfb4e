// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "attend/backend/backend.h"
#include "attend/batch/split.h"
#include "attend/plan/attention_plan.h"

namespace attend {

/// True for the attention types that read only this step's keys and values and have no cache.
constexpr bool is_encoder(AttentionType t) noexcept {
  return t == AttentionType::encoder || t == AttentionType::encoder_only;
}

/// True for cross attention: queries of the decoder over cached keys of the encoder.
constexpr bool is_cross(AttentionType t) noexcept { return t == AttentionType::encoder_decoder; }

/// What an AttentionBuilder makes of one batch. One plan covers the whole mixed batch: a row's bits
/// do not depend on which rows it is planned with, so decodes and prefills need no plan of their
/// own.
struct AttentionMetadata : Metadata {
  /// Shared with the copies that update_block_table() makes for other cache groups.
  std::shared_ptr<const AttentionPlan> plan;
  /// Of captured metadata: what `plan` points into. Null otherwise.
  std::shared_ptr<AotPlan> aot;
  AttentionType attn_type = AttentionType::decoder;
  int num_q_heads = 0, num_kv_heads = 0, head_size = 0;  ///< of the layers
  bool causal = true;      ///< of the batch; single requests may differ, see the plan
  bool all_causal = true;  ///< every request is causal: window_right has no effect
  int window_left = -1;
  int window_right = -1;
  int num_reqs = 0;
  int num_tokens = 0;
  int num_new_keys = 0;  ///< rows of key and value: num_tokens; encoder_decoder: encoder rows
  DecodePrefillSplit split;
  CascadeDecision cascade;      ///< what the plan shares, and why
  int block_size = 0;           ///< 0 for encoders
  ConstTensorView block_table;  ///< i32 [num_reqs, max_blocks], not owned; undefined for encoders
  std::vector<std::int64_t> slot_mapping;  ///< [num_new_keys], or empty: nothing to write

  std::size_t workspace_bytes() const noexcept override { return plan->workspace_bytes; }
  const CascadeDecision* cascade_decision() const noexcept override { return &cascade; }
};

}  // namespace attend
