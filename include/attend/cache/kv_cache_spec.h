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

/// How a cache stores keys and values. The elements of int8 formats are int8 codes, and their f32
/// scales lie in a cache of their own, flash_attn_scale_shape().
/// - int8_level1: int8 keys with a scale a (token, head), int8 values with given scales a (head,
///   element); queries are quantised too.
/// - int8_level2: int8 keys likewise, 16-bit values in the two planes of int8_mixed_cache.h.
/// - int8_per_token_head: int8 keys and values, both with a scale a (token, head); queries are not
///   quantised.
/// - fp8_ds_mla: rows of 656 bytes for multi-head latent attention, scales included; see
///   fp8_ds_mla.h.
enum class KvFormat : std::uint8_t {
  plain,
  int8_level1,
  int8_level2,
  int8_per_token_head,
  fp8_ds_mla
};
std::string_view to_string(KvFormat format) noexcept;
/// nullopt unless it is one of the names above.
std::optional<KvFormat> parse_kv_format(std::string_view name) noexcept;
/// int8_level1 or int8_level2: queries and keys are multiplied as integers.
constexpr bool is_int8_level(KvFormat f) noexcept {
  return f == KvFormat::int8_level1 || f == KvFormat::int8_level2;
}
/// int8 codes with scales in a cache of their own.
constexpr bool is_int8(KvFormat f) noexcept {
  return is_int8_level(f) || f == KvFormat::int8_per_token_head;
}
/// Element type of a cache of that format: `plain` for a plain one, else i8 codes or the bytes (u8)
/// of fp8_ds_mla.
constexpr DType stored_dtype(KvFormat f, DType plain) noexcept {
  return f == KvFormat::plain ? plain : is_int8(f) ? DType::i8 : DType::u8;
}

/// Shape of one layer's cache, or of all layers' if num_layers > 0.
struct KvCacheSpec {
  std::int64_t num_blocks = 0;  ///< >= 1
  int block_size = 16;          ///< tokens per block, >= 1
  int num_kv_heads = 0;         ///< >= 1; 1 for fp8_ds_mla
  int head_size = 0;            ///< elements, >= 1; 576 for fp8_ds_mla
  DType dtype = DType::bf16;    ///< stored_dtype() of the format
  int num_layers = 0;           ///< 0 = no layers dimension
  KvFormat format = KvFormat::plain;

  /// @throws InvalidArgument for a field out of range or a size over 2^62 bytes.
  void validate() const;
};

/// FLASH_ATTN's logical shape: [2, num_blocks, block_size, num_kv_heads, head_size], K then V,
/// with num_layers in front if the spec has it. int8_level1: [2, num_blocks, num_kv_heads,
/// block_size, head_size]; int8_level2: 3 planes of that. @throws InvalidArgument for fp8_ds_mla,
/// and where spec.validate() does.
std::vector<std::int64_t> flash_attn_cache_shape(const KvCacheSpec& spec);

/// FLASH_ATTN's permutation: physical dimension i is logical dimension order[i]. With layers the
/// blocks are outermost (NHD) or block, head (HND), so that one block of all layers moves as one.
/// Caches of the int8 levels have one order, that of their shape: `layout` has no effect on them,
/// and the layers are outermost. @throws InvalidArgument for fp8_ds_mla.
std::vector<int> flash_attn_stride_order(KvLayout layout, bool include_layers,
                                         KvFormat format = KvFormat::plain);

/// Shape of the f32 cache of scales, contiguous, zeroed before use: empty for plain caches;
/// [num_blocks, num_kv_heads, block_size] of the int8 levels; [2, num_blocks, block_size,
/// num_kv_heads], keys then values, of int8_per_token_head. num_layers in front if the spec has it.
/// @throws InvalidArgument as flash_attn_cache_shape().
std::vector<std::int64_t> flash_attn_scale_shape(const KvCacheSpec& spec);

/// Shape of a cache for multi-head latent attention, with num_layers in front if the spec has it:
/// [num_blocks, block_size, head_size], where head_size is the latent and the rope part; u8
/// [num_blocks, block_size, 656] of fp8_ds_mla. @throws InvalidArgument unless there is one kv head
/// and the format is plain or fp8_ds_mla, and where spec.validate() does.
std::vector<std::int64_t> mla_cache_shape(const KvCacheSpec& spec);

/// Its permutation, as that of flash_attn_stride_order(): with layers the blocks are outermost, so
/// that one block of all layers moves as one.
std::vector<int> mla_stride_order(bool include_layers);

/// Bytes of a cache with that shape.
std::int64_t cache_bytes(std::span<const std::int64_t> shape, DType dtype) noexcept;

/// View with the logical shape over memory laid out physically by `order`.
/// @pre `order` is a permutation of shape's dimensions; data holds cache_bytes().
TensorView cache_view(void* data, DType dtype, std::span<const std::int64_t> logical_shape,
                      std::span<const int> order);

}  // namespace attend
