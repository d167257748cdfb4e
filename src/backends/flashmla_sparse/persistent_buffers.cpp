// SPDX-License-Identifier: Apache-2.0
#include "backends/flashmla_sparse/persistent_buffers.h"

#include <algorithm>

namespace attend::flashmla_sparse {

std::shared_ptr<PersistentBuffers> BufferPool::take() {
  for (const auto& buffers : all_) {
    if (buffers.use_count() > 1) continue;
    // Zeros, as vLLM has them: a captured graph reads entries behind those of the batch.
    std::ranges::fill(buffers->request_of_token, 0);
    std::ranges::fill(buffers->visible_of_token, 0);
    std::ranges::fill(buffers->held_of_token, 0);
    std::ranges::fill(buffers->workspace_request, -1);
    return buffers;
  }
  auto made = std::make_shared<PersistentBuffers>();
  const auto tokens = static_cast<std::size_t>(sizes_.max_tokens);
  made->request_of_token.resize(tokens);
  made->visible_of_token.resize(tokens);
  made->held_of_token.resize(tokens);
  made->workspace_request.resize(tokens, -1);
  made->zeros.resize(tokens);
  made->tile_scheduler_metadata.resize(static_cast<std::size_t>(sizes_.max_parts) * 8);
  made->num_splits.resize(2);
  made->cache_lens.assign(1, sizes_.max_model_len);
  all_.push_back(made);
  return made;
}

}  // namespace attend::flashmla_sparse
