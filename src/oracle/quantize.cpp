// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/quantize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "oracle/element.h"

namespace attend::oracle {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Fp8 {
  int mantissa_bits, bias;
  bool ieee;             ///< the largest exponent means infinity and NaN
  std::uint8_t largest;  ///< code of the largest finite value
};

Fp8 describe(DType format) noexcept {
  return format == DType::fp8_e4m3 ? Fp8{3, 7, false, 0x7E} : Fp8{2, 15, true, 0x7B};
}

double magnitude_of(const Fp8& f, int code) noexcept {
  if (code > f.largest) return f.ieee && code == f.largest + 1 ? kInfinity : kNan;
  const int exponent = code >> f.mantissa_bits;
  const int mantissa = code & ((1 << f.mantissa_bits) - 1);
  const double fraction = std::ldexp(mantissa, -f.mantissa_bits);
  return exponent == 0 ? std::ldexp(fraction, 1 - f.bias)
                       : std::ldexp(1.0 + fraction, exponent - f.bias);
}

// The finite magnitudes, ascending.
template <std::size_t kCodes>
std::array<double, kCodes> finite_magnitudes(const Fp8& f) noexcept {
  std::array<double, kCodes> values;
  for (std::size_t i = 0; i < kCodes; ++i) values[i] = magnitude_of(f, static_cast<int>(i));
  return values;
}

std::span<const double> finite_magnitudes(DType format) noexcept {
  static const auto e4m3 = finite_magnitudes<0x7F>(describe(DType::fp8_e4m3));
  static const auto e5m2 = finite_magnitudes<0x7C>(describe(DType::fp8_e5m2));
  return format == DType::fp8_e4m3 ? std::span<const double>(e4m3) : e5m2;
}

double quotient(double x, float scale) noexcept {
  // A float64 quotient of float32 numbers rounds to float32 as the exact one does, unless the
  // result overflows, where it becomes an infinity as well.
  return static_cast<double>(static_cast<float>(x / static_cast<double>(scale)));
}

}  // namespace

double fp8_value(DType format, std::uint8_t code) noexcept {
  const double magnitude = magnitude_of(describe(format), code & 0x7F);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

std::uint8_t fp8_code(DType format, double x, float scale) noexcept {
  const int sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return static_cast<std::uint8_t>(sign | 0x7F);
  const std::span<const double> values = finite_magnitudes(format);
  const double target = std::min(std::abs(quotient(x, scale)), values.back());
  // The first value that is not below, and its neighbour below.
  const auto above = std::lower_bound(values.begin(), values.end(), target);
  auto code = static_cast<int>(above - values.begin());
  if (code > 0) {
    const double up = *above - target, down = target - *(above - 1);
    if (down < up || (down == up && code % 2 != 0)) --code;
  }
  return static_cast<std::uint8_t>(sign | code);
}

float int8_scale(std::span<const double> values) noexcept {
  double amax = 0.0;
  for (const double v : values) {
    if (!std::isfinite(v)) return std::numeric_limits<float>::quiet_NaN();
    amax = std::max(amax, std::abs(v));
  }
  return std::max(static_cast<float>(amax / 127.0), 1e-6F);
}

std::int8_t int8_code(double x, float scale) noexcept {
  if (std::isnan(scale)) return 0;
  const double q = quotient(x, scale);
  if (q >= 127.0) return 127;
  if (q <= -127.0) return -127;
  const double below = std::floor(q);
  const double fraction = q - below;
  const auto low = static_cast<int>(below);
  const bool up = fraction > 0.5 || (fraction == 0.5 && low % 2 != 0);
  return static_cast<std::int8_t>(up ? low + 1 : low);
}

float indexer_key(std::span<const double> key, bool power_of_two,
                  std::span<std::uint8_t> codes) noexcept {
  double amax = static_cast<double>(1e-4F);
  for (const double x : key) {
    if (std::isfinite(x)) amax = std::max(amax, std::abs(x));
  }
  auto scale = static_cast<float>(amax / 448.0);
  if (power_of_two) {
    float power = 0x1p-30F;
    while (power < scale) power *= 2.0F;
    scale = power;
  }
  for (std::size_t i = 0; i < key.size(); ++i) {
    const int sign = std::signbit(key[i]) ? 0x80 : 0;
    codes[i] = std::isfinite(key[i]) ? fp8_code(DType::fp8_e4m3, key[i], scale)
                                     : static_cast<std::uint8_t>(sign | 0x7F);
  }
  return scale;
}

}  // namespace attend::oracle
