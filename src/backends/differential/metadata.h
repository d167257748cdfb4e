// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>

#include "backends/common/attention_metadata.h"

namespace attend::differential {

/// No request has computed tokens: whatever a query sees comes with the batch.
bool is_pure_prefill(std::span<const std::int32_t> query_start_loc,
                     std::span<const std::int32_t> seq_lens) noexcept;

/// Index of the first new token that gets no slot, so that its key will not be in the cache; -1 =
/// none.
std::int64_t first_without_slot(std::span<const std::int64_t> slots) noexcept;

/// What the builder makes of one batch.
struct DifferentialMetadata final : AttentionMetadata {
  DifferentialVariant variant = DifferentialVariant::v1;

  bool is_pure_prefill() const noexcept {
    return differential::is_pure_prefill(plan->query_start_loc, plan->seq_lens);
  }
  std::int64_t first_without_slot() const noexcept {
    return differential::first_without_slot(slot_mapping);
  }
};

}  // namespace attend::differential
