// SPDX-License-Identifier: Apache-2.0
// FLASHMLA_SPARSE: what it can serve, and its cache.
#include <fmt/format.h>

#include "attend/backend/backend.h"
#include "attend/cache/fp8_ds_mla.h"
#include "backends/flashmla_sparse/flashmla_sparse.h"
#include "core/check.h"

namespace attend::flashmla_sparse {
namespace {

class SparseMlaBackend final : public Backend {
 public:
  std::string_view name() const noexcept override { return "FLASHMLA_SPARSE"; }
  const Capability& capability() const noexcept override { return capability_; }

  std::vector<std::int64_t> kv_cache_shape(const KvCacheSpec& spec) const override {
    check_block_size("FLASHMLA_SPARSE.kv_cache_shape", spec.block_size);
    return mla_cache_shape(spec);
  }
  /// There is one head: the layouts do not differ.
  std::vector<int> kv_cache_stride_order(KvLayout, bool include_layers, KvFormat) const override {
    return mla_stride_order(include_layers);
  }
  int kv_cache_block_dim() const noexcept override { return 0; }

  std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) const override {
    return flashmla_sparse::make_builder(config);
  }
  std::unique_ptr<Impl> make_impl(const ImplConfig& config) const override {
    return flashmla_sparse::make_impl(config);
  }

 private:
  static Capability make_capability() {
    Capability can;
    can.dtypes = {DType::bf16};
    can.kv_cache_dtypes = {"auto", "bf16", "fp8_ds_mla"};
    can.head_sizes = {fp8_ds_mla::kDim};
    can.block_sizes = {kBlockSizeMultiple};
    can.devices = {DeviceType::cpu, DeviceType::cuda};
    can.min_cuda_capability = 90;
    can.is_mla = true;
    can.is_sparse = true;
    can.supports_batch_invariance = true;
    return can;
  }
  Capability capability_ = make_capability();
};

}  // namespace

const Backend& backend() noexcept {
  static const SparseMlaBackend instance;
  return instance;
}

void check_block_size(std::string_view op, int block_size) {
  check::require(
      block_size >= 1 && block_size % kBlockSizeMultiple == 0, {op, "block_size"},
      [] { return fmt::format("a positive multiple of {}", kBlockSizeMultiple); }, block_size);
}

}  // namespace attend::flashmla_sparse
