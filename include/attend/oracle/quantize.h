// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "attend/core/dtype.h"
#include "attend/core/tensor_view.h"

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

/// A row of the MLA cache format fp8_ds_mla: 512 latent values as e4m3 codes, for each 128 of them
/// a float32 scale max(amax / 448, FLT_MIN), amax their largest finite magnitude, then the 64 bf16
/// numbers whose bits are `rope`. Codes are fp8_code(), those of infinities the NaN code with their
/// sign. @pre 512 and 64 elements; 656 bytes of row.
void fp8_ds_mla_encode(std::span<const double> latent, std::span<const std::uint16_t> rope,
                       std::span<std::uint8_t> row) noexcept;

/// The 576 numbers that such a row means, whatever its scales are: latent = code * scale, rounded
/// to float32 and then to bf16; a positive NaN where that is none. @pre 656 bytes; 576 elements.
void fp8_ds_mla_decode(std::span<const std::uint8_t> row, std::span<double> elements) noexcept;

/// A token of the MLA cache format fp8_ds_v4: in `data` 448 values as e4m3 codes and then the 64
/// bf16 numbers whose bits are `rope`; in `scales` for each 64 of the values the exponent, plus
/// 127, of max(amax, 1e-4) / 448 rounded up to a power of two, and a 0. amax and the codes of what
/// is not finite are as above. @pre 448 and 64 elements; 576 and 8 bytes.
void fp8_ds_v4_encode(std::span<const double> latent, std::span<const std::uint16_t> rope,
                      std::span<std::uint8_t> data, std::span<std::uint8_t> scales) noexcept;

/// The 512 numbers that such a token means, whatever its scales are, as above; the scale of byte
/// 255 is NaN. @pre 576 and 8 bytes; 512 elements.
void fp8_ds_v4_decode(std::span<const std::uint8_t> data, std::span<const std::uint8_t> scales,
                      std::span<double> elements) noexcept;

/// The numbers of a token of a cache of bytes, u8 [num_blocks, block_size, 656 or 584], of
/// whichever of the two formats its rows are.
std::vector<double> coded_row(const ConstTensorView& cache, std::int64_t block,
                              std::int64_t offset);

/// A key of the indexer: its scale max(amax, 1e-4) / 448 in float32, where amax is the largest
/// finite magnitude, rounded up to a power of two if so asked. The codes are fp8_code(), those of
/// infinities the NaN code with their sign. @pre as many codes as elements.
float indexer_key(std::span<const double> key, bool power_of_two,
                  std::span<std::uint8_t> codes) noexcept;

}  // namespace attend::oracle
