// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <vector>

#include "attend/dist/mla.h"
#include "attend/ops/mla.h"
#include "attend/ops/mla_cache.h"
#include "attend/oracle/attention.h"
#include "support/host_tensor.h"

namespace attend::testing {

/// Lengths and sizes of a batch of MLA decodes. kv_dtype: a plain format, or u8 for fp8_ds_mla.
struct MlaBatchShape {
  DType dtype = DType::f32;
  DType kv_dtype = DType::f32;
  int latent = 32, rope = 8;
  int heads = 12;                         ///< of all ranks
  std::vector<int> seq_lens, query_lens;  ///< [B]
  bool causal = true;
  float softcap = 0.0F;

  int dim() const { return latent + rope; }
  int row() const { return kv_dtype == DType::u8 ? 656 : dim(); }
};

/// Queries and latents, wherever the latter are cached.
struct MlaBatch {
  MlaBatch(const MlaBatchShape& shape, Rng& rng);

  MlaBatchShape shape;
  std::int64_t tokens, keys;
  HostTensor q;                                       ///< [T, H, E]
  HostTensor kv_c, k_pe;                              ///< [S, L], [S, R]
  HostTensor kv_scale;                                ///< [1]
  HostTensor query_start_loc, seq_lens, cu_seq_lens;  ///< i32
};

/// The batch with its latents spread over ranks, written through dcp_slot_mapping and
/// concat_and_cache_mla. Slots that hold no token are NaN, table entries behind the last used one
/// out of range.
class MlaRanks {
 public:
  MlaRanks(const MlaBatch& batch, DcpLayout layout, int block_size, Rng& rng);

  /// Arguments of one rank; out and lse are its heads of `out` and `lse`.
  DcpMlaDecodeArgs args(int rank) const;
  /// Poisons the outputs, runs dcp_mla_decode on all ranks with `threads` workers each.
  void run(DcpCombine combine, int threads = 1);
  /// All heads over the cache of rank 0. @pre a layout of one rank.
  MlaDecodeArgs whole() const;

  const MlaBatch* batch;
  DcpLayout layout;
  int block_size;
  HostTensor out, lse;  ///< [T, H, L], [T, H] of all ranks
  HostTensor block_table;
  std::vector<HostTensor> cache;  ///< one a rank

 private:
  std::int64_t used_columns(std::size_t request) const;
  std::int64_t place_blocks(Rng& rng);
  void fill_cache(int rank);
};

/// Float64 result of `whole`, whose bounds are widened by what splitting over up to `ranks` ranks
/// costs: docs/numerics.md, "Decode context parallelism".
oracle::Result expected(const MlaRanks& whole, int ranks);

/// A problem's `out` and `lse` lie within the bounds of `want`.
void expect_within(const MlaRanks& ranks, const oracle::Result& want);

}  // namespace attend::testing
