// SPDX-License-Identifier: Apache-2.0
#include "conformance/int8_cache_case.h"

namespace attend::conformance {

Op op_reshape_and_cache_flash_int8() {
  return {"reshape_and_cache_flash_int8", false,
          [](Rng& rng) { return make_int8_cache_case(rng, false); }};
}

}  // namespace attend::conformance
