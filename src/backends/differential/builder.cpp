// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "attend/core/error.h"
#include "backends/common/attention_builder.h"
#include "backends/common/batch_checks.h"
#include "backends/differential/differential.h"
#include "backends/differential/metadata.h"
#include "core/check.h"

namespace attend::differential {
namespace {

constexpr std::string_view kMakeOp = "DIFFERENTIAL_FLASH_ATTN.make_builder";
constexpr BuilderNames kNames = {"DIFFERENTIAL_FLASH_ATTN", "DIFFERENTIAL_FLASH_ATTN.build",
                                 "DIFFERENTIAL_FLASH_ATTN.build_for_capture",
                                 "DIFFERENTIAL_FLASH_ATTN.refresh",
                                 "DIFFERENTIAL_FLASH_ATTN.update_block_table"};

const BuilderConfig& checked(const BuilderConfig& c) {
  const auto at = [](std::string_view argument) { return check::Where{kMakeOp, argument}; };
  check::require(c.differential.has_value(), at("differential"), "what differential layers need",
                 "none");
  check::require(c.attn_type == AttentionType::decoder, at("attn_type"), "decoder",
                 to_string(c.attn_type));
  check::require(c.cache.format == KvFormat::plain, at("cache.format"), "plain",
                 to_string(c.cache.format));
  check_heads(kMakeOp, c.differential->variant, c.num_q_heads, c.cache.num_kv_heads,
              c.cache.head_size);
  check::require(is_float_compute(c.cache.dtype) || is_fp8(c.cache.dtype), at("cache.dtype"),
                 "f32, f16, bf16, fp8_e4m3 or fp8_e5m2", to_string(c.cache.dtype));
  c.cache.validate();
  check_block_size(kMakeOp, c.cache.block_size);
  check_batches(kMakeOp, c);
  if (c.arithmetic == Arithmetic::fast) {
    throw Unsupported(
        fmt::format("[{}] argument 'arithmetic': expected automatic or exact, got fast", kMakeOp),
        {"there are no fast kernels for two maps"});
  }
  return c;
}

AttentionPlanInput plan_shape(const BuilderConfig& c) {
  AttentionPlanInput shape;
  differential_plan_shape(shape, c.differential->variant, c.num_q_heads, c.cache.num_kv_heads,
                          c.cache.head_size);
  return shape;
}

class DifferentialBuilder final : public AttentionBuilder {
 public:
  explicit DifferentialBuilder(const BuilderConfig& config)
      : AttentionBuilder(config, kNames, plan_shape(checked(config))) {}

 private:
  std::unique_ptr<AttentionMetadata> make_metadata() const override {
    return std::make_unique<DifferentialMetadata>();
  }
  std::unique_ptr<AttentionMetadata> copy_of(const Metadata& m) const override {
    const auto* old = dynamic_cast<const DifferentialMetadata*>(&m);
    return old == nullptr ? nullptr : std::make_unique<DifferentialMetadata>(*old);
  }
  AttentionMetadata* own(Metadata& m) const override {
    return dynamic_cast<DifferentialMetadata*>(&m);
  }
  void complete(AttentionMetadata& m) const override {
    dynamic_cast<DifferentialMetadata&>(m).variant = config().differential->variant;
  }

  /// Prompts whose keys do not all go into the cache, or that run without one.
  bool reads_rows(const CommonMetadata& batch) const override {
    if (!is_pure_prefill(batch.query_start_loc, first_of(batch.seq_lens, batch.num_reqs)))
      return false;
    return !batch.block_table.defined() ||
           first_without_slot(first_of(batch.slot_mapping, batch.num_tokens)) >= 0;
  }
};

}  // namespace

std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) {
  return std::make_unique<DifferentialBuilder>(config);
}

}  // namespace attend::differential
