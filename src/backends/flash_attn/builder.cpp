// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/kernel_choice.h"
#include "backends/common/attention_builder.h"
#include "backends/flash_attn/flash_attn.h"
#include "backends/flash_attn/metadata.h"
#include "core/check.h"

namespace attend::flash_attn {
namespace {

constexpr std::string_view kMakeOp = "FLASH_ATTN.make_builder";
constexpr BuilderNames kNames = {"FLASH_ATTN", "FLASH_ATTN.build", "FLASH_ATTN.build_for_capture",
                                 "FLASH_ATTN.refresh", "FLASH_ATTN.update_block_table"};

const BuilderConfig& checked(const BuilderConfig& c) {
  const auto at = [](std::string_view argument) { return check::Where{kMakeOp, argument}; };
  check::require(c.cache.format != KvFormat::fp8_ds_mla, at("cache.format"),
                 "plain or an int8 format: latents are for MLA back ends",
                 to_string(c.cache.format));
  check_heads(kMakeOp, c.num_q_heads, c.cache.num_kv_heads, c.cache.head_size);
  const bool int8 = is_int8(c.cache.format) && c.cache.dtype == DType::i8;
  check::require(is_float_compute(c.cache.dtype) || is_fp8(c.cache.dtype) || int8,
                 at("cache.dtype"), "f32, f16, bf16, fp8_e4m3, fp8_e5m2, or i8 with an int8 format",
                 to_string(c.cache.dtype));
  check::require(c.cache.format == KvFormat::plain || !is_encoder(c.attn_type), at("cache.format"),
                 "plain: an encoder has no cache", to_string(c.cache.format));
  if (!is_encoder(c.attn_type)) {
    c.cache.validate();
    check_block_size(kMakeOp, c.cache.block_size);
  }
  check_batches(kMakeOp, c);
  // Queries are of the layer's type, which only matters for int8_level2, and not here.
  const KernelKind kind = kernel_kind(DType::bf16, c.cache.dtype, c.cache.format);
  arithmetic_level(c.arithmetic, kernel_choice().level(kind), kind, kMakeOp);
  return c;
}

AttentionPlanInput plan_shape(const BuilderConfig& c) {
  AttentionPlanInput shape;
  shape.num_q_heads = c.num_q_heads;
  shape.num_kv_heads = c.cache.num_kv_heads;
  shape.head_dim_qk = shape.head_dim_v = c.cache.head_size;
  return shape;
}

class FlashAttnBuilder final : public AttentionBuilder {
 public:
  explicit FlashAttnBuilder(const BuilderConfig& config)
      : AttentionBuilder(config, kNames, plan_shape(checked(config))) {}

 private:
  std::unique_ptr<AttentionMetadata> make_metadata() const override {
    return std::make_unique<FlashAttnMetadata>();
  }
  std::unique_ptr<AttentionMetadata> copy_of(const Metadata& m) const override {
    const auto* old = dynamic_cast<const FlashAttnMetadata*>(&m);
    return old == nullptr ? nullptr : std::make_unique<FlashAttnMetadata>(*old);
  }
  AttentionMetadata* own(Metadata& m) const override {
    return dynamic_cast<FlashAttnMetadata*>(&m);
  }

  void complete(AttentionMetadata& metadata) const override {
    auto& m = dynamic_cast<FlashAttnMetadata&>(metadata);
    m.format = config().cache.format;
    if (!is_int8_level(m.format)) return;
    const bool captured = m.aot != nullptr;  // then the workspace has one size for all batches
    m.int8_scratch = Int8Scratch(captured ? config().capture.max_tokens : m.num_tokens,
                                 captured ? config().capture.max_tokens : m.num_new_keys,
                                 {m.num_q_heads, m.num_kv_heads, m.head_size});
  }
};

}  // namespace

std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) {
  return std::make_unique<FlashAttnBuilder>(config);
}

}  // namespace attend::flash_attn
