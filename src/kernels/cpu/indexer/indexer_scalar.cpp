// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attend/core/float_types.h"
#include "kernels/cpu/exp2_poly.h"
#include "kernels/cpu/indexer/indexer.h"
#include "kernels/cpu/inline.h"

namespace attend::cpu::scalar {
namespace {
#include "kernels/cpu/simd_scalar-inl.h"
//
#include "kernels/cpu/indexer/finish-inl.h"
//
#include "kernels/cpu/indexer/indexer-inl.h"
}  // namespace

extern constinit const IndexerKernel kIndexerKernel = make_indexer_entry(IsaLevel::scalar);
}  // namespace attend::cpu::scalar
