// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "attend/ops/int8_cache.h"
#include "ops/cache_rows.h"

/// Writing rows of int8 codes with their scales: shared by the cache writers and the attention that
/// saves what it is given.
namespace attend::ops {

/// Names that errors carry.
struct Int8RowNames {
  std::string_view op;
  std::string_view key = "key", value = "value", k_scale = "k_scale";
};

/// What cache_rows::copy takes: keys, values and the keys' scales.
struct Int8Rows {
  std::array<cache_rows::Target, 3> targets;
  std::span<const std::int64_t> slots;
};

/// All checks of reshape_and_cache_flash_int8 (`int8_values`) or _mix. @throws InvalidArgument.
Int8Rows check_int8_rows(const Int8RowNames& names, const ReshapeAndCacheInt8Args& args,
                         bool int8_values);

}  // namespace attend::ops
