// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <optional>
#include <vector>

#include "attend/backend/backend.h"
#include "attend/ops/indexer_cache.h"

/// What chooses the tokens of sparse multi-head latent attention: the indexer of a layer, from its
/// projections to ForwardArgs::topk_indices.
namespace attend {

/// Constants of one layer's indexer.
struct SparseIndexerConfig {
  int num_heads = 64;  ///< of 128 elements, >= 1
  int topk = 2048;     ///< tokens chosen for each query, >= 1: SparseBuilderConfig::topk
  /// [max_pos, 64] as in PrepareIndexerArgs; must live as long as the indexer.
  ConstTensorView cos_sin_cache;
  bool is_neox = true;                            ///< as in PrepareIndexerArgs
  std::vector<float> k_norm_weight, k_norm_bias;  ///< [128]: LayerNorm of the keys
  float k_norm_eps = 1e-6F;
  bool hadamard = false;                         ///< as in PrepareIndexerArgs
  IndexerScale scale_fmt = IndexerScale::ue8m0;  ///< of queries and keys
  std::optional<float> softmax_scale;            ///< unset = 128^-0.5
};

/// Tensors of one call. With ranks all but cache and workspace are the same on all. T as in
/// ForwardArgs; rows beyond the batch's num_tokens are not read.
struct SparseIndexerArgs {
  ConstTensorView q;          ///< [T, H, 128] or [T, H * 128]: f32, f16 or bf16
  ConstTensorView k;          ///< [T, 128], dtype of q
  ConstTensorView weights;    ///< [T, H], f32 or dtype of q
  ConstTensorView positions;  ///< i64 [>= num_tokens], contiguous
  /// u8 [num_blocks, block_size, 132], the indexer's own cache. Block table, slots and block size
  /// are those of the metadata: update_block_table() makes one for a cache with other blocks.
  TensorView cache;
  /// i32 [T, topk], last dimension stride 1: result. -1 in rows beyond the batch's.
  TensorView topk_indices;
  Workspace workspace;
  Executor* executor = nullptr;  ///< null = default_executor()
  /// The rank that the builder was told of (SparseBuilderConfig::dcp_world_size), null without
  /// ranks.
  Communicator* communicator = nullptr;
};

/// Any number of threads may call it at the same time.
class SparseIndexer {
 public:
  /// @throws InvalidArgument naming the field that is out of range.
  explicit SparseIndexer(SparseIndexerConfig config);

  /// Bytes that forward() needs with metadata of a sparse MLA builder.
  /// @throws InvalidArgument for other metadata.
  std::size_t workspace_bytes(const Metadata& metadata) const;

  /// Writes the keys of the new tokens into the cache, then chooses for each query token the `topk`
  /// tokens up to itself with the highest logits, ascending (the lower of equals; docs of top_k.h),
  /// or all of them if there are no more, and then -1. Logits of no more than
  /// SparseBuilderConfig::max_logits_bytes are in memory at a time, and none are computed for
  /// tokens that see no more than `topk`. What is chosen for a token depends on its request alone.
  /// `metadata` null = profiling run: -1 everywhere, nothing is read.
  ///
  /// With several ranks it is a collective call. The cache of each holds the keys of its own
  /// tokens, in the slots of dcp_slot_mapping(). Each chooses among them, and dcp_top_k() makes of
  /// that what a single rank would choose: the same bits on all ranks. A rank whose call throws
  /// must abort the group, or the others wait for it (run_in_process does).
  /// @throws InvalidArgument before anything but the workspace is written, or sent;
  /// CommunicatorAborted.
  void forward(const SparseIndexerArgs& args, const Metadata* metadata) const;

  const SparseIndexerConfig& config() const noexcept { return config_; }

 private:
  SparseIndexerConfig config_;
};

}  // namespace attend
