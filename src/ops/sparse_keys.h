// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string_view>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "kernels/cpu/attention/attention.h"

/// Attention in which every query token names its keys: a token is a request of its own, and its
/// keys are the rows at the front of its row in a table, a block being one row.
namespace attend::ops {

/// The keys of all tokens, as the caller named them.
struct SparseKeys {
  ConstTensorView cache;    ///< [num_blocks, block_size, E or bytes]
  ConstTensorView indices;  ///< i32 [T, topk] slots
  ConstTensorView lengths;  ///< i32 [T]: entries of a row that count; undefined = topk
  std::string_view cache_name, indices_name, lengths_name;  ///< for errors
};

/// Checks all but what check_latents() checks of the cache. No index is read: any number is good.
void check_sparse_keys(std::string_view op, const SparseKeys& keys, std::int64_t num_tokens);

/// Bytes of the table and of the numbers of keys.
std::size_t sparse_table_bytes(std::int64_t num_tokens, std::int64_t topk) noexcept;

/// Writes the table of valid indices to `memory` (order and repetitions kept), and makes it and the
/// cache the keys of the problem. @pre memory has sparse_table_bytes(); the checks have passed.
void place_sparse_keys(cpu::AttentionProblem& problem, const SparseKeys& keys, std::int32_t* memory,
                       Executor& executor);

}  // namespace attend::ops
