// SPDX-License-Identifier: Apache-2.0
// Turns a batch into MlaMetadata: a plan of the decodes, steps and plans of the prefills.
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "attend/ops/mla.h"
#include "attend/plan/kernel_choice.h"
#include "attend/plan/mla_workspace.h"
#include "backends/common/batch_checks.h"
#include "backends/common/mla_checks.h"
#include "backends/mla/metadata.h"
#include "backends/mla/mla.h"
#include "backends/mla/workspace.h"
#include "core/check.h"

namespace attend::mla {
namespace {

constexpr std::string_view kMakeOp = "FLASH_ATTN_MLA.make_builder";
constexpr std::string_view kBuildOp = "FLASH_ATTN_MLA.build";
constexpr std::string_view kUpdateOp = "FLASH_ATTN_MLA.update_block_table";
constexpr int kMostThreshold = 1 << 20;

check::Where at(std::string_view argument) { return {kMakeOp, argument}; }

void check_cache(const BuilderConfig& c) {
  const KvCacheSpec& cache = c.cache;
  check::require(cache.format == KvFormat::plain || cache.format == KvFormat::fp8_ds_mla,
                 at("cache.format"), "plain or fp8_ds_mla", to_string(cache.format));
  const bool plain = cache.format == KvFormat::plain;
  check::require(!plain || is_float_compute(cache.dtype) || is_fp8(cache.dtype), at("cache.dtype"),
                 "f32, f16, bf16, fp8_e4m3 or fp8_e5m2", to_string(cache.dtype));
  check::require(
      !plain || is_fp8(cache.dtype) || cache.dtype == c.mla->dtype, at("cache.dtype"),
      [&] {
        return fmt::format("{}, that of the layers, or an fp8 type", to_string(c.mla->dtype));
      },
      to_string(cache.dtype));
  check::require(plain || c.mla->dtype == DType::bf16, at("mla.dtype"),
                 "bf16, which fp8_ds_mla rows hold", to_string(c.mla->dtype));
  cache.validate();
  check_block_size(kMakeOp, cache.block_size);
}

void check_config(const BuilderConfig& c) {
  check::require(c.mla.has_value(), at("mla"), "the sizes of the layers", "none");
  const MlaBuilderConfig& m = *c.mla;
  check::require(is_float_compute(m.dtype), at("mla.dtype"), "f32, f16 or bf16",
                 to_string(m.dtype));
  check_mla_dims(kMakeOp, m.dims, c.num_q_heads, c.cache.num_kv_heads, c.cache.head_size);
  check_mla_format(kMakeOp, m.dims, c.cache.format);
  check_cache(c);
  check::require(c.attn_type == AttentionType::decoder, at("attn_type"), "decoder",
                 to_string(c.attn_type));
  check::require(c.window_left == -1, at("window_left"), "-1", c.window_left);
  check::require(c.window_right <= 0, at("window_right"), "-1 or 0", c.window_right);
  const auto in_range = [&](std::string_view name, std::int64_t value, std::int64_t least,
                            std::int64_t most) {
    check::require(
        value >= least && value <= most, at(name),
        [&] { return fmt::format("a number from {} to {}", least, most); }, value);
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  in_range("num_speculative_tokens", c.num_speculative_tokens, 0, kMostThreshold);
  in_range("num_workers", c.num_workers, 1, kMost);
  in_range("max_num_splits", c.max_num_splits, 0, kMost);
  in_range("mla.max_model_len", m.max_model_len, 1, kMost);
  in_range("mla.max_num_seqs", m.max_num_seqs, 1, kMost);
  in_range("mla.decode_threshold", m.decode_threshold, 0, kMostThreshold);
  if (m.workspace_tokens != 0)
    in_range("mla.workspace_tokens", m.workspace_tokens, std::max(kPieceSize, c.cache.block_size),
             kMost);
  for (const KernelKind kind : {kernel_kind(m.dtype, m.dtype, m.dtype),
                                kernel_kind(m.dtype, c.cache.dtype, c.cache.format)})
    arithmetic_level(c.arithmetic, kernel_choice().level(kind), kind, kMakeOp);
}

class MlaBuilder final : public MetadataBuilder {
 public:
  explicit MlaBuilder(const BuilderConfig& config) : config_(config) {
    check_config(config);
    const MlaBuilderConfig& m = *config_.mla;
    MlaPrefillConfig wanted;
    wanted.platform = m.platform;
    wanted.dtype = m.dtype;
    wanted.dims = m.dims;
    wanted.quant_output = m.quant_output;
    prefill_backend_ = &require_mla_prefill(wanted, m.prefill_backend);
    prefill_ = prefill_backend_->make_impl(
        {config_.num_q_heads, std::nullopt, m.dims, m.dtype, m.platform});
    workspace_tokens_ =
        m.workspace_tokens != 0
            ? m.workspace_tokens
            : mla_workspace_tokens(m.max_model_len, m.max_num_seqs, config_.cache.block_size);
  }

  /// The plans are quick already: `fast_build` changes nothing. Nor does a common prefix: rows of
  /// latents are read once for all heads of a request.
  std::unique_ptr<Metadata> build(int /*common_prefix_len*/, const CommonMetadata& batch,
                                  bool /*fast_build*/) override {
    check_batch(batch);
    auto m = std::make_unique<MlaMetadata>();
    const MlaBuilderConfig& mla = *config_.mla;
    m->num_reqs = batch.num_reqs;
    m->num_tokens = batch.num_tokens;
    m->dims = mla.dims;
    m->num_heads = config_.num_q_heads;
    m->dtype = mla.dtype;
    m->stored = {config_.cache.dtype, config_.cache.format};
    m->prefill_backend = prefill_backend_;
    m->quant_output = mla.quant_output;
    m->seq_lens.assign(batch.seq_lens.begin(), batch.seq_lens.begin() + batch.num_reqs);
    m->split = split_decodes_and_prefills(
        batch, {.decode_threshold = *reorder_batch_threshold(),
                .treat_short_extends_as_decodes = mla.short_extends_decode,
                .fresh_prompts_are_prefills = true});
    set_tables(*m, batch.block_table, batch.slot_mapping, kBuildOp);
    plan_decodes(*m, batch);
    plan_prefills(*m, batch);
    m->layout = lay_out(*m, *prefill_);
    return m;
  }

  std::unique_ptr<Metadata> update_block_table(
      const Metadata& m, const ConstTensorView& block_table,
      std::span<const std::int64_t> slot_mapping) const override {
    const auto* old = dynamic_cast<const MlaMetadata*>(&m);
    check::require(old != nullptr, {kUpdateOp, "m"}, "metadata of a FLASH_ATTN_MLA group",
                   "another back end's");
    check_block_table(kUpdateOp, block_table, old->seq_lens, config_.cache.block_size);
    auto updated = std::make_unique<MlaMetadata>(*old);
    set_tables(*updated, block_table, slot_mapping, kUpdateOp);
    return updated;
  }

  std::optional<int> reorder_batch_threshold() const noexcept override {
    const int own = config_.mla->decode_threshold;
    return own != 0 ? own : std::max(kMlaDecodeThreshold, 1 + config_.num_speculative_tokens);
  }

 private:
  void check_batch(const CommonMetadata& batch) const {
    batch.validate(config_.cache.block_size);
    check::require(batch.causal, {kBuildOp, "causal"}, "true: MLA layers are causal", "false");
    const auto flags = first_of(batch.request_causal, batch.num_reqs);
    const auto other = std::ranges::find(flags, std::uint8_t{0});
    check::require(other == flags.end(), {kBuildOp, "request_causal"}, "1 for every request",
                   [&] { return fmt::format("0 at index {}", other - flags.begin()); });
    check_block_table(kBuildOp, batch.block_table, first_of(batch.seq_lens, batch.num_reqs),
                      config_.cache.block_size);
  }

  void set_tables(MlaMetadata& m, const ConstTensorView& block_table,
                  std::span<const std::int64_t> slot_mapping, std::string_view op) const {
    const auto slots =
        checked_slots({op, "slot_mapping"}, slot_mapping, m.num_tokens, config_.cache);
    m.slot_mapping.assign(slots.begin(), slots.end());
    m.block_size = config_.cache.block_size;
    m.block_table = block_table.defined() ? block_table.slice(0, 0, m.num_reqs) : block_table;
  }

  AttentionPlanInput plan_input() const {
    AttentionPlanInput in;
    in.op = kBuildOp.data();
    in.num_q_heads = config_.num_q_heads;
    in.num_workers = config_.num_workers;
    in.max_num_splits = config_.max_num_splits;
    in.arithmetic = config_.arithmetic;
    return in;
  }

  void plan_decodes(MlaMetadata& m, const CommonMetadata& batch) const {
    if (m.split.num_decodes == 0) return;
    const auto count = static_cast<std::size_t>(m.split.num_decodes);
    AttentionPlanInput in = plan_input();
    in.query_start_loc = std::span(batch.query_start_loc).first(count + 1);
    in.seq_lens = std::span(batch.seq_lens).first(count);
    in.num_kv_heads = 1;
    in.head_dim_qk = m.dims.cache_dim();
    in.head_dim_v = m.dims.kv_lora_rank;
    m.decode = plan_mla_decode(in);
  }

  void plan_prefills(MlaMetadata& m, const CommonMetadata& batch) const {
    if (m.split.num_prefills == 0) return;
    m.prefill_steps =
        cut_prefill({m.split.num_decodes, m.num_reqs, batch.query_start_loc, batch.seq_lens},
                    workspace_tokens_);
    const std::int32_t first_token = m.split.num_decode_tokens;
    std::vector<std::int32_t> starts, counts;
    for (PrefillStep& step : m.prefill_steps) {
      starts.clear();
      counts.clear();
      for (int r = step.request_begin; r <= step.request_end; ++r)
        starts.push_back(batch.query_start_loc[static_cast<std::size_t>(r)] - step.token_begin);
      for (std::size_t i = 0; i + 1 < step.cu_seq_lens.size(); ++i)
        counts.push_back(step.cu_seq_lens[i + 1] - step.cu_seq_lens[i]);
      AttentionPlanInput in = plan_input();
      in.query_start_loc = starts;
      in.seq_lens = counts;
      in.num_kv_heads = config_.num_q_heads;
      in.head_dim_qk = m.dims.qk_head_dim();
      in.head_dim_v = prefill_->head_dim_v();
      in.causal = step.last;
      step.plan = plan_attention(in);
      m.max_keys = std::max(m.max_keys, step.num_keys());
      if (!step.last)
        m.carried_tokens = std::max<std::int64_t>(m.carried_tokens,
                                                  step.token_begin + starts.back() - first_token);
    }
  }

  BuilderConfig config_;
  const MlaPrefillBackend* prefill_backend_ = nullptr;
  std::unique_ptr<MlaPrefill> prefill_;  ///< tells sizes
  std::int64_t workspace_tokens_ = 0;
};

}  // namespace

std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) {
  return std::make_unique<MlaBuilder>(config);
}

}  // namespace attend::mla
