// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "attend/core/float_types.h"
#include "core/check.h"
#include "ops/cache_rows.h"
#include "ops/fp8_encode.h"

namespace attend::cache_rows {
namespace {

// Encoding alone for as long as waking the workers takes.
constexpr std::int64_t kParallelElements = 64 << 10;

void require_scale(check::Where where, const ConstTensorView& scale, std::int64_t heads) {
  check::require(scale.defined(), where, "a scale, which an fp8 cache needs", "none");
  check::tensor(where, scale, scale.rank == 0 ? 0 : 1, {DType::f32});
  check::contiguous(where, scale);
  check::require(
      scale.numel() == 1 || scale.numel() == heads, where,
      [&] { return fmt::format("1 element or {}, one a head", heads); },
      [&] { return describe(scale); });
  for (std::int64_t h = 0; h < scale.numel(); ++h) {
    const float s = scale.as<float>()[h];
    check::require(std::isfinite(s) && s > 0.0F, where, "finite scales above 0",
                   [&] { return fmt::format("{} at index {}", s, h); });
  }
}

// Encodes heads [head_begin, head_end) of every row.
template <typename T, typename Format>
void encode_heads(const Target& target, std::span<const std::int64_t> slots,
                  std::int64_t head_begin, std::int64_t head_end) noexcept {
  const ConstTensorView& rows = target.rows;
  const TensorView& cache = target.cache;
  const std::int64_t scale_stride = target.scale.numel() == 1 ? 0 : target.scale.strides[0];
  for_each_row(slots, cache.shape[1], [&](const Place& place) {
    const T* row = rows.as<T>() + place.row * rows.strides[0];
    auto* slot =
        cache.as<std::uint8_t>() + place.block * cache.strides[0] + place.offset * cache.strides[1];
    for (std::int64_t h = head_begin; h < head_end; ++h) {
      const float s = target.scale.as<float>()[h * scale_stride];
      const T* from = row + h * rows.strides[1];
      std::uint8_t* to = slot + h * cache.strides[2];
      for (std::int64_t d = 0; d < rows.shape[2]; ++d) {
        to[d] = encode_fp8<Format>(to_f32(from[d]) / s);
      }
    }
  });
}

using EncodeHeads = void (*)(const Target&, std::span<const std::int64_t>, std::int64_t,
                             std::int64_t) noexcept;

template <typename Format>
EncodeHeads encoder_from(DType from) noexcept {
  switch (from) {
    case DType::f16:
      return encode_heads<f16, Format>;
    case DType::bf16:
      return encode_heads<bf16, Format>;
    default:
      return encode_heads<float, Format>;
  }
}

void encode(std::span<const Target> targets, std::span<const std::int64_t> slots,
            Executor* executor) {
  std::int64_t elements = 0;
  for (const Target& t : targets)
    elements += static_cast<std::int64_t>(slots.size()) * t.rows.shape[1] * t.rows.shape[2];
  if (elements == 0) return;
  const Target& first = targets.front();
  const EncodeHeads encode_range = first.cache.dtype == DType::fp8_e4m3
                                       ? encoder_from<E4m3Encoding>(first.rows.dtype)
                                       : encoder_from<E5m2Encoding>(first.rows.dtype);
  run(targets.size(), first.rows.shape[1], elements < kParallelElements, executor,
      [&](std::size_t i, std::int64_t head_begin, std::int64_t head_end) {
        encode_range(targets[i], slots, head_begin, head_end);
      });
}

}  // namespace

void require_scales(std::string_view op, const ConstTensorView& k_scale,
                    const ConstTensorView& v_scale, std::int64_t heads) {
  require_scale({op, "k_scale"}, k_scale, heads);
  require_scale({op, "v_scale"}, v_scale, heads);
  check::require(
      v_scale.numel() == k_scale.numel(), {op, "v_scale"},
      [&] { return fmt::format("{} elements like k_scale", k_scale.numel()); },
      [&] { return describe(v_scale); });
}

void write(std::span<const Target> targets, std::span<const std::int64_t> slots,
           Executor* executor) {
  if (is_fp8(targets.front().cache.dtype)) {
    encode(targets, slots, executor);
  } else {
    copy(targets, slots, executor);
  }
}

}  // namespace attend::cache_rows
