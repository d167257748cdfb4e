// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/oracle/attention.h"
#include "serving/row_check.h"

/// What a sampled row attends to, for the oracle: from the generator, never from the cache.
namespace attend::serving {

/// A head of a layer.
struct LayerHead {
  int layer = 0, head = 0;
};

/// One head's rows of a kind (query, key or value) as attention sees them, one position at a time:
/// keys and values as `storage` holds them, queries as it demands them.
class RegeneratedRows {
 public:
  /// The references must outlive the object.
  RegeneratedRows(const SampledRow& row, ValueKind kind, LayerHead place, int head_dim,
                  const ValueGenerator& generator, const KvStorage& storage);

  double operator()(std::int64_t j, int d) {
    if (j != position_) load(j);
    return values_[static_cast<std::size_t>(d)];
  }

 private:
  void load(std::int64_t j);
  void encode();
  void encode_value();
  void round();

  const SampledRow& row_;
  ValueKind kind_;
  LayerHead place_;
  const ValueGenerator& generator_;
  const KvStorage& storage_;
  std::int64_t position_ = -1;
  std::vector<float> generated_;
  std::vector<double> values_;
};

/// Everything about a query head's row but queries, keys and values. head_dim_v is that of a head.
oracle::RowProblem make_row_problem(const SampledRow& row, const ModelPreset& model, int head);

}  // namespace attend::serving
