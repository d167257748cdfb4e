// SPDX-License-Identifier: Apache-2.0
#include "backends/differential/impl_config.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <utility>

#include "backends/common/kv_cache_dtype.h"
#include "backends/common/layer_checks.h"
#include "backends/differential/differential.h"
#include "core/check.h"

namespace attend::differential {
namespace {

constexpr std::string_view kMakeOp = "DIFFERENTIAL_FLASH_ATTN.make_impl";

using NamedVector = std::pair<const char*, const std::vector<float>*>;

std::array<NamedVector, 4> lambda_vectors(const DifferentialLayerConfig& d) {
  return {{{"differential.lambda_q1", &d.lambda_q1},
           {"differential.lambda_k1", &d.lambda_k1},
           {"differential.lambda_q2", &d.lambda_q2},
           {"differential.lambda_k2", &d.lambda_k2}}};
}

void check_vector(const NamedVector& named, int size) {
  const auto& [name, v] = named;
  check::require(
      std::cmp_equal(v->size(), size), {kMakeOp, name},
      [&] { return fmt::format("{} values", size); }, v->size());
  for (std::size_t i = 0; i < v->size(); ++i) {
    check::require(std::isfinite((*v)[i]), {kMakeOp, name}, "finite values",
                   [&] { return fmt::format("{} at index {}", (*v)[i], i); });
  }
}

/// Variant v2 has neither vectors nor a norm: a config that has them is of the other variant.
void check_v2(const DifferentialLayerConfig& d) {
  const auto at = [](std::string_view argument) { return check::Where{kMakeOp, argument}; };
  check::require(d.pairing == HeadPairing::interleaved, at("differential.pairing"),
                 "interleaved: the pairs of variant v2 share a kv head", "halves");
  for (const auto& [name, v] : lambda_vectors(d))
    check::require(v->empty(), at(name), "none: variant v2 has a lambda for each token", v->size());
  check::require(d.lambda_init == 0.0, at("differential.lambda_init"), "0 for variant v2",
                 d.lambda_init);
  check::require(!d.lambda_rounding, at("differential.lambda_rounding"), "unset for variant v2",
                 "a dtype");
  check::require(!d.norm, at("differential.norm"), "false: variant v2 has no norm", "true");
  check::require(d.norm_weight.empty(), at("differential.norm_weight"),
                 "none: variant v2 has no norm", d.norm_weight.size());
}

void check_v1(const DifferentialLayerConfig& d, int head_size) {
  const auto at = [](std::string_view argument) { return check::Where{kMakeOp, argument}; };
  for (const NamedVector& v : lambda_vectors(d)) check_vector(v, head_size);
  check::require(std::isfinite(d.lambda_init), at("differential.lambda_init"), "a finite value",
                 d.lambda_init);
  check::require(!d.lambda_rounding || is_float_compute(*d.lambda_rounding),
                 at("differential.lambda_rounding"), "unset, f32, f16 or bf16",
                 [&] { return to_string(*d.lambda_rounding); });
  if (!d.norm) {
    check::require(d.norm_weight.empty(), at("differential.norm_weight"), "none: there is no norm",
                   d.norm_weight.size());
    return;
  }
  if (!d.norm_weight.empty())
    check_vector({"differential.norm_weight", &d.norm_weight}, 2 * head_size);
  check::require(std::isfinite(d.norm_eps) && d.norm_eps > 0.0F, at("differential.norm_eps"),
                 "a finite value > 0", d.norm_eps);
}

DType checked_storage(const ImplConfig& c) {
  const std::optional<StoredKv> stored = resolve_kv_cache_dtype(c.kv_cache_dtype, c.dtype);
  const bool served = stored && stored->format == KvFormat::plain &&
                      (stored->dtype == c.dtype || is_fp8(stored->dtype));
  check::require(
      served, {kMakeOp, "kv_cache_dtype"},
      [&] { return fmt::format("auto or {}, fp8_e4m3 or fp8_e5m2", to_string(c.dtype)); },
      c.kv_cache_dtype);
  return stored->dtype;
}

}  // namespace

DType check_config(const ImplConfig& c) {
  const auto at = [](std::string_view argument) { return check::Where{kMakeOp, argument}; };
  check::require(c.differential.has_value(), at("differential"),
                 "what differential layers have besides", "none");
  const DifferentialLayerConfig& d = *c.differential;
  check::require(c.attn_type == AttentionType::decoder, at("attn_type"), "decoder",
                 to_string(c.attn_type));
  check_heads(kMakeOp, d.variant, c.num_q_heads, c.num_kv_heads, c.head_size);
  check::require(is_float_compute(c.dtype), at("dtype"), "f32, f16 or bf16", to_string(c.dtype));
  const DType stored = checked_storage(c);
  check_kv_scales(kMakeOp, c, is_fp8(stored));
  check::require(c.value_scales.empty(), at("value_scales"), "none: the cache is not int8_level1",
                 c.value_scales.size());
  check_softmax(kMakeOp, c);
  if (d.variant == DifferentialVariant::v2) {
    check_v2(d);
  } else {
    check_v1(d, c.head_size);
  }
  return stored;
}

DifferentialCombine make_combine(const ImplConfig& c) {
  const DifferentialLayerConfig& d = *c.differential;
  DifferentialCombine combine;
  combine.norm = d.norm;
  if (d.variant == DifferentialVariant::v2) return combine;
  const auto view = [](const std::vector<float>& v) {
    return ConstTensorView(v.data(), DType::f32, {static_cast<std::int64_t>(v.size())});
  };
  combine.lambda = differential_lambda({view(d.lambda_q1), view(d.lambda_k1), view(d.lambda_q2),
                                        view(d.lambda_k2), d.lambda_init, d.lambda_rounding});
  if (!d.norm_weight.empty()) combine.norm_weight = view(d.norm_weight);
  combine.norm_eps = d.norm_eps;
  combine.out_scale = static_cast<float>(1.0 - d.lambda_init);
  return combine;
}

}  // namespace attend::differential
