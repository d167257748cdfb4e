// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/kv_cache_spec.h"

#include "attend/cache/fp8_ds_mla.h"
#include "core/check.h"

namespace attend {
namespace {

std::int64_t num_planes(const KvCacheSpec& spec) noexcept {
  return spec.format == KvFormat::int8_level2 ? 3 : 2;
}

void require_keys_and_values(std::string_view op, KvFormat format) {
  check::require(format != KvFormat::fp8_ds_mla, {op, "format"},
                 "plain or an int8 format, which hold keys and values", to_string(format));
}

void require_mla_rows(std::string_view op, const KvCacheSpec& spec) {
  check::require(spec.num_kv_heads == 1, {op, "num_kv_heads"},
                 "1, the latents that all heads share", spec.num_kv_heads);
  check::require(
      spec.format != KvFormat::fp8_ds_mla || spec.head_size == fp8_ds_mla::kDim, {op, "head_size"},
      [] {
        return fmt::format("{} + {} elements, what fp8_ds_mla holds", fp8_ds_mla::kLatent,
                           fp8_ds_mla::kRope);
      },
      spec.head_size);
}

}  // namespace

std::string_view to_string(KvLayout layout) noexcept {
  return layout == KvLayout::nhd ? "NHD" : "HND";
}

std::optional<KvLayout> parse_kv_layout(std::string_view name) noexcept {
  if (name == "NHD" || name == "nhd") return KvLayout::nhd;
  if (name == "HND" || name == "hnd") return KvLayout::hnd;
  return std::nullopt;
}

std::string_view to_string(KvFormat format) noexcept {
  switch (format) {
    case KvFormat::plain:
      return "plain";
    case KvFormat::int8_level1:
      return "int8_level1";
    case KvFormat::int8_level2:
      return "int8_level2";
    case KvFormat::int8_per_token_head:
      return "int8_per_token_head";
    case KvFormat::fp8_ds_mla:
      return "fp8_ds_mla";
  }
  return "invalid KV format";
}

std::optional<KvFormat> parse_kv_format(std::string_view name) noexcept {
  for (const KvFormat f : {KvFormat::plain, KvFormat::int8_level1, KvFormat::int8_level2,
                           KvFormat::int8_per_token_head, KvFormat::fp8_ds_mla}) {
    if (to_string(f) == name) return f;
  }
  return std::nullopt;
}

void KvCacheSpec::validate() const {
  constexpr std::string_view kOp = "KvCacheSpec::validate";
  const auto at_least = [&](std::string_view name, std::int64_t value, std::int64_t smallest) {
    check::require(
        value >= smallest, {kOp, name}, [&] { return fmt::format("a number >= {}", smallest); },
        value);
  };
  at_least("num_blocks", num_blocks, 1);
  at_least("block_size", block_size, 1);
  at_least("num_kv_heads", num_kv_heads, 1);
  at_least("head_size", head_size, 1);
  at_least("num_layers", num_layers, 0);
  check::require(
      dtype == stored_dtype(format, dtype), {kOp, "dtype"},
      [&] {
        return fmt::format("{}, the {} of {}", to_string(stored_dtype(format, dtype)),
                           is_int8(format) ? "codes" : "bytes", to_string(format));
      },
      to_string(dtype));
  const bool bytes_of_rows = format == KvFormat::fp8_ds_mla;
  if (bytes_of_rows) require_mla_rows(kOp, *this);

  constexpr std::int64_t kMaxBytes = std::int64_t{1} << 62;
  std::int64_t bytes = num_planes(*this) * static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t row = bytes_of_rows ? fp8_ds_mla::kRowBytes : head_size;
  for (const std::int64_t factor :
       {num_blocks, std::int64_t{block_size}, std::int64_t{num_kv_heads}, row,
        std::int64_t{num_layers == 0 ? 1 : num_layers}}) {
    const bool overflow = __builtin_mul_overflow(bytes, factor, &bytes);
    check::require(
        !overflow && bytes <= kMaxBytes, {kOp, "num_blocks"}, "a cache of at most 2^62 bytes", [&] {
          return fmt::format("{} blocks of {} x {} x {} {} in {} layers", num_blocks, block_size,
                             num_kv_heads, head_size, to_string(dtype), num_layers);
        });
  }
}

std::vector<std::int64_t> flash_attn_cache_shape(const KvCacheSpec& spec) {
  spec.validate();
  require_keys_and_values("flash_attn_cache_shape", spec.format);
  const std::int64_t planes = num_planes(spec);
  std::vector<std::int64_t> shape =
      is_int8_level(spec.format)
          ? std::vector<std::int64_t>{planes, spec.num_blocks, spec.num_kv_heads, spec.block_size,
                                      spec.head_size}
          : std::vector<std::int64_t>{planes, spec.num_blocks, spec.block_size, spec.num_kv_heads,
                                      spec.head_size};
  if (spec.num_layers > 0) shape.insert(shape.begin(), spec.num_layers);
  return shape;
}

std::vector<int> flash_attn_stride_order(KvLayout layout, bool include_layers, KvFormat format) {
  require_keys_and_values("flash_attn_stride_order", format);
  if (is_int8_level(format)) {
    return include_layers ? std::vector{0, 1, 2, 3, 4, 5} : std::vector{0, 1, 2, 3, 4};
  }
  if (include_layers) {
    return layout == KvLayout::nhd ? std::vector{2, 0, 1, 3, 4, 5} : std::vector{2, 4, 0, 1, 3, 5};
  }
  return layout == KvLayout::nhd ? std::vector{0, 1, 2, 3, 4} : std::vector{0, 1, 3, 2, 4};
}

std::vector<std::int64_t> flash_attn_scale_shape(const KvCacheSpec& spec) {
  spec.validate();
  require_keys_and_values("flash_attn_scale_shape", spec.format);
  std::vector<std::int64_t> shape;
  if (is_int8_level(spec.format)) {
    shape = {spec.num_blocks, spec.num_kv_heads, spec.block_size};
  } else if (spec.format == KvFormat::int8_per_token_head) {
    shape = {2, spec.num_blocks, spec.block_size, spec.num_kv_heads};
  }
  if (spec.num_layers > 0 && !shape.empty()) shape.insert(shape.begin(), spec.num_layers);
  return shape;
}

std::vector<std::int64_t> mla_cache_shape(const KvCacheSpec& spec) {
  constexpr std::string_view kOp = "mla_cache_shape";
  spec.validate();
  check::require(!is_int8(spec.format), {kOp, "format"}, "plain or fp8_ds_mla",
                 to_string(spec.format));
  require_mla_rows(kOp, spec);
  const std::int64_t row =
      spec.format == KvFormat::fp8_ds_mla ? fp8_ds_mla::kRowBytes : spec.head_size;
  std::vector<std::int64_t> shape = {spec.num_blocks, spec.block_size, row};
  if (spec.num_layers > 0) shape.insert(shape.begin(), spec.num_layers);
  return shape;
}

std::vector<int> mla_stride_order(bool include_layers) {
  return include_layers ? std::vector{1, 0, 2, 3} : std::vector{0, 1, 2};
}

std::int64_t cache_bytes(std::span<const std::int64_t> shape, DType dtype) noexcept {
  auto bytes = static_cast<std::int64_t>(size_of(dtype));
  for (const std::int64_t n : shape) bytes *= n;
  return bytes;
}

TensorView cache_view(void* data, DType dtype, std::span<const std::int64_t> logical_shape,
                      std::span<const int> order) {
  constexpr std::string_view kOp = "cache_view";
  const auto rank = logical_shape.size();
  check::require(
      rank <= kMaxRank, {kOp, "logical_shape"},
      [] { return fmt::format("at most {} dimensions", kMaxRank); }, rank);
  check::require(
      order.size() == rank, {kOp, "order"}, [&] { return fmt::format("{} entries", rank); },
      order.size());
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int>(rank);
  std::int64_t stride = 1;
  unsigned seen = 0;
  for (std::size_t i = rank; i-- > 0;) {
    const int dim = order[i];
    const bool fresh = dim >= 0 && dim < view.rank && (seen >> dim & 1U) == 0;
    check::require(
        fresh, {kOp, "order"}, [&] { return fmt::format("a permutation of {}", rank); },
        [&] { return fmt::format("{} at index {}", dim, i); });
    seen |= 1U << dim;
    const auto d = static_cast<std::size_t>(dim);
    view.shape[d] = logical_shape[d];
    view.strides[d] = stride;
    stride *= logical_shape[d];
  }
  return view;
}

}  // namespace attend
