// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <span>
#include <string>

#include "attend/core/float_types.h"

namespace attend::testing {

/// Generator of test data (splitmix64): the same numbers on every machine, unlike std::
/// distributions. The seed comes from ATTEND_TEST_SEED if that is set. Use
/// SCOPED_TRACE(rng.trace()) so that a failure says how to repeat it.
class Rng {
 public:
  explicit Rng(std::uint64_t default_seed = 1) : seed_(seed_or(default_seed)), state_(seed_) {}

  std::uint64_t seed() const noexcept { return seed_; }
  std::string trace() const {
    return "seed " + std::to_string(seed_) +
           " (repeat with ATTEND_TEST_SEED=" + std::to_string(seed_) + ")";
  }

  std::uint64_t next() noexcept {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  /// Uniform in [low, high], both included.
  std::int64_t integer(std::int64_t low, std::int64_t high) noexcept {
    const auto count = static_cast<std::uint64_t>(high - low) + 1;
    return low + static_cast<std::int64_t>(count == 0 ? next() : next() % count);
  }
  bool chance(double probability) noexcept { return unit() < probability; }
  /// Uniform in [low, high).
  float uniform(float low = -1.0F, float high = 1.0F) noexcept {
    return low + static_cast<float>(unit()) * (high - low);
  }
  /// Mean 0, deviation 1.
  float normal() noexcept {
    constexpr double kTau = 6.283185307179586;
    const double radius = std::sqrt(-2.0 * std::log(1.0 - unit()));
    return static_cast<float>(radius * std::cos(kTau * unit()));
  }
  /// One of the values of a non-empty range.
  template <typename Range>
  auto pick(const Range& values) noexcept {
    return std::data(values)[integer(0, static_cast<std::int64_t>(std::size(values)) - 1)];
  }

  /// Fills with normal values times `scale`, rounded to T (float, f16, bf16, fp8).
  template <typename T>
  void fill_normal(std::span<T> values, float scale = 1.0F) noexcept {
    for (T& v : values) v = from_f32<T>(scale * normal());
  }
  template <typename T>
  void fill_uniform(std::span<T> values, float low = -1.0F, float high = 1.0F) noexcept {
    for (T& v : values) v = from_f32<T>(uniform(low, high));
  }

 private:
  static std::uint64_t seed_or(std::uint64_t fallback) {
    const char* text = std::getenv("ATTEND_TEST_SEED");
    return text == nullptr ? fallback : std::strtoull(text, nullptr, 10);
  }
  double unit() noexcept { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

  std::uint64_t seed_;
  std::uint64_t state_;
};

}  // namespace attend::testing
