// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/top_k/collect.h"

namespace attend::cpu {

CollectFn collect_of([[maybe_unused]] IsaLevel level) noexcept {
#if defined(__x86_64__)
  if (level >= IsaLevel::avx512) return &avx512::collect;
  if (level >= IsaLevel::avx2) return &avx2::collect;
#endif
  return &scalar::collect;
}

}  // namespace attend::cpu
