// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <bit>
#include <cstdint>

#include "attend/core/float_types.h"

/// bf16 bits of the 128 fp8 codes without a sign, low and high bytes apart: what a byte permutation
/// looks up. Every fp8 value is a bf16 value.
namespace attend::cpu {

struct Fp8Table {
  alignas(64) std::array<std::uint8_t, 128> low, high;
};

/// A format of `mantissa_bits` fraction bits. E4M3 has a NaN instead of infinities.
constexpr Fp8Table make_fp8_table(int mantissa_bits, int bias, bool has_infinity) noexcept {
  Fp8Table table{};
  const int fractions = 1 << mantissa_bits;
  for (int code = 0; code < 128; ++code) {
    int exponent = code / fractions, fraction = code % fractions;
    std::uint32_t bits;
    if (has_infinity ? exponent == 127 / fractions : code == 127) {
      bits = fraction == 0 ? 0x7f80 : 0x7fc0;
    } else if (code == 0) {
      bits = 0;
    } else {
      if (exponent == 0) {  // subnormal: shift the leading one out
        exponent = 1;
        for (; fraction < fractions; fraction *= 2) --exponent;
        fraction -= fractions;
      }
      bits = static_cast<std::uint32_t>(exponent - bias + 127) << 7 |
             static_cast<std::uint32_t>(fraction) << (7 - mantissa_bits);
    }
    const auto i = static_cast<std::size_t>(code);
    table.low[i] = static_cast<std::uint8_t>(bits);
    table.high[i] = static_cast<std::uint8_t>(bits >> 8);
  }
  return table;
}

inline constexpr Fp8Table kE4m3Table = make_fp8_table(3, 7, false);
inline constexpr Fp8Table kE5m2Table = make_fp8_table(2, 15, true);

}  // namespace attend::cpu
