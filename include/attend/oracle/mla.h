// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "attend/core/dtype.h"
#include "attend/core/mla_dims.h"

/// float64 reference of a whole MLA layer: one (token, head) at a time, from the query, the latents
/// and the weights to the head's output.
namespace attend::oracle {

/// One row, from functions that give the values: needs no cache.
struct MlaRowProblem {
  MlaDims dims;
  std::int64_t position = 0;  ///< absolute position of the query
  std::int64_t num_keys = 0;  ///< keys 0 .. num_keys - 1 exist
  double scale = 1.0;
  bool causal = true;
  /// Of weights, activations and output: f32, f16 or bf16. What the layer keeps between its steps
  /// is rounded to it.
  DType dtype = DType::bf16;
  /// Of the cache's elements: decode may carry the weights of its values as two bf16 numbers, see
  /// splits_weights.
  DType cache_dtype = DType::bf16;
  std::function<double(int d)> q;  ///< P values without position, then R rotated ones
  /// Latent of key j, 0 <= l < L, as attention sees it: the cache gives it back.
  std::function<double(std::int64_t j, int l)> latent;
  std::function<double(std::int64_t j, int d)> k_pe;  ///< rotated part of key j, 0 <= d < R
  std::function<double(int p, int l)> w_uk;           ///< [P, L] weights of the head's keys
  std::function<double(int v, int l)> w_uv;           ///< [V, L] weights of the head's values
};

/// A row without any rounding.
struct MlaExactRow {
  std::vector<double> out;  ///< [V]
  double lse = 0.0;         ///< natural log; -inf if no key is visible
};
/// Keys and values of the head are made of every latent, then attended to.
MlaExactRow mla_compute_friendly_row(const MlaRowProblem& p);
/// The weights of the keys are multiplied into the query, which attends to the latents; the weights
/// of the values are multiplied by the result. Algebraically the same.
MlaExactRow mla_absorbed_row(const MlaRowProblem& p);

/// A row as a layer computes it, and how far from that a layer may be: docs/numerics.md.
struct MlaRowResult {
  std::vector<double> out;        ///< [V]
  std::vector<double> out_bound;  ///< [V]
  double lse = 0.0;               ///< natural log; -inf if no key is visible
  double lse_bound = 0.0;
};
/// Prefill: the compute-friendly form, keys and values rounded to the dtype.
MlaRowResult mla_prefill_row(const MlaRowProblem& p);
/// Decode: the absorbed form, the query against latents rounded to the dtype. That the attention's
/// output is rounded, too, is part of the bounds.
MlaRowResult mla_decode_row(const MlaRowProblem& p);
/// Sparse attention: the absorbed form over the keys that `chosen` names, one that is named twice
/// twice. Names that are negative or behind the query are skipped.
MlaRowResult mla_sparse_row(const MlaRowProblem& p, std::span<const std::int32_t> chosen);

}  // namespace attend::oracle
