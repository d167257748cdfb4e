// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string_view>

#include "attend/core/tensor_view.h"

/// What ops that attend to the rows of a latent cache check alike.
namespace attend::ops {

/// Queries [T, H, E], a cache [num_blocks, block_size, E or bytes] and outputs [T, H, L].
struct LatentTensors {
  std::string_view cache_name;  ///< for errors
  ConstTensorView q, cache, out;
};

/// Checks types, sizes and strides of the three against each other. The block size may be any.
void check_latents(std::string_view op, const LatentTensors& t);

/// Checks the scale of an fp8 cache: required by it, refused with others.
void check_latent_scale(std::string_view op, const LatentTensors& t,
                        const ConstTensorView& kv_scale);

}  // namespace attend::ops
