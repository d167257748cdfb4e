// SPDX-License-Identifier: Apache-2.0
#include "backends/flashmla_sparse/check_group.h"

#include <fmt/format.h>

#include <string>

#include "core/check.h"

namespace attend::flashmla_sparse {

void check_group(std::string_view op, const Communicator* c, const ContextParallel& dcp) {
  const bool alone = dcp.world_size == 1;
  const bool fits =
      alone ? c == nullptr : c != nullptr && c->size() == dcp.world_size && c->rank() == dcp.rank;
  check::require(
      fits, {op, "communicator"},
      [&] {
        return alone ? std::string("null: the builder was told of no ranks")
                     : fmt::format("rank {} of {}", dcp.rank, dcp.world_size);
      },
      [&] {
        return c == nullptr ? std::string("null")
                            : fmt::format("rank {} of {}", c->rank(), c->size());
      });
}

}  // namespace attend::flashmla_sparse
