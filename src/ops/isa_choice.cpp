// SPDX-License-Identifier: Apache-2.0
#include "ops/isa_choice.h"

#include <fmt/format.h>

#include <algorithm>

#include "attend/core/error.h"

namespace attend::ops {

IsaLevel checked_level(std::string_view op, std::optional<IsaLevel> wanted) {
  const IsaLevel level = wanted.value_or(active_isa());
  const auto levels = available_isa_levels();
  if (std::find(levels.begin(), levels.end(), level) == levels.end()) {
    throw Unsupported(fmt::format("[{}] ISA level {}", op, to_string(level)),
                      {"this machine does not have it"});
  }
  return level;
}

}  // namespace attend::ops
