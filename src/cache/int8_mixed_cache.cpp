// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/int8_mixed_cache.h"

#include "core/check.h"

namespace attend {
namespace {

void require_cache(std::string_view op, const TensorView& cache) {
  const check::Where where{op, "cache"};
  check::tensor(where, cache, 5, {DType::i8});
  check::shape(where, cache, {3, -1, -1, -1, -1});
  check::contiguous(where, cache);
}

TensorView blocks_at(void* data, DType dtype, const TensorView& cache) {
  return {data, dtype, {cache.shape[1], cache.shape[2], cache.shape[3], cache.shape[4]}};
}

}  // namespace

std::vector<std::int64_t> int8_mixed_cache_shape(const KvCacheSpec& spec) {
  constexpr std::string_view kOp = "int8_mixed_cache_shape";
  spec.validate();
  check::require(spec.dtype == DType::i8, {kOp, "spec.dtype"}, "i8",
                 [&] { return std::string(to_string(spec.dtype)); });
  check::require(spec.num_layers == 0, {kOp, "spec.num_layers"}, "0, no layers dimension",
                 spec.num_layers);
  return {3, spec.num_blocks, spec.num_kv_heads, spec.block_size, spec.head_size};
}

TensorView int8_mixed_key_view(const TensorView& cache) {
  require_cache("int8_mixed_key_view", cache);
  return blocks_at(cache.data, DType::i8, cache);
}

TensorView int8_mixed_value_view(const TensorView& cache, DType dtype) {
  constexpr std::string_view kOp = "int8_mixed_value_view";
  require_cache(kOp, cache);
  check::require(dtype == DType::f16 || dtype == DType::bf16, {kOp, "dtype"}, "f16 or bf16",
                 [&] { return std::string(to_string(dtype)); });
  const TensorView values = blocks_at(cache.select(0, 1).data, dtype, cache);
  check::require(reinterpret_cast<std::uintptr_t>(values.data) % size_of(dtype) == 0,
                 {kOp, "cache"}, "planes 1 and 2 at an even address",
                 [&] { return fmt::format("plane 1 of {} at {}", describe(cache), values.data); });
  return values;
}

}  // namespace attend
