// SPDX-License-Identifier: Apache-2.0
#include "backends/common/attention_builder.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "attend/core/error.h"
#include "backends/common/batch_checks.h"
#include "core/check.h"

namespace attend {
namespace {

constexpr int kMaxSpeculativeTokens = 1 << 20;

bool all_causal(const CommonMetadata& batch) {
  const auto each = first_of(batch.request_causal, batch.num_reqs);
  return each.empty() ? batch.causal
                      : std::all_of(each.begin(), each.end(), [](auto c) { return c != 0; });
}

}  // namespace

void check_batches(std::string_view op, const BuilderConfig& c) {
  const auto at = [&](std::string_view argument) { return check::Where{op, argument}; };
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
  check::require(c.max_num_splits >= 0, at("max_num_splits"), "a number >= 0", c.max_num_splits);
}

std::unique_ptr<Metadata> AttentionBuilder::build(int common_prefix_len,
                                                  const CommonMetadata& batch,
                                                  bool /*fast_build*/) {
  check_batch(names_.build, batch);
  check_common_prefix(common_prefix_len, batch);
  auto metadata = make_metadata();
  AttentionPlanInput input = plan_input(names_.build, batch);
  metadata->cascade = decide(input, batch, common_prefix_len);
  input.shared_prefixes = metadata->cascade.prefixes;
  metadata->plan = std::make_shared<const AttentionPlan>(plan_attention(input));
  set_batch(*metadata, batch);
  return metadata;
}

std::unique_ptr<Metadata> AttentionBuilder::build_for_capture(const CommonMetadata& batch) {
  std::vector<std::string> reasons;
  if (config_.capture.max_reqs == 0) reasons.emplace_back("BuilderConfig::capture is not set");
  if (config_.attn_type != AttentionType::decoder)
    reasons.emplace_back("only decoder layers are captured");
  if (!reasons.empty()) throw Unsupported(names_.capture, std::move(reasons));
  auto metadata = make_metadata();
  metadata->aot =
      std::make_shared<AotPlan>(plan_input(names_.capture, CommonMetadata()), config_.capture);
  metadata->plan = {metadata->aot, &metadata->aot->plan()};
  metadata->cascade.reason = CascadeReason::captured;
  metadata->slot_mapping.reserve(static_cast<std::size_t>(config_.capture.max_tokens));
  refresh(*metadata, batch);
  return metadata;
}

void AttentionBuilder::refresh(Metadata& m, const CommonMetadata& batch) const {
  AttentionMetadata* captured = own(m);
  check::require(
      captured != nullptr && captured->aot != nullptr, {names_.refresh, "m"},
      [&] { return fmt::format("what a {} builder made for a captured graph", names_.backend); },
      captured == nullptr ? "another back end's" : "metadata of one batch");
  check_batch(names_.refresh, batch);
  captured->aot->update(plan_input(names_.refresh, batch));
  set_batch(*captured, batch);
}

std::unique_ptr<Metadata> AttentionBuilder::update_block_table(
    const Metadata& m, const ConstTensorView& block_table,
    std::span<const std::int64_t> slot_mapping) const {
  auto updated = copy_of(m);
  check::require(
      updated != nullptr && !is_encoder(updated->attn_type), {names_.update, "m"},
      [&] { return fmt::format("metadata of a {} group with a cache", names_.backend); },
      updated == nullptr ? "another back end's" : "an encoder's");
  check_block_table(names_.update, block_table, updated->plan->seq_lens, config_.cache.block_size);
  const auto slots = checked_slots({names_.update, "slot_mapping"}, slot_mapping,
                                   updated->num_new_keys, config_.cache);
  if (updated->aot != nullptr)
    updated->slot_mapping.reserve(static_cast<std::size_t>(updated->aot->limits().max_tokens));
  updated->slot_mapping.assign(slots.begin(), slots.end());
  updated->block_size = config_.cache.block_size;
  updated->block_table =
      block_table.defined() ? block_table.slice(0, 0, updated->num_reqs) : block_table;
  if (!has_shared_blocks(updated->block_table, updated->cascade.prefixes)) {
    updated->cascade = {};
    updated->cascade.reason = CascadeReason::nothing_shared;
    updated->plan = std::make_shared<const AttentionPlan>(plan_flat(*updated->plan));
  }
  return updated;
}

GraphSupport AttentionBuilder::graph_support() const noexcept {
  const bool captures = config_.capture.max_reqs > 0 && config_.attn_type == AttentionType::decoder;
  return captures ? GraphSupport::always : GraphSupport::never;
}

std::optional<int> AttentionBuilder::reorder_batch_threshold() const noexcept {
  return 1 + config_.num_speculative_tokens;
}

bool AttentionBuilder::reads_rows(const CommonMetadata&) const {
  return is_encoder(config_.attn_type);
}

/// Everything about a batch that the plan does not check. Allocates nothing.
void AttentionBuilder::check_batch(std::string_view op, const CommonMetadata& batch) const {
  const bool encoder = is_encoder(config_.attn_type), cross = is_cross(config_.attn_type);
  // The table of cross attention holds encoder keys: its width has nothing to do with seq_lens.
  batch.validate(encoder || cross ? 0 : config_.cache.block_size);
  if (encoder) return check_no_context(batch);
  if (cross) check_encoder_fields(batch);
  if (batch.block_table.defined() || !reads_rows(batch))
    check_block_table(op, batch.block_table, key_lens(batch), config_.cache.block_size);
  slots_of(op, batch);
}

/// Keys of each request.
std::span<const std::int32_t> AttentionBuilder::key_lens(const CommonMetadata& batch) const {
  return first_of(is_cross(config_.attn_type) ? batch.encoder_seq_lens : batch.seq_lens,
                  batch.num_reqs);
}

/// Slots of the rows of key and value that the batch brings.
std::span<const std::int64_t> AttentionBuilder::slots_of(std::string_view op,
                                                         const CommonMetadata& batch) const {
  const bool cross = is_cross(config_.attn_type);
  return checked_slots({op, cross ? "encoder_slot_mapping" : "slot_mapping"},
                       cross ? batch.encoder_slot_mapping : batch.slot_mapping, num_new_keys(batch),
                       config_.cache);
}

int AttentionBuilder::num_new_keys(const CommonMetadata& batch) const {
  return is_cross(config_.attn_type) ? static_cast<int>(batch.encoder_slot_mapping.size())
                                     : batch.num_tokens;
}

/// Fills in what depends on the batch, the plan and the cascade apart. @pre check_batch().
void AttentionBuilder::set_batch(AttentionMetadata& m, const CommonMetadata& batch) const {
  const bool decoder = config_.attn_type == AttentionType::decoder;
  m.attn_type = config_.attn_type;
  m.num_q_heads = config_.num_q_heads;
  m.num_kv_heads = config_.cache.num_kv_heads;
  m.head_size = config_.cache.head_size;
  m.causal = decoder && batch.causal;
  m.all_causal = decoder && all_causal(batch);
  m.window_left = config_.window_left;
  m.window_right = config_.window_right;
  m.num_reqs = batch.num_reqs;
  m.num_tokens = batch.num_tokens;
  m.num_new_keys = num_new_keys(batch);
  m.split = split_decodes_and_prefills(batch, {.decode_threshold = *reorder_batch_threshold()});
  if (!is_encoder(config_.attn_type)) {
    m.block_size = config_.cache.block_size;
    m.block_table = batch.block_table.defined() ? batch.block_table.slice(0, 0, batch.num_reqs)
                                                : batch.block_table;
    const auto slots = slots_of(names_.build, batch);
    m.slot_mapping.assign(slots.begin(), slots.end());
  }
  complete(m);
}

AttentionPlanInput AttentionBuilder::plan_input(const char* op, const CommonMetadata& batch) const {
  constexpr static std::int32_t kNoRequests[] = {0};
  AttentionPlanInput input = shape_;
  input.op = op;
  input.query_start_loc = batch.query_start_loc.empty()
                              ? std::span<const std::int32_t>(kNoRequests)
                              : first_of(batch.query_start_loc, batch.num_reqs + 1);
  input.seq_lens = key_lens(batch);
  input.window_left = config_.window_left;
  input.window_right = config_.window_right;
  input.num_workers = config_.num_workers;
  input.max_num_splits = config_.max_num_splits;
  input.arithmetic = config_.arithmetic;
  input.causal = false;
  if (config_.attn_type == AttentionType::decoder) {
    input.causal = batch.causal;
    input.request_causal = first_of(batch.request_causal, batch.num_reqs);
  }
  return input;
}

CascadeDecision AttentionBuilder::decide(const AttentionPlanInput& input,
                                         const CommonMetadata& batch, int common_prefix_len) const {
  if (is_cross(config_.attn_type)) return {.prefixes = {}, .reason = CascadeReason::encoder_keys};
  CascadeInput in;
  in.mode = config_.cascade;
  in.batch = input;
  if (!reads_rows(batch)) in.block_table = batch.block_table;
  in.block_size = config_.cache.block_size;
  in.kv_dtype = config_.cache.dtype;
  in.common_prefix_len = common_prefix_len;
  in.use_alibi = config_.use_alibi;
  return decide_cascade(in);
}

/// Whether the requests of each prefix have the same blocks in another table.
bool AttentionBuilder::has_shared_blocks(const ConstTensorView& table,
                                         const std::vector<SharedPrefix>& prefixes) const {
  const auto row = [&](std::int64_t r) { return table.as<std::int32_t>() + r * table.strides[0]; };
  return std::ranges::all_of(prefixes, [&](const SharedPrefix& p) {
    const std::int32_t* first = row(p.request_begin);
    for (int r = p.request_begin + 1; r < p.request_end; ++r)
      if (!std::equal(first, first + p.num_keys / config_.cache.block_size, row(r))) return false;
    return true;
  });
}

/// A plan for the same batch that shares nothing.
AttentionPlan AttentionBuilder::plan_flat(const AttentionPlan& plan) const {
  AttentionPlanInput input;
  input.op = names_.update;
  input.query_start_loc = plan.query_start_loc;
  input.seq_lens = plan.seq_lens;
  input.num_q_heads = plan.num_q_heads;
  input.num_kv_heads = plan.num_kv_heads;
  input.head_dim_qk = plan.head_dim_qk;
  input.head_dim_v = plan.head_dim_v;
  input.branches = plan.branches;
  input.request_causal = plan.request_causal;
  input.window_left = plan.window_left;
  input.window_right = plan.window_right;
  input.num_workers = plan.num_workers;
  input.max_num_splits = plan.max_num_splits;
  input.arithmetic = plan.arithmetic;
  if (plan.isa_given) input.isa = plan.isa;
  return plan_attention(input);
}

void AttentionBuilder::check_common_prefix(int common_prefix_len,
                                           const CommonMetadata& batch) const {
  const check::Where where{names_.build, "common_prefix_len"};
  int limit = batch.num_reqs == 0 ? 0 : std::numeric_limits<int>::max();
  for (int r = 0; r < batch.num_reqs; ++r) limit = std::min(limit, batch.num_computed_tokens(r));
  check::require(
      common_prefix_len >= 0 && common_prefix_len <= limit, where,
      [&] {
        return fmt::format("a number from 0 to {}, the fewest computed tokens of a request", limit);
      },
      common_prefix_len);
  check::require(
      common_prefix_len == 0 || common_prefix_len % config_.cache.block_size == 0, where,
      [&] { return fmt::format("a multiple of the block size {}", config_.cache.block_size); },
      common_prefix_len);
}

/// Cross attention needs the number of encoder keys of every request.
void AttentionBuilder::check_encoder_fields(const CommonMetadata& batch) const {
  check::require(
      std::cmp_equal(key_lens(batch).size(), batch.num_reqs), {names_.build, "encoder_seq_lens"},
      [&] { return fmt::format("{} entries, the keys of each request", batch.num_reqs); },
      batch.encoder_seq_lens.size());
  check::require(batch.encoder_slot_mapping.size() <=
                     static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()),
                 {names_.build, "encoder_slot_mapping"}, "fewer than 2^31 entries",
                 batch.encoder_slot_mapping.size());
}

/// An encoder sees this step's tokens and nothing else.
void AttentionBuilder::check_no_context(const CommonMetadata& batch) const {
  for (int r = 0; r < batch.num_reqs; ++r) {
    check::require(
        batch.num_computed_tokens(r) == 0, {names_.build, "seq_lens"},
        [&] {
          return fmt::format("the query length {} (an encoder has no cache)", batch.query_len(r));
        },
        [&] {
          return fmt::format("{} at index {}", batch.seq_lens[static_cast<std::size_t>(r)], r);
        });
  }
}

}  // namespace attend
