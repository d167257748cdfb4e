// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/batch/common_metadata.h"

namespace attend {

/// A batch for layers with chunked local attention, with the block table that it points to. May be
/// moved, not copied: a copy would point into the original's table.
struct LocalAttentionBatch {
  CommonMetadata common;  ///< of V virtual requests
  std::vector<std::int32_t>
      block_table;  ///< [V, min(chunk_size / block_size, max_blocks)], a column at least
  std::vector<std::int32_t> request_of;  ///< [V] request that a virtual one is a part of, ascending

  LocalAttentionBatch() = default;
  LocalAttentionBatch(LocalAttentionBatch&&) = default;
  LocalAttentionBatch& operator=(LocalAttentionBatch&&) = default;
  LocalAttentionBatch(const LocalAttentionBatch&) = delete;
  LocalAttentionBatch& operator=(const LocalAttentionBatch&) = delete;
  ~LocalAttentionBatch() = default;
};

/// The batch for layers in which a query at position p sees the keys from the last multiple of
/// `chunk_size` up to p: ordinary causal attention, after each request is cut into one virtual
/// request for every chunk that its new tokens touch.
///
/// A virtual request has the query tokens in its chunk, the chunk's keys up to the request's last
/// one, and the chunk's blocks. Tokens keep their order, so queries, outputs, slot_mapping,
/// positions and logits_indices are those of `m`, whose blocks are also where new keys go.
/// is_prefilling is that of the request, `causal` is true, and padding is gone. A request without
/// query tokens stays as one virtual request without any, which has the keys of its last chunk.
/// Table entries behind a virtual request's last block are -1.
///
/// encoder_seq_lens and encoder_slot_mapping belong to other layers and are dropped.
/// @throws InvalidArgument: `chunk_size` (below 1, no multiple of block_size), `block_size` below
/// 1; fields of `m` that break an invariant of their own; block_table undefined although there are
/// requests; causal or request_causal: a request that is not causal; dcp_local_seq_lens: not empty;
/// query_start_loc: more than 2^31 - 1 virtual requests.
/// Definition: vLLM make_local_attention_virtual_batches.
LocalAttentionBatch make_local_attention_virtual_batches(int chunk_size, int block_size,
                                                         const CommonMetadata& m);

}  // namespace attend
