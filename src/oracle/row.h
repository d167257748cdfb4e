// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "attend/oracle/attention.h"
#include "oracle/bounds.h"

namespace attend::oracle {

/// First and one past the last key that the query sees; begin >= end if none.
struct KeyRange {
  std::int64_t begin, end;
};
inline KeyRange visible_range(const RowProblem& p) noexcept {
  KeyRange r{0, p.num_keys};
  if (p.window_left >= 0) r.begin = std::max<std::int64_t>(0, p.position - p.window_left);
  if (p.causal) {
    r.end = std::min(r.end, p.position + 1);
  } else if (p.window_right >= 0) {
    r.end = std::min(r.end, p.position + p.window_right + 1);
  }
  return r;
}

/// What the ALiBi slope multiplies for key j.
inline double distance(const RowProblem& p, std::int64_t j) {
  if (!p.alibi_sqrt) return static_cast<double>(std::abs(p.position - j));
  return std::sqrt(static_cast<double>(std::max<std::int64_t>(p.position - j, 0)));
}

/// Rounds the weights exp(logit - largest) to n / weight_levels of the largest of their piece.
/// `relative_error`: of a float32 weight; where it decides how a weight is rounded, the weight's
/// entry of `doubtful` becomes the step between its two neighbours, else 0.
void round_weights(const RowProblem& p, std::int64_t first_key, double relative_error,
                   std::vector<double>& weights, std::vector<double>& doubtful);

/// The definition, as written down: logits, softmax, weighted sum. `q(d)`, `k(j, d)`, `v(j, d)`
/// take the place of the functions in `p`.
template <typename Q, typename K, typename V>
RowResult row(const RowProblem& p, const Q& q, const K& k, const V& v) {
  const auto dv = static_cast<std::size_t>(p.head_dim_v);
  RowResult r;
  r.out.assign(dv, 0.0);
  r.abs_out.assign(dv, 0.0);
  r.lse = -std::numeric_limits<double>::infinity();
  r.softcap = p.softcap;
  r.split_weights = p.split_weights;
  const bool has_sink = p.sink.has_value() && std::isfinite(*p.sink);
  r.has_sink = has_sink;
  if (has_sink) r.sink_magnitude = std::abs(*p.sink);
  const KeyRange keys = visible_range(p);
  if (keys.begin >= keys.end) {
    if (has_sink && p.lse_includes_sink) r.lse = *p.sink;
    return r;
  }
  r.visible_keys = keys.end - keys.begin;

  std::vector<double> query(static_cast<std::size_t>(p.head_dim_qk));
  for (int d = 0; d < p.head_dim_qk; ++d) query[static_cast<std::size_t>(d)] = q(d);
  std::vector<double> weights;
  weights.reserve(static_cast<std::size_t>(r.visible_keys));
  double largest = -std::numeric_limits<double>::infinity();
  for (std::int64_t j = keys.begin; j < keys.end; ++j) {
    double dot = 0.0, abs_dot = 0.0;
    for (int d = 0; d < p.head_dim_qk; ++d) {
      const double product = query[static_cast<std::size_t>(d)] * k(j, d);
      dot += product;
      abs_dot += std::abs(product);
    }
    double logit = dot * p.scale;
    if (p.softcap > 0.0) logit = p.softcap * std::tanh(logit / p.softcap);
    const double bias = -p.alibi_slope * distance(p, j);
    logit += bias;
    weights.push_back(logit);
    largest = std::max(largest, logit);
    r.logit_magnitude = std::max(r.logit_magnitude, std::abs(p.scale) * abs_dot);
    r.bias_magnitude = std::max(r.bias_magnitude, std::abs(bias));
  }
  r.logit_magnitude += p.extra_logit_magnitude;
  double sum = 0.0;
  for (double& w : weights) sum += w = std::exp(w - largest);
  r.lse = largest + std::log(sum);
  std::vector<double> doubtful;
  if (p.weight_levels > 0) {
    round_weights(p, keys.begin, weight_error(r, p.head_dim_qk), weights, doubtful);
    sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    r.doubtful_abs_out.assign(dv, 0.0);
  }
  if (has_sink) {
    const double top = std::max(r.lse, *p.sink);
    const double with_sink = top + std::log(std::exp(r.lse - top) + std::exp(*p.sink - top));
    sum += std::exp(*p.sink - largest);
    if (p.lse_includes_sink) r.lse = with_sink;
  }
  for (std::int64_t j = keys.begin; j < keys.end; ++j) {
    const double weight = weights[static_cast<std::size_t>(j - keys.begin)] / sum;
    for (std::size_t d = 0; d < dv; ++d) {
      const double value = v(j, static_cast<int>(d));
      const double term = weight * value;
      r.largest_value = std::max(r.largest_value, std::abs(value));
      r.out[d] += term;
      r.abs_out[d] += std::abs(term);
    }
    if (doubtful.empty()) continue;
    const double step = doubtful[static_cast<std::size_t>(j - keys.begin)] / sum;
    r.doubtful_weight += step;
    for (std::size_t d = 0; d < dv; ++d)
      r.doubtful_abs_out[d] += step * std::abs(v(j, static_cast<int>(d)));
  }
  return r;
}

}  // namespace attend::oracle
