// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "attend/core/tensor_view.h"

namespace attend::flashmla_sparse {

/// What metadata holds for each token, in memory of fixed size.
struct PersistentBuffers {
  std::vector<std::int32_t> request_of_token;   ///< [max_num_batched_tokens]
  std::vector<std::int32_t> visible_of_token;   ///< likewise: tokens up to it, itself too
  std::vector<std::int32_t> held_of_token;      ///< likewise: those that this rank holds
  std::vector<std::int32_t> workspace_request;  ///< likewise: in its step, -1 = reads the cache
  std::vector<std::int32_t> zeros;              ///< likewise
  std::vector<std::int32_t> tile_scheduler_metadata;  ///< [most parts, 8]
  std::vector<std::int32_t> num_splits;               ///< [2]
  std::vector<std::int32_t> cache_lens;               ///< [1]
};

struct PersistentSizes {
  int max_tokens = 0;
  int max_parts = 0;  ///< 0 = no schedule
  int max_model_len = 0;
};

/// Buffers for one batch after the other: the same ones again if nobody holds them any more, so
/// that addresses stay; others if the metadata of an earlier batch is still alive.
class BufferPool {
 public:
  explicit BufferPool(const PersistentSizes& sizes) : sizes_(sizes) {}
  std::shared_ptr<PersistentBuffers> take();

 private:
  PersistentSizes sizes_;
  std::vector<std::shared_ptr<PersistentBuffers>> all_;
};

}  // namespace attend::flashmla_sparse
