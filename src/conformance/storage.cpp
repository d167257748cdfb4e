// SPDX-License-Identifier: Apache-2.0
#include "conformance/storage.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

#include "attend/core/float_types.h"
#include "attend/oracle/quantize.h"

namespace attend::conformance {
namespace {

constexpr std::size_t kGuardBytes = 256;
constexpr std::byte kPoison{0xff};

}  // namespace

Storage::Storage(Rng& rng, DType dtype, std::vector<std::int64_t> shape, const Layout& layout) {
  view_ = TensorView(nullptr, dtype, shape);
  std::vector<int> order = layout.order;
  if (order.empty()) {
    order.resize(shape.size());
    std::iota(order.begin(), order.end(), 0);
  }
  std::int64_t stride = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    if (dim != order.rbegin() && layout.padded) stride += rng.range(0, 9);
    if (*dim == order.front()) stride += layout.outer_gap;
    view_.strides[static_cast<std::size_t>(*dim)] = stride;
    stride *= std::max<std::int64_t>(1, shape[static_cast<std::size_t>(*dim)]);
  }
  begin_ = kGuardBytes;
  if (layout.padded) begin_ += size_of(dtype) * static_cast<std::size_t>(rng.range(0, 15));
  bytes_.assign(begin_ + static_cast<std::size_t>(stride) * size_of(dtype) + kGuardBytes, kPoison);
  view_.data = bytes_.data() + begin_;
}

std::int64_t Storage::offset(std::initializer_list<std::int64_t> index) const noexcept {
  std::int64_t offset = 0;
  std::size_t dim = 0;
  for (const std::int64_t i : index) offset += i * view_.strides[dim++];
  return offset;
}

double Storage::get(std::int64_t offset) const noexcept {
  const std::byte* at = &bytes_[byte_of(offset)];
  if (view_.dtype == DType::f32) {
    float x;
    std::memcpy(&x, at, sizeof x);
    return x;
  }
  if (view_.dtype == DType::i8) return static_cast<std::int8_t>(*at);
  if (is_fp8(view_.dtype)) return oracle::fp8_value(view_.dtype, static_cast<std::uint8_t>(*at));
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return view_.dtype == DType::f16 ? to_f32(f16{bits}) : to_f32(bf16{bits});
}

void Storage::set(std::int64_t offset, double value) noexcept {
  std::byte* at = &bytes_[byte_of(offset)];
  const auto x = static_cast<float>(value);
  if (view_.dtype == DType::f32) {
    std::memcpy(at, &x, sizeof x);
    return;
  }
  if (view_.dtype == DType::i8) {
    *at = static_cast<std::byte>(
        static_cast<std::int8_t>(std::nearbyint(std::clamp(x, -127.0F, 127.0F))));
    return;
  }
  if (is_fp8(view_.dtype)) {
    *at = static_cast<std::byte>(oracle::fp8_code(view_.dtype, x, 1.0F));
    return;
  }
  const std::uint16_t bits = view_.dtype == DType::f16 ? to_f16(x).bits : to_bf16(x).bits;
  std::memcpy(at, &bits, sizeof bits);
}

void Storage::set_random(Rng& rng, std::int64_t offset, std::int64_t n, double magnitude) {
  for (std::int64_t i = 0; i < n; ++i) set(offset + i, magnitude * rng.bell());
}

void Storage::set_random(Rng& rng, double magnitude) {
  for (const std::int64_t offset : offsets()) set(offset, magnitude * rng.bell());
}

std::vector<std::int64_t> Storage::offsets() const {
  std::vector<std::int64_t> result{0};
  for (int dim = 0; dim < view_.rank; ++dim) {
    const auto d = static_cast<std::size_t>(dim);
    std::vector<std::int64_t> next;
    next.reserve(result.size() * static_cast<std::size_t>(view_.shape[d]));
    for (const std::int64_t base : result) {
      for (std::int64_t i = 0; i < view_.shape[d]; ++i) next.push_back(base + i * view_.strides[d]);
    }
    result = std::move(next);
  }
  return result;
}

void Storage::reset() {
  std::copy(before_.begin(), before_.end(), bytes_.begin());
  expected_ = before_;
}

void Storage::accept(std::int64_t offset) noexcept {
  std::memcpy(&expected_[byte_of(offset)], &bytes_[byte_of(offset)], size_of(view_.dtype));
}

void Storage::expect_value(std::int64_t offset, double value) {
  const double now = get(offset);
  set(offset, value);
  accept(offset);
  set(offset, now);
}

void Storage::expect_copy(std::int64_t offset, const Storage& from,
                          std::int64_t from_offset) noexcept {
  std::memcpy(&expected_[byte_of(offset)], &from.bytes_[from.byte_of(from_offset)],
              size_of(view_.dtype));
}

void Storage::expect_copy_within(std::int64_t offset, std::int64_t from_offset) noexcept {
  std::memcpy(&expected_[byte_of(offset)], &expected_[byte_of(from_offset)], size_of(view_.dtype));
}

void Storage::expect_bits(std::int64_t offset, std::uint64_t bits) noexcept {
  for (std::size_t i = 0; i < size_of(view_.dtype); ++i) {
    expected_[byte_of(offset) + i] = static_cast<std::byte>(bits >> (8 * i) & 0xFFU);
  }
}

void Storage::expect_f32(std::int64_t offset, float value) noexcept {
  expect_bits(offset, std::bit_cast<std::uint32_t>(value));
}

void Storage::set_random_bits(Rng& rng) {
  for (const std::int64_t offset : offsets()) {
    const std::uint64_t bits = rng.next();
    std::memcpy(&bytes_[byte_of(offset)], &bits, size_of(view_.dtype));
  }
}

std::string Storage::damage() const {
  const auto [now, expected] = std::mismatch(bytes_.begin(), bytes_.end(), expected_.begin());
  if (now == bytes_.end()) return {};
  const std::ptrdiff_t byte = now - bytes_.begin() - static_cast<std::ptrdiff_t>(begin_);
  return fmt::format("byte {} from the first element ({}) is {:#04x}, expected {:#04x}", byte,
                     describe(view_), static_cast<int>(*now), static_cast<int>(*expected));
}

Storage int_storage(Rng& rng, std::span<const std::int32_t> values) {
  Storage s(rng, DType::i32, {static_cast<std::int64_t>(values.size())});
  std::ranges::copy(values, s.view().as<std::int32_t>());
  return s;
}

}  // namespace attend::conformance
