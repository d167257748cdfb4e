// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "backends/common/attention_metadata.h"

namespace attend {

/// Names that errors carry.
struct BuilderNames {
  const char* backend;
  const char *build, *capture, *refresh, *update;  ///< of the functions
};

/// Checks what a builder's configuration says besides heads and cache. `op` is the name in the
/// error.
void check_batches(std::string_view op, const BuilderConfig& config);

/// Turns a batch into AttentionMetadata: one plan, the slots to write, the block table to read.
class AttentionBuilder : public MetadataBuilder {
 public:
  /// The plan is quick already: `fast_build` changes nothing.
  std::unique_ptr<Metadata> build(int common_prefix_len, const CommonMetadata& batch,
                                  bool fast_build) override;
  std::unique_ptr<Metadata> build_for_capture(const CommonMetadata& batch) override;
  void refresh(Metadata& m, const CommonMetadata& batch) const override;
  std::unique_ptr<Metadata> update_block_table(
      const Metadata& m, const ConstTensorView& block_table,
      std::span<const std::int64_t> slot_mapping) const override;
  GraphSupport graph_support() const noexcept override;
  std::optional<int> reorder_batch_threshold() const noexcept override;

 protected:
  /// `config` has been checked. `shape`: heads, head sizes and branches of the plans.
  AttentionBuilder(const BuilderConfig& config, const BuilderNames& names,
                   const AttentionPlanInput& shape)
      : config_(config), names_(names), shape_(shape) {}
  const BuilderConfig& config() const noexcept { return config_; }

 private:
  virtual std::unique_ptr<AttentionMetadata> make_metadata() const = 0;
  /// Copy of `m`, which is of the back end's own type; null if it is not.
  virtual std::unique_ptr<AttentionMetadata> copy_of(const Metadata& m) const = 0;
  /// `m`, if it is of the back end's own type; else null.
  virtual AttentionMetadata* own(Metadata& m) const = 0;
  /// Fills in what the back end has besides.
  virtual void complete(AttentionMetadata&) const {}
  /// Whether the batch attends to rows of key and value: then it shares nothing and may have no
  /// block table.
  virtual bool reads_rows(const CommonMetadata& batch) const;

  void check_batch(std::string_view op, const CommonMetadata& batch) const;
  std::span<const std::int32_t> key_lens(const CommonMetadata& batch) const;
  std::span<const std::int64_t> slots_of(std::string_view op, const CommonMetadata& batch) const;
  int num_new_keys(const CommonMetadata& batch) const;
  void set_batch(AttentionMetadata& m, const CommonMetadata& batch) const;
  AttentionPlanInput plan_input(const char* op, const CommonMetadata& batch) const;
  CascadeDecision decide(const AttentionPlanInput& input, const CommonMetadata& batch,
                         int common_prefix_len) const;
  bool has_shared_blocks(const ConstTensorView& table,
                         const std::vector<SharedPrefix>& prefixes) const;
  AttentionPlan plan_flat(const AttentionPlan& plan) const;
  void check_common_prefix(int common_prefix_len, const CommonMetadata& batch) const;
  void check_encoder_fields(const CommonMetadata& batch) const;
  void check_no_context(const CommonMetadata& batch) const;

  BuilderConfig config_;
  BuilderNames names_;
  AttentionPlanInput shape_;
};

}  // namespace attend
