// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attend/ops/mla_weights.h"
#include "attend/oracle/projection.h"
#include "conformance/comparison.h"
#include "conformance/rng.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// Random weights of an MLA layer, in one of the forms that MlaWeights takes, for problems of some
/// rows.
class MlaWeightsProblem {
 public:
  explicit MlaWeightsProblem(Rng& rng);

  /// Packed for a level.
  std::shared_ptr<const MlaWeights> weights(IsaLevel isa, Executor& executor) const;
  const oracle::KvBProj& expected() const noexcept { return expected_; }
  int tokens() const noexcept { return tokens_; }
  DType dtype() const noexcept { return args_.dtype; }
  const MlaDims& dims() const noexcept { return args_.dims; }
  int num_heads() const noexcept { return args_.num_heads; }

  /// Rows of activations in the dtype of the layer, for each head if `per_head`. Some numbers are
  /// very large, some subnormal.
  Storage activations(Rng& rng, int dim, bool per_head) const;
  /// Room for [tokens, H, dim], heads or tokens outermost.
  Storage output(Rng& rng, int dim) const;
  std::string describe() const;

 private:
  void choose_weight(Rng& rng);

  KvBProjArgs args_;
  int tokens_;
  Storage weight_, scale_;
  oracle::KvBProj expected_;
};

}  // namespace attend::conformance
