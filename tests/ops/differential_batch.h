// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <map>
#include <utility>
#include <vector>

#include "attend/ops/attention.h"
#include "attend/ops/differential.h"
#include "support/host_tensor.h"

namespace attend::testing {

/// A request of a batch. Its rows depend on `id` and their position alone.
struct DifferentialRequest {
  int id = 0;
  int keys = 0;
  int query = 1;  ///< tokens; the last one stands at position keys - 1
};

struct DifferentialBatchOptions {
  DType dtype = DType::bf16;
  DType cache = DType::bf16;  ///< that of the queries, or fp8
  DifferentialVariant variant = DifferentialVariant::v1;
  HeadPairing pairing = HeadPairing::interleaved;
  int kv_heads = 4, group = 2;  ///< query heads to a kv head
  int dim = 32;
  int block_size = 16;  ///< 0 = ragged keys
  bool hnd = false;
  bool maps = false;       ///< the maps instead of the combined result
  unsigned placement = 0;  ///< which block is where; every number is another order

  int q_heads() const noexcept { return kv_heads * group; }
  bool is_v2() const noexcept { return variant == DifferentialVariant::v2; }
  int width() const noexcept { return is_v2() ? dim : 2 * dim; }
};

/// Tensors of a call of differential_attention, causal, with a norm and a weight in variant v1.
/// Blocks that no request uses and rows behind a request's last key are NaN, entries of the table
/// behind its last block are no blocks, results are poisoned.
class DifferentialBatch {
 public:
  DifferentialBatch(const DifferentialBatchOptions& options,
                    const std::vector<DifferentialRequest>& requests);

  DifferentialAttentionArgs args() const;
  AttentionPlanInput plan_input(int num_workers) const;
  TensorView result() const noexcept { return options.maps ? maps.view() : out.view(); }
  /// Head of a pair among `heads`.
  int head(int pair, int branch, int heads) const noexcept;

  /// Bytes of the result and the LSE of each (request, position).
  using Rows = std::map<std::pair<int, int>, std::vector<unsigned char>>;
  Rows rows() const;
  /// Poisons the results, runs args() and gives its rows.
  Rows run(Executor* executor, const KernelOptions& kernels);
  /// The same with a plan; its workspace begins as NaN.
  Rows run(const AttentionPlan& plan, Executor& executor);
  void poison() noexcept;

  DifferentialBatchOptions options;
  std::vector<DifferentialRequest> requests;
  HostTensor q, kv, block_table, query_start_loc, seq_lens, key_start_loc;
  HostTensor out, maps, lse;
  HostTensor token_lambda, norm_weight, descale;
  /// What args() has, to be changed by tests.
  AttentionParams params;
  DifferentialCombine combine;

 private:
  void place_keys();
  TensorView cache_view() const;
  TensorView key_row(const TensorView& t, std::int64_t block, std::int64_t offset,
                     int kv_head) const;
};

/// Both maps of every query head of a batch by flash_attn_varlen in exact arithmetic from ragged
/// keys, each half of the values by itself. Heads in the order of the batch.
struct PlainMaps {
  PlainMaps(const DifferentialBatch& batch, DType out_dtype, IsaLevel level);
  HostTensor out, lse;  ///< [T, H, W], [T, H]
};

/// Whether an element is NaN; of a float tensor.
bool has_nan(const TensorView& t);

}  // namespace attend::testing
