// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "attend/plan/attention_plan.h"
#include "conformance/attention_shape.h"
#include "conformance/random_blocks.h"

/// Requests whose block tables begin alike.
namespace attend::conformance {

/// A shape like random_shape's with a few queries a request and keys for at least two pieces.
AttentionShape random_shared_shape(Rng& rng);

/// Ranges of requests with prefixes of whole blocks that fit their keys, some inside of others.
std::vector<SharedPrefix> random_shared_prefixes(Rng& rng, const AttentionShape& shape,
                                                 int block_size);

/// Keys at the start of each request that its table needs no block for. The first request of a
/// range has the blocks that any other one of the range reads.
std::vector<std::int32_t> hidden_keys(const AttentionShape& shape,
                                      std::span<const SharedPrefix> prefixes);

/// Puts the first request's blocks into the tables of those that share its prefix, but for the
/// blocks that they never read.
void share_blocks(RandomBlocks& blocks, const AttentionShape& shape,
                  std::span<const SharedPrefix> prefixes);

}  // namespace attend::conformance
