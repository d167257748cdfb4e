// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <vector>

#include "attend/core/dtype.h"
#include "attend/ops/differential.h"
#include "attend/oracle/attention.h"

/// float64 reference of differential attention. Bounds are derived in docs/numerics.md, section
/// "Differential attention".
namespace attend::oracle {

/// Reference of differential_attention (arguments are only read). `out` is that of args.maps where
/// it is defined; lse is [T, H], of both maps.
Result differential_attention(const DifferentialAttentionArgs& args);
/// Reference of differential_combine; no LSE.
Result differential_combine(const DifferentialCombineArgs& args);

/// A number and how far one of the library's may be from it.
struct Number {
  double value = 0.0, bound = 0.0;
};
/// Reference of differential_lambda.
Number differential_lambda(const DifferentialLambdaArgs& args);

/// What becomes of the two maps of one pair.
struct DifferentialRowCombine {
  double lambda = 0.0;        ///< as float32 has it
  double lambda_error = 0.0;  ///< how far the kernel's may be from it
  bool norm = true;
  std::vector<double> norm_weight;  ///< one an element; empty = ones
  double norm_eps = 1e-5;
  double out_scale = 1.0;
};
/// The lambda that belongs to an element of token_lambda: its sigmoid.
void set_token_lambda(DifferentialRowCombine& combine, double element) noexcept;

/// One pair of one token.
struct DifferentialRow {
  std::vector<double> out, out_bound;  ///< [head_dim_v of the maps]
  std::array<double, 2> lse{}, lse_bound{};
};
/// @pre Both maps have the same head_dim_v and see the same keys.
DifferentialRow differential_row(const RowProblem& first, const RowProblem& second,
                                 const DifferentialRowCombine& combine, DType out_dtype);

}  // namespace attend::oracle
