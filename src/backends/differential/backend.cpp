// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <string>

#include "attend/cache/differential.h"
#include "backends/common/kv_cache_dtype.h"
#include "backends/differential/differential.h"
#include "core/check.h"

namespace attend::differential {
namespace {

class DifferentialBackend final : public Backend {
 public:
  std::string_view name() const noexcept override { return "DIFFERENTIAL_FLASH_ATTN"; }
  const Capability& capability() const noexcept override { return capability_; }

  std::vector<std::int64_t> kv_cache_shape(const KvCacheSpec& spec) const override {
    check_block_size("DIFFERENTIAL_FLASH_ATTN.kv_cache_shape", spec.block_size);
    return differential_cache_shape(spec);
  }
  std::vector<int> kv_cache_stride_order(KvLayout layout, bool include_layers,
                                         KvFormat) const override {
    return differential_stride_order(layout, include_layers);
  }
  int kv_cache_block_dim() const noexcept override { return kDifferentialBlockDim; }

  std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) const override {
    return differential::make_builder(config);
  }
  std::unique_ptr<Impl> make_impl(const ImplConfig& config) const override {
    return differential::make_impl(config);
  }

 protected:
  std::optional<std::string> supports_combination(const AttentionConfig& c) const override {
    std::string reason;
    if (c.has_sink && c.platform.type == DeviceType::cuda && c.platform.capability() < 90)
      reason = "sink not supported on compute capability < 9.0";
    const std::optional<StoredKv> stored = resolve_kv_cache_dtype(c.kv_cache_dtype, c.dtype);
    if (stored && is_float_compute(stored->dtype) && stored->dtype != c.dtype) {
      reason += fmt::format(
          "{}kv_cache_dtype {} differs from dtype {} (the cache stores keys as they are)",
          reason.empty() ? "" : "; ", to_string(stored->dtype), to_string(c.dtype));
    }
    if (reason.empty()) return std::nullopt;
    return reason;
  }

 private:
  static Capability make_capability() {
    Capability can;
    can.dtypes = {DType::f16, DType::bf16, DType::f32};
    can.cpu_only_dtypes = {DType::f32};
    can.kv_cache_dtypes = {"auto", "f16", "bf16", "f32", "fp8_e4m3", "fp8_e5m2"};
    can.head_size_multiple = kHeadSizeMultiple;
    can.max_head_size = kMaxDifferentialHeadDim;
    can.block_sizes = {kBlockSizeMultiple};
    can.devices = {DeviceType::cpu, DeviceType::cuda};
    can.min_cuda_capability = 80;
    can.is_differential = true;
    can.supports_non_causal = true;
    can.supports_batch_invariance = true;
    can.supports_per_head_quant_scales = true;
    can.supports_sink = true;
    can.supports_alibi_sqrt = true;
    return can;
  }
  Capability capability_ = make_capability();
};

}  // namespace

const Backend& backend() noexcept {
  static const DifferentialBackend instance;
  return instance;
}

void check_heads(std::string_view op, DifferentialVariant variant, int num_q_heads,
                 int num_kv_heads, int head_size) {
  const bool branches = variant == DifferentialVariant::v1;
  check::require(num_kv_heads >= 1 && (!branches || num_kv_heads % 2 == 0), {op, "num_kv_heads"},
                 branches ? "an even number >= 2: heads are pairs" : "a number >= 1", num_kv_heads);
  const int step = branches ? num_kv_heads : 2 * num_kv_heads;
  check::require(
      num_q_heads >= 1 && num_q_heads % step == 0, {op, "num_q_heads"},
      [&] {
        return fmt::format("a positive multiple of {}num_kv_heads {}{}", branches ? "" : "twice ",
                           num_kv_heads, branches ? "" : ", which pairs of heads share");
      },
      num_q_heads);
  check::require(
      head_size >= 1 && head_size % kHeadSizeMultiple == 0 && head_size <= kMaxDifferentialHeadDim,
      {op, "head_size"},
      [] {
        return fmt::format("a multiple of {}, at most {}", kHeadSizeMultiple,
                           kMaxDifferentialHeadDim);
      },
      head_size);
}

void check_block_size(std::string_view op, int block_size) {
  check::require(
      block_size >= 1 && block_size % kBlockSizeMultiple == 0, {op, "block_size"},
      [] { return fmt::format("a positive multiple of {}", kBlockSizeMultiple); }, block_size);
}

}  // namespace attend::differential
