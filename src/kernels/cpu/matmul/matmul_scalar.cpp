// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attend/core/float_types.h"
#include "kernels/cpu/exp2_poly.h"
#include "kernels/cpu/inline.h"
#include "kernels/cpu/matmul/matmul.h"

namespace attend::cpu::scalar {
namespace {
#include "kernels/cpu/simd_scalar-inl.h"
//
#include "kernels/cpu/matmul/matmul-inl.h"
}  // namespace

extern constinit const MatmulKernel kMatmulKernel = make_matmul_entry(IsaLevel::scalar);
}  // namespace attend::cpu::scalar
