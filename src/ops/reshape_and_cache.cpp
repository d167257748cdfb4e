// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cmath>

#include "attend/core/float_types.h"
#include "attend/ops/cache.h"
#include "core/check.h"
#include "ops/cache_rows.h"
#include "ops/fp8_encode.h"

namespace attend {
namespace {

using cache_rows::Target;

constexpr std::string_view kOp = "reshape_and_cache_flash";

// Encoding alone for as long as waking the workers takes.
constexpr std::int64_t kParallelElements = 64 << 10;

void require_scale(std::string_view name, const ConstTensorView& scale, std::int64_t heads) {
  const check::Where where{kOp, name};
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

void require_scales(const ReshapeAndCacheFlashArgs& a) {
  require_scale("k_scale", a.k_scale, a.key.shape[1]);
  require_scale("v_scale", a.v_scale, a.key.shape[1]);
  check::require(
      a.v_scale.numel() == a.k_scale.numel(), {kOp, "v_scale"},
      [&] { return fmt::format("{} elements like k_scale", a.k_scale.numel()); },
      [&] { return describe(a.v_scale); });
}

std::span<const std::int64_t> validate(const ReshapeAndCacheFlashArgs& a) {
  cache_rows::require_rows(kOp, "key", a.key, {DType::f32, DType::f16, DType::bf16});
  cache_rows::require_rows(kOp, "value", a.value, {DType::f32, DType::f16, DType::bf16});
  check::require(
      a.value.dtype == a.key.dtype, {kOp, "value"},
      [&] { return fmt::format("dtype {} of key", to_string(a.key.dtype)); },
      [&] { return describe(a.value); });
  check::shape({kOp, "value"}, a.value, {a.key.shape[0], a.key.shape[1], -1});
  cache_rows::require_cache(kOp, "key_cache", a.key_cache, a.key,
                            {a.key.dtype, DType::fp8_e4m3, DType::fp8_e5m2});
  cache_rows::require_cache(kOp, "value_cache", a.value_cache, a.value, {a.key_cache.dtype});
  check::shape({kOp, "value_cache"}, a.value_cache,
               {a.key_cache.shape[0], a.key_cache.shape[1], -1, -1});
  const auto slots = cache_rows::require_slots(kOp, a.slot_mapping, a.key.shape[0],
                                               a.key_cache.shape[0] * a.key_cache.shape[1]);
  const bool scaled = is_fp8(a.key_cache.dtype);
  if (scaled) require_scales(a);

  check::no_overlap({kOp, "value_cache"}, a.value_cache, "key_cache", a.key_cache);
  const auto apart_from_inputs = [&](std::string_view name, const TensorView& cache) {
    check::no_overlap({kOp, name}, cache, "key", a.key);
    check::no_overlap({kOp, name}, cache, "value", a.value);
    check::no_overlap({kOp, name}, cache, "slot_mapping", a.slot_mapping);
    if (!scaled) return;
    check::no_overlap({kOp, name}, cache, "k_scale", a.k_scale);
    check::no_overlap({kOp, name}, cache, "v_scale", a.v_scale);
  };
  apart_from_inputs("key_cache", a.key_cache);
  apart_from_inputs("value_cache", a.value_cache);
  return slots;
}

// Encodes heads [head_begin, head_end) of every row.
template <typename T, typename Format>
void encode_heads(const Target& target, const ConstTensorView& scale,
                  std::span<const std::int64_t> slots, std::int64_t head_begin,
                  std::int64_t head_end) noexcept {
  const ConstTensorView& rows = target.rows;
  const TensorView& cache = target.cache;
  cache_rows::for_each_row(slots, cache.shape[1], [&](const cache_rows::Place& place) {
    const T* row = rows.as<T>() + place.row * rows.strides[0];
    auto* slot =
        cache.as<std::uint8_t>() + place.block * cache.strides[0] + place.offset * cache.strides[1];
    for (std::int64_t h = head_begin; h < head_end; ++h) {
      const float s = scale.as<float>()[scale.numel() == 1 ? 0 : h];
      const T* from = row + h * rows.strides[1];
      std::uint8_t* to = slot + h * cache.strides[2];
      for (std::int64_t d = 0; d < rows.shape[2]; ++d) {
        to[d] = encode_fp8<Format>(to_f32(from[d]) / s);
      }
    }
  });
}

using EncodeHeads = void (*)(const Target&, const ConstTensorView&, std::span<const std::int64_t>,
                             std::int64_t, std::int64_t) noexcept;

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

void encode(std::span<const Target> targets, const ReshapeAndCacheFlashArgs& a,
            std::span<const std::int64_t> slots, Executor* executor) {
  const std::int64_t heads = a.key.shape[1];
  const std::int64_t elements =
      static_cast<std::int64_t>(slots.size()) * heads * (a.key.shape[2] + a.value.shape[2]);
  if (elements == 0) return;
  const EncodeHeads encode_range = a.key_cache.dtype == DType::fp8_e4m3
                                       ? encoder_from<E4m3Encoding>(a.key.dtype)
                                       : encoder_from<E5m2Encoding>(a.key.dtype);
  const std::array<ConstTensorView, 2> scales = {a.k_scale, a.v_scale};
  cache_rows::run(targets.size(), heads, elements < kParallelElements, executor,
                  [&](std::size_t i, std::int64_t head_begin, std::int64_t head_end) {
                    encode_range(targets[i], scales[i], slots, head_begin, head_end);
                  });
}

}  // namespace

void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& a, Executor* executor) {
  const auto slots = validate(a);
  const std::array<Target, 2> targets = {{{a.key, a.key_cache}, {a.value, a.value_cache}}};
  if (is_fp8(a.key_cache.dtype)) {
    encode(targets, a, slots, executor);
  } else {
    cache_rows::copy(targets, slots, executor);
  }
}

}  // namespace attend
