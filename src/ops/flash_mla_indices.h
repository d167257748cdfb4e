// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string_view>

#include "attend/ops/flash_mla.h"

namespace attend::ops {

/// flash_mla_with_kvcache with indices, all but the mark of rows without keys.
/// @pre q, k_cache, head_dim_v, softmax_scale, out and lse have been checked.
void flash_mla_with_indices(std::string_view op, const FlashMlaWithKvCacheArgs& args,
                            Executor& executor, const KernelOptions& kernels);

}  // namespace attend::ops
