// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/backend/mla_prefill.h"
#include "backends/mla/metadata.h"

namespace attend::mla {

/// Places for all that a layer's call keeps between its steps. @pre the rest of `m` is filled in.
WorkspaceLayout lay_out(const MlaMetadata& m, const MlaPrefill& prefill);

}  // namespace attend::mla
