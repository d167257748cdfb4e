// SPDX-License-Identifier: Apache-2.0
#include "highest_isa.inc"
#include "kernels/cpu/top_k/collect.h"

namespace attend::cpu {

CollectFn collect_of([[maybe_unused]] IsaLevel level) noexcept {
#if ATTEND_HIGHEST_ISA >= 2
  if (level >= IsaLevel::avx512) return &avx512::collect;
#endif
#if ATTEND_HIGHEST_ISA >= 1
  if (level >= IsaLevel::avx2) return &avx2::collect;
#endif
  return &scalar::collect;
}

}  // namespace attend::cpu
