// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string_view>

#include "attend/dist/communicator.h"
#include "backends/flashmla_sparse/metadata.h"

namespace attend::flashmla_sparse {

/// That the communicator is the rank that the builder was told of, or null if there is but one.
/// @throws InvalidArgument.
void check_group(std::string_view op, const Communicator* communicator, const ContextParallel& dcp);

}  // namespace attend::flashmla_sparse
