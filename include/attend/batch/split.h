// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "attend/batch/common_metadata.h"

namespace attend {

struct DecodePrefillSplit {
  int num_decodes = 0;
  int num_prefills = 0;
  int num_decode_tokens = 0;
  int num_prefill_tokens = 0;
  friend bool operator==(const DecodePrefillSplit&, const DecodePrefillSplit&) = default;
};

struct SplitOptions {
  int decode_threshold = 1;      ///< longest query (inclusive) that counts as decode; >= 1
  bool require_uniform = false;  ///< decodes must all have the first request's query length (or 0)
  bool treat_short_extends_as_decodes = true;  ///< false: rows with is_prefilling set are prefills
  /// Requests without computed tokens are prefills however short. In the order of reorder_swaps() a
  /// request's side then depends on its own lengths alone.
  bool fresh_prompts_are_prefills = false;
};

/// Splits a batch that is ordered decodes first. Everything from the first prefill on counts as
/// prefill. @throws InvalidArgument if treat_short_extends_as_decodes is false and is_prefilling is
/// empty. Definition: vLLM split_decodes_and_prefills.
DecodePrefillSplit split_decodes_and_prefills(const CommonMetadata& m, const SplitOptions& o = {});

/// What the 4-region reorder looks at, one entry a request.
struct ReorderRequest {
  int num_scheduled_tokens = 0;  ///< query tokens in this step
  int num_computed_tokens = 0;   ///< tokens already in the cache
  int num_prompt_tokens = 0;     ///< length of the prompt
};

/// Swaps that bring a batch into the order decode, short extend, long extend, prefill with as few
/// moves as possible: requests already in their region stay. Apply the pairs in order by swapping
/// rows (first, second). Empty if nothing moves.
/// Definition: vLLM reorder_batch_to_split_decodes_and_prefills.
std::vector<std::pair<int, int>> reorder_swaps(std::span<const ReorderRequest> requests,
                                               int decode_threshold = 1);

}  // namespace attend
