// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <string_view>

#include "attend/core/tensor_view.h"

namespace attend::ops {

/// Lengths of requests, [B] or [B, next_n].
struct ContextLens {
  std::span<const std::int32_t> values;
  std::int64_t requests = 0;
  std::int64_t columns = 1;    ///< next_n
  bool of_each_token = false;  ///< [B, next_n]

  std::int64_t last(std::int64_t request) const noexcept {
    return values[static_cast<std::size_t>((request + 1) * columns - 1)];
  }
};
/// @throws InvalidArgument unless i32 of rank 1 or 2, contiguous, each >= 0.
ContextLens checked_context_lens(std::string_view op, const ConstTensorView& context_lens);

/// Writes the rows of get_paged_mqa_logits_metadata(). @pre parts >= 1, 2 * (parts + 1) numbers.
void paged_mqa_logits_schedule(const ContextLens& lens, std::int64_t block_size, std::int64_t parts,
                               std::int32_t* rows);

}  // namespace attend::ops
