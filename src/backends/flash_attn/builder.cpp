// SPDX-License-Identifier: Apache-2.0
// Turns a batch into FlashAttnMetadata: one plan, the slots to write, the block table to read.
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "backends/flash_attn/flash_attn.h"
#include "backends/flash_attn/metadata.h"
#include "core/check.h"

namespace attend::flash_attn {
namespace {

constexpr std::string_view kMakeOp = "FLASH_ATTN.make_builder";
constexpr std::string_view kBuildOp = "FLASH_ATTN.build";
constexpr std::string_view kUpdateOp = "FLASH_ATTN.update_block_table";
constexpr int kMaxSpeculativeTokens = 1 << 20;

void check_config(const BuilderConfig& c) {
  const auto at = [](std::string_view argument) { return check::Where{kMakeOp, argument}; };
  check_heads(kMakeOp, c.num_q_heads, c.cache.num_kv_heads, c.cache.head_size);
  const bool int8 = c.cache.format != KvFormat::plain && c.cache.dtype == DType::i8;
  check::require(is_float_compute(c.cache.dtype) || is_fp8(c.cache.dtype) || int8,
                 at("cache.dtype"), "f32, f16, bf16, fp8_e4m3, fp8_e5m2, or i8 with an int8 format",
                 to_string(c.cache.dtype));
  check::require(c.cache.format == KvFormat::plain || !is_encoder(c.attn_type), at("cache.format"),
                 "plain: an encoder has no cache", to_string(c.cache.format));
  if (!is_encoder(c.attn_type)) {
    c.cache.validate();
    check_block_size(kMakeOp, c.cache.block_size);
  }
  const auto window = [&](std::string_view name, int tokens) {
    if (is_cross(c.attn_type)) {
      check::require(tokens == -1, at(name), "-1 (queries have no place among the encoder's keys)",
                     tokens);
    }
    check::require(tokens >= -1, at(name), "a number >= -1", tokens);
  };
  window("window_left", c.window_left);
  window("window_right", c.window_right);
  check::require(
      c.num_speculative_tokens >= 0 && c.num_speculative_tokens <= kMaxSpeculativeTokens,
      at("num_speculative_tokens"),
      [] { return fmt::format("a number from 0 to {}", kMaxSpeculativeTokens); },
      c.num_speculative_tokens);
  check::require(c.num_workers >= 1, at("num_workers"), "a number >= 1", c.num_workers);
}

/// Checks the form of a table that `plan` will be run with; the op, which reads the block ids,
/// checks those.
void check_block_table(std::string_view op, const ConstTensorView& table, const AttentionPlan& plan,
                       int block_size) {
  if (plan.num_reqs() == 0) return;
  const check::Where where{op, "block_table"};
  check::tensor(where, table, 2, {DType::i32});
  check::unit_last_stride(where, table);
  const std::int64_t longest = *std::max_element(plan.seq_lens.begin(), plan.seq_lens.end());
  const std::int64_t width = (longest + block_size - 1) / block_size;
  check::require(
      table.shape[0] >= plan.num_reqs() && table.shape[1] >= width, where,
      [&] {
        return fmt::format(
            "at least {} rows and {} columns (the longest request has {} keys in "
            "blocks of {})",
            plan.num_reqs(), width, longest, block_size);
      },
      [&] { return describe(table); });
}

/// The first `num_rows` slots, or none; each -1 or a row of the cache.
std::vector<std::int64_t> checked_slots(check::Where where, std::span<const std::int64_t> slots,
                                        int num_rows, const KvCacheSpec& cache) {
  if (slots.empty()) return {};
  const auto count = static_cast<std::size_t>(num_rows);
  check::require(
      slots.size() >= count, where,
      [&] { return fmt::format("none or at least {} entries", count); }, slots.size());
  const std::int64_t capacity = cache.num_blocks * cache.block_size;
  for (std::size_t i = 0; i < count; ++i) {
    check::require(
        slots[i] >= -1 && slots[i] < capacity, where,
        [&] { return fmt::format("slots from -1 to {}", capacity - 1); },
        [&] { return fmt::format("{} at index {}", slots[i], i); });
  }
  return {slots.begin(), slots.begin() + static_cast<std::ptrdiff_t>(count)};
}

class FlashAttnBuilder final : public MetadataBuilder {
 public:
  explicit FlashAttnBuilder(const BuilderConfig& config) : config_(config) { check_config(config); }

  /// The plan is quick already: `fast_build` changes nothing.
  std::unique_ptr<Metadata> build(int common_prefix_len, const CommonMetadata& padded,
                                  bool /*fast_build*/) override {
    const bool encoder = is_encoder(config_.attn_type);
    const bool cross = is_cross(config_.attn_type);
    // The table of cross attention holds encoder keys: its width has nothing to do with seq_lens.
    padded.validate(encoder || cross ? 0 : config_.cache.block_size);
    const CommonMetadata batch = padded.unpadded(padded.num_tokens, padded.num_reqs);
    check_common_prefix(common_prefix_len, batch);
    if (encoder) check_no_context(batch);
    if (cross) check_encoder_fields(batch);

    auto metadata = std::make_unique<FlashAttnMetadata>();
    AttentionPlanInput input = plan_input(batch);
    metadata->cascade = decide(input, batch, common_prefix_len);
    input.shared_prefixes = metadata->cascade.prefixes;
    metadata->plan = std::make_shared<const AttentionPlan>(plan_attention(input));
    metadata->attn_type = config_.attn_type;
    metadata->causal = !encoder && !cross && batch.causal;
    metadata->all_causal = !encoder && !cross && all_causal(batch);
    metadata->window_left = config_.window_left;
    metadata->window_right = config_.window_right;
    metadata->num_reqs = batch.num_reqs;
    metadata->num_tokens = batch.num_tokens;
    metadata->num_new_keys =
        cross ? static_cast<int>(batch.encoder_slot_mapping.size()) : batch.num_tokens;
    metadata->format = config_.cache.format;
    if (is_int8_level(metadata->format)) {
      metadata->int8_scratch =
          Int8Scratch(metadata->num_tokens, metadata->num_new_keys,
                      {config_.num_q_heads, config_.cache.num_kv_heads, config_.cache.head_size});
    }
    metadata->split =
        split_decodes_and_prefills(batch, {.decode_threshold = *reorder_batch_threshold()});
    if (encoder) return metadata;
    check_block_table(kBuildOp, batch.block_table, *metadata->plan, config_.cache.block_size);
    metadata->block_size = config_.cache.block_size;
    metadata->block_table = batch.block_table;
    metadata->slot_mapping =
        checked_slots({kBuildOp, cross ? "encoder_slot_mapping" : "slot_mapping"},
                      cross ? batch.encoder_slot_mapping : batch.slot_mapping,
                      metadata->num_new_keys, config_.cache);
    return metadata;
  }

  std::unique_ptr<Metadata> update_block_table(
      const Metadata& m, const ConstTensorView& block_table,
      std::span<const std::int64_t> slot_mapping) const override {
    const auto* old = dynamic_cast<const FlashAttnMetadata*>(&m);
    check::require(old != nullptr && !is_encoder(old->attn_type), {kUpdateOp, "m"},
                   "metadata of a FLASH_ATTN group with a cache",
                   old == nullptr ? "another back end's" : "an encoder's");
    check_block_table(kUpdateOp, block_table, *old->plan, config_.cache.block_size);
    auto updated = std::make_unique<FlashAttnMetadata>(*old);
    updated->slot_mapping =
        checked_slots({kUpdateOp, "slot_mapping"}, slot_mapping, old->num_new_keys, config_.cache);
    updated->block_size = config_.cache.block_size;
    updated->block_table =
        block_table.defined() ? block_table.slice(0, 0, old->num_reqs) : block_table;
    if (!has_shared_blocks(updated->block_table, old->cascade.prefixes)) {
      updated->cascade = {};
      updated->cascade.reason = CascadeReason::nothing_shared;
      updated->plan = std::make_shared<const AttentionPlan>(plan_flat(*old->plan));
    }
    return updated;
  }

  std::optional<int> reorder_batch_threshold() const noexcept override {
    return 1 + config_.num_speculative_tokens;
  }

 private:
  AttentionPlanInput plan_input(const CommonMetadata& batch) const {
    AttentionPlanInput input;
    input.op = kBuildOp.data();
    input.query_start_loc = batch.query_start_loc;
    input.seq_lens = is_cross(config_.attn_type) ? batch.encoder_seq_lens : batch.seq_lens;
    input.num_q_heads = config_.num_q_heads;
    input.num_kv_heads = config_.cache.num_kv_heads;
    input.head_dim_qk = config_.cache.head_size;
    input.head_dim_v = config_.cache.head_size;
    input.window_left = config_.window_left;
    input.window_right = config_.window_right;
    input.num_workers = config_.num_workers;
    input.causal = false;
    if (config_.attn_type == AttentionType::decoder) {
      input.causal = batch.causal;
      input.request_causal = batch.request_causal;
    }
    return input;
  }

  CascadeDecision decide(const AttentionPlanInput& input, const CommonMetadata& batch,
                         int common_prefix_len) const {
    if (is_cross(config_.attn_type)) return {.prefixes = {}, .reason = CascadeReason::encoder_keys};
    CascadeInput in;
    in.mode = config_.cascade;
    in.batch = input;
    if (!is_encoder(config_.attn_type)) in.block_table = batch.block_table;
    in.block_size = config_.cache.block_size;
    in.kv_dtype = config_.cache.dtype;
    in.common_prefix_len = common_prefix_len;
    in.use_alibi = config_.use_alibi;
    return decide_cascade(in);
  }

  /// Whether the requests of each prefix have the same blocks in another table.
  bool has_shared_blocks(const ConstTensorView& table,
                         const std::vector<SharedPrefix>& prefixes) const {
    const auto row = [&](std::int64_t r) {
      return table.as<std::int32_t>() + r * table.strides[0];
    };
    return std::ranges::all_of(prefixes, [&](const SharedPrefix& p) {
      const std::int32_t* first = row(p.request_begin);
      for (int r = p.request_begin + 1; r < p.request_end; ++r)
        if (!std::equal(first, first + p.num_keys / config_.cache.block_size, row(r))) return false;
      return true;
    });
  }

  /// A plan for the same batch that shares nothing.
  static AttentionPlan plan_flat(const AttentionPlan& plan) {
    AttentionPlanInput input;
    input.op = kUpdateOp.data();
    input.query_start_loc = plan.query_start_loc;
    input.seq_lens = plan.seq_lens;
    input.num_q_heads = plan.num_q_heads;
    input.num_kv_heads = plan.num_kv_heads;
    input.head_dim_qk = plan.head_dim_qk;
    input.head_dim_v = plan.head_dim_v;
    input.request_causal = plan.request_causal;
    input.window_left = plan.window_left;
    input.window_right = plan.window_right;
    input.num_workers = plan.num_workers;
    input.isa = plan.isa;
    return plan_attention(input);
  }

  static bool all_causal(const CommonMetadata& batch) {
    const auto& each = batch.request_causal;
    return each.empty() ? batch.causal
                        : std::all_of(each.begin(), each.end(), [](auto c) { return c != 0; });
  }

  void check_common_prefix(int common_prefix_len, const CommonMetadata& batch) const {
    int limit = batch.num_reqs == 0 ? 0 : std::numeric_limits<int>::max();
    for (int r = 0; r < batch.num_reqs; ++r) limit = std::min(limit, batch.num_computed_tokens(r));
    check::require(
        common_prefix_len >= 0 && common_prefix_len <= limit, {kBuildOp, "common_prefix_len"},
        [&] {
          return fmt::format("a number from 0 to {}, the fewest computed tokens of a request",
                             limit);
        },
        common_prefix_len);
    check::require(
        common_prefix_len == 0 || common_prefix_len % config_.cache.block_size == 0,
        {kBuildOp, "common_prefix_len"},
        [&] { return fmt::format("a multiple of the block size {}", config_.cache.block_size); },
        common_prefix_len);
  }

  /// Cross attention needs the number of encoder keys of every request.
  static void check_encoder_fields(const CommonMetadata& batch) {
    check::require(
        batch.encoder_seq_lens.size() == static_cast<std::size_t>(batch.num_reqs),
        {kBuildOp, "encoder_seq_lens"},
        [&] { return fmt::format("{} entries, the keys of each request", batch.num_reqs); },
        batch.encoder_seq_lens.size());
    check::require(batch.encoder_slot_mapping.size() <=
                       static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()),
                   {kBuildOp, "encoder_slot_mapping"}, "fewer than 2^31 entries",
                   batch.encoder_slot_mapping.size());
  }

  /// An encoder sees this step's tokens and nothing else.
  static void check_no_context(const CommonMetadata& batch) {
    for (int r = 0; r < batch.num_reqs; ++r) {
      check::require(
          batch.num_computed_tokens(r) == 0, {kBuildOp, "seq_lens"},
          [&] {
            return fmt::format("the query length {} (an encoder has no cache)", batch.query_len(r));
          },
          [&] {
            return fmt::format("{} at index {}", batch.seq_lens[static_cast<std::size_t>(r)], r);
          });
    }
  }

  BuilderConfig config_;
};

}  // namespace

std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) {
  return std::make_unique<FlashAttnBuilder>(config);
}

}  // namespace attend::flash_attn
