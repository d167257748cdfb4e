// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "attend/ops/attention.h"
#include "attend/ops/int8_attention.h"
#include "attend/ops/merge.h"

/// float64 reference of every op: plain loops, no vectorisation, no code shared with kernels or
/// ops.
namespace attend::oracle {

/// One attention row, from functions that give the values: needs no cache.
struct RowProblem {
  int head_dim_qk = 0, head_dim_v = 0;
  std::int64_t position = 0;  ///< absolute position of the query
  std::int64_t num_keys = 0;  ///< keys 0 .. num_keys - 1 exist
  double scale = 1.0;
  bool causal = true;
  std::int64_t window_left = -1, window_right = -1;
  double softcap = 0.0;
  double alibi_slope = 0.0;        ///< 0 = off
  bool alibi_sqrt = false;         ///< as in AttentionParams
  std::optional<double> sink;      ///< logit of the sink; unset = none
  bool lse_includes_sink = false;  ///< as in AttentionParams
  /// Weights are rounded to n / weight_levels of the largest of their 256-key piece; the LSE is
  /// not. 0 = off.
  int weight_levels = 0;
  /// A kernel may carry the weights as sums of two bf16 numbers: see splits_weights.
  bool split_weights = false;
  /// Size of a part of the logits that q and k do not show, because the kernel adds it by itself.
  double extra_logit_magnitude = 0.0;
  std::function<double(int d)> q;                  ///< value as the kernel sees it (rounded)
  std::function<double(std::int64_t j, int d)> k;  ///< key j
  std::function<double(std::int64_t j, int d)> v;  ///< value row j
};

/// Result of a row and what an error bound needs.
struct RowResult {
  std::vector<double> out;       ///< [head_dim_v]
  double lse = 0.0;              ///< natural log; -inf if no key is visible
  std::vector<double> abs_out;   ///< [head_dim_v] sum_j p_j |v_j|
  double logit_magnitude = 0.0;  ///< max over visible j of |scale| * sum_d |q_d k_jd|
  double bias_magnitude = 0.0;   ///< max over visible j of the ALiBi bias's absolute value
  double softcap = 0.0;          ///< of the problem; 0 = off
  bool has_sink = false;         ///< a finite sink was counted
  double sink_magnitude = 0.0;   ///< its absolute value, else 0
  double largest_value = 0.0;    ///< largest |v_jd| of the visible j
  std::int64_t visible_keys = 0;
  bool split_weights = false;  ///< of the problem
  /// Rounded weights only: what float32 errors can move by turning a weight to its other neighbour.
  double doubtful_weight = 0.0;          ///< of the denominator, relative to it
  std::vector<double> doubtful_abs_out;  ///< [head_dim_v] of the output; empty if not rounded
};
RowResult attention_row(const RowProblem& p);
/// Whether kernels may carry the weights of values stored as `values` as sums of two bf16 numbers:
/// where bf16 holds every value exactly. False for values of int8 queries.
bool splits_weights(DType values) noexcept;

/// Largest error that a float32-accumulating kernel may make in out[d] for this row, derived in
/// docs/numerics.md: rounding of the output to `out_dtype` plus the propagated float32 errors of
/// logits, exponentials and sums, times 2.
double out_error_bound(const RowResult& r, int d, int head_dim_qk, DType out_dtype);
/// Same for the natural-log LSE.
double lse_error_bound(const RowResult& r, int head_dim_qk);

/// Full results of an op, in float64, for comparison.
struct Result {
  std::vector<double> out;        ///< contiguous, shape of args.out
  std::vector<double> lse;        ///< contiguous, shape of lse in the op's layout
  std::vector<double> out_bound;  ///< per element of out
  std::vector<double> lse_bound;  ///< per element of lse
};
/// Reference of flash_attn_varlen (arguments are only read).
Result flash_attn_varlen(const FlashAttnVarlenArgs& args);
/// Reference of flash_attn_varlen_int8 and, after its rows are saved, of the paged ops.
Result flash_attn_varlen_int8(const FlashAttnVarlenInt8Args& args);
/// Reference of flash_attn_with_kvcache: caches are read as they were before the call.
Result flash_attn_with_kvcache(const FlashAttnWithKvCacheArgs& args);
/// What the append of flash_attn_with_kvcache must leave in the cache, [B, Snew, Hkv, D].
struct AppendedKeys {
  std::vector<double> value;  ///< new keys, rotated and rounded to the dtype of the cache
  std::vector<double> bound;  ///< largest error per element; 0 = the bits must agree
};
AppendedKeys appended_keys(const FlashAttnWithKvCacheArgs& args);
/// Reference of merge_attn_states.
Result merge_attn_states(const MergeAttnStatesArgs& args);

}  // namespace attend::oracle
