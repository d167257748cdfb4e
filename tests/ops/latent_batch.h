// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <map>
#include <utility>
#include <vector>

#include "attend/ops/mla.h"
#include "support/host_tensor.h"

namespace attend::testing {

/// A request of a batch over a latent cache. Its rows depend on `id` and their position alone.
struct LatentRequest {
  int id = 0;
  int keys = 0;
  int query = 1;  ///< tokens; the last one stands at position keys - 1
};

struct LatentOptions {
  DType dtype = DType::bf16;
  DType cache = DType::bf16;  ///< u8 = rows of the format with `dim` elements
  int heads = 4;
  int dim = 576, latent = 512;
  int block_size = 16;
  bool causal = true;
  unsigned placement = 0;  ///< which block is where; every number is another order
};

/// Tensors of a call of mla_decode. Blocks that no request uses and rows behind a request's last
/// key are NaN, entries of the table behind its last block are no blocks, results are poisoned.
class LatentBatch {
 public:
  LatentBatch(const LatentOptions& options, const std::vector<LatentRequest>& requests);

  MlaDecodeArgs args() const;
  AttentionPlanInput plan_input(int num_workers) const;

  /// Bytes of output and LSE of each (request, position).
  using Rows = std::map<std::pair<int, int>, std::vector<unsigned char>>;
  Rows rows() const;
  /// Runs args() and gives its rows.
  Rows run(Executor* executor, const KernelOptions& kernels);

  LatentOptions options;
  std::vector<LatentRequest> requests;
  HostTensor q, cache, block_table, query_start_loc, seq_lens, out, lse, kv_scale;

 private:
  void place_keys();
};

/// The same batch with a bf16 cache: what cp_gather_and_upconvert_fp8_kv_cache reads of the rows of
/// `batch`, whose cache is of bytes.
LatentBatch upconverted(const LatentBatch& batch);

}  // namespace attend::testing
