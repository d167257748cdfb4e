// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "attend/ops/differential.h"
#include "attend/plan/attention_plan.h"
#include "conformance/attention_shape.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// What follows the maps, with the memory that it points to.
struct DifferentialCombineProblem {
  DifferentialCombineProblem() = default;
  DifferentialCombineProblem(Rng& rng, DifferentialVariant kind, std::int64_t tokens,
                             std::int64_t heads, int width);

  DifferentialCombine args() const;
  std::string describe() const;

  DifferentialVariant variant = DifferentialVariant::v1;
  HeadPairing pairing = HeadPairing::interleaved;
  DifferentialCombine values;  ///< without the views
  Storage token_lambda, norm_weight;
};

/// How the two branches of a cache lie in memory; `layers`: the blocks of all layers outermost.
enum class BranchStorage : std::uint8_t { ragged, nhd, hnd, layers_nhd, layers_hnd };

struct DifferentialOptions {
  BranchStorage kv = BranchStorage::ragged;
  int block_size = 16;  ///< paged
  bool padded = false;  ///< gaps between rows of every tensor
  bool maps = false;    ///< the maps are the output
  bool lse = true;
  bool lse_by_head = false;    ///< lse stored as [H, T]
  std::optional<DType> codes;  ///< of keys and values: fp8
  bool fp8_queries = false;
  bool share_prefixes = false;  ///< paged: some requests begin with the same blocks
};
DifferentialOptions random_differential_options(Rng& rng);

/// A differential_attention problem with its memory. What no query may read is NaN, as in
/// VarlenProblem.
struct DifferentialProblem {
  DifferentialProblem(Rng& rng, const DifferentialOptions& memory);

  DifferentialAttentionArgs args() const;
  /// A plan's input but for workers and kernels; points into the problem.
  AttentionPlanInput plan_input() const;
  /// Puts the outputs back to what they were before the op.
  void reset();
  Storage& result() noexcept { return options.maps ? maps : out; }
  std::string describe() const;

  AttentionShape shape;  ///< head_dim_v: width of a map
  DifferentialOptions options;
  DifferentialCombineProblem combine;
  std::vector<SharedPrefix> shared_prefixes;  ///< with options.share_prefixes
  Storage q, out, maps, lse;
  Storage kv;    ///< [2 branches, 2, num_blocks, block_size, Hk / 2, D]: variant v1, paged
  Storage k, v;  ///< the others
  HeadValues head_values;
  Storage q_descale, k_descale, v_descale;  ///< of fp8 problems, each or none
  Storage query_start_loc, cu_seqlens_kv, seq_lens, block_table;
  AttentionParams params;

 private:
  bool is_v1() const noexcept { return combine.variant == DifferentialVariant::v1; }
  DType kv_dtype() const noexcept { return options.codes.value_or(shape.dtype); }
  void make_shape(Rng& rng);
  void make_outputs(Rng& rng);
  void make_descales(Rng& rng);
  void make_ragged(Rng& rng);
  void make_paged(Rng& rng);
  void fill_row(Rng& rng, std::int64_t block, std::int64_t offset);

  std::vector<std::int32_t> query_start_;
};

}  // namespace attend::conformance
