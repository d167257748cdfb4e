// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "attend/core/tensor_view.h"

namespace attend {

/// Order of tokens and heads inside a block: nhd = [block_size, num_kv_heads, head_size],
/// hnd = [num_kv_heads, block_size, head_size].
enum class KvLayout : std::uint8_t { nhd, hnd };
std::string_view to_string(KvLayout layout) noexcept;
/// "NHD"/"nhd"/"HND"/"hnd"; nullopt otherwise.
std::optional<KvLayout> parse_kv_layout(std::string_view name) noexcept;

/// Shape of one layer's cache, or of all layers' if num_layers > 0.
struct KvCacheSpec {
  std::int64_t num_blocks = 0;  ///< >= 1
  int block_size = 16;          ///< tokens per block, >= 1
  int num_kv_heads = 0;         ///< >= 1
  int head_size = 0;            ///< elements, >= 1
  DType dtype = DType::bf16;
  int num_layers = 0;  ///< 0 = no layers dimension

  /// @throws InvalidArgument for a field out of range or a size over 2^62 bytes.
  void validate() const;
};

/// FLASH_ATTN's logical shape: [2, num_blocks, block_size, num_kv_heads, head_size], K then V,
/// with num_layers in front if the spec has it.
std::vector<std::int64_t> flash_attn_cache_shape(const KvCacheSpec& spec);

/// FLASH_ATTN's permutation: physical dimension i is logical dimension order[i]. With layers the
/// blocks are outermost (NHD) or block, head (HND), so that one block of all layers moves as one.
std::vector<int> flash_attn_stride_order(KvLayout layout, bool include_layers);

/// Bytes of a cache with that shape.
std::int64_t cache_bytes(std::span<const std::int64_t> shape, DType dtype) noexcept;

/// View with the logical shape over memory laid out physically by `order`.
/// @pre `order` is a permutation of shape's dimensions; data holds cache_bytes().
TensorView cache_view(void* data, DType dtype, std::span<const std::int64_t> logical_shape,
                      std::span<const int> order);

}  // namespace attend
