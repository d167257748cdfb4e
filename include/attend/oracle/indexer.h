// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "attend/ops/indexer.h"
#include "attend/ops/indexer_logits.h"

/// float64 reference of the indexer of sparse MLA. Arguments are only read, and are valid. Bounds
/// are derived in docs/numerics.md, section "Indexer".
namespace attend::oracle {

/// Logits [rows, columns] with the largest error that float32 sums may make in each. -infinity with
/// bound 0 where a row does not see the key, NaN where a code is NaN.
struct IndexerLogits {
  std::vector<double> logits, bound;
};
IndexerLogits fp8_mqa_logits(const Fp8MqaLogitsArgs& args);
IndexerLogits fp8_paged_mqa_logits(const Fp8PagedMqaLogitsArgs& args);

/// What prepare_indexer() computes before it encodes: queries [T, H, 128] and keys [T, 128], with
/// the largest error of each. Without a Hadamard transform that of queries is 0.
struct PreparedIndexer {
  std::vector<double> q, q_bound;
  std::vector<double> k, k_bound;
};
PreparedIndexer prepare_indexer(const PrepareIndexerArgs& args);

/// Codes and scale of a query: as indexer_key(), from max(amax, 1e-10) / 448.
float indexer_query(std::span<const double> query, bool power_of_two,
                    std::span<std::uint8_t> codes) noexcept;

/// True if `indices` may be what top_k_per_row_* chooses of logits that are off by no more than
/// their bounds: as many as there can be, ascending, then -1, and none that is surely below one
/// that is left out. @pre No NaN.
bool may_be_top_k(std::span<const double> logits, std::span<const double> bounds,
                  std::span<const std::int32_t> indices);

}  // namespace attend::oracle
