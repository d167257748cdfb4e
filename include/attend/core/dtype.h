// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace attend {

/// Element types that a tensor view can carry.
enum class DType : std::uint8_t { f32, f16, bf16, fp8_e4m3, fp8_e5m2, i8, u8, i32, i64 };
constexpr bool is_fp8(DType t) noexcept { return t == DType::fp8_e4m3 || t == DType::fp8_e5m2; }

/// Bytes of one element.
constexpr std::size_t size_of(DType t) noexcept {
  switch (t) {
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    default:
      return 1;
  }
}

/// Name as printed in errors and accepted on the command line, e.g. "bf16".
std::string_view to_string(DType t) noexcept;

/// Parses a name. Accepts our names and the field's ("bfloat16", "float16", "half", "float32",
/// "fp8" = fp8_e4m3, "int8"); nullopt if unknown.
std::optional<DType> parse_dtype(std::string_view name) noexcept;

/// True for f32, f16 and bf16: what queries, keys, values and outputs may be.
constexpr bool is_float_compute(DType t) noexcept {
  return t == DType::f32 || t == DType::f16 || t == DType::bf16;
}

}  // namespace attend
