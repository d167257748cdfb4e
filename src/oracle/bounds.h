// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/dtype.h"
#include "attend/oracle/attention.h"

namespace attend::oracle {

inline constexpr double kUnit = 0x1p-24;             ///< unit roundoff of float32
inline constexpr double kExp2Error = 0x1p-21;        ///< relative error of the kernels' exp2
inline constexpr double kSmallestWeight = 0x1p-126;  ///< below it the kernels' exp2 is 0
inline constexpr double kSplitError = 0x1p-16;       ///< relative error of a weight as two bf16
inline constexpr double kTanhError = 0x1p-21;        ///< absolute error of the kernels' tanh

/// First-order propagation counts each error once; the factor covers the higher orders.
inline constexpr double kSafety = 2.0;

/// Relative error of a float32 softmax weight before normalisation.
double weight_error(const RowResult& r, int head_dim_qk);

/// Relative error of adding the weights, or of adding weight times value.
double sum_error(const RowResult& r);

/// Error of out[d] before it is rounded to the output's dtype.
double computed_error(const RowResult& r, int d, int head_dim_qk);

/// Error of rounding a value of that magnitude to `dtype`, to nearest.
double rounding_error(DType dtype, double magnitude);

}  // namespace attend::oracle
