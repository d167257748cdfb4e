// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>

#include "conformance/check.h"

namespace attend::conformance {

/// A random problem of paged_attention_int8, or of paged_attention_mix if `mixed`.
std::unique_ptr<Case> make_paged_int8_case(Rng& rng, bool mixed);

}  // namespace attend::conformance
