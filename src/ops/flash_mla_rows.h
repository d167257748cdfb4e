// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "attend/core/tensor_view.h"

/// Conventions of FlashMLA that ours do not have: a sink of +infinity takes all of its head.
namespace attend::ops {

/// Checks f32 [heads] without NaN, if it is defined.
void check_attn_sink(std::string_view op, const ConstTensorView& sink, std::int64_t heads);

/// The sinks with none where they are +infinity; empty if there are none.
std::vector<float> finite_sinks(const ConstTensorView& sink);

/// Zeroes the heads of `out`, [T, H, V] with last stride 1, whose sinks are +infinity.
void clear_sunk_heads(const ConstTensorView& sink, const TensorView& out);

}  // namespace attend::ops
