// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <string>

#include "backends/common/kv_cache_dtype.h"
#include "backends/flash_attn/flash_attn.h"
#include "core/check.h"

namespace attend::flash_attn {
namespace {

class FlashAttnBackend final : public Backend {
 public:
  std::string_view name() const noexcept override { return "FLASH_ATTN"; }
  const Capability& capability() const noexcept override { return capability_; }

  std::vector<std::int64_t> kv_cache_shape(const KvCacheSpec& spec) const override {
    check_block_size("FLASH_ATTN.kv_cache_shape", spec.block_size);
    return flash_attn_cache_shape(spec);
  }
  std::vector<int> kv_cache_stride_order(KvLayout layout, bool include_layers,
                                         KvFormat format) const override {
    return flash_attn_stride_order(layout, include_layers, format);
  }
  std::vector<std::int64_t> kv_scale_shape(const KvCacheSpec& spec) const override {
    check_block_size("FLASH_ATTN.kv_scale_shape", spec.block_size);
    return flash_attn_scale_shape(spec);
  }
  int kv_cache_block_dim() const noexcept override { return 1; }

  std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) const override {
    return flash_attn::make_builder(config);
  }
  std::unique_ptr<Impl> make_impl(const ImplConfig& config) const override {
    return flash_attn::make_impl(config);
  }

 protected:
  std::optional<std::string> supports_combination(const AttentionConfig& c) const override {
    std::string reason;
    if (c.has_sink && c.platform.type == DeviceType::cuda && c.platform.capability() < 90)
      reason = "sink not supported on compute capability < 9.0";
    const auto add = [&](std::string_view text) {
      reason += fmt::format("{}{}", reason.empty() ? "" : "; ", text);
    };
    const std::optional<StoredKv> stored = resolve_kv_cache_dtype(c.kv_cache_dtype, c.dtype);
    const bool encoder =
        c.attn_type == AttentionType::encoder || c.attn_type == AttentionType::encoder_only;
    if (!stored) return reason.empty() ? std::nullopt : std::optional(reason);
    const bool int8 = is_int8(stored->format);
    if ((is_fp8(stored->dtype) || int8) && encoder)
      add("quantization is not supported for encoder attention");
    if (is_float_compute(stored->dtype) && stored->dtype != c.dtype) {
      add(fmt::format("kv_cache_dtype {} differs from dtype {} (the cache stores keys as they are)",
                      to_string(stored->dtype), to_string(c.dtype)));
    }
    if (stored->format == KvFormat::int8_level2 && c.dtype == DType::f32)
      add("int8_level2 keeps values in 16 bits, dtype is f32");
    if (int8 && c.use_per_head_quant_scales)
      add(fmt::format("{} has scales of its own instead of per-head ones",
                      to_string(stored->format)));
    if (int8 && c.platform.type != DeviceType::cpu)
      add(fmt::format("{} runs on the CPU only", to_string(stored->format)));
    if (reason.empty()) return std::nullopt;
    return reason;
  }

 private:
  static Capability make_capability() {
    Capability can;
    can.dtypes = {DType::f16, DType::bf16, DType::f32};
    can.cpu_only_dtypes = {DType::f32};
    can.kv_cache_dtypes = {"auto",        "f16",         "bf16",
                           "f32",         "fp8_e4m3",    "fp8_e5m2",
                           "int8_level1", "int8_level2", "int8_per_token_head"};
    can.head_size_multiple = kHeadSizeMultiple;
    can.max_head_size = kMaxHeadSize;
    can.block_sizes = {kBlockSizeMultiple};
    can.attn_types = {AttentionType::decoder, AttentionType::encoder, AttentionType::encoder_only,
                      AttentionType::encoder_decoder};
    can.devices = {DeviceType::cpu, DeviceType::cuda};
    can.min_cuda_capability = 80;
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
  static const FlashAttnBackend instance;
  return instance;
}

void check_heads(std::string_view op, int num_q_heads, int num_kv_heads, int head_size) {
  check::require(num_kv_heads >= 1, {op, "num_kv_heads"}, "a number >= 1", num_kv_heads);
  check::require(
      num_q_heads >= 1 && num_q_heads % num_kv_heads == 0, {op, "num_q_heads"},
      [&] { return fmt::format("a positive multiple of num_kv_heads {}", num_kv_heads); },
      num_q_heads);
  check::require(
      head_size >= 1 && head_size % kHeadSizeMultiple == 0 && head_size <= kMaxHeadSize,
      {op, "head_size"},
      [] { return fmt::format("a multiple of {}, at most {}", kHeadSizeMultiple, kMaxHeadSize); },
      head_size);
}

void check_block_size(std::string_view op, int block_size) {
  check::require(
      block_size >= 1 && block_size % kBlockSizeMultiple == 0, {op, "block_size"},
      [] { return fmt::format("a positive multiple of {}", kBlockSizeMultiple); }, block_size);
}

}  // namespace attend::flash_attn
