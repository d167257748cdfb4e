// SPDX-License-Identifier: Apache-2.0
// One layer: its constants, and which metadata it takes.
#include <fmt/format.h>

#include <cmath>

#include "backends/common/mla_checks.h"
#include "backends/common/profiling_output.h"
#include "backends/flashmla_sparse/flashmla_sparse.h"
#include "backends/flashmla_sparse/layer.h"
#include "core/check.h"

namespace attend::flashmla_sparse {
namespace {

constexpr std::string_view kMakeOp = "FLASHMLA_SPARSE.make_impl";

check::Where at(std::string_view argument) { return {kMakeOp, argument}; }

StoredKv check_cache_type(const ImplConfig& c) {
  const std::optional<StoredKv> stored = resolve_kv_cache_dtype(c.kv_cache_dtype, c.dtype);
  const bool fits = stored && (stored->format == KvFormat::fp8_ds_mla ||
                               (stored->format == KvFormat::plain && stored->dtype == DType::bf16));
  check::require(fits, at("kv_cache_dtype"), "auto, bf16 or fp8_ds_mla",
                 [&] { return fmt::format("'{}'", c.kv_cache_dtype); });
  return *stored;
}

Layer make_layer(const ImplConfig& c) {
  check::require(c.mla.has_value() && c.mla->weights != nullptr, at("mla"),
                 "the weights of the layer", "none");
  check::require(c.dtype == DType::bf16, at("dtype"), "bf16", to_string(c.dtype));
  const MlaWeights& weights = *c.mla->weights;
  check_mla_dims(kMakeOp, weights.dims(), c.num_q_heads, c.num_kv_heads, c.head_size);
  check_mla_format(kMakeOp, weights.dims(), KvFormat::fp8_ds_mla);  // bf16 rows have these parts
  check::require(
      weights.num_heads() == c.num_q_heads && weights.dtype() == c.dtype, at("mla.weights"),
      [&] { return fmt::format("{} heads of {}", c.num_q_heads, to_string(c.dtype)); },
      [&] { return fmt::format("{} of {}", weights.num_heads(), to_string(weights.dtype())); });
  check_mla_unused(kMakeOp, c);
  check::require(c.k_scale.empty(), at("k_scale"), "none: the cache has no codes of one scale",
                 c.k_scale.size());
  check::require(c.mla->prefill_backend == "auto", at("mla.prefill_backend"),
                 "auto: prefill attends to the same rows as decode", c.mla->prefill_backend);
  Layer layer;
  layer.config = c;
  layer.stored = check_cache_type(c);
  layer.scale =
      c.scale.value_or(1.0F / std::sqrt(static_cast<float>(weights.dims().qk_head_dim())));
  check::require(std::isfinite(layer.scale) && layer.scale > 0.0F, at("scale"),
                 "a finite value > 0", layer.scale);
  return layer;
}

class SparseMlaImpl final : public Impl {
 public:
  explicit SparseMlaImpl(const ImplConfig& config) : layer_(make_layer(config)) {}

  void forward(const ForwardArgs& args, const Metadata* metadata) const override {
    check_results(layer_, args);
    if (metadata == nullptr) {
      fill_profiling_output(args.output, args.lse);
      return;
    }
    const SparseMlaMetadata& m = checked(*metadata);
    Executor& executor = args.executor != nullptr ? *args.executor : default_executor();
    check_forward(layer_, args, m, executor);
    run_forward(layer_, args, m, executor);
  }

 private:
  /// The metadata, if it was made for layers like this one.
  const SparseMlaMetadata& checked(const Metadata& metadata) const {
    constexpr check::Where kWhere{kForwardOp, "metadata"};
    const auto* m = dynamic_cast<const SparseMlaMetadata*>(&metadata);
    check::require(m != nullptr, kWhere, "what a FLASHMLA_SPARSE builder made",
                   "another back end's");
    const auto text = [](int heads, const MlaDims& d, const StoredKv& stored) {
      return fmt::format(
          "{} heads of {}/{}/{}/{}, a {} cache", heads, d.kv_lora_rank, d.qk_nope_head_dim,
          d.qk_rope_head_dim, d.v_head_dim,
          stored.format == KvFormat::plain ? to_string(stored.dtype) : to_string(stored.format));
    };
    const bool same = m->dims == layer_.dims() && m->num_heads == layer_.config.num_q_heads &&
                      m->stored == layer_.stored;
    check::require(
        same, kWhere, [&] { return text(layer_.config.num_q_heads, layer_.dims(), layer_.stored); },
        [&] { return text(m->num_heads, m->dims, m->stored); });
    return *m;
  }

  Layer layer_;
};

}  // namespace

std::unique_ptr<Impl> make_impl(const ImplConfig& config) {
  return std::make_unique<SparseMlaImpl>(config);
}

}  // namespace attend::flashmla_sparse
