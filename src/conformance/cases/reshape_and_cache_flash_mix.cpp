// SPDX-License-Identifier: Apache-2.0
#include "conformance/int8_cache_case.h"

namespace attend::conformance {

Op op_reshape_and_cache_flash_mix() {
  return {"reshape_and_cache_flash_mix", false,
          [](Rng& rng) { return make_int8_cache_case(rng, true); }};
}

}  // namespace attend::conformance
