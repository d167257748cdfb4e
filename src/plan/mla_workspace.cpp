// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/mla_workspace.h"

#include <algorithm>

#include "attend/plan/attention_plan.h"

namespace attend {

std::int64_t mla_workspace_tokens(std::int64_t max_model_len, int max_num_seqs,
                                  int block_size) noexcept {
  // Limited first, so that no product overflows.
  const std::int64_t lengths = 8 * std::min(max_model_len, kMlaMostWorkspaceTokens);
  const std::int64_t batch = 4 * std::min(std::int64_t{max_num_seqs}, kMlaMostWorkspaceTokens) *
                             std::min<std::int64_t>(block_size, kMlaMostWorkspaceTokens);
  const std::int64_t tokens = std::max<std::int64_t>(
      std::min(std::max(lengths, batch), kMlaMostWorkspaceTokens), block_size);
  return (tokens + kPieceSize - 1) / kPieceSize * kPieceSize;
}

}  // namespace attend
