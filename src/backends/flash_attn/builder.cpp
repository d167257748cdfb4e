// SPDX-License-Identifier: Apache-2.0
// Turns a batch into FlashAttnMetadata: one plan, the slots to write, the block table to read.
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "attend/core/error.h"
#include "backends/flash_attn/flash_attn.h"
#include "backends/flash_attn/metadata.h"

namespace attend::flash_attn {
namespace {

constexpr std::string_view kMakeOp = "FLASH_ATTN.make_builder";
constexpr std::string_view kBuildOp = "FLASH_ATTN.build";
constexpr std::string_view kUpdateOp = "FLASH_ATTN.update_block_table";

void require_at_least(std::string_view op, std::string_view argument, std::int64_t lowest,
                      std::int64_t got) {
  if (got < lowest) {
    throw InvalidArgument(op, argument, fmt::format(">= {}", lowest), fmt::to_string(got));
  }
}

void check(const BuilderConfig& c) {
  check_attn_type(kMakeOp, c.attn_type);
  check_heads(kMakeOp, c.num_q_heads, c.cache.num_kv_heads, c.cache.head_size);
  if (!is_float_compute(c.cache.dtype)) {
    throw InvalidArgument(kMakeOp, "cache.dtype", "f32, f16 or bf16",
                          std::string(to_string(c.cache.dtype)));
  }
  if (!is_encoder(c.attn_type)) {
    if (c.cache.block_size < 1 || c.cache.block_size % kBlockSizeMultiple != 0) {
      throw InvalidArgument(kMakeOp, "cache.block_size",
                            fmt::format("a positive multiple of {}", kBlockSizeMultiple),
                            fmt::to_string(c.cache.block_size));
    }
    c.cache.validate();
  }
  require_at_least(kMakeOp, "window_left", -1, c.window_left);
  require_at_least(kMakeOp, "window_right", -1, c.window_right);
  require_at_least(kMakeOp, "num_speculative_tokens", 0, c.num_speculative_tokens);
  require_at_least(kMakeOp, "num_workers", 1, c.num_workers);
}

/// Checks a table that `plan` will be run with; contents are checked by the op, which reads them.
void check_block_table(std::string_view op, const ConstTensorView& table, const AttentionPlan& plan,
                       int block_size) {
  const std::int64_t longest =
      plan.seq_lens.empty() ? 0 : *std::max_element(plan.seq_lens.begin(), plan.seq_lens.end());
  const std::int64_t width = (longest + block_size - 1) / block_size;
  const bool usable = table.defined() && table.dtype == DType::i32 && table.rank == 2 &&
                      table.device.type == DeviceType::cpu && table.shape[0] >= plan.num_reqs() &&
                      table.shape[1] >= width && (table.strides[1] == 1 || table.shape[1] <= 1);
  if (usable || plan.num_reqs() == 0) return;
  throw InvalidArgument(
      op, "block_table",
      fmt::format("i32 [>= {}, >= {}] on the cpu, last dimension contiguous ({} tokens in blocks "
                  "of {})",
                  plan.num_reqs(), width, longest, block_size),
      table.defined() ? describe(table) : "an undefined view");
}

/// The first `num_tokens` slots, or none; each a row of the cache or negative.
std::vector<std::int64_t> checked_slots(std::string_view op, std::span<const std::int64_t> slots,
                                        int num_tokens, const KvCacheSpec& cache) {
  if (slots.empty()) return {};
  const auto count = static_cast<std::size_t>(num_tokens);
  if (slots.size() < count) {
    throw InvalidArgument(op, "slot_mapping", fmt::format("empty or >= {} entries", count),
                          fmt::format("{} entries", slots.size()));
  }
  const std::int64_t capacity = cache.num_blocks * cache.block_size;
  for (std::size_t i = 0; i < count; ++i) {
    if (slots[i] >= capacity) {
      throw InvalidArgument(op, fmt::format("slot_mapping[{}]", i),
                            fmt::format("< {} = num_blocks * block_size", capacity),
                            fmt::to_string(slots[i]));
    }
  }
  return {slots.begin(), slots.begin() + static_cast<std::ptrdiff_t>(count)};
}

class FlashAttnBuilder final : public MetadataBuilder {
 public:
  explicit FlashAttnBuilder(const BuilderConfig& config) : config_(config) { check(config); }

  /// A common prefix is a hint: attending flat gives the same bits, so it is checked and not used.
  /// The plan is quick already: `fast_build` changes nothing.
  std::unique_ptr<Metadata> build(int common_prefix_len, const CommonMetadata& padded,
                                  bool /*fast_build*/) override {
    const bool encoder = is_encoder(config_.attn_type);
    padded.validate(encoder ? 0 : config_.cache.block_size);
    const CommonMetadata batch = padded.unpadded(padded.num_tokens, padded.num_reqs);
    check_common_prefix(common_prefix_len, batch);
    if (encoder) check_no_context(batch);

    auto metadata = std::make_unique<FlashAttnMetadata>();
    metadata->plan = std::make_shared<const AttentionPlan>(plan(batch));
    metadata->attn_type = config_.attn_type;
    metadata->causal = !encoder && batch.causal;
    metadata->all_causal = !encoder && all_causal(batch);
    metadata->window_left = config_.window_left;
    metadata->window_right = config_.window_right;
    metadata->num_reqs = batch.num_reqs;
    metadata->num_tokens = batch.num_tokens;
    metadata->split =
        split_decodes_and_prefills(batch, {.decode_threshold = *reorder_batch_threshold()});
    if (encoder) return metadata;
    check_block_table(kBuildOp, batch.block_table, *metadata->plan, config_.cache.block_size);
    metadata->block_size = config_.cache.block_size;
    metadata->block_table = batch.block_table;
    metadata->slot_mapping =
        checked_slots(kBuildOp, batch.slot_mapping, batch.num_tokens, config_.cache);
    return metadata;
  }

  std::unique_ptr<Metadata> update_block_table(
      const Metadata& m, const ConstTensorView& block_table,
      std::span<const std::int64_t> slot_mapping) const override {
    const auto* old = dynamic_cast<const FlashAttnMetadata*>(&m);
    if (old == nullptr || is_encoder(old->attn_type)) {
      throw InvalidArgument(kUpdateOp, "m", "metadata of a FLASH_ATTN group with a cache",
                            old == nullptr ? "metadata of another back end" : "an encoder's");
    }
    check_block_table(kUpdateOp, block_table, *old->plan, config_.cache.block_size);
    auto updated = std::make_unique<FlashAttnMetadata>(*old);
    updated->slot_mapping = checked_slots(kUpdateOp, slot_mapping, old->num_tokens, config_.cache);
    updated->block_size = config_.cache.block_size;
    updated->block_table =
        block_table.defined() ? block_table.slice(0, 0, old->num_reqs) : block_table;
    return updated;
  }

  std::optional<int> reorder_batch_threshold() const noexcept override {
    return 1 + config_.num_speculative_tokens;
  }

 private:
  AttentionPlan plan(const CommonMetadata& batch) const {
    AttentionPlanInput input;
    input.query_start_loc = batch.query_start_loc;
    input.seq_lens = batch.seq_lens;
    input.num_q_heads = config_.num_q_heads;
    input.num_kv_heads = config_.cache.num_kv_heads;
    input.head_dim_qk = config_.cache.head_size;
    input.head_dim_v = config_.cache.head_size;
    input.window_left = config_.window_left;
    input.window_right = config_.window_right;
    input.num_workers = config_.num_workers;
    if (is_encoder(config_.attn_type)) {
      input.causal = false;
    } else {
      input.causal = batch.causal;
      input.request_causal = batch.request_causal;
    }
    return plan_attention(input);
  }

  static bool all_causal(const CommonMetadata& batch) {
    const auto& each = batch.request_causal;
    return each.empty() ? batch.causal
                        : std::all_of(each.begin(), each.end(), [](auto c) { return c != 0; });
  }

  static void check_common_prefix(int common_prefix_len, const CommonMetadata& batch) {
    int limit = batch.num_reqs == 0 ? 0 : std::numeric_limits<int>::max();
    for (int r = 0; r < batch.num_reqs; ++r) limit = std::min(limit, batch.num_computed_tokens(r));
    if (common_prefix_len >= 0 && common_prefix_len <= limit) return;
    throw InvalidArgument(kBuildOp, "common_prefix_len",
                          fmt::format("0 .. {} = the fewest computed tokens of a request", limit),
                          fmt::to_string(common_prefix_len));
  }

  /// An encoder sees this step's tokens and nothing else.
  static void check_no_context(const CommonMetadata& batch) {
    for (int r = 0; r < batch.num_reqs; ++r) {
      if (batch.num_computed_tokens(r) == 0) continue;
      throw InvalidArgument(
          kBuildOp, fmt::format("seq_lens[{}]", r),
          fmt::format("{} = its query length (an encoder has no cache)", batch.query_len(r)),
          fmt::to_string(batch.seq_lens[static_cast<std::size_t>(r)]));
    }
  }

  BuilderConfig config_;
};

}  // namespace

std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) {
  return std::make_unique<FlashAttnBuilder>(config);
}

}  // namespace attend::flash_attn
