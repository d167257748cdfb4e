// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "attend/core/tensor_view.h"

/// What back ends of sparse multi-head latent attention have besides: every query token attends to
/// the tokens that an indexer chose for it.
namespace attend {

/// Where prefill tokens read their keys. Changes no bit of a result.
enum class SparseStrategy : std::uint8_t {
  automatic,  ///< what a model of the two costs expects to be faster
  mixed,      ///< the whole batch reads the cache
  /// Requests that prefill are gathered into a workspace of bf16 rows, a few at a time, which their
  /// tokens read; decodes read the cache.
  separate
};
std::string_view to_string(SparseStrategy strategy) noexcept;
std::optional<SparseStrategy> parse_sparse_strategy(std::string_view name) noexcept;

/// Why a batch takes its strategy.
enum class SparseReason : std::uint8_t {
  asked_for,           ///< as BuilderConfig says
  bf16_rows,           ///< the cache has no codes: a gather would save nothing
  no_prefills,         ///< nothing to gather for
  context_parallel,    ///< keys are spread over ranks, each reads its own
  small_workspace,     ///< no request that prefills fits the workspace
  reading_is_cheaper,  ///< too few tokens read a row for a gather to pay
  gather_is_cheaper    ///< rows are converted once and read by many tokens
};
/// The reason in words.
std::string_view to_string(SparseReason reason) noexcept;

struct SparseDecision {
  SparseStrategy strategy = SparseStrategy::mixed;  ///< mixed or separate
  SparseReason reason = SparseReason::no_prefills;
  /// Estimates of what the strategies do not have in common, in microseconds a layer: dequantising
  /// a row for each token that reads it, or gathering it once. 0 where nothing was estimated.
  double dequantise_us = 0.0, gather_us = 0.0;
};
/// The decision in one line.
std::string describe(const SparseDecision& decision);

/// What a sparse MLA back end's builder needs besides MlaBuilderConfig, whose workspace_tokens are
/// here the rows of the bf16 workspace (0 = sparse_workspace_tokens()).
struct SparseBuilderConfig {
  int topk = 0;                    ///< most tokens that a query attends to, >= 1
  int max_num_batched_tokens = 0;  ///< query tokens of the largest batch, >= 1
  SparseStrategy strategy = SparseStrategy::automatic;
  /// Processors that tile_scheduler_metadata is made for; 0 = BuilderConfig::num_workers.
  int num_processors = 0;
  /// Decode context parallelism: position p belongs to rank (p / interleave) mod world_size. With
  /// more than one rank block tables, slots and caches are those of dcp_slot_mapping(), and layers
  /// need ForwardArgs::communicator, indexers SparseIndexerArgs::communicator.
  int dcp_world_size = 1, dcp_rank = 0, dcp_interleave = 1;
  /// Budgets of the indexer's prefill, in keys that are gathered at a time (0 = that of the
  /// workspace) and in bytes of logits. Neither changes a bit. With several ranks they are those of
  /// a rank, and the same on all; what the ranks exchange for more tokens than one keeps the
  /// second.
  std::int64_t max_gathered_keys = 0;
  std::int64_t max_logits_bytes = std::int64_t{256} << 20;
};

/// Rows of the bf16 workspace: five requests of the greatest length as in vLLM, with a limit of
/// kSparseMostWorkspaceTokens, but at least one.
inline constexpr std::int64_t kSparseMostWorkspaceTokens = 65536;
std::int64_t sparse_workspace_tokens(std::int64_t max_model_len) noexcept;

/// What a builder found out about a batch of T query tokens. Views are valid as long as the
/// metadata; their memory is used again by the next batch once the metadata is gone.
struct SparseBatch {
  SparseDecision decision;
  int topk = 0;
  ConstTensorView req_id_per_token;  ///< i32 [T]: request of each query token
  // Caches of fp8_ds_mla, else undefined: the schedule that flash_mla_with_kvcache() takes if all
  // tokens are put to it as one request. The layers have a schedule of their own.
  ConstTensorView tile_scheduler_metadata;  ///< i32 [parts, 8]
  ConstTensorView num_splits;               ///< i32 [2]
  ConstTensorView cache_lens;               ///< i32 [1]: max_model_len
};

}  // namespace attend
