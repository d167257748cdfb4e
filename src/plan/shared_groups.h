// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/plan/cascade.h"

namespace attend::plan {

/// Requests next to each other whose block tables begin alike.
struct SharedGroup {
  std::int32_t request_begin, request_end;
  std::int32_t num_pieces;  ///< whole pieces in equal blocks
};

/// Finds groups of at least two requests, largest first: visits the group of [begin, end), then
/// those inside of it, which share more. In the automatic mode requests with many queries are in no
/// group: they read keys for many rows anyway, and would store partial results for all of those.
class SharedGroups {
 public:
  /// @pre `input` as in decide_cascade, with a block table.
  explicit SharedGroups(const CascadeInput& input);

  /// Next group in that order; false if there is none left.
  bool next(SharedGroup& group);

 private:
  struct Range {
    std::int32_t begin, end, outer_pieces;
  };
  std::vector<std::int32_t> alike_;  ///< [B - 1] pieces that request i shares with request i + 1
  std::vector<Range> todo_;          ///< stack
};

}  // namespace attend::plan
