// SPDX-License-Identifier: Apache-2.0
#include "serving/kv_storage.h"

#include <fmt/format.h>

#include <string>

#include "attend/core/error.h"

namespace attend::serving {
namespace {

constexpr std::string_view kArgument = "value-scales";

std::string describe_scales(int layers, int heads, int size) {
  return fmt::format("scales of {} layer{}, {} kv heads x {} elements", layers,
                     layers == 1 ? "" : "s", heads, size);
}

}  // namespace

std::string_view KvStorage::name() const noexcept {
  return format == KvFormat::plain ? to_string(dtype) : to_string(format);
}

KvStorage find_kv_storage(std::string_view kv_cache_dtype, DType compute) noexcept {
  const KvFormat format = parse_kv_format(kv_cache_dtype).value_or(KvFormat::plain);
  if (format != KvFormat::plain) return {stored_dtype(format, compute), format};
  return {parse_dtype(kv_cache_dtype).value_or(compute)};
}

void set_value_scales(KvStorage& storage, const ValueScales* scales, const ModelPreset& model,
                      int num_layers) {
  if (storage.format != KvFormat::int8_level1) {
    if (scales == nullptr) return;
    throw InvalidArgument("replay", kArgument, "no scales: only kv-cache-dtype int8_level1 has any",
                          std::string(storage.name()));
  }
  const int num_caches = model.num_caches(num_layers);
  const std::string expected = describe_scales(num_caches, model.num_kv_heads, model.head_dim);
  if (scales == nullptr) {
    throw InvalidArgument("replay", kArgument,
                          expected + " for int8_level1 (attend calibrate finds them)", "none");
  }
  const ValueScales& s = *scales;
  if (s.num_layers != num_caches || s.num_kv_heads != model.num_kv_heads ||
      s.head_size != model.head_dim) {
    throw InvalidArgument("replay", kArgument, expected,
                          describe_scales(s.num_layers, s.num_kv_heads, s.head_size));
  }
  const auto count = static_cast<std::size_t>(num_caches) *
                     static_cast<std::size_t>(model.num_kv_heads) *
                     static_cast<std::size_t>(model.head_dim);
  if (s.scales.size() != count) {
    throw InvalidArgument("replay", kArgument, fmt::format("{} numbers", count),
                          std::to_string(s.scales.size()));
  }
  storage.value_scales = scales;
}

}  // namespace attend::serving
