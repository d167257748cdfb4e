// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string_view>

#include "attend/ops/sparse_mla.h"

/// What sparse_mla_attention and the functions of FlashMLA share.
namespace attend::ops {

/// Everything that needs no plan, but scale and sinks. `cache_name`: the cache in errors.
void check_sparse_tensors(std::string_view op, std::string_view cache_name, const SparseMlaArgs& a);

/// That a plan and its resources fit.
void check_sparse_planned(std::string_view op, const SparseMlaArgs& a, const SparseMlaPlan& plan,
                          Workspace workspace, const Executor& executor);

/// State of rows whose keys come in two calls, as in AttentionProblem.
struct SparseCarry {
  float* state = nullptr;                 ///< null = all keys are here
  const std::uint8_t* resumes = nullptr;  ///< null: rows begin, and end in their state
};

/// Runs a plan. @pre everything above passed.
void run_sparse(const SparseMlaArgs& a, const SparseMlaPlan& plan, Workspace workspace,
                Executor& executor, const SparseCarry& carry = {});

}  // namespace attend::ops
