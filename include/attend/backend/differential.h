// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <vector>

#include "attend/ops/differential.h"

/// What the back end of differential attention needs besides (attend/ops/differential.h).
namespace attend {

/// What a builder needs. cache.num_kv_heads counts the heads of both branches.
struct DifferentialBuilderConfig {
  /// v2 layers have the cache of FLASH_ATTN, flash_attn_cache_shape(): it has no branches.
  DifferentialVariant variant = DifferentialVariant::v1;
};

/// What a layer has.
struct DifferentialLayerConfig {
  DifferentialVariant variant = DifferentialVariant::v1;
  HeadPairing pairing = HeadPairing::interleaved;
  /// [head_size] each, finite; v2: empty, ForwardArgs::token_lambda takes their place.
  std::vector<float> lambda_q1, lambda_k1, lambda_q2, lambda_k2;
  /// See differential_lambda_init(); results are multiplied with 1 - lambda_init. v2: 0.
  double lambda_init = 0.0;
  std::optional<DType> lambda_rounding;  ///< DifferentialLambdaArgs::round_to
  bool norm = true;                      ///< RMSNorm of each pair; v2: false
  std::vector<float> norm_weight;        ///< [2 * head_size], finite; empty = ones
  float norm_eps = 1e-5F;                ///< finite, > 0
};

}  // namespace attend
