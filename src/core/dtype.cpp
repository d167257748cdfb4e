// SPDX-License-Identifier: Apache-2.0
#include "attend/core/dtype.h"

#include <array>
#include <utility>

namespace attend {

std::string_view to_string(DType t) noexcept {
  switch (t) {
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    case DType::fp8_e4m3:
      return "fp8_e4m3";
    case DType::fp8_e5m2:
      return "fp8_e5m2";
    case DType::i8:
      return "i8";
    case DType::u8:
      return "u8";
    case DType::i32:
      return "i32";
    case DType::i64:
      return "i64";
  }
  return "invalid dtype";
}

std::optional<DType> parse_dtype(std::string_view name) noexcept {
  static constexpr std::array<std::pair<std::string_view, DType>, 24> kNames{{
      {"f32", DType::f32},
      {"float32", DType::f32},
      {"float", DType::f32},
      {"fp32", DType::f32},
      {"f16", DType::f16},
      {"float16", DType::f16},
      {"half", DType::f16},
      {"fp16", DType::f16},
      {"bf16", DType::bf16},
      {"bfloat16", DType::bf16},
      {"fp8_e4m3", DType::fp8_e4m3},
      {"fp8", DType::fp8_e4m3},
      {"float8_e4m3fn", DType::fp8_e4m3},
      {"fp8_e5m2", DType::fp8_e5m2},
      {"float8_e5m2", DType::fp8_e5m2},
      {"i8", DType::i8},
      {"int8", DType::i8},
      {"u8", DType::u8},
      {"uint8", DType::u8},
      {"i32", DType::i32},
      {"int32", DType::i32},
      {"int", DType::i32},
      {"i64", DType::i64},
      {"int64", DType::i64},
  }};
  for (const auto& [text, type] : kNames) {
    if (text == name) return type;
  }
  return std::nullopt;
}

}  // namespace attend
