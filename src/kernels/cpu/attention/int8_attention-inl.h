// SPDX-License-Identifier: Apache-2.0
// The kernels for int8 queries and keys. Included as parts-inl.h is, with Dot defined.

#include "kernels/cpu/attention/parts-inl.h"
//
#include "kernels/cpu/attention/int8_gemm-inl.h"
//
#include "kernels/cpu/attention/int8_unit-inl.h"
