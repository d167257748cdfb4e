// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "plan/shared_groups.h"
#include "plan/unit_cost.h"

namespace attend::plan {

/// A prefix is shared if that takes less than this share of the time of attending flat: the model
/// is off by some percent, and a wrong guess must not cost anything.
inline constexpr double kLeastGain = 0.9;

/// Expected time, in microseconds of all workers together, of the pieces of a group that are not
/// shared yet.
struct GroupCost {
  double flat_us, shared_us;
};

/// Model of the time of units: bytes read, operations, and the partial results that sharing stores
/// and merges.
class CascadeCost {
 public:
  explicit CascadeCost(const CascadeInput& input);

  /// Cost of a group, given the groups that are shared already.
  GroupCost of(const SharedGroup& group) const;
  /// From now on the group is shared.
  void share(const SharedGroup& group);

 private:
  double piece_us(std::int64_t rows) const;
  double units_us(std::int64_t rows) const;

  const CascadeInput& in_;
  std::int64_t group_;      ///< query heads of a kv head
  std::int64_t unit_rows_;  ///< most rows of a unit
  UnitCost cost_;
  std::vector<std::int32_t> shared_;  ///< [B] pieces of a request that are shared
};

}  // namespace attend::plan
