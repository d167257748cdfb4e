// SPDX-License-Identifier: Apache-2.0
// FlashAttention: the prefill back end for every platform.
#include "attend/backend/mla_prefill.h"
#include "backends/mla/prefill/common/varlen_prefill.h"

namespace attend::mla_prefill::flash_attn {

/// Declared by src/registry too, from the list of components.
const MlaPrefillBackend& backend() noexcept;

namespace {

class FlashAttnPrefill final : public MlaPrefillBackend {
 public:
  std::string_view name() const noexcept override { return "FLASH_ATTN"; }
  const MlaPrefillCapability& capability() const noexcept override { return capability_; }
  bool is_available(const Platform&) const noexcept override { return true; }

  /// Version 3 (for capability 9.x) and 4 (10.x) take values of another size than keys, as the ops
  /// do. Version 2, on all other NVIDIA devices, and the library of ROCm do not.
  bool requires_v_padding(const Platform& p) const noexcept override {
    if (p.type == DeviceType::cpu) return false;
    return p.capability_major != 9 && p.capability_major != 10;
  }

 protected:
  std::unique_ptr<MlaPrefill> make_checked_impl(const MlaPrefillImplConfig& config) const override {
    return make_varlen_prefill(*this, config);
  }

 private:
  static MlaPrefillCapability make_capability() {
    MlaPrefillCapability can;
    can.dtypes = {DType::f16, DType::bf16, DType::f32};
    can.cpu_only_dtypes = {DType::f32};
    can.devices = {DeviceType::cpu, DeviceType::cuda, DeviceType::rocm};
    can.min_cuda_capability = 80;
    can.dim_multiple = 8;
    can.max_head_dim = 256;
    can.quant_output_devices = {DeviceType::cpu};
    can.supports_batch_invariance = true;
    return can;
  }
  MlaPrefillCapability capability_ = make_capability();
};

}  // namespace

const MlaPrefillBackend& backend() noexcept {
  static const FlashAttnPrefill instance;
  return instance;
}

}  // namespace attend::mla_prefill::flash_attn
