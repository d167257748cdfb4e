// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"
#include "conformance/sparse_layer_case.h"

namespace attend::conformance {

Op op_sparse_layer() {
  return {"sparse_layer", false, [](Rng& rng) { return make_sparse_layer_case(rng, true); }, true};
}

}  // namespace attend::conformance
