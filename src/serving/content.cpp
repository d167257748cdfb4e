// SPDX-License-Identifier: Apache-2.0
#include "serving/content.h"

#include <algorithm>

#include "attend/core/error.h"
#include "attend/core/float_types.h"

namespace attend::serving {
namespace {

constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ULL;
// Keep request ids and segment ids apart, which both count from 0, and drafts and encoder tokens
// from either.
constexpr std::uint64_t kRequestDomain = 0x5265717565737400ULL;
constexpr std::uint64_t kSegmentDomain = 0x5365676d656e7400ULL;
constexpr std::uint64_t kDraftDomain = 0x4472616674730000ULL;
constexpr std::uint64_t kEncoderDomain = 0x456e636f64657200ULL;

constexpr int kTableBits = 12;
constexpr std::uint64_t kTableSize = 1ULL << kTableBits;
constexpr double kSqrt3 = 1.7320508075688772;  // uniform in +-sqrt(3) has variance 1

template <typename T>
void fill_from_table(const T* table, std::uint64_t state, int count, T* row) noexcept {
  constexpr std::uint64_t mask = kTableSize - 1;
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    state += kGolden;
    const std::uint64_t bits = mix64(state);
    row[i] = table[bits & mask];
    row[i + 1] = table[(bits >> 16) & mask];
    row[i + 2] = table[(bits >> 32) & mask];
    row[i + 3] = table[(bits >> 48) & mask];
  }
  std::uint64_t bits = mix64(state + kGolden);
  for (; i < count; ++i, bits >>= 16) row[i] = table[bits & mask];
}

}  // namespace

std::uint64_t own_content_id(const Request& request) noexcept {
  return mix64(kRequestDomain + mix64(static_cast<std::uint64_t>(request.id)));
}

std::uint64_t content_id(const Request& request, std::int64_t position) noexcept {
  const auto segment =
      std::upper_bound(request.segments.begin(), request.segments.end(), position,
                       [](std::int64_t p, const ContentSegment& s) { return p < s.end; });
  if (segment == request.segments.end()) return own_content_id(request);
  return mix64(kSegmentDomain + mix64(segment->id));
}

std::uint64_t draft_content_id(const Request& request, std::int64_t first_rejected) noexcept {
  return mix64(kDraftDomain +
               mix64(own_content_id(request) + static_cast<std::uint64_t>(first_rejected)));
}

std::uint64_t encoder_content_id(const Request& request) noexcept {
  return mix64(kEncoderDomain + mix64(own_content_id(request)));
}

std::uint64_t block_hash(std::uint64_t parent, const Request& request, std::int64_t begin,
                         std::int64_t end) noexcept {
  std::uint64_t hash = mix64(parent + kGolden);
  for (std::int64_t p = begin; p < end; ++p) hash = mix64(hash + content_id(request, p));
  return hash;
}

ValueGenerator::ValueGenerator(std::uint64_t seed, DType dtype) : seed_(seed), dtype_(dtype) {
  if (!is_float_compute(dtype)) {
    throw InvalidArgument("value_generator", "dtype", "f32, f16 or bf16", to_string(dtype));
  }
  table32_.resize(kTableSize);
  if (dtype != DType::f32) table16_.resize(kTableSize);
  for (std::size_t i = 0; i < kTableSize; ++i) {
    const double unit = (2.0 * static_cast<double>(i) + 1.0) / kTableSize - 1.0;
    const auto exact = static_cast<float>(unit * kSqrt3);
    if (dtype == DType::f32) {
      table32_[i] = exact;
    } else if (dtype == DType::bf16) {
      table16_[i] = to_bf16(exact).bits;
      table32_[i] = to_f32(bf16{table16_[i]});
    } else {
      table16_[i] = to_f16(exact).bits;
      table32_[i] = to_f32(f16{table16_[i]});
    }
  }
}

std::uint64_t ValueGenerator::row_state(const RowKey& key) const noexcept {
  const std::uint64_t place = (static_cast<std::uint64_t>(key.layer) << 32) |
                              (static_cast<std::uint64_t>(key.head) << 8) |
                              static_cast<std::uint64_t>(key.kind);
  std::uint64_t state = mix64(seed_ + kGolden);
  state = mix64(state ^ key.content);
  state = mix64(state + static_cast<std::uint64_t>(key.position));
  return mix64(state ^ place);
}

void ValueGenerator::fill(const RowKey& key, int count, void* row) const noexcept {
  if (table16_.empty()) {
    fill_from_table(table32_.data(), row_state(key), count, static_cast<float*>(row));
  } else {
    fill_from_table(table16_.data(), row_state(key), count, static_cast<std::uint16_t*>(row));
  }
}

void ValueGenerator::fill_f32(const RowKey& key, int count, float* row) const noexcept {
  fill_from_table(table32_.data(), row_state(key), count, row);
}

}  // namespace attend::serving
