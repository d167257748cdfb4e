// SPDX-License-Identifier: Apache-2.0
// FLASH_ATTN_MLA: what it can serve, and its cache.
#include <fmt/format.h>

#include "attend/backend/backend.h"
#include "attend/cache/fp8_ds_mla.h"
#include "attend/plan/attention_plan.h"
#include "backends/common/kv_cache_dtype.h"
#include "backends/mla/mla.h"
#include "core/check.h"

namespace attend::mla {
namespace {

class MlaBackend final : public Backend {
 public:
  std::string_view name() const noexcept override { return "FLASH_ATTN_MLA"; }
  const Capability& capability() const noexcept override { return capability_; }

  std::vector<std::int64_t> kv_cache_shape(const KvCacheSpec& spec) const override {
    check_block_size("FLASH_ATTN_MLA.kv_cache_shape", spec.block_size);
    return mla_cache_shape(spec);
  }
  /// There is one head: the layouts do not differ.
  std::vector<int> kv_cache_stride_order(KvLayout, bool include_layers, KvFormat) const override {
    return mla_stride_order(include_layers);
  }
  int kv_cache_block_dim() const noexcept override { return 0; }

  std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) const override {
    return mla::make_builder(config);
  }
  std::unique_ptr<Impl> make_impl(const ImplConfig& config) const override {
    return mla::make_impl(config);
  }

 protected:
  std::optional<std::string> supports_combination(const AttentionConfig& c) const override {
    const std::optional<StoredKv> stored = resolve_kv_cache_dtype(c.kv_cache_dtype, c.dtype);
    if (!stored) return std::nullopt;
    if (stored->format == KvFormat::fp8_ds_mla) {
      if (c.dtype == DType::bf16 && c.head_size == fp8_ds_mla::kDim) return std::nullopt;
      return fmt::format("fp8_ds_mla rows hold {} elements and bf16 rope values (got {} and {})",
                         fp8_ds_mla::kDim, c.head_size, to_string(c.dtype));
    }
    if (is_float_compute(stored->dtype) && stored->dtype != c.dtype)
      return fmt::format(
          "kv_cache_dtype {} differs from dtype {} (the cache stores rows as they "
          "are)",
          to_string(stored->dtype), to_string(c.dtype));
    return std::nullopt;
  }

 private:
  static Capability make_capability() {
    Capability can;
    can.dtypes = {DType::f16, DType::bf16, DType::f32};
    can.cpu_only_dtypes = {DType::f32};
    can.kv_cache_dtypes = {"auto", "f16", "bf16", "f32", "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla"};
    can.head_sizes = {320, 576};
    can.block_sizes = {kBlockSizeMultiple};
    can.devices = {DeviceType::cpu, DeviceType::cuda, DeviceType::rocm};
    can.min_cuda_capability = 90;
    can.is_mla = true;
    can.supports_batch_invariance = true;
    return can;
  }
  Capability capability_ = make_capability();
};

}  // namespace

const Backend& backend() noexcept {
  static const MlaBackend instance;
  return instance;
}

void check_block_size(std::string_view op, int block_size) {
  check::require(
      block_size >= 1 && block_size % kBlockSizeMultiple == 0, {op, "block_size"},
      [] { return fmt::format("a positive multiple of {}", kBlockSizeMultiple); }, block_size);
}

}  // namespace attend::mla
