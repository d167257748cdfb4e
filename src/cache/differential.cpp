// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/differential.h"

#include "core/check.h"

namespace attend {

std::vector<std::int64_t> differential_cache_shape(const KvCacheSpec& spec) {
  constexpr std::string_view kOp = "differential_cache_shape";
  spec.validate();
  check::require(spec.format == KvFormat::plain, {kOp, "format"},
                 "plain, the one format that is kept in branches", to_string(spec.format));
  check::require(spec.num_kv_heads % 2 == 0, {kOp, "num_kv_heads"},
                 "an even number, of which one half is in each branch", spec.num_kv_heads);
  check::require(spec.block_size % 16 == 0, {kOp, "block_size"}, "a multiple of 16",
                 spec.block_size);
  std::vector<std::int64_t> shape = {
      2, 2, spec.num_blocks, spec.block_size, spec.num_kv_heads / 2, spec.head_size};
  if (spec.num_layers > 0) shape.insert(shape.begin(), spec.num_layers);
  return shape;
}

std::vector<int> differential_stride_order(KvLayout layout, bool include_layers) {
  if (include_layers)
    return layout == KvLayout::nhd ? std::vector{3, 0, 1, 2, 4, 5, 6}
                                   : std::vector{3, 5, 0, 1, 2, 4, 6};
  return layout == KvLayout::nhd ? std::vector{0, 1, 2, 3, 4, 5} : std::vector{0, 1, 2, 4, 3, 5};
}

}  // namespace attend
