// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <string_view>

#include "attend/core/cpu.h"

namespace attend::ops {

/// The wanted level, active_isa() if unset. @throws Unsupported for one that this machine lacks.
IsaLevel checked_level(std::string_view op, std::optional<IsaLevel> wanted);

}  // namespace attend::ops
