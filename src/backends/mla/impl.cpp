// SPDX-License-Identifier: Apache-2.0
// One layer: its constants, and which metadata it takes.
#include <fmt/format.h>

#include <cmath>
#include <utility>

#include "backends/common/mla_checks.h"
#include "backends/common/profiling_output.h"
#include "backends/mla/layer.h"
#include "backends/mla/mla.h"
#include "core/check.h"

namespace attend::mla {
namespace {

constexpr std::string_view kMakeOp = "FLASH_ATTN_MLA.make_impl";
constexpr std::string_view kForwardOp = "FLASH_ATTN_MLA.forward";

check::Where at(std::string_view argument) { return {kMakeOp, argument}; }

StoredKv check_cache_type(const ImplConfig& c) {
  const std::optional<StoredKv> stored = resolve_kv_cache_dtype(c.kv_cache_dtype, c.dtype);
  const bool fits = stored && (stored->format == KvFormat::fp8_ds_mla
                                   ? c.dtype == DType::bf16
                                   : stored->format == KvFormat::plain &&
                                         (stored->dtype == c.dtype || is_fp8(stored->dtype)));
  check::require(
      fits, at("kv_cache_dtype"),
      [&] {
        return fmt::format("auto, {}, fp8_e4m3, fp8_e5m2 or, for bf16, fp8_ds_mla",
                           to_string(c.dtype));
      },
      [&] { return fmt::format("'{}'", c.kv_cache_dtype); });
  return *stored;
}

Layer make_layer(const ImplConfig& c) {
  check::require(c.mla.has_value() && c.mla->weights != nullptr, at("mla"),
                 "the weights of the layer", "none");
  check::require(is_float_compute(c.dtype), at("dtype"), "f32, f16 or bf16", to_string(c.dtype));
  const MlaWeights& weights = *c.mla->weights;
  check_mla_dims(kMakeOp, weights.dims(), c.num_q_heads, c.num_kv_heads, c.head_size);
  check::require(
      weights.num_heads() == c.num_q_heads && weights.dtype() == c.dtype, at("mla.weights"),
      [&] { return fmt::format("{} heads of {}", c.num_q_heads, to_string(c.dtype)); },
      [&] { return fmt::format("{} of {}", weights.num_heads(), to_string(weights.dtype())); });
  check_mla_unused(kMakeOp, c);
  Layer layer;
  layer.config = c;
  layer.stored = check_cache_type(c);
  check_mla_format(kMakeOp, weights.dims(), layer.stored.format);
  layer.scale =
      c.scale.value_or(1.0F / std::sqrt(static_cast<float>(weights.dims().qk_head_dim())));
  check::require(std::isfinite(layer.scale) && layer.scale > 0.0F, at("scale"),
                 "a finite value > 0", layer.scale);
  const bool scaled = is_fp8(layer.stored.dtype);
  check::require(c.k_scale.size() <= (scaled ? 1U : 0U), at("k_scale"),
                 scaled ? "one scale or none (= 1)" : "none: the cache has no codes of one scale",
                 c.k_scale.size());
  if (!c.k_scale.empty()) layer.kv_scale = c.k_scale[0];
  check::require(std::isfinite(layer.kv_scale) && layer.kv_scale > 0.0F, at("k_scale"),
                 "a finite value > 0", layer.kv_scale);
  MlaPrefillConfig wanted;
  wanted.platform = c.mla->platform;
  wanted.dtype = c.dtype;
  wanted.dims = weights.dims();
  layer.prefill_backend = &require_mla_prefill(wanted, c.mla->prefill_backend);
  layer.prefill = layer.prefill_backend->make_impl(
      {c.num_q_heads, layer.scale, weights.dims(), c.dtype, c.mla->platform});
  return layer;
}

class MlaImpl final : public Impl {
 public:
  explicit MlaImpl(const ImplConfig& config) : layer_(make_layer(config)) {}

  void forward(const ForwardArgs& args, const Metadata* metadata) const override {
    check_results(layer_, args);
    if (metadata == nullptr) {
      fill_profiling_output(args.output, args.lse);
      return;
    }
    const MlaMetadata& m = checked(*metadata);
    Executor& executor = args.executor != nullptr ? *args.executor : default_executor();
    check_forward(layer_, args, m, executor);
    run_forward(layer_, args, m, executor);
  }

 private:
  /// The metadata, if it was made for layers like this one.
  const MlaMetadata& checked(const Metadata& metadata) const {
    constexpr check::Where kWhere{kForwardOp, "metadata"};
    const auto* m = dynamic_cast<const MlaMetadata*>(&metadata);
    check::require(m != nullptr, kWhere, "what a FLASH_ATTN_MLA builder made",
                   "another back end's");
    const auto text = [](int heads, const MlaDims& d, DType dtype, const StoredKv& stored,
                         std::string_view prefill) {
      return fmt::format(
          "{} heads of {}/{}/{}/{}, {}, a {} cache, prefill {}", heads, d.kv_lora_rank,
          d.qk_nope_head_dim, d.qk_rope_head_dim, d.v_head_dim, to_string(dtype),
          stored.format == KvFormat::plain ? to_string(stored.dtype) : to_string(stored.format),
          prefill);
    };
    const bool same = m->dims == layer_.dims() && m->num_heads == layer_.config.num_q_heads &&
                      m->dtype == layer_.config.dtype && m->stored == layer_.stored &&
                      m->prefill_backend == layer_.prefill_backend;
    check::require(
        same, kWhere,
        [&] {
          return text(layer_.config.num_q_heads, layer_.dims(), layer_.config.dtype, layer_.stored,
                      layer_.prefill_backend->name());
        },
        [&] {
          return text(m->num_heads, m->dims, m->dtype, m->stored, m->prefill_backend->name());
        });
    return *m;
  }

  Layer layer_;
};

}  // namespace

std::unique_ptr<Impl> make_impl(const ImplConfig& config) {
  return std::make_unique<MlaImpl>(config);
}

}  // namespace attend::mla
