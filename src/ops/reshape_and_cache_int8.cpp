// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "attend/ops/int8_cache.h"
#include "core/check.h"
#include "ops/cache_rows.h"
#include "ops/int8_encode.h"
#include "ops/int8_rows.h"

namespace attend {
namespace {

using cache_rows::Target;

// Quantising alone for as long as waking the workers takes.
constexpr std::int64_t kParallelElements = 64 << 10;

// [.., H] as [.., H, 1]: scales are rows of one element.
template <typename View>
View as_rows(View scales) noexcept {
  scales.shape[scales.rank] = 1;
  scales.strides[scales.rank] = 1;
  ++scales.rank;
  return scales;
}

void require_scale_cache(std::string_view op, std::string_view name, const TensorView& scales,
                         std::initializer_list<std::int64_t> shape) {
  check::tensor({op, name}, scales, 3, {DType::f32});
  check::shape({op, name}, scales, shape);
  check::distinct_elements({op, name}, scales);
}

struct Named {
  std::string_view name;
  ConstTensorView tensor;
};

// Every written tensor lies apart from the others and from what is read.
void require_apart(std::string_view op, std::span<const Named> written,
                   std::span<const Named> read) {
  for (std::size_t i = 0; i < written.size(); ++i) {
    const check::Where where{op, written[i].name};
    for (std::size_t k = 0; k < i; ++k) {
      check::no_overlap(where, written[i].tensor, written[k].name, written[k].tensor);
    }
    for (const Named& r : read) check::no_overlap(where, written[i].tensor, r.name, r.tensor);
  }
}

void write_codes(std::string_view op, const ReshapeAndCacheInt8Args& a, bool int8_values,
                 Executor* executor) {
  const ops::Int8Rows rows = ops::check_int8_rows({.op = op}, a, int8_values);
  cache_rows::copy(rows.targets, rows.slots, executor);
}

constexpr std::string_view kPerTokenHead = "reshape_and_cache_int8_per_token_head";

std::span<const std::int64_t> validate(const ReshapeAndCachePerTokenHeadArgs& a) {
  constexpr std::string_view kOp = kPerTokenHead;
  cache_rows::require_rows(kOp, "key", a.key, {DType::f32, DType::f16, DType::bf16});
  cache_rows::require_rows(kOp, "value", a.value, {a.key.dtype});
  const std::int64_t heads = a.key.shape[1];
  check::shape({kOp, "value"}, a.value, {a.key.shape[0], heads, -1});
  cache_rows::require_cache(kOp, "key_cache", a.key_cache, a.key, {DType::i8});
  cache_rows::require_cache(kOp, "value_cache", a.value_cache, a.value, {DType::i8});
  const std::int64_t blocks = a.key_cache.shape[0];
  const std::int64_t block_size = a.key_cache.shape[1];
  check::shape({kOp, "value_cache"}, a.value_cache, {blocks, block_size, -1, -1});
  require_scale_cache(kOp, "key_scale_cache", a.key_scale_cache, {blocks, block_size, heads});
  require_scale_cache(kOp, "value_scale_cache", a.value_scale_cache, {blocks, block_size, heads});
  const auto slots =
      cache_rows::require_slots(kOp, a.slot_mapping, a.key.shape[0], blocks * block_size);
  require_apart(kOp,
                std::array{Named{"key_cache", a.key_cache}, Named{"value_cache", a.value_cache},
                           Named{"key_scale_cache", a.key_scale_cache},
                           Named{"value_scale_cache", a.value_scale_cache}},
                std::array{Named{"key", a.key}, Named{"value", a.value},
                           Named{"slot_mapping", a.slot_mapping}});
  return slots;
}

// Quantises heads [head_begin, head_end) of every row.
template <typename T>
void quantize_heads(const Target& target, const TensorView& scales,
                    std::span<const std::int64_t> slots, std::int64_t head_begin,
                    std::int64_t head_end) noexcept {
  const ConstTensorView& rows = target.rows;
  const TensorView& cache = target.cache;
  cache_rows::for_each_row(slots, cache.shape[1], [&](const cache_rows::Place& place) {
    const T* row = rows.as<T>() + place.row * rows.strides[0];
    auto* codes =
        cache.as<std::int8_t>() + place.block * cache.strides[0] + place.offset * cache.strides[1];
    auto* scale =
        scales.as<float>() + place.block * scales.strides[0] + place.offset * scales.strides[1];
    for (std::int64_t h = head_begin; h < head_end; ++h) {
      scale[h * scales.strides[2]] =
          int8::encode_row(row + h * rows.strides[1], rows.shape[2], codes + h * cache.strides[2]);
    }
  });
}

}  // namespace

ops::Int8Rows ops::check_int8_rows(const Int8RowNames& names, const ReshapeAndCacheInt8Args& a,
                                   bool int8_values) {
  const std::string_view op = names.op;
  cache_rows::require_rows(op, names.key, a.key, {DType::i8});
  if (int8_values) {
    cache_rows::require_rows(op, names.value, a.value, {DType::i8});
  } else {
    cache_rows::require_rows(op, names.value, a.value, {DType::f16, DType::bf16});
  }
  const std::int64_t rows = a.key.shape[0];
  const std::int64_t heads = a.key.shape[1];
  check::shape({op, names.value}, a.value, {rows, heads, -1});
  check::tensor({op, names.k_scale}, a.k_scale, 2, {DType::f32});
  check::shape({op, names.k_scale}, a.k_scale, {rows, heads});

  check::tensor({op, "key_cache"}, a.key_cache, 4, {DType::i8});
  check::shape({op, "key_cache"}, a.key_cache, {-1, heads, -1, a.key.shape[2]});
  const std::int64_t blocks = a.key_cache.shape[0];
  const std::int64_t block_size = a.key_cache.shape[2];
  check::tensor({op, "value_cache"}, a.value_cache, 4, {a.value.dtype});
  check::shape({op, "value_cache"}, a.value_cache, {blocks, heads, block_size, a.value.shape[2]});
  for (const Named& c : {Named{"key_cache", a.key_cache}, Named{"value_cache", a.value_cache}}) {
    check::unit_last_stride({op, c.name}, c.tensor);
    check::distinct_elements({op, c.name}, c.tensor);
  }
  require_scale_cache(op, "key_scale_cache", a.key_scale_cache, {blocks, heads, block_size});
  const auto slots = cache_rows::require_slots(op, a.slot_mapping, rows, blocks * block_size);
  require_apart(op,
                std::array{Named{"key_cache", a.key_cache}, Named{"value_cache", a.value_cache},
                           Named{"key_scale_cache", a.key_scale_cache}},
                std::array{Named{names.key, a.key}, Named{names.value, a.value},
                           Named{names.k_scale, a.k_scale}, Named{"slot_mapping", a.slot_mapping}});
  return {{{{a.key, a.key_cache.permute({0, 2, 1, 3})},
            {a.value, a.value_cache.permute({0, 2, 1, 3})},
            {as_rows(a.k_scale), as_rows(a.key_scale_cache.permute({0, 2, 1}))}}},
          slots};
}

void reshape_and_cache_flash_int8(const ReshapeAndCacheInt8Args& a, Executor* executor) {
  write_codes("reshape_and_cache_flash_int8", a, true, executor);
}

void reshape_and_cache_flash_mix(const ReshapeAndCacheInt8Args& a, Executor* executor) {
  write_codes("reshape_and_cache_flash_mix", a, false, executor);
}

void reshape_and_cache_int8_per_token_head(const ReshapeAndCachePerTokenHeadArgs& a,
                                           Executor* executor) {
  const auto slots = validate(a);
  const std::array<Target, 2> targets = {{{a.key, a.key_cache}, {a.value, a.value_cache}}};
  const std::array<TensorView, 2> scales = {a.key_scale_cache, a.value_scale_cache};
  const std::int64_t heads = a.key.shape[1];
  const std::int64_t elements =
      static_cast<std::int64_t>(slots.size()) * heads * (a.key.shape[2] + a.value.shape[2]);
  int8::with_type(a.key.dtype, [&]<typename T>(T) {
    cache_rows::run(targets.size(), heads, elements < kParallelElements, executor,
                    [&](std::size_t i, std::int64_t head_begin, std::int64_t head_end) {
                      quantize_heads<T>(targets[i], scales[i], slots, head_begin, head_end);
                    });
  });
}

}  // namespace attend
