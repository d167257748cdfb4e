// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "attend/core/device.h"
#include "attend/core/dtype.h"
#include "attend/core/executor.h"
#include "attend/core/mla_dims.h"
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"
#include "attend/ops/attention.h"
#include "attend/plan/attention_plan.h"

/// What computes the prefill of MLA layers: attention with keys and values of all heads (head sizes
/// P + R and V, see MlaDims), first over the chunks of a request's context, then over its new
/// tokens. A registry of its own, since an MLA back end can work with any of them.
namespace attend {

/// What an MLA layer asks of a prefill back end.
struct MlaPrefillConfig {
  Platform platform;
  DType dtype = DType::bf16;
  MlaDims dims;
  bool batch_invariant = false;
  bool quant_output = false;  ///< wants outputs as fp8_e4m3 codes with a static scale
  friend bool operator==(const MlaPrefillConfig&, const MlaPrefillConfig&) = default;
};
std::string describe(const MlaPrefillConfig& config);

/// What a prefill back end can do, as data: the CLI prints it, validate_configuration reads it.
struct MlaPrefillCapability {
  std::vector<DType> dtypes;           ///< of queries, keys, values; empty = any
  std::vector<DType> cpu_only_dtypes;  ///< those of `dtypes` that only the CPU serves
  /// Where it can be chosen automatically; empty = any. Elsewhere only when asked for by name.
  std::vector<DeviceType> devices;
  int min_cuda_capability = 0;          ///< 10 * major + minor, e.g. 80
  std::vector<std::string> rocm_archs;  ///< e.g. "gfx942"; empty = any
  int dim_multiple = 1;                 ///< every one of MlaDims must be a multiple of this
  int max_head_dim = 0;                 ///< most of P + R, and of V; 0 = no limit
  /// Where outputs can be written as fp8_e4m3 codes with a static scale; empty = nowhere.
  std::vector<DeviceType> quant_output_devices;
  bool supports_batch_invariance = false;
};

/// Constants of one layer.
struct MlaPrefillImplConfig {
  int num_heads = 0;           ///< H, >= 1
  std::optional<float> scale;  ///< finite, > 0; unset = 1 / sqrt(P + R)
  MlaDims dims;
  DType dtype = DType::bf16;
  /// Whose kernels' rules to follow (padding of V, quantised outputs). Tensors are on the CPU.
  Platform platform;
};

/// A call over the new tokens of each request: causal, bottom-right. T query rows, Tk keys; last
/// dimension of each tensor: stride 1.
struct NewTokensArgs {
  ConstTensorView q;  ///< [T, H, P + R], dtype of the layer
  /// [>= Tk, H, P + R]. A request's keys end with those of its new tokens; context tokens may stand
  /// before them.
  ConstTensorView k;
  ConstTensorView v;  ///< [as k, H, V]
  TensorView out;     ///< [T, H, V], dtype of the layer, or fp8_e4m3 with output_scale
  TensorView lse;     ///< f32 [T, H], natural log; undefined = not wanted
  /// An output code stands for code * output_scale: finite, > 0. The output is rounded to the
  /// layer's type before it is divided. Not for requests with context: carry and lse must be
  /// undefined.
  std::optional<float> output_scale;
  /// With it this is the last one of a request's calls: carry.last must be true. The state is that
  /// of the chunks: f32 [T', H, head_dim_v() + 2].
  AttentionCarry carry;
  /// Not null. All requests causal, no windows, H query and H kv heads, head sizes P + R and
  /// head_dim_v().
  const AttentionPlan* plan = nullptr;
  Workspace workspace;  ///< plan->workspace_bytes + workspace_bytes(T, Tk, has output_scale)
  Executor* executor = nullptr;  ///< null = default_executor()
};

/// A call over one chunk of each request's context: unmasked. Either out and lse, or the carry.
struct ContextChunkArgs {
  ConstTensorView q;     ///< as NewTokensArgs
  ConstTensorView k;     ///< [>= Tk, H, P + R], the chunks of all requests one after the other
  ConstTensorView v;     ///< [as k, H, V]
  TensorView out;        ///< [T, H, V], dtype of the layer; undefined with a carry
  TensorView lse;        ///< f32 [T, H], natural log; undefined with a carry
  AttentionCarry carry;  ///< carry.last must be false; state f32 [T', H, head_dim_v() + 2]
  const AttentionPlan* plan = nullptr;  ///< as NewTokensArgs, but no request is causal
  /// plan->workspace_bytes + workspace_bytes(T, Tk); with a carry workspace_bytes(0, Tk) will do.
  Workspace workspace;
  Executor* executor = nullptr;  ///< null = default_executor()
};

/// Runs the prefill of one layer. Immutable: any thread may call. Calls allocate nothing.
class MlaPrefill {
 public:
  virtual ~MlaPrefill() = default;
  /// Value columns of its kernel calls, which plans and carries must have: V, or P + R where values
  /// are padded with zeros.
  virtual int head_dim_v() const noexcept = 0;
  /// Bytes that a call needs besides its plan's workspace. `num_tokens`: rows of out, 0 = the call
  /// only writes a carry. `num_keys`: keys of the plan, its key_start_loc.back().
  virtual std::size_t workspace_bytes(std::int64_t num_tokens, std::int64_t num_keys,
                                      bool quant_output = false) const noexcept = 0;
  /// @throws InvalidArgument; Unsupported for an output_scale that cannot be served. Both before
  /// anything is written.
  virtual void run_prefill_new_tokens(const NewTokensArgs& args) const = 0;
  /// @throws InvalidArgument, before anything is written.
  virtual void run_prefill_context_chunk(const ContextChunkArgs& args) const = 0;
};

/// One prefill back end. Stateless; lives for the whole process.
class MlaPrefillBackend {
 public:
  virtual ~MlaPrefillBackend() = default;
  /// Fixed name in capitals, e.g. "ROCM_AITER_FA".
  virtual std::string_view name() const noexcept = 0;
  virtual const MlaPrefillCapability& capability() const noexcept = 0;
  /// Whether the library that has its kernels exists for the platform. On the CPU the ops stand in
  /// for it.
  virtual bool is_available(const Platform& platform) const noexcept = 0;
  /// Whether its kernels there need values as wide as the keys.
  virtual bool requires_v_padding(const Platform& platform) const noexcept = 0;

  /// Every reason why it cannot serve `config`, in the fixed order of the list in
  /// docs/selection.md; empty = it can. Never stops at the first.
  std::vector<std::string> validate_configuration(const MlaPrefillConfig& config) const;
  /// Why it cannot write quantised outputs on `platform`; nullopt = it can.
  std::optional<std::string> quant_output_reason(const Platform& platform) const;

  /// @throws InvalidArgument naming the field that is out of range; Unsupported with the reasons of
  /// validate_configuration() for platform, dtype and dims.
  std::unique_ptr<MlaPrefill> make_impl(const MlaPrefillImplConfig& config) const;

 protected:
  /// @pre `config` is one that it serves.
  virtual std::unique_ptr<MlaPrefill> make_checked_impl(
      const MlaPrefillImplConfig& config) const = 0;
};

/// All prefill back ends of this build, in the order of their names.
std::span<const MlaPrefillBackend* const> mla_prefill_backends() noexcept;
/// Prefill back end of that name. @throws InvalidArgument listing the valid names.
const MlaPrefillBackend& find_mla_prefill_backend(std::string_view name);

/// Answer of the selector, as Selection.
struct MlaPrefillSelection {
  const MlaPrefillBackend* backend = nullptr;  ///< null = none fits
  /// (name, reasons) of every candidate that cannot serve the configuration, in priority order.
  std::vector<std::pair<std::string, std::vector<std::string>>> rejected;
  /// Names of candidates that could serve it but come later in priority order.
  std::vector<std::string> also_valid;
};

/// Candidates for a platform, best first.
std::vector<const MlaPrefillBackend*> mla_prefill_priority(const MlaPrefillConfig& config);

/// Validates every candidate and picks the first that fits. Never throws for "none fits".
MlaPrefillSelection select_mla_prefill(const MlaPrefillConfig& config);

/// Same, for one named by the user: only that one is validated, and its list of devices not asked.
/// @throws InvalidArgument for an unknown name.
MlaPrefillSelection select_mla_prefill(const MlaPrefillConfig& config, std::string_view name);

/// Like the two above, but throws Unsupported with all reasons if nothing fits.
const MlaPrefillBackend& require_mla_prefill(const MlaPrefillConfig& config,
                                             std::string_view name = "auto");

}  // namespace attend
