// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>

#include "attend/oracle/attention.h"
#include "oracle/bounds.h"
#include "oracle/element.h"

namespace attend::oracle {
namespace {

constexpr double kEmpty = -std::numeric_limits<double>::infinity();

struct Weights {
  double prefix = 0.0, suffix = 0.0;
  double lse = kEmpty;
  double relative_error = 0.0;  ///< of each weight, in float32
  double lse_error = 0.0;
};

/// Both infinities and NaN mean that nothing was visible.
double sanitised(double lse) { return std::isfinite(lse) ? lse : kEmpty; }

Weights merge_weights(double prefix_lse, double suffix_lse) {
  Weights w;
  const double largest = std::max(prefix_lse, suffix_lse);
  if (largest == kEmpty) return w;
  const double a = std::exp(prefix_lse - largest);
  const double b = std::exp(suffix_lse - largest);
  w.prefix = a / (a + b);
  w.suffix = b / (a + b);
  w.lse = largest + std::log(a + b);
  // The exponent e^(p - m) loses 3 units times |p - m|, and x e^-x < 1 bounds its effect.
  w.relative_error = 2 * (2 * kExp2Error + 8 * kUnit);
  w.lse_error = 2 * (kExp2Error + 4 * kUnit * (1.0 + std::abs(w.lse)));
  return w;
}

}  // namespace

Result merge_attn_states(const MergeAttnStatesArgs& a) {
  const std::int64_t tokens = a.out.shape[0], heads = a.out.shape[1], dim = a.out.shape[2];
  const std::int64_t with_prefix =
      a.prefill_tokens_with_context < 0 ? tokens : a.prefill_tokens_with_context;
  Result result;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const double suffix_lse = at(a.suffix_lse, {t, h});
      Weights w;
      if (t < with_prefix) {
        w = merge_weights(sanitised(at(a.prefix_lse, {t, h})), sanitised(suffix_lse));
      } else if (std::isfinite(suffix_lse)) {
        w.suffix = 1.0;
        w.lse = suffix_lse;
      }
      result.lse.push_back(w.lse);
      result.lse_bound.push_back(w.lse_error);
      for (std::int64_t d = 0; d < dim; ++d) {
        const double p = w.prefix > 0.0 ? w.prefix * at(a.prefix_out, {t, h, d}) : 0.0;
        const double s = w.suffix > 0.0 ? w.suffix * at(a.suffix_out, {t, h, d}) : 0.0;
        const double computed = w.relative_error * (std::abs(p) + std::abs(s));
        const double rounding =
            computed > 0.0 ? rounding_error(a.out.dtype, std::abs(p + s) + computed) : 0.0;
        result.out.push_back(p + s);
        result.out_bound.push_back(computed + rounding);
      }
    }
  }
  return result;
}

}  // namespace attend::oracle
