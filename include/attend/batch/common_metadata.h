// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/core/tensor_view.h"

namespace attend {

/// Facts about one step's batch that every back end shares. Host memory; owns all but the block
/// table. B = num_reqs, T = num_tokens. Source of the fields: vLLM's CommonAttentionMetadata.
struct CommonMetadata {
  /// [B + 1] prefix sum of query lengths; starts with 0, never decreases, ends with num_tokens.
  std::vector<std::int32_t> query_start_loc;
  /// [B] keys visible per request, *including* this step's tokens; >= query length.
  std::vector<std::int32_t> seq_lens;
  int num_reqs = 0;       ///< B; rows beyond it in the vectors are padding
  int num_tokens = 0;     ///< T; query tokens, padding excluded
  int max_query_len = 0;  ///< upper bound of the query lengths, may be loose
  int max_seq_len = 0;    ///< upper bound of seq_lens, may be loose
  /// i32 [B, max_blocks], logical to physical block; not owned. Undefined for encoders without
  /// cache. Entries beyond a request's last used block may be garbage and are never read.
  ConstTensorView block_table;
  /// [T] or longer: flat slot of each new K/V row, block * block_size + offset; -1 = do not write.
  std::vector<std::int64_t> slot_mapping;
  bool causal = true;  ///< all requests, unless request_causal is given
  /// [B] or empty (= `causal` for all): 1 if that request is causal.
  std::vector<std::uint8_t> request_causal;
  /// [B] or empty: 1 while the request still computes its prompt.
  std::vector<std::uint8_t> is_prefilling;
  /// [T] or empty: absolute position of each query token.
  std::vector<std::int64_t> positions;
  /// [B] or empty: number of encoder tokens, the keys of encoder-decoder attention; other types do
  /// not look at it. 0 = a request without encoder input.
  std::vector<std::int32_t> encoder_seq_lens;
  /// [E]: flat slot, in the cache of the encoder-decoder layers, of each encoder K/V row that this
  /// step brings; -1 = do not write. Empty in steps that bring none. E is independent of T.
  std::vector<std::int64_t> encoder_slot_mapping;
  /// [B] or empty: keys held by this rank under decode context parallelism.
  std::vector<std::int32_t> dcp_local_seq_lens;
  /// Query-token indices whose logits are wanted, or empty (= not known).
  std::vector<std::int32_t> logits_indices;

  int query_len(int request) const noexcept {
    const auto r = static_cast<std::size_t>(request);
    return query_start_loc[r + 1] - query_start_loc[r];
  }
  /// Tokens already in the cache before this step: seq_len - query_len.
  int num_computed_tokens(int request) const noexcept {
    return seq_lens[static_cast<std::size_t>(request)] - query_len(request);
  }
  /// [B + 1] exclusive prefix sum of seq_lens.
  std::vector<std::int32_t> key_start_loc() const;

  /// Checks every invariant stated above. `block_size` <= 0 skips the block-table width check.
  /// @throws InvalidArgument naming the first field that is wrong and the offending index.
  void validate(int block_size = 0) const;

  /// Copy without padding: the first `reqs` requests and `tokens` tokens of every field.
  /// encoder_slot_mapping belongs to the encoder's rows and is copied whole.
  CommonMetadata unpadded(int tokens, int reqs) const;
};

}  // namespace attend
