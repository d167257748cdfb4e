// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <vector>

#include "attend/ops/sparse_mla.h"
#include "attend/oracle/attention.h"

namespace attend::oracle {

/// As Result, and the largest logits with their bounds, [T, H].
struct SparseMlaResult {
  std::vector<double> out, out_bound;
  std::vector<double> lse, lse_bound;
  std::vector<double> max_logits, max_logits_bound;
};

/// Reference of sparse_mla_attention (arguments are only read). `more`: the keys that its indices
/// name in its cache count as well; the rest of it is not read. Null = none.
SparseMlaResult sparse_mla_attention(const SparseMlaArgs& args,
                                     const SparseMlaArgs* more = nullptr);

}  // namespace attend::oracle
