// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "attend/batch/common_metadata.h"

namespace attend {

/// What make_slot_mapping() may do besides.
struct SlotMappingOptions {
  /// Window of the layers in tokens, >= 1; none = all tokens get slots. Where no request of the
  /// batch has computed tokens, the prompt's queries need no cache, and later ones see no more than
  /// the last `window` tokens: those before get no slot, so that their blocks may be missing.
  /// Leave it out for fp8 caches, which queries read in the step that writes them, too.
  std::optional<int> sliding_window = std::nullopt;
  /// Entries of the result: those of tokens, then -1, as a captured graph needs. 0 = num_tokens.
  int padded_tokens = 0;
};

/// CommonMetadata::slot_mapping from its block table: where each of the num_tokens new keys goes.
/// All -1 if the block table is undefined (profiling, encoders without cache). Entries of blocks
/// that get no new key are not read. `m.slot_mapping` itself is ignored.
/// @throws InvalidArgument: block_size below 1; sliding_window below 1; padded_tokens neither 0 nor
/// at least num_tokens; fields of `m` that break an invariant; block_table: a negative entry where
/// a key goes.
/// Definition: vLLM's compute_slot_mapping and compute_slot_mapping_start_idx.
std::vector<std::int64_t> make_slot_mapping(const CommonMetadata& m, int block_size,
                                            const SlotMappingOptions& options = {});

}  // namespace attend
