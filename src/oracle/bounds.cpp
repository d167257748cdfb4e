// SPDX-License-Identifier: Apache-2.0
#include "oracle/bounds.h"

#include <algorithm>
#include <cmath>

#include "attend/oracle/attention.h"
#include "attend/plan/attention_plan.h"
#include "oracle/element.h"

// Derivation: docs/numerics.md, section "Error bounds". Symbols as there.
namespace attend::oracle {
namespace {

double num_pieces(const RowResult& r) {
  return static_cast<double>(r.visible_keys / kPieceSize + 2);
}

/// Absolute error of a logit, in natural units.
double logit_error(const RowResult& r, int head_dim_qk) {
  double error = (head_dim_qk + 10) * kUnit * r.logit_magnitude + 4 * kUnit * r.bias_magnitude;
  if (r.softcap > 0.0) error += r.softcap * (kTanhError + 4 * kUnit);
  return error;
}

}  // namespace

double sum_error(const RowResult& r) {
  const auto terms = static_cast<double>(std::min<std::int64_t>(r.visible_keys, kPieceSize));
  return (terms + 1 + 2 * num_pieces(r)) * kUnit;
}

double weight_error(const RowResult& r, int head_dim_qk) {
  const double largest_logit =
      (r.softcap > 0.0 ? std::min(r.softcap, r.logit_magnitude) : r.logit_magnitude) +
      r.bias_magnitude + r.sink_magnitude;
  const double pieces = num_pieces(r);
  const double sink_error = r.has_sink ? 2 * kExp2Error + 3 * kUnit : 0.0;
  return logit_error(r, head_dim_qk) + 4 * kUnit * largest_logit + (1 + pieces) * kExp2Error +
         sink_error;
}

double rounding_error(DType dtype, double magnitude) {
  const FloatFormat f = format_of(dtype);
  const double half_ulp_of_one = std::ldexp(1.0, -f.precision);
  const double half_of_smallest = std::ldexp(1.0, f.min_exponent - f.precision);
  return std::max(half_ulp_of_one * magnitude, half_of_smallest);
}

bool splits_weights(DType values) noexcept { return size_of(values) == 1 || values == DType::bf16; }

double computed_error(const RowResult& r, int d, int head_dim_qk) {
  const double out = std::abs(r.out[static_cast<std::size_t>(d)]);
  const double abs_out = r.abs_out[static_cast<std::size_t>(d)];
  const double relative = weight_error(r, head_dim_qk) + sum_error(r);
  const double flushed = kSmallestWeight * static_cast<double>(r.visible_keys) * r.largest_value;
  const double split = r.split_weights ? kSplitError * abs_out + kSmallestWeight : 0.0;
  double computed = kSafety * (relative * (abs_out + out) + split + 3 * kUnit * out + flushed);
  if (!r.doubtful_abs_out.empty()) {
    computed += r.doubtful_abs_out[static_cast<std::size_t>(d)] + r.doubtful_weight * out;
  }
  return computed;
}

double out_error_bound(const RowResult& r, int d, int head_dim_qk, DType out_dtype) {
  if (r.visible_keys == 0) return 0.0;
  const double computed = computed_error(r, d, head_dim_qk);
  const double out = std::abs(r.out[static_cast<std::size_t>(d)]);
  return computed + rounding_error(out_dtype, out + computed);
}

double lse_error_bound(const RowResult& r, int head_dim_qk) {
  if (r.visible_keys == 0) return 0.0;
  const double largest_logit = r.logit_magnitude + r.bias_magnitude + r.sink_magnitude;
  const double logarithm = 4 * kUnit * (std::abs(r.lse) + largest_logit) + kExp2Error;
  return kSafety * (weight_error(r, head_dim_qk) + sum_error(r) + logarithm);
}

}  // namespace attend::oracle
