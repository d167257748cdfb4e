// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string_view>

namespace attend::conformance {

/// SplitMix64: the same numbers from the same seed with every compiler and library.
class Rng {
 public:
  explicit Rng(std::uint64_t seed) : state_(seed) {}
  /// Independent stream for one case of one op.
  Rng(std::uint64_t seed, std::string_view op, int index)
      : state_(seed * 0x9e3779b97f4a7c15ULL + static_cast<std::uint64_t>(index)) {
    for (const char c : op) state_ = next() ^ static_cast<unsigned char>(c);
  }

  std::uint64_t next() {
    state_ += 0x9e3779b97f4a7c15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }
  /// Integer in [low, high].
  std::int64_t range(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(high - low + 1));
  }
  int range(int low, int high) {
    return static_cast<int>(range(std::int64_t{low}, std::int64_t{high}));
  }
  /// In [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  bool chance(double probability) { return uniform() < probability; }
  /// Bell-shaped with mean 0, variance 1 and |x| <= 3.5 (sum of four uniforms).
  double bell() { return (uniform() + uniform() + uniform() + uniform() - 2.0) * std::sqrt(3.0); }
  /// Normal with mean 0 and variance 1, tails included.
  double normal() {
    constexpr double kTau = 6.283185307179586;
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(kTau * uniform());
  }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[next() % values.size()];
  }

 private:
  std::uint64_t state_;
};

}  // namespace attend::conformance
