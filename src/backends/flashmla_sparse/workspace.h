// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "backends/flashmla_sparse/metadata.h"

namespace attend::flashmla_sparse {

/// Places for all that a layer's call keeps. @pre the rest of `m` is filled in.
WorkspaceLayout lay_out(const SparseMlaMetadata& m);

}  // namespace attend::flashmla_sparse
