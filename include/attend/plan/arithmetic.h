// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

namespace attend {

/// How queries and keys, and weights and values, are multiplied. Within either mode the bits of a
/// row depend on nothing but the row (docs/numerics.md, "Two arithmetic modes").
enum class Arithmetic : std::uint8_t {
  /// fast where the level in use has fast kernels for the types, else exact. The default.
  automatic,
  /// Products are float32 fused multiply-adds of float32 numbers, weights are float32. On every
  /// level and for all floating-point queries; where the level in use has only fast kernels for the
  /// types, those of the highest level below it that has exact ones run.
  exact,
  /// Products of tiles of bf16 numbers with float32 sums. A weight enters as the sum of two bf16
  /// numbers, off by at most 2^-16 of it. Level amx has it for bf16, fp8 and int8 caches (the
  /// latter with a scale a token and head); elsewhere it is Unsupported.
  fast,
};
std::string_view to_string(Arithmetic arithmetic) noexcept;
/// nullopt unless it is one of the names above.
std::optional<Arithmetic> parse_arithmetic(std::string_view name) noexcept;

}  // namespace attend
