// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <memory>
#include <optional>

#include "attend/core/cpu.h"
#include "attend/core/dtype.h"
#include "attend/core/executor.h"
#include "attend/core/mla_dims.h"
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"

/// The projection between the latent of MLA and the keys and values of its heads, and the products
/// with it.
namespace attend {

/// Arguments of MlaWeights::from_kv_b_proj.
struct KvBProjArgs {
  /// [H * (P + V), L], any row stride, last dimension stride 1: the weight of a linear layer from
  /// the latent, for each head P rows of keys, then V rows of values. f32, f16 or bf16, or codes in
  /// i8 or fp8_e4m3 with scales. Only read during the call.
  ConstTensorView weight;
  /// f32, contiguous, of codes only (undefined for other weights); each finite and > 0, a code
  /// stands for code * scale. [1] or rank 0: one for all. [H * (P + V)]: one a row.
  /// [ceil(H * (P + V) / 128), ceil(L / 128)]: one for each block of 128 rows and 128 columns.
  ConstTensorView weight_scale = {};
  MlaDims dims;                      ///< all > 0, P, V and L multiples of 8; R is not used
  int num_heads = 0;                 ///< H > 0
  DType dtype = DType::bf16;         ///< of the layer: f32, f16 or bf16
  std::optional<IsaLevel> isa = {};  ///< level of the kernels; unset = active_isa()
  Executor* executor = nullptr;      ///< for packing; null = default_executor()
};

/// The weights W_UK and W_UV of an MLA layer, packed for the products with them. Made once, never
/// changed; any number of threads may call the products at the same time.
///
/// Weights of another type than the layer's are converted once: the product of code and scale in
/// float32, then rounded to dtype() to nearest, ties to even; beyond the largest finite value of
/// f16 that is an infinity. W_UV is kept once, W_UK twice, as up_project and absorb_query run over
/// it in different directions.
///
/// An element of a product is one sum in float32, in an order that depends on nothing but dtype(),
/// isa() and the size of the sum, rounded once to dtype(). So a row has the same bits whatever
/// other rows are multiplied with it, wherever it lies, and for any number of workers. Level amx
/// multiplies bf16 numbers in tiles, which take numbers below 2^-126 as 0.
///
/// The products allocate nothing. All of their tensors have dtype(), any strides but the last (1).
/// They throw InvalidArgument (shapes, dtypes, outputs that overlap with an input or each other)
/// before anything is written. An executor that is null is default_executor().
class MlaWeights {
 public:
  /// @throws InvalidArgument (shapes, dtypes, sizes, scales), Unsupported for a level that this
  /// machine lacks, DeviceError if memory cannot be had.
  static std::shared_ptr<const MlaWeights> from_kv_b_proj(const KvBProjArgs& args);

  const MlaDims& dims() const noexcept { return dims_; }
  int num_heads() const noexcept { return num_heads_; }  ///< H
  DType dtype() const noexcept { return dtype_; }        ///< of the layer
  IsaLevel isa() const noexcept { return isa_; }         ///< highest level of the kernels
  std::int64_t bytes() const noexcept;                   ///< of the packed weights

  /// Keys without position and values of all heads from latents: k_nope[n, h] = W_UK of head h
  /// times kv_c[n], v[n, h] = W_UV of it times kv_c[n].
  /// @param kv_c [N, L], N >= 0  @param k_nope [N, H, P]  @param v [N, H, V]
  void up_project(const ConstTensorView& kv_c, const TensorView& k_nope, const TensorView& v,
                  Executor* executor = nullptr) const;

  /// Queries that can be multiplied with latents: ql_nope[t, h] = q_nope[t, h] times W_UK of head
  /// h.
  /// @param q_nope [T, H, P], T >= 0  @param ql_nope [T, H, L]
  void absorb_query(const ConstTensorView& q_nope, const TensorView& ql_nope,
                    Executor* executor = nullptr) const;

  /// Outputs from sums of latents: out[t, h] = W_UV of head h times latents[t, h].
  /// @param latents [T, H, L], T >= 0  @param out [T, H, V], may be the rows of a [T, H * V] tensor
  void v_up_project(const ConstTensorView& latents, const TensorView& out,
                    Executor* executor = nullptr) const;

  /// Writes the weights as absorb_query uses them, in dtype(), for tests and other kernels.
  /// @param out [H, P, L], any strides but the last (1) @throws InvalidArgument before any write
  void copy_w_uk_t(const TensorView& out) const;
  /// The same as v_up_project uses them. @param out [H, L, V]
  void copy_w_uv(const TensorView& out) const;

 private:
  MlaWeights(const KvBProjArgs& args, IsaLevel isa);

  MlaDims dims_;
  int num_heads_;
  DType dtype_;
  IsaLevel isa_;
  Buffer keys_up_;    ///< W_UK of each head as [L, P], packed
  Buffer values_up_;  ///< W_UV of each head as [L, V], packed
  Buffer absorb_;     ///< W_UK of each head as [P, L], packed
};

}  // namespace attend
