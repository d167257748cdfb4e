// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "kernels/cpu/indexer/indexer.h"

namespace attend::cpu {

#define ATTEND_INDEXER_KERNEL(ns)            \
  namespace ns {                             \
  extern const IndexerKernel kIndexerKernel; \
  }
#include "kernels/cpu/indexer/kernels.inc"
#undef ATTEND_INDEXER_KERNEL

namespace {

#define ATTEND_INDEXER_KERNEL(ns) &ns::kIndexerKernel,
constexpr std::array kKernels = {
#include "kernels/cpu/indexer/kernels.inc"
};
#undef ATTEND_INDEXER_KERNEL

}  // namespace

const IndexerKernel& indexer_kernel(IsaLevel level) noexcept {
  for (const IndexerKernel* kernel : kKernels)
    if (kernel->isa <= level) return *kernel;
  return *kKernels.back();
}

}  // namespace attend::cpu
