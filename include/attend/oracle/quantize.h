// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>

#include "attend/core/dtype.h"

/// Reference of the codes that caches store: by the definition of each format and by search, not by
/// bit manipulation.
namespace attend::oracle {

/// Value of a code of fp8_e4m3 or fp8_e5m2 (sign, exponent, mantissa; infinity and NaN where the
/// format has them). @pre `format` is one of the two.
double fp8_value(DType format, std::uint8_t code) noexcept;

/// Code of x / scale, the quotient rounded to float32 and then to the nearest finite value of the
/// format, ties to the even code; beyond the largest finite value that value. NaN gives 0x7f with
/// the sign of x. @pre scale is finite and > 0.
std::uint8_t fp8_code(DType format, double x, float scale) noexcept;

/// max(amax / 127, 1e-6) in float32, where amax is the largest magnitude of `values`; NaN if one of
/// them is not finite. 1e-6 without values.
float int8_scale(std::span<const double> values) noexcept;

/// Code of x / scale, the quotient rounded to float32 and then to the nearest integer, ties to
/// even, clamped to [-127, 127]. 0 if the scale is NaN. @pre x is no NaN, scale > 0, unless scale
/// is NaN.
std::int8_t int8_code(double x, float scale) noexcept;

}  // namespace attend::oracle
