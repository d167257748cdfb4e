// SPDX-License-Identifier: Apache-2.0
// AITER's FlashAttention, for the AMD devices that it has fast kernels for.
#include "attend/backend/mla_prefill.h"
#include "backends/mla/prefill/common/varlen_prefill.h"

namespace attend::mla_prefill::aiter_flash_attn {

/// Declared by src/registry too, from the list of components.
const MlaPrefillBackend& backend() noexcept;

namespace {

class AiterPrefill final : public MlaPrefillBackend {
 public:
  std::string_view name() const noexcept override { return "ROCM_AITER_FA"; }
  const MlaPrefillCapability& capability() const noexcept override { return capability_; }
  bool is_available(const Platform& p) const noexcept override {
    return p.type != DeviceType::cuda;
  }
  bool requires_v_padding(const Platform&) const noexcept override { return false; }

 protected:
  std::unique_ptr<MlaPrefill> make_checked_impl(const MlaPrefillImplConfig& config) const override {
    return make_varlen_prefill(*this, config);
  }

 private:
  static MlaPrefillCapability make_capability() {
    MlaPrefillCapability can;
    can.dtypes = {DType::f16, DType::bf16, DType::f32};
    can.cpu_only_dtypes = {DType::f32};
    can.devices = {DeviceType::rocm};
    can.rocm_archs = {"gfx942", "gfx950"};
    can.dim_multiple = 8;
    can.max_head_dim = 256;
    return can;
  }
  MlaPrefillCapability capability_ = make_capability();
};

}  // namespace

const MlaPrefillBackend& backend() noexcept {
  static const AiterPrefill instance;
  return instance;
}

}  // namespace attend::mla_prefill::aiter_flash_attn
