// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/mla.h"

#include <algorithm>
#include <cmath>

#include "oracle/mla_product.h"
#include "oracle/row.h"

// Derivation of the bounds: docs/numerics.md, section "MLA layers". Symbols as there.
namespace attend::oracle {
namespace {

std::size_t index(std::int64_t i) noexcept { return static_cast<std::size_t>(i); }

std::vector<double> query(const MlaRowProblem& p) {
  std::vector<double> q(index(p.dims.qk_head_dim()));
  for (std::size_t d = 0; d < q.size(); ++d) q[d] = p.q(static_cast<int>(d));
  return q;
}

/// Latents and rotated keys, one key in memory at a time: attention asks for all elements of a key
/// before it goes on to the next.
class CachedRow {
 public:
  explicit CachedRow(const MlaRowProblem& p)
      : p_(p), values_(index(p.dims.cache_dim())), latent_(index(p.dims.kv_lora_rank)) {}

  /// True if the row was not the current one.
  bool load(std::int64_t j) {
    if (j == key_) return false;
    key_ = j;
    for (int l = 0; l < p_.dims.kv_lora_rank; ++l) values_[index(l)] = p_.latent(j, l);
    for (int d = 0; d < p_.dims.qk_rope_head_dim; ++d)
      values_[index(p_.dims.kv_lora_rank + d)] = p_.k_pe(j, d);
    std::copy_n(values_.begin(), latent_.size(), latent_.begin());
    return true;
  }
  const std::vector<double>& latent() const noexcept { return latent_; }
  double operator[](int d) const noexcept { return values_[index(d)]; }  ///< 0 <= d < L + R
  double rotated(int d) const noexcept { return values_[latent_.size() + index(d)]; }

 private:
  const MlaRowProblem& p_;
  std::int64_t key_ = -1;
  std::vector<double> values_, latent_;
};

RowProblem attention(const MlaRowProblem& p, int head_dim_qk, int head_dim_v) {
  RowProblem a;
  a.head_dim_qk = head_dim_qk;
  a.head_dim_v = head_dim_v;
  a.position = p.position;
  a.num_keys = p.num_keys;
  a.scale = p.scale;
  a.causal = p.causal;
  return a;
}

/// W_UK^T q, what attends to the latents.
Product absorb(const MlaRowProblem& p, std::vector<double> q) {
  q.resize(index(p.dims.qk_nope_head_dim));
  return multiply(Matrix(p.dims.qk_nope_head_dim, p.dims.kv_lora_rank, p.w_uk), q);
}

/// What latents are multiplied by to become keys, and values.
Matrix key_weights(const MlaRowProblem& p) {
  return {p.dims.kv_lora_rank, p.dims.qk_nope_head_dim, [&](int l, int i) { return p.w_uk(i, l); }};
}
Matrix value_weights(const MlaRowProblem& p) {
  return {p.dims.kv_lora_rank, p.dims.v_head_dim, [&](int l, int v) { return p.w_uv(v, l); }};
}

/// What every key's logit may be off by because of numbers that were rounded to a neighbour: sums
/// |scale| |factor| |x|, in ascending order of the keys.
class LogitErrors {
 public:
  LogitErrors(double scale, std::vector<double> factors)
      : scale_(std::abs(scale)), factors_(std::move(factors)) {}
  void add(std::int64_t j, const std::vector<double>& x) {
    double sum = 0.0;
    for (std::size_t i = 0; i < factors_.size(); ++i)
      if (factors_[i] != 0.0 && x[i] != 0.0) sum += std::abs(factors_[i] * x[i]);
    errors_.resize(index(j) + 1);
    errors_.back() = scale_ * sum;
  }
  double operator[](std::int64_t j) const { return errors_[index(j)]; }

 private:
  double scale_;
  std::vector<double> factors_, errors_;
};

/// Error of a sum of weight times value from the weights alone, which is that of a weighted sum of
/// any linear function of the values.
double shared_error(const MlaRowProblem& p, const RowResult& r, int d) {
  const double abs_out = r.abs_out[index(d)];
  const double split = r.split_weights ? kSplitError * abs_out : 0.0;
  return kSafety *
         (weight_error(r, p.dims.cache_dim()) * (abs_out + std::abs(r.out[index(d)])) + split);
}

/// What is left of the error of latent l of the attention's output: sums and rounding.
double own_latent_error(const MlaRowProblem& p, const RowResult& r, int l) {
  const double computed = computed_error(r, l, p.dims.cache_dim());
  return computed - shared_error(p, r, l) +
         rounding_error(p.dtype, std::abs(r.out[index(l)]) + computed);
}

MlaRowResult empty_row(const MlaRowProblem& p, double lse) {
  const std::vector<double> zeros(index(p.dims.v_head_dim), 0.0);
  return {.out = zeros, .out_bound = zeros, .lse = lse, .lse_bound = 0.0};
}

}  // namespace

MlaExactRow mla_compute_friendly_row(const MlaRowProblem& p) {
  const MlaDims& n = p.dims;
  const std::vector<double> q = query(p);
  const Matrix w_k = key_weights(p), w_v = value_weights(p);
  CachedRow keys(p), latents(p);
  std::vector<double> k_nope, value;
  const auto k = [&](std::int64_t j, int d) {
    if (keys.load(j)) k_nope = multiply(w_k, keys.latent()).values;
    return d < n.qk_nope_head_dim ? k_nope[index(d)] : keys.rotated(d - n.qk_nope_head_dim);
  };
  const auto v = [&](std::int64_t j, int d) {
    if (latents.load(j)) value = multiply(w_v, latents.latent()).values;
    return value[index(d)];
  };
  const RowResult r =
      row(attention(p, n.qk_head_dim(), n.v_head_dim), [&](int d) { return q[index(d)]; }, k, v);
  return {r.out, r.lse};
}

MlaExactRow mla_absorbed_row(const MlaRowProblem& p) {
  const MlaDims& n = p.dims;
  const std::vector<double> plain = query(p);
  std::vector<double> q = absorb(p, plain).values;
  q.insert(q.end(), plain.begin() + n.qk_nope_head_dim, plain.end());
  CachedRow cached(p);
  const auto element = [&](std::int64_t j, int d) {
    cached.load(j);
    return cached[d];
  };
  const RowResult r = row(
      attention(p, n.cache_dim(), n.kv_lora_rank), [&](int d) { return q[index(d)]; }, element,
      element);
  return {multiply(value_weights(p), r.out).values, r.lse};
}

// Errors that differ from key to key stand beside the values, as columns that are weighed like
// them.

MlaRowResult mla_prefill_row(const MlaRowProblem& p) {
  const MlaDims& n = p.dims;
  const int v_dim = n.v_head_dim;
  const std::vector<double> q = query(p);
  const Matrix w_k = key_weights(p), w_v = value_weights(p);
  CachedRow keys(p), latents(p);
  Rounded k_nope, value;
  LogitErrors logit_errors(p.scale, {q.begin(), q.begin() + n.qk_nope_head_dim});
  const auto k = [&](std::int64_t j, int d) {
    if (keys.load(j)) {
      k_nope = round_product(multiply(w_k, keys.latent()), p.dtype);
      logit_errors.add(j, k_nope.doubts);
    }
    return d < n.qk_nope_head_dim ? k_nope.values[index(d)] : keys.rotated(d - n.qk_nope_head_dim);
  };
  const auto v = [&](std::int64_t j, int d) {
    if (latents.load(j)) value = round_product(multiply(w_v, latents.latent()), p.dtype);
    if (d == 2 * v_dim) return logit_errors[j];
    if (d < v_dim) return value.values[index(d)];
    return value.doubts[index(d - v_dim)] +
           logit_errors[j] * std::abs(value.values[index(d - v_dim)]);
  };
  RowProblem a = attention(p, n.qk_head_dim(), 2 * v_dim + 1);
  a.split_weights = splits_weights(p.dtype);
  const RowResult r = row(a, [&](int d) { return q[index(d)]; }, k, v);
  if (r.visible_keys == 0) return empty_row(p, r.lse);

  const double logit_error = r.out[index(2 * v_dim)];
  MlaRowResult result;
  result.lse = r.lse;
  result.lse_bound = lse_error_bound(r, n.qk_head_dim()) + kSafety * logit_error;
  for (int d = 0; d < v_dim; ++d) {
    const double out = std::abs(r.out[index(d)]);
    const double computed = computed_error(r, d, n.qk_head_dim()) +
                            kSafety * (r.out[index(v_dim + d)] + logit_error * out);
    result.out.push_back(r.out[index(d)]);
    result.out_bound.push_back(computed + rounding_error(p.dtype, out + computed));
  }
  return result;
}

MlaRowResult mla_decode_row(const MlaRowProblem& p) {
  const MlaDims& n = p.dims;
  const int rank = n.kv_lora_rank, v_dim = n.v_head_dim;
  const std::vector<double> plain = query(p);
  Rounded absorbed = round_product(absorb(p, plain), p.dtype);
  std::vector<double> q = std::move(absorbed.values);
  q.insert(q.end(), plain.begin() + n.qk_nope_head_dim, plain.end());
  const Matrix w = value_weights(p);
  CachedRow keys(p), latents(p);
  std::vector<double> value;
  LogitErrors logit_errors(p.scale, std::move(absorbed.doubts));
  const auto k = [&](std::int64_t j, int d) {
    if (keys.load(j)) logit_errors.add(j, keys.latent());
    return keys[d];
  };
  // Behind the latents the head's own values: an error of a key's weight moves all its latents
  // alike, and so the value that they make.
  const auto v = [&](std::int64_t j, int d) {
    if (latents.load(j)) value = multiply(w, latents.latent()).values;
    if (d < rank) return latents[d];
    if (d < rank + v_dim) return value[index(d - rank)];
    return logit_errors[j] *
           (d == rank + 2 * v_dim ? 1.0 : std::abs(value[index(d - rank - v_dim)]));
  };
  RowProblem a = attention(p, n.cache_dim(), rank + 2 * v_dim + 1);
  a.split_weights = splits_weights(p.cache_dtype);
  const RowResult r = row(a, [&](int d) { return q[index(d)]; }, k, v);
  if (r.visible_keys == 0) return empty_row(p, r.lse);

  const double logit_error = r.out[index(rank + 2 * v_dim)];
  std::vector<double> latent_errors;
  for (int l = 0; l < rank; ++l) latent_errors.push_back(own_latent_error(p, r, l));
  const Product out = multiply(w, {r.out.begin(), r.out.begin() + rank});
  MlaRowResult result;
  result.lse = r.lse;
  result.lse_bound = lse_error_bound(r, n.cache_dim()) + kSafety * logit_error;
  for (int d = 0; d < v_dim; ++d) {
    const double x = std::abs(out.values[index(d)]);
    double computed = shared_error(p, r, rank + d) + product_error(out, d) +
                      kSafety * (r.out[index(rank + v_dim + d)] + logit_error * x);
    for (int l = 0; l < rank; ++l) computed += std::abs(w.at(l, d)) * latent_errors[index(l)];
    result.out.push_back(out.values[index(d)]);
    result.out_bound.push_back(computed + rounding_error(p.dtype, x + computed));
  }
  return result;
}

}  // namespace attend::oracle
