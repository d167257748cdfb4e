// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string_view>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "kernels/cpu/indexer/indexer.h"

namespace attend::ops {

/// Consecutive keys, by pointers to their codes.
struct IndexerKeyRange {
  std::int64_t begin = 0;
  int count = 0;
  const std::uint8_t** rows = nullptr;
  float* scales = nullptr;
};

/// Keys [begin, end) of a row.
struct KeySpan {
  std::int64_t begin = 0, end = 0;
};

/// Logits of rows in groups: rows of a group see keys of one list. Checked.
struct IndexerLogitsWork {
  ConstTensorView q;        ///< [requests, rows of a request, H, 128]
  ConstTensorView weights;  ///< [rows, H]
  TensorView logits;        ///< [rows, width]
  bool clean_logits = true;
  std::int64_t group_rows = 1;  ///< rows of a group; the last one may have fewer
  /// The keys that a row sees.
  FunctionRef<KeySpan(std::int64_t row)> span;
  /// Finds keys of a group's list: fills `rows` and `scales`.
  FunctionRef<void(std::int64_t group, const IndexerKeyRange& keys)> find;
};

/// Computes on the executor (null = the default one), or alone if there is little to do.
void run_indexer_logits(const IndexerLogitsWork& work, const cpu::IndexerKernel& kernel,
                        Executor* executor);

/// Checks queries [..., H, 128] of any number of rows, weights and results [rows, -1] against each
/// other.
void check_indexer_rows(std::string_view op, const ConstTensorView& q,
                        const ConstTensorView& weights, const TensorView& logits);

}  // namespace attend::ops
