// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <vector>

#include "attend/dist/differential.h"
#include "dist/dcp_problem.h"

namespace attend::testing {

/// Lengths are those of a DcpShape, kv_heads and heads_a_rank of it are the layer's, too; dim_v is
/// not read.
struct DcpDifferentialShape {
  DcpShape base;
  DifferentialVariant variant = DifferentialVariant::v1;
  HeadPairing pairing = HeadPairing::interleaved;
  bool norm = true;  ///< not read by variant v2
};

/// A differential layer once as a whole and once spread over the ranks. Slots that hold no token
/// are NaN.
class DcpDifferentialProblem {
 public:
  DcpDifferentialProblem(const DcpDifferentialShape& shape, Rng& rng);

  /// All keys on one rank.
  DifferentialAttentionArgs whole() const;
  DcpDifferentialAttentionArgs args(int rank) const;
  /// Poisons the outputs, runs dcp_differential_attention on all ranks.
  void run(DcpCombine exchange, int threads = 1);

  bool is_v1() const { return shape.variant == DifferentialVariant::v1; }
  int heads() const { return shape.base.heads(); }
  /// Columns of a map.
  int width() const { return is_v1() ? 2 * shape.base.dim : shape.base.dim; }
  /// Row of `lse` (or head of q) on a rank that has map `map` of its `pair`.
  int head_of_rank(int pair, int map) const;

  DcpDifferentialShape shape;
  /// The maps as plain attention: a key head and wide values for each query head, the two of a pair
  /// side by side. Has the lengths and the table, too.
  DcpProblem maps;
  HostTensor q, k, v, k_new, v_new;  ///< [T, H, D], [S, Hk, D], [T, Hk, D], paired by `pairing`
  std::vector<HostTensor> q_rank;    ///< [T, Hq, D], one a rank
  HostTensor token_lambda;           ///< [T, H / 2]
  HostTensor norm_weight;            ///< [2 D]
  HostTensor out, whole_out;         ///< v1 [T, H, D], v2 [T, H / 2, D]
  std::vector<HostTensor> lse;       ///< [T, Hq], one a rank
  HostTensor whole_lse;              ///< [T, H]
  std::vector<HostTensor> k_cache, v_cache;

 private:
  int head_of(int pair, int map, int heads) const;
  void spread_queries();
  void fill_maps();
  void fill_caches();
};

/// Float64 result of the whole layer, pairs in order, [T, H / 2, W], and how far DCP may be from
/// it; LSEs [T, H], the two of a pair side by side.
oracle::Result expected(const DcpDifferentialProblem& problem);

}  // namespace attend::testing
