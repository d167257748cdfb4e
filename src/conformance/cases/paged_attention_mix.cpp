// SPDX-License-Identifier: Apache-2.0
#include "conformance/paged_int8_case.h"

namespace attend::conformance {

Op op_paged_attention_mix() {
  return {"paged_attention_mix", true, [](Rng& rng) { return make_paged_int8_case(rng, true); }};
}

}  // namespace attend::conformance
