// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "attend/dist/decode_context_parallel.h"
#include "attend/oracle/attention.h"
#include "support/host_tensor.h"

namespace attend::testing {

/// Lengths and shape of a batch whose context is spread over ranks.
struct DcpShape {
  DType dtype = DType::f32;
  DcpLayout layout;
  int block_size = 16;
  int kv_heads = 1;
  int heads_a_rank = 1;
  int dim = 16, dim_v = 16;
  std::vector<int> context_lens, query_lens;  ///< [B]
  bool causal = true;
  std::vector<std::uint8_t> request_causal;  ///< [B] or empty
  float softcap = 0.0F;

  int heads() const { return heads_a_rank * layout.world_size; }
};

/// The problem once as a whole (all keys one after the other) and once spread over the ranks:
/// caches filled through dcp_slot_mapping and reshape_and_cache_flash. Slots that hold no token are
/// NaN, table entries behind the last used one out of range.
class DcpProblem {
 public:
  DcpProblem(const DcpShape& shape, Rng& rng);

  /// All keys on one rank: what DCP must agree with. Outputs of its own.
  FlashAttnVarlenArgs whole() const;
  /// Arguments of one rank; out and lse are its heads of `out` and `lse`.
  DcpAttentionArgs args(int rank) const;
  /// Poisons the outputs, runs dcp_attention on all ranks with `threads` workers each.
  void run(DcpCombine combine, int threads = 1);

  DcpShape shape;
  std::int64_t tokens = 0, keys = 0;
  HostTensor q, k, v;                        ///< [T, H, D], [S, Hkv, D], [S, Hkv, Dv]
  HostTensor k_new, v_new;                   ///< [T, Hkv, *]
  HostTensor out, lse;                       ///< [T, H, Dv], [T, H] of all ranks
  HostTensor whole_out, whole_lse;           ///< the same of whole()
  std::vector<HostTensor> k_cache, v_cache;  ///< one a rank
  HostTensor query_start_loc, seq_lens, cu_seqlens_kv, block_table;

 private:
  void place_blocks(Rng& rng);
  void fill_caches();
};

/// Float64 result of the whole problem and how far DCP may be from it: the oracle's own bound plus
/// the further roundings of docs/numerics.md, "Decode context parallelism".
oracle::Result expected(const DcpProblem& problem);

}  // namespace attend::testing
