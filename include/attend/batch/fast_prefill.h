// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/batch/common_metadata.h"

namespace attend {

/// The batch for layers behind the last one that owns a KV cache: they need only the rows whose
/// logits are wanted (`m.logits_indices`), because nobody reads keys or values of theirs.
///
/// A batch with max_query_len <= 1 has nothing to leave out and comes back as it is. Otherwise each
/// request keeps its tokens of logits_indices: query_start_loc counts them, seq_lens, block_table
/// and is_prefilling stay, positions are those of the kept tokens, logits_indices is 0 .. kept - 1,
/// `causal` is true, both slot mappings are empty (such layers write nothing) and padding is gone.
/// A request without a wanted logit keeps a query of length 0. Row i of the new batch is token
/// m.logits_indices[i] of the old one.
///
/// The kept tokens of a request must be its last ones: a query's position follows from its distance
/// to the end of the keys, so leaving out a later token would move the earlier ones.
/// @throws InvalidArgument if `m` breaks an invariant of its own; logits_indices: empty (not known)
/// although there are tokens, not ascending, or not the last tokens of a request; causal or
/// request_causal: a request that is not causal (its kept tokens would lose the keys behind them).
/// Definition: vLLM make_kv_sharing_fast_prefill_common_attn_metadata.
CommonMetadata make_kv_sharing_fast_prefill_metadata(const CommonMetadata& m);

}  // namespace attend
