// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"
#include "attend/ops/attention.h"
#include "attend/ops/kernel_options.h"
#include "attend/plan/attention_plan.h"

/// Differential attention (arXiv 2410.05258): heads come in pairs, and the result of a pair is the
/// difference of two softmax maps, weighted with lambda:
///   attn = softmax(q1 k1^T scale + mask) V - lambda * softmax(q2 k2^T scale + mask) V
/// with V = [v1 | v2], twice as wide as a head. Then RMSNorm over the 2 * D elements of each pair
/// and a factor: out = attn / sqrt(mean(attn^2) + eps) * weight * out_scale. One pass over keys and
/// values computes both maps, with the bits of flash_attn_varlen() in exact arithmetic for each.
/// From the softmax to the factor everything is float32, rounded once to the type of the output.
namespace attend {

/// Which heads of H are pair p of H / 2, for queries as for keys and values. Query pair p reads
/// pair p / (H / Hkv) of the keys.
enum class HeadPairing : std::uint8_t {
  interleaved,  ///< heads 2 p and 2 p + 1 (Phi-4-mini-flash, microsoft/unilm)
  halves        ///< heads p and p + H / 2 (DiffLlama)
};

enum class DifferentialVariant : std::uint8_t {
  /// Branches: each map has a key head of its own, values are the pair's two heads side by side.
  v1,
  /// Diff-Transformer V2: both maps read the same key and value head, of which each belongs to
  /// H / Hkv query heads, an even number. Pairing is interleaved. A pair's result is D wide.
  v2
};

/// Vectors that the scalar lambda of a layer is made of. All f32, f16 or bf16, alike, [D], any
/// stride; finite.
struct DifferentialLambdaArgs {
  ConstTensorView lambda_q1, lambda_k1, lambda_q2, lambda_k2;
  double lambda_init = 0.0;  ///< finite; see differential_lambda_init()
  /// Rounds both exponentials, their difference and its sum with lambda_init to f16 or bf16, as
  /// seed 004 and vLLM's first port do with the type of the queries. Unset (or f32): no rounding.
  std::optional<DType> round_to;
};

/// exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, in float32.
/// @throws InvalidArgument: shapes, dtypes; a result that is not finite.
float differential_lambda(const DifferentialLambdaArgs& args);

/// 0.8 - 0.6 exp(-0.3 layer): lambda_init of the layer with that 0-based index among all of the
/// model, those without attention included. @throws InvalidArgument for a negative index.
double differential_lambda_init(int layer);

/// What becomes of the two maps of a pair; W = 2 D elements, D of variant v2.
struct DifferentialCombine {
  float lambda = 0.0F;  ///< finite; not read if token_lambda is defined
  /// f32, f16 or bf16 [T, H / 2], any strides: sigmoid of it is the lambda of that token and pair.
  /// Undefined = `lambda` for all. Required by variant v2, refused by v1.
  ConstTensorView token_lambda;
  bool norm = true;  ///< RMSNorm of each pair; variant v2 has none: false
  /// [W], f32, f16 or bf16, stride 1; undefined = ones. Only with `norm`.
  ConstTensorView norm_weight;
  float norm_eps = 1e-5F;  ///< finite, > 0
  float out_scale = 1.0F;  ///< finite; 1 - lambda_init of variant v1. Applied with and without norm
};

/// Arguments of differential_attention. B requests, T query tokens, H query heads, Hk kv heads,
/// both even; D a multiple of 8 up to kMaxDifferentialHeadDim. dtypes as in FlashAttnVarlenArgs
/// without token scales. Last dimension of each: stride 1.
struct DifferentialAttentionArgs {
  ConstTensorView q;  ///< [T, H, D]
  /// Paged (block_table defined): v1 [2, num_blocks, block_size, Hk / 2, D], the two branches;
  /// v2 [num_blocks, block_size, Hk, D]. Ragged: [S, Hk, D], paired as q is.
  ConstTensorView k;
  ConstTensorView v;  ///< shape of k
  /// v1 [T, H, D]: head 2 p has the first, head 2 p + 1 the second half of pair p, whatever the
  /// pairing of the inputs. v2 [T, H / 2, D]. Overlaps no input. Undefined with `maps`.
  TensorView out;
  /// f32 [T, H, W], last dimension stride 1: the normalised map of each query head instead of the
  /// combined result, for merging over ranks (then differential_combine()). Undefined = not wanted.
  TensorView maps;
  TensorView lse;                   ///< f32 [T, H], natural log, of both maps; undefined = none
  ConstTensorView query_start_loc;  ///< i32 [B + 1], contiguous
  /// i32 [B + 1], contiguous. Exactly one of cu_seqlens_kv and (seq_lens and block_table) is given.
  ConstTensorView cu_seqlens_kv;
  ConstTensorView seq_lens;     ///< i32 [B], contiguous
  ConstTensorView block_table;  ///< i32 [B, max_blocks], stride 1 in the last dimension
  /// f32 [B, Hk], any strides, finite and > 0, by kv head in the pairing of the heads: real value =
  /// stored value * descale. Only with fp8 (q: by the kv head of its own map). Undefined = 1.
  ConstTensorView q_descale, k_descale, v_descale;
  DifferentialVariant variant = DifferentialVariant::v1;
  HeadPairing pairing = HeadPairing::interleaved;
  DifferentialCombine combine;  ///< not read with `maps`
  AttentionParams params;       ///< slopes and sinks by query head, [H] or [B, H]
};

/// Plans and runs in one call, as flash_attn_varlen() does. Arithmetic::fast is refused: there is
/// no such kernel, and `automatic` is exact.
/// @throws InvalidArgument; Unsupported. Both before anything is written.
void differential_attention(const DifferentialAttentionArgs& args, Executor* executor = nullptr,
                            const KernelOptions& kernels = {});

/// Runs a plan: plan_attention() with differential_plan_shape(). No allocation.
/// @pre workspace.size >= plan.workspace_bytes. @throws as above.
void differential_attention(const DifferentialAttentionArgs& args, const AttentionPlan& plan,
                            Workspace workspace, Executor& executor);

/// Makes the checks of the overload above and nothing else.
/// @throws InvalidArgument; Unsupported.
void validate(const DifferentialAttentionArgs& args, const AttentionPlan& plan, Workspace workspace,
              const Executor& executor);

/// Puts heads, head sizes and branches of a differential layer into `input`.
/// @throws InvalidArgument: odd head counts, heads that do not divide, head sizes out of range.
void differential_plan_shape(AttentionPlanInput& input, DifferentialVariant variant,
                             int num_q_heads, int num_kv_heads, int head_size);

/// Arguments of differential_combine: the end of differential_attention() for maps that come from
/// elsewhere, for example merged over ranks.
struct DifferentialCombineArgs {
  /// f32, f16 or bf16 [T, H, W], last dimension stride 1: normalised maps, by query head.
  ConstTensorView maps;
  /// v1 [T, H, W / 2], v2 [T, H / 2, W], as DifferentialAttentionArgs::out; f32, f16 or bf16.
  TensorView out;
  DifferentialVariant variant = DifferentialVariant::v1;
  HeadPairing pairing = HeadPairing::interleaved;
  DifferentialCombine combine;
};

/// Bits of differential_attention() if the maps are those that it gives.
/// @throws InvalidArgument; Unsupported for a level that is not available. Nothing is written then.
void differential_combine(const DifferentialCombineArgs& args, Executor* executor = nullptr,
                          const KernelOptions& kernels = {});

}  // namespace attend
