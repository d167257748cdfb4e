// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/oracle/indexer.h"
#include "conformance/comparison.h"
#include "conformance/rng.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// Codes and scale of a key or query, as random ones may be.
struct RandomCodes {
  double magnitude = 1.0;   ///< of the codes' values
  double nan_chance = 0.0;  ///< that one of them is NaN
};

/// Writes 128 e4m3 codes.
void set_codes(Rng& rng, const RandomCodes& kind, void* to);
/// A scale of a key: a power of two or any number, seldom 0 or below.
float random_scale(Rng& rng);

/// Weights of heads, positive and negative ones.
Storage random_weights(Rng& rng, std::int64_t rows, std::int64_t heads, const Layout& layout);

/// Compares logits with the oracle's; what a row does not see is -infinity if `clean`, else as it
/// was. A NaN must be the positive quiet one. @pre got.reset() before the op.
void compare_logits(Outcome& outcome, Storage& got, const oracle::IndexerLogits& expected,
                    bool clean);

}  // namespace attend::conformance
