// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"
#include "conformance/sparse_layer_case.h"

namespace attend::conformance {

Op op_backend_flashmla_sparse() {
  return {backend_op_name("FLASHMLA_SPARSE"), false,
          [](Rng& rng) { return make_sparse_layer_case(rng, false); }, true};
}

}  // namespace attend::conformance
