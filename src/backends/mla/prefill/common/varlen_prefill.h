// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>

#include "attend/backend/mla_prefill.h"

namespace attend::mla_prefill {

/// An impl over flash_attn_varlen that follows what `backend` says about its platform: padding of V
/// and quantised outputs. @pre `config` is one that `backend` serves; `backend` outlives the impl.
std::unique_ptr<MlaPrefill> make_varlen_prefill(const MlaPrefillBackend& backend,
                                                const MlaPrefillImplConfig& config);

}  // namespace attend::mla_prefill
