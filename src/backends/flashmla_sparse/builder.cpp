// SPDX-License-Identifier: Apache-2.0
// Turns a batch into SparseMlaMetadata: where each token reads, and plans for as many tokens as a
// call takes at a time.
#include <fmt/format.h>

#include <algorithm>

#include "attend/ops/flash_mla.h"
#include "attend/plan/kernel_choice.h"
#include "backends/common/batch_checks.h"
#include "backends/flashmla_sparse/flashmla_sparse.h"
#include "backends/flashmla_sparse/metadata.h"
#include "backends/flashmla_sparse/strategy.h"
#include "backends/flashmla_sparse/workspace.h"
#include "core/check.h"
#include "dist/dcp/layout.h"

namespace attend::flashmla_sparse {
namespace {

constexpr std::string_view kMakeOp = "FLASHMLA_SPARSE.make_builder";
constexpr std::string_view kBuildOp = "FLASHMLA_SPARSE.build";
constexpr std::string_view kUpdateOp = "FLASHMLA_SPARSE.update_block_table";

/// Queries and results of the tokens that are attended to at a time take about so many bytes: 8192
/// tokens of 128 heads would take 2 GiB.
constexpr std::int64_t kTokenBytes = std::int64_t{64} << 20;

int processors(const BuilderConfig& c) {
  return c.sparse->num_processors != 0 ? c.sparse->num_processors : c.num_workers;
}

PersistentSizes sizes(const BuilderConfig& c) {
  const bool has_codes = c.cache.format == KvFormat::fp8_ds_mla;
  // Fewer query tokens make more parts.
  const int parts = has_codes ? mla_num_sm_parts(processors(c), c.num_q_heads, 1, 1) : 0;
  return {c.sparse->max_num_batched_tokens, parts, static_cast<int>(c.mla->max_model_len)};
}

class SparseMlaBuilder final : public MetadataBuilder {
 public:
  explicit SparseMlaBuilder(const BuilderConfig& config)
      : config_((check_config(kMakeOp, config), config)), pool_(sizes(config)) {
    workspace_rows_ = config.mla->workspace_tokens != 0
                          ? config.mla->workspace_tokens
                          : sparse_workspace_tokens(config.mla->max_model_len);
  }

  /// `fast_build` changes nothing, nor does a common prefix: every token names its keys.
  std::unique_ptr<Metadata> build(int /*common_prefix_len*/, const CommonMetadata& batch,
                                  bool /*fast_build*/) override {
    check_batch(batch);
    auto m = std::make_unique<SparseMlaMetadata>();
    const MlaBuilderConfig& mla = *config_.mla;
    const SparseBuilderConfig& sparse = *config_.sparse;
    m->num_reqs = batch.num_reqs;
    m->num_tokens = batch.num_tokens;
    m->dims = mla.dims;
    m->num_heads = config_.num_q_heads;
    m->topk = sparse.topk;
    m->stored = {config_.cache.dtype, config_.cache.format};
    m->dcp = {sparse.dcp_world_size, sparse.dcp_rank, sparse.dcp_interleave};
    m->num_workers = config_.num_workers;
    m->quant_output = mla.quant_output;
    m->seq_lens.assign(batch.seq_lens.begin(), batch.seq_lens.begin() + batch.num_reqs);
    m->query_start_loc.assign(1, 0);
    if (batch.num_reqs > 0)
      m->query_start_loc.assign(batch.query_start_loc.begin(),
                                batch.query_start_loc.begin() + batch.num_reqs + 1);
    m->split = split_decodes_and_prefills(
        batch, {.decode_threshold = *reorder_batch_threshold(),
                .treat_short_extends_as_decodes = mla.short_extends_decode,
                .fresh_prompts_are_prefills = true});
    set_tables(*m, batch.block_table, batch.slot_mapping, kBuildOp);
    choose_steps(*m);
    fill_buffers(*m);
    plan(*m);
    m->layout = lay_out(*m);
    return m;
  }

  std::unique_ptr<Metadata> update_block_table(
      const Metadata& m, const ConstTensorView& block_table,
      std::span<const std::int64_t> slot_mapping) const override {
    const auto* old = dynamic_cast<const SparseMlaMetadata*>(&m);
    check::require(old != nullptr, {kUpdateOp, "m"}, "metadata of a FLASHMLA_SPARSE group",
                   "another back end's");
    check_block_table(kUpdateOp, block_table, old->seq_lens, tokens_of_entry());
    auto updated = std::make_unique<SparseMlaMetadata>(*old);
    set_tables(*updated, block_table, slot_mapping, kUpdateOp);
    return updated;
  }

  std::optional<int> reorder_batch_threshold() const noexcept override {
    const int own = config_.mla->decode_threshold;
    return own != 0 ? own : 1 + config_.num_speculative_tokens;
  }

 private:
  /// Tokens that an entry of the block table stands for.
  int tokens_of_entry() const { return config_.cache.block_size * config_.sparse->dcp_world_size; }

  void check_batch(const CommonMetadata& batch) const {
    batch.validate(tokens_of_entry());
    check::require(batch.causal, {kBuildOp, "causal"}, "true: MLA layers are causal", "false");
    const auto flags = first_of(batch.request_causal, batch.num_reqs);
    const auto other = std::ranges::find(flags, std::uint8_t{0});
    check::require(other == flags.end(), {kBuildOp, "request_causal"}, "1 for every request",
                   [&] { return fmt::format("0 at index {}", other - flags.begin()); });
    const int most = config_.sparse->max_num_batched_tokens;
    check::require(
        batch.num_tokens <= most, {kBuildOp, "num_tokens"},
        [&] { return fmt::format("at most {}, as the builder was told", most); }, batch.num_tokens);
    check_block_table(kBuildOp, batch.block_table, first_of(batch.seq_lens, batch.num_reqs),
                      tokens_of_entry());
  }

  void set_tables(SparseMlaMetadata& m, const ConstTensorView& block_table,
                  std::span<const std::int64_t> slot_mapping, std::string_view op) const {
    const auto slots =
        checked_slots({op, "slot_mapping"}, slot_mapping, m.num_tokens, config_.cache);
    m.slot_mapping.assign(slots.begin(), slots.end());
    m.block_size = config_.cache.block_size;
    m.block_table = block_table.defined() ? block_table.slice(0, 0, m.num_reqs) : block_table;
  }

  void choose_steps(SparseMlaMetadata& m) const {
    const Requests requests{m.num_reqs, m.query_start_loc, m.seq_lens};
    m.batch.decision = decide({.asked = config_.sparse->strategy,
                               .has_codes = m.stored.format == KvFormat::fp8_ds_mla,
                               .dcp_world_size = m.dcp.world_size,
                               .topk = m.topk,
                               .first_prefill = m.split.num_decodes,
                               .workspace_rows = workspace_rows_,
                               .num_workers = config_.num_workers},
                              requests);
    m.steps = m.batch.decision.strategy == SparseStrategy::separate
                  ? separate_steps(requests, m.split.num_decodes, workspace_rows_)
                  : mixed_steps(requests);
    m.indexer = cut_indexer(
        requests,
        {.topk = m.topk,
         .first_prefill = m.split.num_decodes,
         .max_keys = config_.sparse->max_gathered_keys != 0 ? config_.sparse->max_gathered_keys
                                                            : workspace_rows_,
         .max_logits = config_.sparse->max_logits_bytes / static_cast<std::int64_t>(sizeof(float)),
         .layout = m.dcp.layout()});
    for (Step& step : m.steps) {
      m.most_rows = std::max(m.most_rows, step.rows);
      // Ends of rows, too: what cp_gather_cache() takes.
      if (step.gathered) step.workspace_starts.push_back(step.rows);
    }
  }

  void fill_buffers(SparseMlaMetadata& m) {
    m.buffers = pool_.take();
    PersistentBuffers& b = *m.buffers;
    const Requests requests{m.num_reqs, m.query_start_loc, m.seq_lens};
    for (const Step& step : m.steps) {
      for (int r = step.request_begin; r < step.request_end; ++r) {
        const auto first = static_cast<std::size_t>(m.query_start_loc[static_cast<std::size_t>(r)]);
        const std::int32_t queries = requests.query_len(r);
        for (std::int32_t i = 0; i < queries; ++i) {
          const std::size_t t = first + static_cast<std::size_t>(i);
          b.request_of_token[t] = r;
          const std::int32_t visible = requests.seq_len(r) - queries + i + 1;
          b.visible_of_token[t] = visible;
          b.held_of_token[t] =
              static_cast<std::int32_t>(dcp::local_count(visible, m.dcp.rank, m.dcp.layout()));
          b.workspace_request[t] = step.gathered ? r - step.request_begin : -1;
        }
      }
    }
    m.batch.topk = m.topk;
    m.batch.req_id_per_token = {b.request_of_token.data(), DType::i32, {m.num_tokens}};
    if (m.stored.format == KvFormat::fp8_ds_mla) fill_schedule(m);
  }

  /// The schedule of a decode in which all tokens are one request of topk keys.
  void fill_schedule(SparseMlaMetadata& m) const {
    PersistentBuffers& b = *m.buffers;
    const int parts =
        mla_num_sm_parts(processors(config_), m.num_heads, 1, std::max(1, m.num_tokens));
    const TensorView schedule(b.tile_scheduler_metadata.data(), DType::i32, {parts, 8});
    const TensorView splits(b.num_splits.data(), DType::i32, {2});
    const std::int32_t keys = m.topk;
    get_mla_metadata({{&keys, DType::i32, {1}}, schedule, splits});
    m.batch.tile_scheduler_metadata = schedule;
    m.batch.num_splits = splits;
    m.batch.cache_lens = {b.cache_lens.data(), DType::i32, {1}};
  }

  void plan(SparseMlaMetadata& m) const {
    const std::int64_t token_bytes =
        std::int64_t{m.num_heads} * (m.dims.cache_dim() + m.dims.kv_lora_rank) * 2;
    const auto at_once = static_cast<int>(std::max<std::int64_t>(16, kTokenBytes / token_bytes));
    const auto add = [&](int tokens) {
      m.tokens_at_once = std::max(m.tokens_at_once, tokens);
      if (tokens == 0 || m.plans.contains(tokens)) return;
      SparseMlaPlanInput in;
      in.num_tokens = tokens;
      in.topk = m.topk;
      in.num_heads = m.num_heads * m.dcp.world_size;
      in.head_dim_qk = m.dims.cache_dim();
      in.head_dim_v = m.dims.kv_lora_rank;
      in.num_workers = config_.num_workers;
      // One level for rows of the cache and of the workspace, or the strategies' bits would differ.
      in.isa = kernel_choice().level(kernel_kind(DType::bf16, m.stored.dtype, m.stored.format));
      in.arithmetic = config_.arithmetic;
      m.plans.emplace(tokens, plan_sparse_mla(in));
    };
    for (const Step& step : m.steps) {
      const int tokens = step.token_end - step.token_begin;
      add(std::min(tokens, at_once));
      if (tokens > at_once) add(tokens % at_once);
    }
  }

  BuilderConfig config_;
  BufferPool pool_;
  std::int64_t workspace_rows_ = 0;
};

}  // namespace

std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) {
  return std::make_unique<SparseMlaBuilder>(config);
}

}  // namespace attend::flashmla_sparse
