// SPDX-License-Identifier: Apache-2.0
// Rows of caches that are bytes, by the layouts in words of attend/cache/fp8_ds_mla.h and
// fp8_ds_v4.h.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "attend/oracle/quantize.h"
#include "oracle/element.h"

namespace attend::oracle {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A float64 product of a code's value and a float32 number is exact.
double bf16_product(double value, float scale) noexcept {
  const auto product = static_cast<double>(static_cast<float>(value * static_cast<double>(scale)));
  if (std::isnan(product)) return kNan;
  const double rounded = round_to(DType::bf16, product);
  return std::abs(rounded) < 0x1p128 ? rounded : std::copysign(kInfinity, product);
}

double largest(std::span<const double> values) noexcept {
  double amax = 0.0;
  for (const double x : values) {
    if (std::isfinite(x)) amax = std::max(amax, std::abs(x));
  }
  return amax;
}

std::uint8_t code_of(double x, float scale) noexcept {
  const int sign = std::signbit(x) ? 0x80 : 0;
  return std::isfinite(x) ? fp8_code(DType::fp8_e4m3, x, scale)
                          : static_cast<std::uint8_t>(sign | 0x7F);
}

// A row of bytes may lie at any address.
void read_rope(const std::uint8_t* from, std::span<double> elements) noexcept {
  std::array<std::uint16_t, 64> bits;
  std::memcpy(bits.data(), from, sizeof bits);
  const ConstTensorView rope(bits.data(), DType::bf16, {64});
  for (std::int64_t i = 0; i < 64; ++i) elements[static_cast<std::size_t>(i)] = element(rope, i);
}

}  // namespace

void fp8_ds_mla_encode(std::span<const double> latent, std::span<const std::uint16_t> rope,
                       std::span<std::uint8_t> row) noexcept {
  for (std::size_t tile = 0; tile < 4; ++tile) {
    const auto values = latent.subspan(128 * tile, 128);
    const float scale = std::max(static_cast<float>(largest(values) / 448.0), 0x1p-126F);
    for (std::size_t i = 0; i < values.size(); ++i) {
      row[128 * tile + i] = code_of(values[i], scale);
    }
    std::memcpy(&row[512 + 4 * tile], &scale, 4);
  }
  std::memcpy(&row[528], rope.data(), 128);
}

void fp8_ds_mla_decode(std::span<const std::uint8_t> row, std::span<double> elements) noexcept {
  std::array<float, 4> scales;
  std::memcpy(scales.data(), &row[512], 16);
  for (std::size_t i = 0; i < 512; ++i) {
    elements[i] = bf16_product(fp8_value(DType::fp8_e4m3, row[i]), scales[i / 128]);
  }
  read_rope(&row[528], elements.subspan(512));
}

void fp8_ds_v4_encode(std::span<const double> latent, std::span<const std::uint16_t> rope,
                      std::span<std::uint8_t> data, std::span<std::uint8_t> scales) noexcept {
  for (std::size_t tile = 0; tile < 7; ++tile) {
    const auto values = latent.subspan(64 * tile, 64);
    // The floor is the float32 number, and so is the quotient.
    const double amax = std::max(largest(values), static_cast<double>(1e-4F));
    const auto least = static_cast<float>(amax / 448.0);
    int exponent = -60;
    while (std::ldexp(1.0F, exponent) < least) ++exponent;
    for (std::size_t i = 0; i < values.size(); ++i)
      data[64 * tile + i] = code_of(values[i], std::ldexp(1.0F, exponent));
    scales[tile] = static_cast<std::uint8_t>(exponent + 127);
  }
  scales[7] = 0;
  std::memcpy(&data[448], rope.data(), 128);
}

void fp8_ds_v4_decode(std::span<const std::uint8_t> data, std::span<const std::uint8_t> scales,
                      std::span<double> elements) noexcept {
  for (std::size_t i = 0; i < 448; ++i) {
    const int stored = scales[i / 64];
    const double scale = stored == 255 ? kNan : std::ldexp(1.0, stored - 127);
    elements[i] = bf16_product(fp8_value(DType::fp8_e4m3, data[i]), static_cast<float>(scale));
  }
  read_rope(&data[448], elements.subspan(448));
}

std::vector<double> coded_row(const ConstTensorView& cache, std::int64_t block,
                              std::int64_t offset) {
  const auto* at = static_cast<const std::uint8_t*>(cache.data) + block * cache.strides[0];
  if (cache.shape[2] == 656) {
    std::vector<double> numbers(576);
    fp8_ds_mla_decode({at + offset * cache.strides[1], 656}, numbers);
    return numbers;
  }
  std::vector<double> numbers(512);
  fp8_ds_v4_decode({at + offset * 576, 576}, {at + cache.shape[1] * 576 + offset * 8, 8}, numbers);
  return numbers;
}

}  // namespace attend::oracle
