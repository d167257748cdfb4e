// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/core/tensor_view.h"
#include "attend/ops/mla_weights.h"

/// float64 reference of the products of MlaWeights.
namespace attend::oracle {

/// The weight of a kv_b_proj layer as the products see it.
struct KvBProj {
  MlaDims dims;
  int num_heads = 0;
  DType dtype = DType::f32;    ///< of the layer
  std::vector<double> weight;  ///< [H * (P + V), L], converted to that dtype

  /// W_UK of a head: element `p` of its key from element `l` of the latent.
  double key(int head, int p, int l) const noexcept;
  /// W_UV likewise.
  double value(int head, int v, int l) const noexcept;
};

/// Converts codes and numbers as MlaWeights does. @pre The arguments are valid, and nothing
/// overflows.
KvBProj kv_b_proj(const KvBProjArgs& args);

/// Elements in logical row-major order with the largest error that a float32-accumulating product
/// may make in each, derived in docs/numerics.md.
struct Projection {
  std::vector<double> out, bound;
};
/// k_nope of MlaWeights::up_project, [N, H, P]. @param kv_c [N, L]
Projection up_project_keys(const KvBProj& w, const ConstTensorView& kv_c);
/// v of it, [N, H, V].
Projection up_project_values(const KvBProj& w, const ConstTensorView& kv_c);
/// MlaWeights::absorb_query, [T, H, L]. @param q_nope [T, H, P]
Projection absorb_query(const KvBProj& w, const ConstTensorView& q_nope);
/// MlaWeights::v_up_project, [T, H, V]. @param latents [T, H, L]
Projection v_up_project(const KvBProj& w, const ConstTensorView& latents);

}  // namespace attend::oracle
