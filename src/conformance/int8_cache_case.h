// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>

#include "conformance/check.h"

namespace attend::conformance {

/// A random problem of reshape_and_cache_flash_int8, or with `mixed` of
/// reshape_and_cache_flash_mix.
std::unique_ptr<Case> make_int8_cache_case(Rng& rng, bool mixed);

}  // namespace attend::conformance
